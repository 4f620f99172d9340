"""Anomaly -> evidence -> action: each rule reads the looks taken so far and returns what is wrong, or None.

A look is {"progress": share of the training that is done, figure: value}, with the figures that were measured since the look
before. A rule whose figures nobody measures stays silent. Thresholds are in nats a token (ΔNLL), nats a text (margin,
staleness), or shares.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

Look = dict[str, float]
Evidence = Callable[[list[Look]], str | None]

UNUSED = 0.02  # of the text's own nats: a plan that saves less is not used
LEAST_GAIN = 0.01  # nats a token, where the text costs next to nothing


@dataclass(frozen=True)
class Rule:
    name: str
    evidence: Evidence
    action: str


def figures(looks: list[Look], name: str, last: int) -> list[float] | None:
    """The last values of a figure, each from another look; None where there are fewer."""
    known = [look[name] for look in looks if name in look]
    return known[-last:] if len(known) >= last else None


def _unused(looks: list[Look]) -> str | None:
    gains, own = figures(looks, "dnll_shuffle", 2), figures(looks, "nll_own_condition", 1)
    if looks[-1]["progress"] < 0.25 or gains is None or own is None or max(gains) > max(LEAST_GAIN, UNUSED * own[0]):
        return None
    return f"NLL rises by {gains[-1]:+.4f} nats a token under another text's plan, from {own[0]:.3f}"


def _undecided_search(looks: list[Look]) -> str | None:
    margins, flips = figures(looks, "margin", 2), figures(looks, "plan_flips", 2)
    if margins is None or flips is None or max(margins) > 0.1 or min(flips) < 0.3:
        return None
    return f"the best plan's score is {margins[-1]:.3f} nats above the next, and {flips[-1]:.0%} of plans changed"


def _collapsed(looks: list[Look]) -> str | None:
    share = figures(looks, "posterior_entropy_share", 1)
    changes = ("plan_flips", "flip_rate", "posterior_change")  # the first that is measured
    flips = next((known for name in changes if (known := figures(looks, name, 1)) is not None), None)
    if looks[-1]["progress"] > 0.3 or share is None or flips is None or flips[0] > 0.02 or share[0] > 0.1:
        return None
    after = f"after {_percent(looks)} of the training"
    return f"{flips[0]:.1%} of plans changed, and entropy is {share[0]:.1%} of its maximum {after}"


def _stale(looks: list[Look]) -> str | None:
    gaps = figures(looks, "staleness", 3)
    if gaps is None or min(gaps) < 1.0:
        return None
    found = f"{min(gaps):.2f} to {max(gaps):.2f} nats a text"
    return f"new plans scored {found} above the stored ones at the last three looks with a search"


def _soft(looks: list[Look]) -> str | None:
    cosines = figures(looks, "relaxation_cosine", 2)
    if looks[-1]["progress"] < 0.25 or cosines is None or max(cosines) > 0.5:
        return None
    return f"cos(e_soft, e_hard) is {cosines[-1]:.2f}"


def _vague(looks: list[Look]) -> str | None:
    shares = figures(looks, "posterior_entropy_share", 2)
    if looks[-1]["progress"] < 0.5 or shares is None or min(shares) < 0.9:
        return None
    return f"the planner's entropy is {shares[-1]:.0%} of its maximum after {_percent(looks)} of the training"


def _no_gradient(looks: list[Look]) -> str | None:
    norms = figures(looks, "planner_gradient", 2)
    if norms is None or not max(norms) < 1e-6:
        return None
    return f"the planner's gradient is {norms[-1]:.1e}"


def _exploding(looks: list[Look]) -> str | None:
    largest, norms = figures(looks, "planner_gradient_max", 1), figures(looks, "planner_gradient", 1)
    if largest is None or norms is None:
        return None
    usual = median(look["planner_gradient"] for look in looks if "planner_gradient" in look)
    if math.isfinite(largest[0]) and largest[0] <= 100 * max(usual, 1e-3):
        return None
    return f"the planner's gradient rose to {largest[0]:.1e}, usually {usual:.1e}"


def _first_words_only(looks: list[Look]) -> str | None:
    positions = sorted((name for name in looks[-1] if name.startswith("nll_at_")), key=lambda name: int(name[7:]))
    known = [look for look in looks if all(name in look for name in positions)]
    if looks[-1]["progress"] < 0.25 or len(positions) < 2 or len(known) < 3:
        return None
    fell = [1 - known[-1][name] / known[0][name] if known[0][name] > 0.05 else 0.0 for name in positions]
    if fell[0] < 0.2 or max(fell[1:]) > 0.02:
        return None
    return f"NLL fell by {fell[0]:.0%} at the first positions and by at most {max(0.0, max(fell[1:])):.0%} later"


def _percent(looks: list[Look]) -> str:
    return f"{looks[-1]['progress']:.0%}"


RULES = (
    Rule(
        "plans are not used", _unused,
        "hide more of the executor's own tokens (module.corruption), allow more concepts (module.types), "
        "or train with a lower module.lr",
    ),
    Rule(
        "the search is undecided", _undecided_search,
        "search more or more diverse candidates, refresh plans more often, or train with a lower module.lr",
    ),
    Rule(
        "plans collapsed early", _collapsed,
        "raise module.temperatures or module.weights.usage, or search sampled or diverse candidates instead of the most "
        "probable ones",
    ),
    Rule(
        "stored plans are stale", _stale,
        "refresh plans more often, or train with a lower module.lr",
    ),
    Rule(
        "the relaxation is far from the choice", _soft,
        "lower the second of module.temperatures, or anneal faster (module.anneal_share)",
    ),
    Rule(
        "the planner stays unsure", _vague,
        "raise module.weights.text, lower module.weights.usage, or lower module.temperatures",
    ),
    Rule(
        "the planner gets no gradient", _no_gradient,
        "check that module.weights.text (in a search, module.weights.posterior) is above 0, or raise module.temperatures",
    ),
    Rule(
        "the planner's gradient explodes", _exploding,
        "lower module.lr, clip harder (trainer.gradient_clip_val), or raise the second of module.temperatures",
    ),
    Rule(
        "only the first positions use the plan", _first_words_only,
        "hide more of the executor's own tokens for longer (module.corruption, module.anneal_share), allow more concepts",
    ),
)  # fmt: skip
