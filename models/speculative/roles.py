"""Who drafts and who checks in q* decoding, and what a draft costs."""

from typing import Any, Literal, NamedTuple

from torch import nn

Draft = Literal["theta", "target", "alternate", "assistant"]


class Roles(NamedTuple):
    """drafter, checkers: names of models. cost: seconds of a forward of the drafter over one of its checkers together.

    formula: whose expected speed-up in `qstar_speed.SPEEDUPS` it is.
    """

    drafter: str
    checkers: tuple[str, ...]
    cost: float
    formula: str


def roles(draft: Draft, cost: float) -> Roles:
    """cost: seconds of a forward of theta over one of target; of the assistant over both, where it drafts."""
    if draft == "assistant":
        return Roles("assistant", ("theta", "target"), cost, "assistant")
    formula = "alternate" if draft == "alternate" else "carry"
    if draft == "theta" or (draft == "alternate" and cost <= 1):
        return Roles("theta", ("target",), cost, formula)
    return Roles("target", ("theta",), 1 / cost, formula)


def parameter_cost(theta: nn.Module, target: nn.Module, draft: Draft, assistant: Any = None) -> float:
    """The cost that `roles` asks for, were a forward's time that of its parameters: it does not change from run to run.

    assistant: a third model, or any source of scores, which then counts as one parameter.
    """
    ours, theirs = _parameters(theta), _parameters(target)
    return max(1, _parameters(assistant)) / (ours + theirs) if draft == "assistant" else ours / theirs


def _parameters(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters()) if isinstance(model, nn.Module) else 0
