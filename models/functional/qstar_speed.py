r"""Expected speed-up of q* decoding over running both models for every token.

β: acceptance rate of the drafter's tokens, independent of each other. β_t: that of the verifier's own token (`alternate`).
c (`cost`): time of a forward pass of the drafter over one of its verifiers. γ (`gamma`): tokens of a draft.
w (`position_cost`): what each further position adds to a forward pass, as a fraction of it: near 0 on a GPU with a small batch,
near 1 where arithmetic takes the time. All speed-ups are ratios of times.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from models.functional.errors import require_choice


def speedup_carry(gamma: int, beta: float, cost: float, position_cost: float = 0.0) -> float:
    """(1 + c) (1 - β^{γ+1}) / (1 - β) / (γ c + 1 + γ w + β^γ c): after a draft accepted whole the drafter runs once more."""
    tokens = sum(beta**k for k in range(gamma + 1))
    return (1 + cost) * tokens / (gamma * cost + 1 + gamma * position_cost + beta**gamma * cost)


def speedup_alternate(
    gamma: int, beta: float, cost: float, position_cost: float = 0.0, beta_t: float | None = None
) -> float:
    """The verifier's token after a whole draft is a proposal that the drafter verifies. At c = γ = 1, w = 0: 2 / (2 - β).

    Rounds after a rejection and rounds with a proposal are the two states of a Markov chain with stationary weights
    w_R = 1 - β_t β^γ and w_P = β^γ.
    """
    beta_t = beta if beta_t is None else beta_t
    drafted = sum(beta**k for k in range(gamma))
    verification = 1 + gamma * position_cost
    w_rejected, w_proposal = 1 - beta_t * beta**gamma, beta**gamma
    tokens = w_rejected * drafted + w_proposal * (1 + beta_t * drafted)
    time = w_rejected * (gamma * cost + verification)
    time += w_proposal * (cost * (1 + position_cost) + beta_t * ((gamma - 1) * cost + verification))
    return (1 + cost) * tokens / time


def speedup_third_drafter(gamma: int, beta: float, cost: float, position_cost: float = 0.0) -> float:
    """(1 - β^{γ+1}) / (1 - β) / (1 + γ w + γ c): both models verify the draft of a third one; c = T_drafter / (T_θ + T_t)."""
    return sum(beta**k for k in range(gamma + 1)) / (1 + gamma * position_cost + gamma * cost)


def speedup_block_drafter(gamma: int, beta: float, cost: float, position_cost: float = 0.0) -> float:
    """(1 - β^{γ+1}) / (1 - β) / (1 + γ w + c): the same where the third model drafts all γ tokens in one forward pass."""
    return sum(beta**k for k in range(gamma + 1)) / (1 + gamma * position_cost + cost)


def speedup_by_position(acceptance_at: Sequence[float], cost: float, position_cost: float = 0.0) -> float:
    """(1 + Σ_i Π_{l≤i} β_l) / (1 + k w + c): a drafter of blocks whose k tokens are accepted with probabilities β_l.

    acceptance_at: β_1 ... β_k, each given that the tokens before it are accepted. The numerator is the expected number of
    tokens of a round (Leviathan et al., 2211.17192, with a rate of each position); its denominator is the round's time in
    forward passes of the verifiers. It is in proportion to tokens a second.
    """
    tokens = 1 + sum(accumulate(acceptance_at, mul))
    return tokens / (1 + len(acceptance_at) * position_cost + cost)


def best_block_length(acceptance_at: Sequence[float], cost: float, position_cost: float = 0.0) -> int:
    """The draft length k with the highest `speedup_by_position` of the first k rates; 0 where none is above 1."""
    lengths = range(1, len(acceptance_at) + 1)
    speedups = [1.0] + [speedup_by_position(acceptance_at[:k], cost, position_cost) for k in lengths]
    return speedups.index(max(speedups))


SPEEDUPS = {
    "carry": speedup_carry,
    "alternate": speedup_alternate,
    "assistant": speedup_third_drafter,
    "block_drafter": speedup_block_drafter,
}


def best_gamma(
    beta: float, cost: float, scheme: str = "alternate", longest: int = 16, position_cost: float = 0.0
) -> int:
    """The draft length up to `longest` with the highest expected speed-up; 0 where none is above 1.

    scheme: a name of `SPEEDUPS`.
    """
    require_choice("draft", scheme, SPEEDUPS)
    speedups = [1.0] + [SPEEDUPS[scheme](gamma, beta, cost, position_cost) for gamma in range(1, longest + 1)]
    return speedups.index(max(speedups))


def slowest_row_rounds(gamma: int, beta: float, tokens: int, batch: int) -> float:
    """Expected rounds of the slowest of `batch` rows over those of one row, until each has `tokens` tokens; at least 1.

    A round yields k + 1 tokens with probability β^k (1 - β) for k < γ, and γ + 1 tokens with probability β^γ.
    """
    yields = [beta**k * (1 - beta) for k in range(gamma)] + [beta**gamma]
    unfinished_at = [1.0] + [0.0] * (tokens - 1)  # probability of n tokens so far, n below `tokens`
    one = slowest = 0.0
    while (unfinished := sum(unfinished_at)) > 1e-12:
        one += unfinished
        slowest += 1 - (1 - min(1.0, unfinished)) ** batch
        unfinished_at = [
            sum(p * unfinished_at[n - k - 1] for k, p in enumerate(yields) if n > k) for n in range(tokens)
        ]
    return slowest / one
