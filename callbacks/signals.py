"""Signals that end a process. Imports nothing that takes time."""

import os
import signal
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

# Slurm announces the end of a job's time by SIGUSR1, submitit by SIGUSR2, Grid Engine and a limit of processor time by
# SIGXCPU; SIGHUP is a terminal that is closed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)


class EndedBySignal(SystemExit):
    """Ends the process with 128 + the signal's number, as shells report it."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """The handler of `SIGNALS` from now on; nothing in a thread other than the main one.

    SIGHUP that is ignored stays so: nohup lets a run go on without its terminal.
    """

    def handle(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            _leave_terminal()
        handler(signum, frame)

    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, handle)


def _leave_terminal() -> None:
    """Send what is printed from now on nowhere, unless it goes to a file or pipe.

    A write to a closed terminal raises an error, which would be raised instead of `EndedBySignal`.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with suppress(OSError):  # it may be closed
            # not isatty, which is False once the terminal is closed
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)
