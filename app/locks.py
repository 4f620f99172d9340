"""Locks that keep runs on one machine out of each other's folders.

The locks are the operating system's: they end with the process that holds them, however that ends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from app.ranks import leads
from models.functional.errors import UsageError


@contextmanager
def exclusive_run(folder: str | Path) -> Iterator[None]:
    """The folder of a run, for this run alone. Raises UsageError while another one works there."""
    if not leads():
        yield
        return
    try:
        held = _lock(Path(folder) / ".running").acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another run is writing to {folder}; wait for it, or type hydra.run.dir=<another folder>"
        ) from None
    with held:
        yield


@contextmanager
def build_once(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """What makes `path` is done by one run at a time; on_wait is called before waiting for another one.

    The lock lies in the folder `locks` beside the one that holds `path`.
    """
    if not leads():
        yield
        return
    lock = _lock(path.parent.with_name("locks") / f"{path.name}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        held = lock.acquire()
    with held:
        yield


def _lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)
