"""SIGTERM, as clusters send it before they kill: the work stops at its next step, where a checkpoint is written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What a shell reports of a process that SIGTERM has ended: 128 + 15.
STOPPED = 143

_asked = False


class Stopped(SystemExit):
    """Stopped by SIGTERM, everything saved. Not caught, it ends the process with code 143."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


def _ask(number: int, frame: FrameType | None) -> None:
    # It may come twice, from the cluster and from torchrun passing it on; the second must not cut the saving short.
    global _asked
    _asked = True


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM ask for a stop within the block instead of ending the process at once.

    Python sets signal handlers in the main thread only; in another one this changes nothing.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _ask:
        yield
        return
    before = signal.signal(signal.SIGTERM, _ask)
    _asked = False
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_asked() -> bool:
    """Whether SIGTERM came; a trainer then saves and raises `Stopped`."""
    return _asked
