"""Signals outside of training, which has `callbacks.interruption`: a sentence, and 128 + the signal's number as exit status."""

import os
import signal
from contextlib import suppress
from types import FrameType

from app.ranks import leads
from callbacks.signals import EndedBySignal, handle_signals


def end_at_once_on_signals() -> None:
    """For the time in which libraries are imported: nothing is begun yet that has to be undone.

    An exception would not do. A library may take it for its own failure, or keep it to itself.
    """
    handle_signals(_end_at_once)


def raise_on_signals() -> None:
    """For the work itself: `EndedBySignal` removes temporary files and releases locks. A second signal ends at once."""
    handle_signals(_raise)


def _end_at_once(signum: int, frame: FrameType | None) -> None:
    _say(signum)
    os._exit(128 + signum)


def _raise(signum: int, frame: FrameType | None) -> None:
    _say(signum)
    end_at_once_on_signals()
    raise EndedBySignal(signum)


def _say(signum: int) -> None:
    if leads():
        below = "\n" if os.isatty(2) else ""  # of the ^C
        name = signal.Signals(signum).name
        with suppress(OSError):  # not print: a handler may run while something else prints
            os.write(2, f"{below}interrupted by {name}; nothing was being trained, so no step is lost\n".encode())
