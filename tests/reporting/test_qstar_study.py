"""The study's table against published digits, and its two statements against counterexamples."""

import json

import pytest
import torch
from rich.console import Console

from models.functional.gaussian import gaussian_alpha, geometric_mixture, kl_gaussian
from reporting.qstar_study import PAIRS, GaussianStudy, wrong_statements

PUBLISHED = {  # a*, KL(theta||t), KL(t||theta), C
    "same variance, x-separated": (0.500, 8.000, 8.000, 2.0000),
    "theta narrow, t wide": (0.388, 0.636, 1.614, 0.2341),
    "opposite directions": (0.500, 1.125, 1.125, 0.2231),
    "extreme variances": (0.298, 1.775, 11.292, 0.8363),
    "mean + variance": (0.344, 2.886, 10.614, 1.2316),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, GaussianStudy(str(folder), points=161)(Console(width=120, quiet=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table_to_its_digits(name):
    theta, target = PAIRS[name]
    alpha, chernoff = gaussian_alpha(theta, target)
    found = (alpha, kl_gaussian(theta, target), kl_gaussian(target, theta), chernoff)
    digits = (3, 3, 3, 4)
    assert [round(value, n) for value, n in zip(found, digits, strict=True)] == list(PUBLISHED[name])


def test_the_solver_on_a_grid_agrees_with_the_closed_form(study):
    _, record = study
    assert len(record["rows"]) == 9
    assert max(row["grid_error"] for row in record["rows"][:-1]) < 1e-3
    assert 0.3 < record["rows"][-1]["alpha"] < 0.5


def test_it_leaves_its_files(study):
    folder, record = study
    assert json.loads((folder / "study.json").read_text()) == record
    for made in ("panels.png", "alpha.png", "tensorboard"):
        assert (folder / made).exists()


def test_precisions_add_and_powers_of_covariances_do_not():
    theta, target = PAIRS["opposite correlations"]
    q = geometric_mixture(theta, target, 0.5)
    x = torch.randn(100, 2, dtype=torch.float64)
    log_q = q.log_density(x) - 0.5 * (theta.log_density(x) + target.log_density(x))
    assert log_q.std() < 1e-10  # the same up to a constant: it is the mixture
    first, second = wrong_statements()
    assert "0.388 < 1/2" in first
    assert "0.260" in second
