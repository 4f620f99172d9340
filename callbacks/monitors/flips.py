"""Monitor 3: how many plans a search changes. Healthy: many at first, then fewer. None early on: too few candidates."""

from torch import Tensor

from callbacks.monitors.search import SearchMonitor
from models.interfaces.probe_batch import EStep


class FlipMonitor(SearchMonitor):
    """plan_flips: share of searched texts whose best plan is another than the stored one."""

    names = ("plan_flips",)

    def values(self, found: EStep) -> Tensor:
        return found.flips
