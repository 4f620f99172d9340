"""q* against closed forms and enumeration in float64."""

import shutil

import pytest
import torch

from models.functional import qstar
from models.functional.errors import UsageError
from models.functional.qstar import mix, overlap, residual, solve_alpha


def pair(rows=6, vocabulary=40, scale=2.0, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, rows, vocabulary, generator=draw, dtype=torch.float64)
    return tuple(part.log_softmax(-1).to(dtype) for part in logits)


def kl(p, q):
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


def test_at_the_solution_both_divergences_are_the_chernoff_information():
    a, b = pair()
    found = solve_alpha(a, b)
    q, log_z = mix(a, b, found.alpha)
    torch.testing.assert_close(kl(q, a), kl(q, b), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.chernoff, kl(q, a), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.log_z, log_z, atol=1e-12, rtol=0)
    assert ((found.alpha > 0) & (found.alpha < 1)).all()
    # control: an equal mixture of log-probabilities is not symmetric
    half, _ = mix(a, b, 0.5)
    assert (kl(half, a) - kl(half, b)).abs().max() > 0.01


def test_it_minimises_k_on_a_grid():
    a, b = pair(rows=3)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    values = torch.stack([(a + x * (b - a)).logsumexp(-1) for x in grid])
    assert ((1 - solve_alpha(a, b).alpha) - grid[values.argmin(0)]).abs().max() < 1e-3
    torch.testing.assert_close(-solve_alpha(a, b).chernoff, values.amin(0), atol=1e-6, rtol=0)


def test_two_tokens_have_a_closed_form():
    x, y = torch.tensor([0.9, 0.6, 0.01]).double(), torch.tensor([0.1, 0.3, 0.5]).double()
    a, b = torch.stack([x, 1 - x], -1).log(), torch.stack([y, 1 - y], -1).log()
    d = b - a
    q = -d[:, 1] / (d[:, 0] - d[:, 1])  # E_q d = 0
    weight = (torch.logit(q) - torch.logit(x)) / (d[:, 0] - d[:, 1])
    torch.testing.assert_close(solve_alpha(a, b).alpha, 1 - weight, atol=1e-6, rtol=0)


def test_two_gaussians_on_a_grid_have_their_exact_weight():
    """Equal variances: alpha = 1/2 and C = |mu - mu'|² / 8 s²; narrow and wide: 0.388, 0.2341 (in 2-D)."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    normal = lambda mean, s2: (-((z - mean) ** 2) / (2 * s2)).log_softmax(-1)  # noqa: E731
    found = solve_alpha(normal(-2.0, 1.0).unsqueeze(0), normal(2.0, 1.0).unsqueeze(0))
    assert found.alpha.item() == pytest.approx(0.5, abs=1e-6)
    assert found.chernoff.item() == pytest.approx(2.0, abs=1e-6)
    found = solve_alpha(normal(0.0, 0.5).unsqueeze(0), normal(0.0, 2.0).unsqueeze(0))
    assert found.alpha.item() == pytest.approx(0.388, abs=5e-4)
    assert 2 * found.chernoff.item() == pytest.approx(0.2341, abs=5e-5)


def test_truncated_supports_follow_the_existence_rule():
    inf = torch.inf
    a = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], [0.2, 0.3, 0.5], [0.5, 0.5, 0.0]]).double().log()
    b = torch.tensor([[0.0, 0.5, 0.5], [0.7, 0.3, 0.0], [0.1, 0.1, 0.8], [0.3, 0.7, 0.0]]).double().log()
    found = solve_alpha(a, b)
    assert found.alpha[0] == 0.5  # one common token, equally probable: d = 0
    assert found.alpha[1] == 1.0  # the target is everywhere above theta on the common tokens: theta restricted to them
    q, _ = mix(a, b, found.alpha)
    torch.testing.assert_close(q[1].exp(), torch.tensor([0.75, 0.25, 0.0]).double())
    assert 0 < found.alpha[2] < 1
    torch.testing.assert_close(found.chernoff, -mix(a, b, found.alpha)[1], atol=1e-12, rtol=0)
    swapped = solve_alpha(b[1:2], a[1:2])
    assert swapped.alpha.item() == 0.0
    none = torch.tensor([[0.0, -inf]]), torch.tensor([[-inf, 0.0]])
    with pytest.raises(UsageError, match="no common token"):
        solve_alpha(*none)


def test_equal_models_are_weighted_alike():
    a, _ = pair(rows=2)
    found = solve_alpha(a, a)
    assert found.alpha.tolist() == [0.5, 0.5]
    assert found.chernoff.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["near", "far", "spike", "two spikes"])
def test_low_precision_inputs_get_the_gap_of_their_own_values_closed(dtype, kind):
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 30_000, generator=draw)
    other = {
        "near": logits + 0.3 * torch.randn(2, 30_000, generator=draw),
        "far": 3 * torch.randn(2, 30_000, generator=draw),
        "spike": torch.where(torch.arange(30_000) == 5, 25.0, logits),
        "two spikes": torch.where(torch.arange(30_000) == 5, 25.0, logits),
    }[kind]
    if kind == "two spikes":
        logits[:, 9] = 25.0
    a, b = logits.log_softmax(-1).to(dtype), other.log_softmax(-1).to(dtype)
    found = solve_alpha(a, b)
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)  # few digits sum to 1 only nearly
    q, log_z = mix(a, b, found.alpha)
    assert (kl(q, a) - kl(q, b)).abs().max() < 1e-6
    torch.testing.assert_close(found.log_z, log_z, atol=1e-6, rtol=0)
    assert found.iterations <= {"near": 4, "far": 5, "spike": 4, "two spikes": 4}[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearly_equal_models_are_weighted_nearly_alike_whatever_their_digits_sum_to(dtype):
    """At V = 152 000 a float32 log-softmax is off by 5e-6, more than the divergence of models 1e-3 apart."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 152_000, generator=draw)
    other = logits + 1e-3 * torch.randn(4, 152_000, generator=draw)
    found = solve_alpha(logits.log_softmax(-1).to(dtype), other.log_softmax(-1).to(dtype))
    assert found.iterations <= 4
    assert (found.alpha - 0.5).abs().max() < 0.05
    assert (found.chernoff > -1e-9).all()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_compiled_passes_give_what_plain_ones_give():
    for rows, vocabulary in ((3, 1000), (2, 5000)):
        a, b = pair(rows, vocabulary, dtype=torch.float32)
        a[0, 7] = -torch.inf
        plain, fused = solve_alpha(a, b, fused=False), solve_alpha(a, b, fused=True)
        torch.testing.assert_close(fused.alpha, plain.alpha, atol=1e-6, rtol=0)
        torch.testing.assert_close(fused.log_z, plain.log_z, atol=1e-7, rtol=0)
        assert fused.iterations == plain.iterations


def test_a_model_that_gives_nan_is_called_so():
    with pytest.raises(UsageError, match="a model gives NaN"):
        solve_alpha(torch.full((1, 3), torch.nan), torch.zeros(1, 3).log_softmax(-1))


def test_rows_are_solved_in_blocks_without_a_trace(monkeypatch):
    a, b = pair(rows=12, dtype=torch.float32)
    monkeypatch.setattr(qstar, "CACHED_NUMBERS", 100)
    blocks = solve_alpha(a, b)
    monkeypatch.setattr(qstar, "CACHED_NUMBERS", 10**6)
    for ours, whole in zip(blocks, solve_alpha(a, b), strict=True):
        torch.testing.assert_close(ours, whole, atol=0, rtol=0)


def test_leading_dimensions_are_rows():
    a, b = pair(rows=6)
    flat, shaped = solve_alpha(a, b), solve_alpha(a.view(2, 3, -1), b.view(2, 3, -1))
    torch.testing.assert_close(shaped.alpha.flatten(), flat.alpha, atol=1e-9, rtol=0)


@pytest.mark.parametrize("forbidden", [-1e5, -1e7, -1e9])
def test_a_token_that_one_model_all_but_forbids_has_its_share_in_single_precision(forbidden):
    a = torch.tensor([[0.5, 0.5, 0.0]]).log()
    a[0, 2] = forbidden
    b = torch.tensor([[0.1, 0.1, 0.8]]).log()
    alpha = solve_alpha(a, b).alpha
    q, _ = mix(a, b, alpha.float())
    exact, _ = mix(a.double(), b.double(), alpha)
    torch.testing.assert_close(q.exp().double(), exact.exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("drafter", ["theta", "target"])
def test_accepting_and_drawing_from_the_residual_is_drawing_from_q(drafter):
    """p(x) min(1, q/p) + (rejected mass) residual(x) = q(x), by enumeration."""
    a, b = pair()
    found = solve_alpha(a, b, tolerance=1e-13)
    q, _ = mix(a, b, found.alpha)
    p = a if drafter == "theta" else b
    accepted = p.exp() * (q - p).clamp(max=0).exp()
    rest = 1 - accepted.sum(-1, keepdim=True)
    assert (accepted + rest * residual(q, p) - q.exp()).abs().max() < 1e-12
    torch.testing.assert_close(accepted.sum(-1), overlap(p, q), atol=1e-12, rtol=0)
    # negative control: sampling q again after a rejection is biased
    assert (accepted + rest * q.exp() - q.exp()).abs().max() > 1e-3


def test_q_is_never_harder_to_draft_for_than_the_other_model():
    a, b = pair(rows=50)
    found = solve_alpha(a, b)
    q, _ = mix(a, b, found.alpha)
    for p in (a, b):
        assert (overlap(p, q) >= overlap(a, b) - 1e-12).all()
        bound = torch.maximum(1 - (found.chernoff / 2).sqrt(), 1 - (1 - (-found.chernoff).exp()).sqrt())
        assert (overlap(p, q) >= bound - 1e-12).all()
