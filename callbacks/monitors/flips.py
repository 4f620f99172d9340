"""Monitor 3: how many plans a search changes. High at first, then falling; none early on: the candidates are too few."""

from torch import Tensor

from callbacks.monitors.search import SearchMonitor
from models.interfaces.probe_batch import EStep


class FlipMonitor(SearchMonitor):
    """plan_flips: share of texts whose plan is no longer the one kept."""

    names = ("plan_flips",)

    def values(self, found: EStep) -> Tensor:
        return found.flips
