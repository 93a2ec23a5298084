"""Sharing tickets: on the Hugging Face Hub, or in a local folder that looks the same."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .masks import layer_sparsities
from .settings import SettingError
from .ticket import Ticket, TicketError, load_ticket

# timm's prefixes for where a model comes from.
HUB, LOCAL = "hf-hub:", "local-dir:"
FILE, CARD, PLOT = "model.ticket", "README.md", "accuracy.png"


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
    """
    ticket = load_ticket(file)
    if plot is not None and not Path(plot).is_file():
        raise SettingError(f"plot: there is no file {plot}; leave it out, or give a search's accuracy.png")
    if to.startswith(LOCAL):
        folder = Path(to.removeprefix(LOCAL))
        folder.mkdir(parents=True, exist_ok=True)
        _fill(folder, ticket, Path(file), plot, to)
        return str(folder)
    if not to.startswith(HUB):
        raise SettingError(f"to: {to!r} is not valid; write {HUB}user/name, or {LOCAL}path for a folder")
    from huggingface_hub import HfApi

    name = to.removeprefix(HUB)
    with tempfile.TemporaryDirectory() as folder:
        _fill(Path(folder), ticket, Path(file), plot, to)
        api = HfApi()
        api.create_repo(name, exist_ok=True, private=private)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add the ticket")
    return f"https://huggingface.co/{name}"


def fetch(address: str) -> Path:
    """The ticket file of ``hf-hub:user/name``, ``hf-hub:user/name@revision`` or ``local-dir:path``.

    Raises:
        TicketError: It cannot be had from there; the message says why.
    """
    if address.startswith(LOCAL):
        return Path(address.removeprefix(LOCAL)) / FILE
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = address.removeprefix(HUB).partition("@")
    try:
        return Path(hf_hub_download(name, FILE, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise TicketError(f"{address}: {FILE} cannot be had from the Hub: {error}") from error


def card(ticket: Ticket, address: str, plot: bool = False) -> str:
    """The model card of a ticket, as Markdown with the Hub's header."""
    facts = ticket.metadata
    model: Any = facts.get("model") or {}
    pruner: Any = facts.get("pruner") or {}
    recipe: Any = facts.get("recipe") or {}
    metrics: Any = facts.get("metrics") or {}
    architecture, method = model.get("architecture") or "a timm model", pruner.get("name") or "an unnamed method"
    kwargs = "".join(f", {key}={value!r}" for key, value in (model.get("kwargs") or {}).items())
    dense: Any = facts.get("dense") or {}
    told = {key: value for key, value in metrics.items() if isinstance(value, int | float | str)}
    scores = "\n".join(f"| {key} | {value} | {dense.get(key, '')} |" for key, value in told.items())
    layers = "\n".join(
        f"| {name} | {'x'.join(map(str, ticket.masks[name].shape))} | {sparsity:.4f} |"
        for name, sparsity in layer_sparsities(ticket.masks).items()
    )
    header = "---\nlibrary_name: timm-tickets\ntags:\n- image-classification\n- timm\n- sparse\n- lottery-ticket\n---\n"
    return f"""{header}
# A lottery ticket for {architecture}

{ticket.sparsity:.2%} of its prunable weights are zero. Found by `{method}` on {recipe.get("dataset", "data not said")}.

```python
import timm, timm_tickets
model = timm.create_model({architecture!r}{kwargs})
timm_tickets.load_ticket({address!r}).apply_(model)
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

Pruner settings: `{json.dumps(pruner)}`
"""


def _fill(folder: Path, ticket: Ticket, file: Path, plot: str | Path | None, address: str) -> None:
    if file.resolve() != (folder / FILE).resolve():
        shutil.copyfile(file, folder / FILE)
    if plot is not None and Path(plot).resolve() != (folder / PLOT).resolve():
        shutil.copyfile(plot, folder / PLOT)
    (folder / CARD).write_text(card(ticket, address, plot is not None))
