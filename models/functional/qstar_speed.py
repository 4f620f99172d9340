r"""Expected speed-up of q* decoding over running both models at every token.

β chance that a draft of the drafting model is kept, β_t that the checker's own token is (alternate), c = T_drafter / T_checker,
γ tokens in a draft; independent acceptances. Ratios of times, no units.
"""

from models.functional.errors import require_choice


def speedup_carry(gamma: int, beta: float, cost: float) -> float:
    """(1 + c) (1 - β^{γ+1}) / (1 - β) / (γ c + 1 + β^γ c): after a whole draft the drafter runs once more."""
    tokens = sum(beta**k for k in range(gamma + 1))
    return (1 + cost) * tokens / (gamma * cost + 1 + beta**gamma * cost)


def speedup_alternate(gamma: int, beta: float, cost: float, beta_t: float | None = None) -> float:
    """The checker's token after a whole draft is a proposal that the drafter checks; at c = 1, γ = 1: 2 / (2 - β).

    Rounds after a rejection and rounds with a proposal are the two states of a Markov chain with stationary weights
    w_R = 1 - β_t β^γ and w_P = β^γ.
    """
    beta_t = beta if beta_t is None else beta_t
    drafted = sum(beta**k for k in range(gamma))
    w_rejected, w_proposal = 1 - beta_t * beta**gamma, beta**gamma
    tokens = w_rejected * drafted + w_proposal * (1 + beta_t * drafted)
    time = w_rejected * (gamma * cost + 1) + w_proposal * (cost + beta_t * ((gamma - 1) * cost + 1))
    return (1 + cost) * tokens / time


def speedup_third_drafter(gamma: int, beta: float, cost: float) -> float:
    """(1 - β^{γ+1}) / (1 - β) / (1 + γ c_d): both models check the block of a third one; c_d = T_d / (T_θ + T_t)."""
    return sum(beta**k for k in range(gamma + 1)) / (1 + gamma * cost)


SPEEDUPS = {"carry": speedup_carry, "alternate": speedup_alternate, "assistant": speedup_third_drafter}


def best_gamma(beta: float, cost: float, scheme: str = "alternate", most: int = 16) -> int:
    """The draft length from 1 to `most` with the highest expected speed-up at a measured β."""
    require_choice("draft", scheme, SPEEDUPS)
    return max(range(1, most + 1), key=lambda gamma: SPEEDUPS[scheme](gamma, beta, cost))
