"""Where a ticket is: a file, a folder, or a repository of the Hub."""

from pathlib import Path

from ..core.errors import TicketError, shown

# timm's prefixes for where a model comes from.
HUB, LOCAL = "hf-hub:", "local-dir:"

FILE = "model.ticket"


def ticket_at(address: str | Path) -> Path:
    """The ticket file of an address, found to be there.

    Raises:
        FileNotFoundError: It is not; or a folder is.
        TicketError: It cannot be had from the Hub.
    """
    path = fetch(address)
    if path.is_dir():
        inside = sorted(one.name for one in path.glob("*.ticket"))
        told = f"name the one in it: {path / inside[0]}" if inside else "there is no *.ticket in it; name a file"
        raise FileNotFoundError(f"{path} is a folder and no ticket; {told}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no ticket at {path}")
    return path


def fetch(address: str | Path) -> Path:
    """The ticket file of ``hf-hub:user/name``, ``hf-hub:user/name@revision`` or ``local-dir:path``; a path as it is.

    Raises:
        TicketError: It cannot be had from the Hub; the message says why.
    """
    address = str(address)
    if address.startswith(LOCAL):
        return Path(address.removeprefix(LOCAL)) / FILE
    if not address.startswith(HUB):
        return Path(address)
    from huggingface_hub import hf_hub_download

    name, _, revision = address.removeprefix(HUB).partition("@")
    try:
        return Path(hf_hub_download(name, FILE, revision=revision or None))
    except Exception as error:  # the hub's own errors and those of whatever carries its requests
        raise TicketError(f"{address}: {FILE} cannot be had from the Hub: {shown(str(error), 500)}") from None
