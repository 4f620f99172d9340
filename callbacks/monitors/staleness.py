"""Monitor 4: score of a new plan minus that of the stored one. Often large: plans are refreshed too seldom."""

from torch import Tensor

from callbacks.monitors.search import SearchMonitor
from models.interfaces.probe_batch import EStep


class StalenessMonitor(SearchMonitor):
    """staleness: S(z new) - S(z stored), both scored now, nats a text."""

    names = ("staleness",)

    def values(self, found: EStep) -> Tensor:
        return found.gaps
