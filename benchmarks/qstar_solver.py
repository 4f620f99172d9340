"""The solver of q*'s weight against bisection: seconds, and the gap that is left between the two divergences.

python benchmarks/qstar_solver.py
Legend: N rows, V vocabulary.
"""

import argparse

import torch
from timing import (
    Row,
    as_ratio,
    build_result,
    build_row,
    in_milliseconds,
    interleave,
    new_parser,
    prepare,
    show,
    timed,
    write_json,
)
from torch import Tensor

from models.functional.qstar import mix, solve_alpha
from reporting.console import report_console

SOLVER = "solve_alpha"

READING = """
A ratio is the time over the solver's on the same pair, in the same round, median [first, third quartile]. gap: the largest
|KL(q, theta) - KL(q, t)| over the rows, computed in float64 from the same float32 log-probabilities. Bisection mixes,
normalises and computes both divergences at every step. one read: the sum of both inputs, the least that a pass can take.
"""


def pair(kind: str, rows: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 log-probabilities (N, V) of two models: near, as of a fine-tuned one; far, unrelated; a spike at one token."""
    logits = 3 * torch.randn(rows, vocabulary, device=device)
    if kind == "near":
        other = logits + 0.3 * torch.randn_like(logits)
    elif kind == "far":
        other = 3 * torch.randn_like(logits)
    else:
        other = logits.clone()
        other[:, 5] = 25.0
    return logits.log_softmax(-1), other.log_softmax(-1)


def bisect(theta: Tensor, target: Tensor, steps: int = 20) -> Tensor:
    """alpha (N,) by halving [0, 1] on KL(q, theta) - KL(q, t)."""
    low = torch.zeros(len(theta), device=theta.device)
    high = torch.ones_like(low)
    for _ in range(steps):
        middle = (low + high) / 2
        q, _ = mix(theta, target, middle)
        p = q.exp()
        nearer_t = (p * (q - theta)).sum(-1) > (p * (q - target)).sum(-1)
        low, high = torch.where(nearer_t, middle, low), torch.where(nearer_t, high, middle)
    return (low + high) / 2


def gap(theta: Tensor, target: Tensor, alpha: Tensor) -> float:
    theta, target = theta.double().log_softmax(-1), target.double().log_softmax(-1)
    q, _ = mix(theta, target, alpha.double())
    return float((q.exp() * (target - theta)).sum(-1).abs().max())


def measure(kind: str, rows: int, args: argparse.Namespace, device: torch.device) -> list[Row]:
    theta, target = pair(kind, rows, args.vocabulary, device)
    runs = {
        SOLVER: lambda: solve_alpha(theta, target).alpha,
        "20 bisections": lambda: bisect(theta, target),
        "one read": lambda: theta.sum(-1) + target.sum(-1),
    }
    gaps = {name: gap(theta, target, runs[name]()) for name in list(runs)[:2]}
    passes = {SOLVER: solve_alpha(theta, target).iterations, "20 bisections": 20, "one read": 1}
    times = interleave(
        {name: timed(run, device, args.clock) for name, run in runs.items()}, repeats=args.repeats, warmup=args.warmup
    )
    return [
        build_row(name, times, SOLVER, pair=kind, batch=rows, gap=gaps.get(name), passes=passes[name]) for name in runs
    ]


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__.splitlines()[0], repeats=9)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, nargs="+", default=[5, 40], help="positions solved together")
    args = parser.parse_args(argv)
    device, console = prepare(args), report_console()
    rows = [row for n in args.rows for kind in ("near", "far", "spike") for row in measure(kind, n, args, device)]
    result = build_result("qstar_solver", args, device, rows, READING)
    columns = {
        "solver": lambda row: f"{row['batch']} rows, {row['pair']}: {row['name']}",
        "ms": in_milliseconds,
        "ratio of times": as_ratio,
        "passes": lambda row: str(row["passes"]),
        "gap": lambda row: "-" if row["gap"] is None else f"{row['gap']:.0e}",
    }
    show(result, columns, console)
    write_json(result, args.json, columns)


if __name__ == "__main__":
    main()
