"""Draws of the interval (r, t), r <= t, over which a flow is averaged; t = 1 is noise."""

from typing import Literal

import torch
from torch import Generator, Tensor

from models.functional.errors import UsageError, require_share

TimeLaw = Literal["uniform", "logit_normal"]


def sample_interval(
    n: int,
    generator: Generator,
    device: torch.device,
    *,
    law: TimeLaw = "uniform",
    equal_share: float = 0.5,
    endpoint_share: float = 0.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> tuple[Tensor, Tensor, int]:
    """n pairs (r, t): the first `n_equal` rows have r = t, the last `endpoint_share` of the rows have (r, t) = (0, 1).

    Two independent draws of the law are sorted into r <= t (MeanFlow, Geng et al. 2025). `logit_normal` is
    sigmoid(N(logit_mean, logit_std)). Returns r (n,), t (n,) and n_equal: the rows that need no derivative come first.
    Counts are share x n, rounded up or down at random so that their mean is exact.
    """
    if law == "uniform":
        draws = torch.rand(2, n, generator=generator, device=device)
    elif law == "logit_normal":
        draws = torch.sigmoid(logit_mean + logit_std * torch.randn(2, n, generator=generator, device=device))
    else:
        raise UsageError(f"module.time_law={law} is not known; type uniform or logit_normal")
    require_shares(equal_share=equal_share, endpoint_share=endpoint_share, together=True)
    n_equal = _count(equal_share * n, generator, device)
    n_endpoint = min(n - n_equal, _count(endpoint_share * n, generator, device))
    t, r = draws.max(0).values, draws.min(0).values
    t[:n_equal] = draws[0, :n_equal]
    r[:n_equal] = t[:n_equal]
    t[n - n_endpoint :], r[n - n_endpoint :] = 1.0, 0.0
    return r, t, n_equal


def require_shares(*, together: bool = False, **shares: float) -> None:
    """Raise UsageError unless every module.<name> lies in [0, 1], and their sum too where they share the same rows."""
    require_share(**{f"module__{name}": share for name, share in shares.items()})
    if together and sum(shares.values()) > 1.0:
        raise UsageError(f"{' + '.join(f'module.{name}' for name in shares)} = {sum(shares.values())} exceeds 1")


def _count(expected: float, generator: Generator, device: torch.device) -> int:
    """A random integer with this mean: in small batches plain rounding would change a share."""
    whole, rest = divmod(expected, 1)
    if rest < 1e-9:
        return int(whole)
    return int(whole) + int(torch.rand(1, generator=generator, device=device).item() < rest)


def check_interval(r: Tensor, t: Tensor) -> None:
    """Raise UsageError unless 0 <= r <= t <= 1 in every row."""
    if bool((r > t).any()) or bool((r < 0).any()) or bool((t > 1).any()):
        worst = int((r - t).argmax())
        raise UsageError(
            f"a flow runs from t down to r, so 0 <= r <= t <= 1 is needed; got r={r[worst].item():g}, t={t[worst].item():g}"
        )


def sample_data_interval(
    n: int,
    generator: Generator,
    device: torch.device,
    *,
    diagonal_share: float,
    endpoint_share: float,
    widest: float,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """n cuts s <= u <= t of even **data time**: the first `n_diagonal` rows have s = u = t, the last ones begin at s = 0.

    Widths are U(0, widest) and the interval lies uniformly in [0, 1]; `endpoint_share` of the rows have
    (s, t) = (0, widest), which is (0, 1) once `widest` has grown to 1. u is uniform in between. Returns s, u, t (n,) and
    n_diagonal. `noisy_mask.warp_time` maps them to uneven times.
    """
    require_shares(diagonal_share=diagonal_share, endpoint_share=endpoint_share, together=True)
    n_diagonal = _count(diagonal_share * n, generator, device)
    n_endpoint = min(n - n_diagonal, _count(endpoint_share * n, generator, device))
    width, position, cut = torch.rand(3, n, generator=generator, device=device)
    width = width * widest
    s = position * (1 - width)
    s[n - n_endpoint :], width[n - n_endpoint :] = 0.0, widest
    s[:n_diagonal], width[:n_diagonal] = position[:n_diagonal], 0.0
    return s, s + cut * width, (s + width).clamp(max=1.0), n_diagonal
