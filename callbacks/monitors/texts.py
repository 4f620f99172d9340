"""The base of monitors of texts that are written from a condition, token by token."""

from callbacks.monitors.rows import RowMonitor
from models.functional.errors import require_at_least
from models.interfaces.probes import TextProbe


class TextMonitor(RowMonitor):
    """rows: held-out texts that are measured; width: positions that are taken together."""

    offers = TextProbe

    def __init__(self, rows: int = 256, width: int = 64) -> None:
        super().__init__(rows)
        require_at_least(1, width=width)
        self.width = width
