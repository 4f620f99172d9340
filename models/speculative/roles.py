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


def roles(options: DraftOptions) -> Roles:
    draft, cost = options.draft, options.cost
    if draft == "assistant":
        return Roles("assistant", ("theta", "target"), cost, "assistant")
    formula = "alternate" if draft == "alternate" else "carry"
    if draft == "theta" or (draft == "alternate" and cost <= 1):
        return Roles("theta", ("target",), cost, formula)
    return Roles("target", ("theta",), 1 / cost, formula)
