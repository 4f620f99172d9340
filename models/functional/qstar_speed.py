r"""Expected speed-up of q* decoding over running both models at every token.

β chance that a draft of the drafting model is kept, β_t that the checker's own token is (alternate), c = T_drafter / T_checker,
γ tokens in a draft, w what each further place adds to a forward (`wide`, a share of it: near 0 on a GPU with a small batch,
towards 1 where arithmetic takes the time); independent acceptances. Ratios of times, no units.
"""

from models.functional.errors import require_choice


def speedup_carry(gamma: int, beta: float, cost: float, wide: float = 0.0) -> float:
    """(1 + c) (1 - β^{γ+1}) / (1 - β) / (γ c + 1 + γ w + β^γ c): after a whole draft the drafter runs once more."""
    tokens = sum(beta**k for k in range(gamma + 1))
    return (1 + cost) * tokens / (gamma * cost + 1 + gamma * wide + beta**gamma * cost)


def speedup_alternate(gamma: int, beta: float, cost: float, wide: float = 0.0, beta_t: float | None = None) -> float:
    """The checker's token after a whole draft is a proposal that the drafter checks; at c = 1, γ = 1, w = 0: 2 / (2 - β).

    Rounds after a rejection and rounds with a proposal are the two states of a Markov chain with stationary weights
    w_R = 1 - β_t β^γ and w_P = β^γ.
    """
    beta_t = beta if beta_t is None else beta_t
    drafted = sum(beta**k for k in range(gamma))
    check = 1 + gamma * wide
    w_rejected, w_proposal = 1 - beta_t * beta**gamma, beta**gamma
    tokens = w_rejected * drafted + w_proposal * (1 + beta_t * drafted)
    time = w_rejected * (gamma * cost + check)
    time += w_proposal * (cost * (1 + wide) + beta_t * ((gamma - 1) * cost + check))
    return (1 + cost) * tokens / time


def speedup_third_drafter(gamma: int, beta: float, cost: float, wide: float = 0.0) -> float:
    """(1 - β^{γ+1}) / (1 - β) / (1 + γ w + γ c_d): both models check the block of a third one; c_d = T_d / (T_θ + T_t)."""
    return sum(beta**k for k in range(gamma + 1)) / (1 + gamma * wide + gamma * cost)


SPEEDUPS = {"carry": speedup_carry, "alternate": speedup_alternate, "assistant": speedup_third_drafter}


def best_gamma(beta: float, cost: float, scheme: str = "alternate", most: int = 16, wide: float = 0.0) -> int:
    """The draft length up to `most` with the highest expected speed-up at a measured β; 0 where none is above 1."""
    require_choice("draft", scheme, SPEEDUPS)
    speedups = [1.0] + [SPEEDUPS[scheme](gamma, beta, cost, wide) for gamma in range(1, most + 1)]
    return speedups.index(max(speedups))


def wait_for_the_slowest(gamma: int, beta: float, tokens: int, batch: int) -> float:
    """Expected rounds of the slowest of `batch` rows over those of one row, until each has `tokens` tokens: at least 1.

    A round yields k + 1 tokens with chance β^k (1 - β) for k < γ, and γ + 1 with β^γ.
    """
    yields = [beta**k * (1 - beta) for k in range(gamma)] + [beta**gamma]
    short = [1.0] + [0.0] * (tokens - 1)  # chance of having n tokens, n below `tokens`
    one = slowest = 0.0
    while (unfinished := sum(short)) > 1e-12:
        one += unfinished
        slowest += 1 - (1 - min(1.0, unfinished)) ** batch
        short = [sum(p * short[n - k - 1] for k, p in enumerate(yields) if n > k) for n in range(tokens)]
    return slowest / one
