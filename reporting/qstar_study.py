"""A study of q* of known distributions: its weight, its divergences, and two common statements about it that are wrong.

Gaussian pairs have closed forms. The solver of decoding also solves all pairs on a grid, whose points are its vocabulary.
Results: a table, nine panels, and both divergences over alpha; in study.json, PNG files and TensorBoard.
"""

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from models.functional.gaussian import Gaussian, gaussian_alpha, geometric_mixture, kl_gaussian
from models.functional.qstar import mix, solve_alpha
from models.functional.qstar_curve import divergences_along
from reporting.alpha_figure import draw_divergences


def gaussian(mean: tuple[float, float], cov: list[list[float]] | float | tuple[float, float]) -> Gaussian:
    if isinstance(cov, float | int):
        cov = (float(cov), float(cov))
    matrix = torch.diag(torch.tensor(cov)) if isinstance(cov, tuple) else torch.tensor(cov)
    return Gaussian(torch.tensor(mean, dtype=torch.float64), matrix.double())


PAIRS: dict[str, tuple[Gaussian, Gaussian]] = {
    "same variance, x-separated": (gaussian((-2, 0), 1.0), gaussian((2, 0), 1.0)),
    "theta narrow, t wide": (gaussian((0, 0), 0.5), gaussian((0, 0), 2.0)),
    "opposite directions": (gaussian((0, 0), (2.0, 0.5)), gaussian((0, 0), (0.5, 2.0))),
    "extreme variances": (gaussian((0, 0), 0.2), gaussian((0, 0), 3.0)),
    "mean + variance": (gaussian((-1.5, 0), 0.5), gaussian((1.5, 0), 2.0)),
    "diagonally separated": (gaussian((-1.5, -1.5), 1.0), gaussian((1.5, 1.5), 1.0)),
    "separated, opposite directions": (gaussian((-1, -1), (2.0, 0.5)), gaussian((1, 1), (0.5, 2.0))),
    "opposite correlations": (
        gaussian((-1.5, 0), [[1.0, 0.7], [0.7, 1.0]]), gaussian((1.5, 0), [[1.0, -0.7], [-0.7, 1.0]])
    ),
}  # fmt: skip


class GaussianStudy:
    """size: half-width of the square with points x points grid points, the vocabulary of the solver. folder: of the results."""

    def __init__(self, folder: str, size: float = 10.0, points: int = 401) -> None:
        self.folder = Path(folder)
        self.axis = torch.linspace(-size, size, points, dtype=torch.float64)
        self.grid = torch.stack(torch.meshgrid(self.axis, self.axis, indexing="xy"), -1).flatten(0, 1)

    def __call__(self, console: Console) -> dict:
        rows = [self._gaussian_row(name, *pair) for name, pair in PAIRS.items()]
        multi = self._multi_peak()
        rows.append(self._grid_row("two peaks against one", *multi))
        figures = {"panels": self._panels(multi), "alpha": self._curves(multi)}
        console.print(_table(rows))
        statements = wrong_statements()
        for text in statements:
            console.print(f"· {text}", highlight=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"rows": rows, "statements": statements}
        (self.folder / "study.json").write_text(json.dumps(record, indent=2) + "\n")
        with SummaryWriter(str(self.folder / "tensorboard")) as writer:
            for name, figure in figures.items():
                figure.savefig(self.folder / f"{name}.png", dpi=130)
                writer.add_figure(f"qstar/{name}", figure)
        console.print(f"\ntable and figures: {self.folder}", highlight=False, soft_wrap=True)
        return record

    # -- numbers ----------------------------------------------------------------------------------------------------

    def _gaussian_row(self, name: str, theta: Gaussian, target: Gaussian) -> dict:
        alpha, chernoff = gaussian_alpha(theta, target)
        row = self._grid_row(name, self._on_grid(theta), self._on_grid(target))
        exact = {"alpha": alpha, "chernoff": chernoff}
        kls = {"kl_theta_t": kl_gaussian(theta, target), "kl_t_theta": kl_gaussian(target, theta)}
        return row | exact | kls | {"grid_error": abs(row["alpha"] - alpha)}

    def _grid_row(self, name: str, log_theta: Tensor, log_t: Tensor) -> dict:
        found = solve_alpha(log_theta.unsqueeze(0), log_t.unsqueeze(0))
        kl = lambda p, q: float((p.exp() * (p - q)).sum())  # noqa: E731
        return {
            "pair": name,
            "alpha": found.alpha.item(),
            "chernoff": found.chernoff.item(),
            "kl_theta_t": kl(log_theta, log_t),
            "kl_t_theta": kl(log_t, log_theta),
            "grid_error": None,
        }

    def _on_grid(self, distribution: Gaussian) -> Tensor:
        return distribution.log_density(self.grid).log_softmax(-1)

    def _multi_peak(self) -> tuple[Tensor, Tensor]:
        """A mixture of two narrow peaks, and one broad peak between them."""
        peaks = [self._on_grid(gaussian(mean, 0.4)) for mean in ((-2, 0), (2, 0))]
        return torch.stack(peaks).logsumexp(0).log_softmax(-1), self._on_grid(gaussian((0.5, 0), 2.0))

    # -- pictures ---------------------------------------------------------------------------------------------------

    def _all_on_grid(self, multi: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = {name: (self._on_grid(a), self._on_grid(b)) for name, (a, b) in PAIRS.items()}
        return pairs | {"two peaks against one": multi}

    def _panels(self, multi: tuple[Tensor, Tensor]) -> Figure:
        figure = Figure(figsize=(11, 11), layout="constrained")
        shape = (len(self.axis), len(self.axis))
        for axis, (name, (a, b)) in zip(figure.subplots(3, 3).flat, self._all_on_grid(multi).items(), strict=True):
            alpha = solve_alpha(a.unsqueeze(0), b.unsqueeze(0)).alpha
            q, _ = mix(a, b, alpha[0])
            for log_p, colour in ((a, "#3b6ea5"), (b, "#4a8f5a"), (q, "#c8553d")):
                p = log_p.exp().view(shape)
                axis.contour(self.axis, self.axis, p / p.max(), levels=[0.1, 0.5, 0.9], colors=colour, linewidths=1)
            axis.set(xlim=(-5, 5), ylim=(-5, 5), aspect="equal")
            axis.set_title(f"{name}\nα* = {alpha.item():.3f}", fontsize=9)
        figure.suptitle("π_θ blue, π_t green, q* red", fontsize=11)
        return figure

    def _curves(self, multi: tuple[Tensor, Tensor]) -> Figure:
        figure = Figure(figsize=(11, 9), layout="constrained")
        alphas = torch.linspace(0, 1, 51, dtype=torch.float64)
        flat = alphas.tolist()
        for axis, (name, (a, b)) in zip(figure.subplots(3, 3).flat, self._all_on_grid(multi).items(), strict=True):
            a, b = a.unsqueeze(0), b.unsqueeze(0)
            found, solved = divergences_along(a, b, alphas), solve_alpha(a, b)
            star = solved.alpha.item(), solved.chernoff.item()
            draw_divergences(axis, flat, found.kl_theta[:, 0].tolist(), found.kl_target[:, 0].tolist(), star)
            axis.set_title(name, fontsize=9)
        axis.legend(fontsize=8)
        return figure


def wrong_statements() -> list[str]:
    """Two common statements about q* that are wrong, each with a counterexample in numbers."""
    theta, target = PAIRS["theta narrow, t wide"]
    alpha, _ = gaussian_alpha(theta, target)
    narrow = "“The narrower distribution gets the larger weight.” Not so: with variances 0.5 and 2 the narrow one gets "
    theta, target = PAIRS["opposite correlations"]
    weight, _ = gaussian_alpha(theta, target)
    true = geometric_mixture(theta, target, weight).cov
    claimed = _power(theta.cov, weight) @ _power(target.cov, 1 - weight)
    gap = float((claimed - true).abs().max())
    return [
        f"{narrow}α* = {alpha:.3f} < 1/2, since the logarithmic mean of the precisions lies below their arithmetic mean.",
        "“Σ_q = Σ_θ^α Σ_t^(1-α).” Not so: precisions add, Σ_q^-1 = α Σ_θ^-1 + (1-α) Σ_t^-1. With correlations ±0.7 an entry "
        f"of the claimed matrix is off by {gap:.3f}; the true determinant is {float(torch.linalg.det(true)):.3f}, "
        f"the claimed one {float(torch.linalg.det(claimed)):.3f}.",
    ]


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def _table(rows: list[dict]) -> Table:
    table = Table(title="q* of two distributions", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("pair", no_wrap=True)
    for title in ("α*", "KL(θ‖t)", "KL(t‖θ)", "C", "solver's error in α*"):
        table.add_column(title, justify="right")
    for row in rows:
        error = "-" if row["grid_error"] is None else f"{row['grid_error']:.0e}"
        kls = (f"{row[name]:.3f}" for name in ("kl_theta_t", "kl_t_theta"))
        table.add_row(row["pair"], f"{row['alpha']:.3f}", *kls, f"{row['chernoff']:.4f}", error)
    return table
