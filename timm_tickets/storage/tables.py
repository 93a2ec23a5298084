"""Tables as CSV: written whole, read where they are whole."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import DamagedError, read_bytes, write_bytes


def write_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], path: Path) -> None:
    """Write rows, each with these columns, under a line of their names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a file of these columns; none where there is no file.

    Raises:
        DamagedError: It is no such table; else as `read_bytes`.
    """
    data = read_bytes(path)
    if data is None:
        return []
    try:
        header, *rows = csv.reader(io.StringIO(data.decode()), strict=True)
        if header != list(columns) or any(len(row) != len(header) for row in rows):
            raise ValueError("other columns")
    except (ValueError, csv.Error) as error:  # a UnicodeDecodeError is a ValueError too
        raise DamagedError(f"{path} is damaged (it is no table of {', '.join(columns)})") from error
    return [dict(zip(header, row, strict=True)) for row in rows]
