"""Monitor 2: how far the best plan is ahead of the next. Near 0 for long: nothing is told apart; huge early: one is."""

from torch import Tensor

from callbacks.monitors.search import SearchMonitor
from models.interfaces.probe_batch import EStep


class MarginMonitor(SearchMonitor):
    """margin: S(z1) - S(z2), nats a text, over searches of at least two candidates."""

    names = ("margin",)

    def values(self, found: EStep) -> Tensor:
        return found.margins
