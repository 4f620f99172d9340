"""Which model drafts and which models verify in q* decoding."""

from typing import NamedTuple

from models.speculative.options import DraftOptions


class Roles(NamedTuple):
    """drafter, verifiers: names of models. cost: seconds of a forward pass of the drafter over one of all its verifiers.

    formula: the name of its expected speed-up in `qstar_speed.SPEEDUPS`.
    """

    drafter: str
    verifiers: tuple[str, ...]
    cost: float
    formula: str

    @property
    def in_blocks(self) -> bool:
        """Whether a draft takes one forward pass."""
        return self.drafter == "block_drafter"

    def of_one_model(self) -> "Roles":
        """The same where theta is also the target and runs once."""
        return self._replace(verifiers=("theta",))

    @property
    def third(self) -> bool:
        """Whether neither theta nor target drafts, so that all models that q* needs verify the draft."""
        return self.drafter not in ("theta", "target")


def roles(options: DraftOptions) -> Roles:
    draft, cost = options.draft, options.cost
    if draft in ("assistant", "block_drafter"):
        return Roles(draft, ("theta", "target"), cost, draft)
    formula = "alternate" if draft == "alternate" else "carry"
    if draft == "theta" or (draft == "alternate" and cost <= 1):
        return Roles("theta", ("target",), cost, formula)
    return Roles("target", ("theta",), 1 / cost, formula)
