"""Sharing tickets: on the Hugging Face Hub, or in a local folder that looks the same."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import SettingError, shown
from ..core.masks import layer_sparsities
from ..storage.files import replacing, write_bytes
from .address import FILE, HUB, LOCAL
from .ticket import Ticket, load_ticket

CARD, PLOT = "README.md", "accuracy.png"
# Arguments of timm.create_model that only shape a model: none takes a path, an address or code.
_HARMLESS = {
    *("num_classes", "in_chans", "img_size", "patch_size", "window_size", "global_pool", "output_stride"),
    *("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "init_values", "zero_init_last"),
    *("embed_dim", "embed_dims", "dims", "depth", "depths", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm"),
    *("class_token", "reg_tokens", "act_layer", "norm_layer", "width", "widths", "shortcut", "bias"),
}
_LINES = 1_000  # of a table


def push(file: str | Path, to: str, plot: str | Path | None = None, private: bool = False) -> str:
    """Publish a ticket file with a model card.

    Args:
        file: The ticket; it is read first, and copied as it is.
        to: ``hf-hub:user/name`` (a repository on the Hub, made where there is none; log in with ``hf auth login``), or
            ``local-dir:path``, a folder.
        plot: A PNG for the card, such as the search's ``accuracy.png``.
        private: Whether a repository that is made is private.

    Returns:
        The address or the folder.

    Raises:
        SettingError: Another kind of place.
        TicketError: The file is not a ticket.
        OSError: The folder cannot be written, or the Hub cannot be reached or refuses.
    """
    ticket = load_ticket(file)
    if plot is not None and not Path(plot).is_file():
        raise SettingError(f"plot: there is no file {plot}; leave it out, or give a search's accuracy.png")
    if to.startswith(LOCAL):
        folder = Path(to.removeprefix(LOCAL))
        folder.mkdir(parents=True, exist_ok=True)
        _fill(folder, ticket, Path(file), plot, to)
        return str(folder)
    name = to.removeprefix(HUB)
    if not to.startswith(HUB) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise SettingError(f"to: {to!r} is not valid; write {HUB}user/name, or {LOCAL}path for a folder")
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        _fill(Path(folder), ticket, Path(file), plot, to)
        api = HfApi()
        try:
            api.create_repo(name, exist_ok=True, private=private)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add the ticket")
        except Exception as error:  # the hub's own errors and those of whatever carries its requests
            raise OSError(
                f"{to}: the Hub did not take the ticket: {shown(str(error), 500)}; it is unchanged in {file}"
            ) from error
    return f"https://huggingface.co/{name}"


def card(ticket: Ticket, address: str, plot: bool = False) -> str:
    """The model card of a ticket, as Markdown with the Hub's header.

    What a ticket says of itself may be anything, from anyone. Into the card's code go only names and numbers for
    arguments that are known to be harmless; everything else is text, and none of it markup or a link.
    """
    facts = ticket.metadata
    model, pruner, recipe, metrics, dense = (
        _table(facts, key) for key in ("model", "pruner", "recipe", "metrics", "dense")
    )
    kwargs = {key: model[key] for key in ("num_classes", "in_chans") if isinstance(model.get(key), int)}
    kwargs |= _table(model, "kwargs")
    safe = harmless(kwargs)
    arguments = "".join(f", {key}={value!r}" for key, value in safe.items())
    scores = _rows(
        (key, value, dense.get(key, "")) for key, value in metrics.items() if isinstance(value, int | float | str)
    )
    layers = _rows(
        (name, "x".join(map(str, ticket.masks[name].shape)), f"{sparsity:.4f}")
        for name, sparsity in layer_sparsities(ticket.masks).items()
    )
    settings = [(key, value) for key, value in pruner.items() if key != "name"]
    settings += [(f"model: {key}, not in the code above", value) for key, value in kwargs.items() if key not in safe]
    architecture = model.get("architecture")
    known = isinstance(architecture, str) and re.fullmatch(r"[\w.]{1,100}", architecture, re.ASCII)
    architecture = architecture if known else ""
    header = "---\nlibrary_name: timm-tickets\ntags:\n- image-classification\n- timm\n- sparse\n- lottery-ticket\n---\n"
    method, data = (_text(facts.get(key) or "") for facts, key in ((pruner, "name"), (recipe, "dataset")))
    return f"""{header}
# A lottery ticket for {_text(architecture) or "a timm model"}

{ticket.sparsity:.2%} of its prunable weights are zero. Found by {method or "an unnamed method"}
on {data or "data without a name"}.

```python
import timm, timm_tickets
model = timm.create_model({architecture!r}{arguments})
ticket = timm_tickets.load_ticket({address!r}); ticket.apply_(model)
```

The ticket holds the masks and the weights to start from; train it with `ticket.attach(model, optimizer)`, which keeps
pruned weights at exactly zero.

| measured | ticket | dense |
|---|---|---|
{scores or "| nothing | | |"}
{"![accuracy against sparsity](accuracy.png)" if plot else ""}

| layer | shape | sparsity |
|---|---|---|
{layers}

| setting of the pruner | |
|---|---|
{_rows(settings)}
"""


def _table(facts: Any, key: str) -> dict[str, Any]:
    """A part of the metadata, where it is what it should be."""
    found = facts.get(key)
    return {str(name): value for name, value in found.items()} if isinstance(found, dict) else {}


def _rows(rows: Iterable[tuple[Any, ...]]) -> str:
    """Lines of a table, as many as anyone may want to read."""
    lines = ["| " + " | ".join(map(_text, row)) + " |" for row in rows]
    more = [f"| and {len(lines) - _LINES:,} more | | |"] if len(lines) > _LINES else []
    return "\n".join(lines[:_LINES] + more)


def _text(value: Any) -> str:
    """A word as it is; anything else as a code span, in which nothing is markup and no address becomes a link."""
    text = re.sub(r"[`|<>]", " ", shown(value, 200)).strip()
    if re.fullmatch(r"\w*|-?\d+(\.\d+)?", text, re.ASCII):
        return text.replace("_", r"\_")
    return f"`{text}`"


def harmless(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of arguments of timm.create_model that a stranger may have written, those that only shape a model."""
    return {key: value for key, value in arguments.items() if key in _HARMLESS and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """A truth value, a number, a word, or a few of them."""
    if isinstance(value, list):
        return len(value) <= 32 and not any(isinstance(one, list) for one in value) and all(map(_is_plain, value))
    if isinstance(value, str):
        return re.fullmatch(r"\w{1,40}", value, re.ASCII) is not None
    return isinstance(value, bool | int | float) and abs(value) <= 10**6


def _fill(folder: Path, ticket: Ticket, file: Path, plot: str | Path | None, address: str) -> None:
    for source, target in ((file, folder / FILE), (plot, folder / PLOT)):
        if source is not None and Path(source).resolve() != target.resolve():
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
    write_bytes(folder / CARD, card(ticket, address, plot is not None).encode())
