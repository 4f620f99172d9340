"""How far a long reading job has come, with the time left; lines where the output goes to a file."""

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Seconds of work before the first line: a job that is over by then needs none.
QUIET_SECONDS = 5.0


class ReadingProgress:
    """Counts bytes read: a bar on a terminal, elsewhere a first line after some seconds and one at every tenth.

    total: bytes to read. The time left is what remains at the mean rate so far. Use it as a context, and call it with bytes.
    """

    def __init__(self, title: str, total: float, console: Console | None = None) -> None:
        self.title, self.total, self.console = title, max(total, 1.0), console or Console()
        self.done, self._said = 0.0, -1
        columns = (BarColumn(), DownloadColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(TextColumn("{task.description}"), *columns, console=self.console, transient=True)

    def __enter__(self) -> "ReadingProgress":
        self._started = time.monotonic()
        if self.console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def __call__(self, read: float) -> None:
        self.done += read
        if self.console.is_terminal:
            self._bar.update(self._task, completed=self.done)
            return
        elapsed, tenth = time.monotonic() - self._started, int(10 * self.done / self.total)
        if elapsed > QUIET_SECONDS and tenth > self._said:
            self._said = tenth
            left = elapsed * max(0.0, self.total / self.done - 1)
            mebibytes = f"{self.done / 2**20:.0f}/{self.total / 2**20:.0f} MiB"
            gone = f"{elapsed:.0f} s gone, {left:.0f} s left"
            self.console.print(f"{self.title}: {mebibytes}, {gone}", highlight=False, soft_wrap=True)
