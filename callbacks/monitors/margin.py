"""Monitor 2: score of the best plan of a search minus the next one's. Near 0 for long: the search cannot tell them apart."""

from torch import Tensor

from callbacks.monitors.search import SearchMonitor
from models.interfaces.probe_batch import EStep


class MarginMonitor(SearchMonitor):
    """margin: S(z1) - S(z2), nats a text, over searches of at least two candidates."""

    names = ("margin",)

    def values(self, found: EStep) -> Tensor:
        return found.margins
