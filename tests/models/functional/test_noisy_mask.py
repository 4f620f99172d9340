"""The noisy-mask identities on a denoiser that is exact: four texts of two words, every posterior by enumeration, float64."""

import pytest
import torch
from scipy.stats import chisquare

from models.functional.errors import UsageError
from models.functional.flow_times import sample_data_interval
from models.functional.noisy_mask import (
    distribution_divergence,
    flow_map,
    gap_weight,
    line_point,
    noisy_mask,
    noisy_meanflow_target,
    psd_target,
    recovery_ratio,
    second_order_step,
    split_weight,
    token_evidence,
    velocity,
    warp_time,
    wiener_gain,
)

WORDS = torch.tensor([[1.0, 0.2], [-0.4, 0.9], [-0.7, -0.8]], dtype=torch.float64)  # (V, D)
MASK = torch.tensor([0.1, -0.2], dtype=torch.float64)
TEXTS = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 1]])  # two words that nearly always agree
PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
SIGMA = 0.7


def posterior(z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """D_s(z) exactly: (B, 2, D), (B,) -> (B, 2, V)."""
    s = s.view(-1, 1, 1, 1)
    mean = (1 - s) * MASK + s * WORDS[TEXTS]  # (B, texts, 2, D)
    log_likelihood = -((z.unsqueeze(1) - mean) ** 2).sum((-1, -2)) / (2 * ((1 - s[:, :, 0, 0]) * SIGMA) ** 2)
    weight = torch.softmax(PRIOR.log() + log_likelihood, -1)  # (B, texts)
    word = torch.nn.functional.one_hot(TEXTS, 3).double()  # (texts, 2, V)
    return torch.einsum("bn,nlv->blv", weight, word)


def integrate(z: torch.Tensor, s: torch.Tensor, t: torch.Tensor, steps: int = 400):
    """The flow from s to t by RK4, and psi_{s,t} by Simpson's rule on w(u) D_u(z_u) along it."""

    def drift(point, time):
        return velocity(point, posterior(point, time) @ WORDS, time.unsqueeze(-1))

    h, psi, u = (t - s) / steps, 0, s.clone()
    weigh = lambda time: ((1 - s) * (1 - t) / ((t - s) * (1 - time) ** 2)).view(-1, 1, 1)  # noqa: E731
    step = h.view(-1, 1, 1)
    for _ in range(steps):
        k1 = drift(z, u)
        k2 = drift(z + step / 2 * k1, u + h / 2)
        k3 = drift(z + step / 2 * k2, u + h / 2)
        middle = z + step / 2 * (k2 + k3) / 2
        k4 = drift(z + step * k3, u + h)
        end = z + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        parts = [weigh(v) * posterior(p, v) for p, v in ((z, u), (middle, u + h / 2), (end, u + h))]
        psi = psi + step / 6 * (parts[0] + 4 * parts[1] + parts[2])
        z, u = end, u + h
    return z, psi


@pytest.fixture
def points():
    """Starts on the line at various s: z (B, 2, D), s, u, t (B,)."""
    generator = torch.Generator().manual_seed(0)
    s = torch.tensor([0.0, 0.0, 0.1, 0.3, 0.5, 0.2], dtype=torch.float64)
    u = torch.tensor([0.3, 0.5, 0.4, 0.5, 0.8, 0.25], dtype=torch.float64)
    t = torch.tensor([0.6, 0.9, 0.8, 0.95, 0.9, 0.7], dtype=torch.float64)
    z0 = noisy_mask(MASK, SIGMA, (6, 2), generator).double()
    clean = WORDS[TEXTS[torch.tensor([0, 1, 2, 3, 0, 1])]]
    return line_point(z0, clean, s.unsqueeze(-1).expand(6, 2)), s, u, t


def each(time):
    """Times of rows as times of their two positions."""
    return time.unsqueeze(-1).expand(-1, 2)


def test_no_other_multiple_comes_nearer_to_a_token():
    """The error of c (z - m) is a parabola in c, here of the words above with as much noise as there is."""
    s = torch.linspace(0, 1, 11, dtype=torch.float64)
    spread = (WORDS - MASK).square().mean().sqrt().item()
    gain = wiener_gain(s, SIGMA, spread)

    def error(c):
        """Mean over words and coordinates of (E_x - m - c (s (E_x - m) + (1 - s) σ ε))², the noise integrated out."""
        missing = (1 - c * s)[:, None, None] * (WORDS - MASK)
        return missing.square().mean((1, 2)) + (c * (1 - s) * SIGMA) ** 2

    assert (error(gain) < torch.minimum(error(gain + 1e-3), error(gain - 1e-3))).all()
    assert (error(gain) < error(wiener_gain(s, SIGMA, 2 * spread)))[1:-1].all()
    assert gain[0] == 0
    assert gain[-1] == 1


def test_evidence_is_the_noise_s_density_up_to_a_constant_and_all_that_the_posterior_needs(points):
    z, s, _, _ = points
    evidence = token_evidence(z, MASK, WORDS, each(s), SIGMA)
    mean = (1 - each(s))[..., None, None] * MASK + each(s)[..., None, None] * WORDS  # (B, 2, V, D)
    spread = ((1 - each(s)) * SIGMA)[..., None, None]
    density = torch.distributions.Normal(mean, spread).log_prob(z.unsqueeze(2)).sum(-1)
    torch.testing.assert_close(evidence.diff(dim=-1), density.diff(dim=-1))
    assert torch.equal(evidence[s == 0], torch.zeros_like(evidence[s == 0]))
    likelihood = sum(evidence[:, k, TEXTS[:, k]] for k in range(2))
    weight = torch.softmax(PRIOR.log() + likelihood, -1)
    word = torch.nn.functional.one_hot(TEXTS, 3).double()
    torch.testing.assert_close(torch.einsum("bn,nlv->blv", weight, word), posterior(z, s))


def test_psi_is_a_distribution_and_the_flow_map_built_from_it_solves_the_flow(points):
    z, s, _, t = points
    end, psi = integrate(z, s, t)
    torch.testing.assert_close(psi.sum(-1), torch.ones(6, 2).double(), atol=1e-6, rtol=0)
    assert psi.min() > 0
    torch.testing.assert_close(flow_map(z, psi @ WORDS, each(s), each(t)), end, atol=1e-5, rtol=0)


def test_no_time_is_no_motion(points):
    z, s, _, _ = points
    assert torch.allclose(flow_map(z, torch.randn(6, 2, 2).double(), each(s), each(s)), z, atol=1e-14)


def test_two_jumps_are_one(points):
    """Semigroup: the psd target made of exact parts is the exact whole, and not with another weight."""
    z, s, u, t = points
    middle, psi_su = integrate(z, s, u)
    end, psi_ut = integrate(middle, u, t)
    whole, psi_st = integrate(z, s, t)
    torch.testing.assert_close(end, whole, atol=1e-7, rtol=0)
    target = psd_target(psi_su, psi_ut, each(s), each(u), each(t))
    torch.testing.assert_close(target, psi_st, atol=1e-6, rtol=0)
    lengths = each((u - s) / (t - s)).unsqueeze(-1)
    assert (lengths * psi_su + (1 - lengths) * psi_ut - psi_st).abs().max() > 0.02


def test_the_exact_flow_map_is_the_fixed_point_of_the_corrected_mean_flow_target(points):
    """target = psi where f = log psi, with df/ds along the flow by central differences; rho = D / psi there."""
    z, s, _, t = points
    h = 1e-5
    drift = velocity(z, posterior(z, s) @ WORDS, each(s))
    log_psi = lambda point, start: integrate(point, start, t)[1].log()  # noqa: E731
    ahead, behind = log_psi(z + h * drift, s + h), log_psi(z - h * drift, s - h)
    df, psi, d = (ahead - behind) / (2 * h), log_psi(z, s).exp(), posterior(z, s)
    torch.testing.assert_close(recovery_ratio(psi, df, each(s), each(t)), d / psi, atol=1e-4, rtol=1e-4)
    constant = torch.randn(6, 2, 1).double()  # what no softmax sees
    target = noisy_meanflow_target(d.log(), psi.log() + constant, df + 3.0, each(s), each(t), rho_min=1e-9)
    torch.testing.assert_close(target, psi, atol=1e-5, rtol=0)
    # controls: a derivative at fixed z (no flow) and the weight t - s of uncorrected mean flow both miss it
    still = (log_psi(z, s + h) - log_psi(z, s - h)) / (2 * h)
    assert (noisy_meanflow_target(d.log(), psi.log(), still, each(s), each(t), 1e-9) - psi).abs().max() > 0.02
    plain = d / (1 - each(t - s).unsqueeze(-1) * (df - (psi * df).sum(-1, keepdim=True))).clamp(min=1e-9)
    assert (plain / plain.sum(-1, keepdim=True) - psi).abs().max() > 0.02


def test_targets_stay_on_the_simplex_whatever_the_derivative():
    logits, df = torch.randn(5, 4), 50 * torch.randn(5, 4)
    s, t = torch.zeros(5), torch.full((5,), 0.9)
    log_d = torch.randn(5, 4).log_softmax(-1)
    target = noisy_meanflow_target(log_d, logits, df, s, t, rho_min=0.05)
    torch.testing.assert_close(target.sum(-1), torch.ones(5))
    assert target.min() >= 0
    by_hand = log_d.exp() / recovery_ratio(logits.softmax(-1), df, s, t).clamp(min=0.05)
    torch.testing.assert_close(target, by_hand / by_hand.sum(-1, keepdim=True))
    assert (recovery_ratio(logits.softmax(-1), df, s, t) < 0).any()  # where the bound is needed


def test_the_second_order_step_is_exact_for_a_denoiser_that_moves_evenly():
    """psi_{s,t} = int w(u) D_u du by quadrature, with D_u a straight line through D_r and D_s."""
    r, s, t = (torch.tensor(time, dtype=torch.float64) for time in (0.1, 0.25, 0.7))
    d_r, d_s = (torch.randn(3, 4, generator=torch.Generator().manual_seed(k)).double() for k in (0, 1))
    d_r, d_s = (d_r / 8).softmax(-1), (d_s / 8).softmax(-1)  # near each other: the line stays on the simplex
    edges = torch.linspace(0, 1, 20001).double()
    u = s + (t - s) * (edges[1:] + edges[:-1]) / 2
    w = (1 - s) * (1 - t) / ((t - s) * (1 - u) ** 2) * (t - s) / 20000
    line = d_s + ((u - s) / (s - r)).view(-1, 1, 1) * (d_s - d_r)
    truth = (w.view(-1, 1, 1) * line).sum(0)
    torch.testing.assert_close(second_order_step(d_s, d_r, r, s, t), truth, atol=1e-7, rtol=0)
    torch.testing.assert_close(second_order_step(d_s, d_s, r, s, t), d_s)
    # c = (1 - s)/(s - r) where t = 1; a word that would fall below nothing has nothing
    end = second_order_step(d_s, d_r, r, s, torch.ones_like(s))
    raw = (d_s + 5 * (d_s - d_r)).clamp(min=0)
    torch.testing.assert_close(end, raw / raw.sum(-1, keepdim=True))


def flow_in_steps(z, s, t, steps, order):
    """Where `steps` even steps of first or second order lead, in exact arithmetic as `follow_flow` takes them."""
    point, before = z, None
    for k in range(steps):
        here, then = (s + (t - s) * n / steps for n in (k, k + 1))
        d = psi = posterior(point, here)
        if order == 2 and before is not None and bool((then < 1).all()):
            psi = second_order_step(d, before, each(s + (t - s) * (k - 1) / steps), each(here), each(then))
        point, before = flow_map(point, psi @ WORDS, each(here), each(then)), d
    return point, psi


def test_halving_second_order_steps_quarters_the_error(points):
    z, s, _, t = points
    end, _ = integrate(z, s, t)
    error = {
        (n, order): (flow_in_steps(z, s, t, n, order)[0] - end).abs().max().item()
        for n in (64, 128)
        for order in (1, 2)
    }
    assert error[64, 2] / error[128, 2] == pytest.approx(4, rel=0.2)
    assert error[64, 1] / error[128, 1] == pytest.approx(2, rel=0.2)  # Euler


def test_eight_second_order_steps_end_in_the_texts_of_the_flow_more_often_than_sixteen_of_euler():
    n = 4000
    z = noisy_mask(MASK, SIGMA, (n, 2), torch.Generator().manual_seed(1)).double()
    zero = torch.zeros(n).double()
    truth = flow_in_steps(z, zero, zero + 1, 256, 1)[1].argmax(-1)
    same = {
        (steps, order): (flow_in_steps(z, zero, zero + 1, steps, order)[1].argmax(-1) == truth).all(-1).double().mean()
        for steps, order in ((8, 2), (8, 1), (16, 1))
    }
    assert same[8, 2] > same[16, 1] > same[8, 1]


def test_split_weights_at_the_ends():
    s, u, t = torch.tensor([0.2, 0.2, 0.2, 0.0]), torch.tensor([0.2, 0.5, 0.6, 0.4]), torch.tensor([0.2, 0.5, 1.0, 0.8])
    assert split_weight(s, u, t).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.4 * 0.2 / (0.8 * 0.6)])


def test_the_flow_makes_whole_texts_with_the_right_frequencies_and_one_forward_of_marginals_does_not():
    """argmax of psi_{0,1} from fresh noise has the distribution of the texts; chi-square with its negative control."""
    n, generator = 4000, torch.Generator().manual_seed(1)
    z = noisy_mask(MASK, SIGMA, (n, 2), generator).double()
    zero = torch.zeros(n).double()
    end, _ = integrate(z, zero, zero + 0.998, steps=300)
    words = posterior(end, zero + 0.998).argmax(-1)
    code = words[:, 0] * 3 + words[:, 1]
    counts = torch.stack([(code == a * 3 + b).sum() for a, b in TEXTS.tolist()])
    assert counts.sum() == n  # coherent: no other text occurs
    assert chisquare(counts.numpy(), (PRIOR * n).numpy()).pvalue > 1e-3
    marginals = posterior(z, zero)  # at s = 0 the noise is independent of the text
    torch.testing.assert_close(marginals[0], marginals[-1], atol=1e-12, rtol=0)
    drawn = torch.multinomial(marginals.flatten(0, 1), 1, generator=generator).view(n, 2)
    valid = (drawn.unsqueeze(1) == TEXTS).all(-1).any(-1).double().mean()
    assert valid < 0.6


def test_warped_times_keep_their_ends_and_put_half_below_the_centre():
    q = torch.linspace(0, 1, 5)
    assert torch.equal(warp_time(q, 0.5), q)
    warped = warp_time(q, 0.2)
    assert warped.tolist() == pytest.approx([0.0, 1 / 13, 0.2, 3 / 7, 1.0], abs=1e-6)
    with pytest.raises(UsageError, match=r"module\.time_center=1"):
        warp_time(q, 1.0)


def test_warped_times_stay_between_their_ends_to_the_last_bit():
    """Beyond 1 the weights of `split_weight` are negative, and so are probabilities."""
    q = torch.rand(200, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.0, 1.0])
    for center in torch.linspace(0.01, 0.99, 99).tolist():
        assert torch.equal(warp_time(ends, center), ends)
        assert 0 <= warp_time(q, center).min() <= warp_time(q, center).max() <= 1
    assert torch.equal(warp_time(q, 0.5), q)


def test_another_centre_is_another_sigma():
    """warp(q, c) with sigma and q with sigma (1-c)/c are the same line up to scale (here with m = 0)."""
    q, c, eps, word = torch.tensor(0.3).double(), 0.2, torch.randn(2).double(), WORDS[0]
    warped = line_point(SIGMA * eps, word, warp_time(q, c))
    plain = line_point(SIGMA * (1 - c) / c * eps, word, q)
    torch.testing.assert_close(warped / warped.norm(), plain / plain.norm())


def test_divergence_and_gap_weight_by_hand():
    target, logits = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert distribution_divergence(target, logits).item() == pytest.approx(torch.tensor(1.5).log().item())
    gap = 2 * (0.5 - 1 / 3) ** 2 + (1 / 3) ** 2
    assert gap_weight(target, logits).item() == pytest.approx((gap + 1e-6) ** -0.5)


def test_intervals_are_ordered_and_shares_are_kept():
    draw = lambda **o: sample_data_interval(64, torch.Generator().manual_seed(0), torch.device("cpu"), **o)  # noqa: E731
    s, u, t, diagonal = draw(diagonal_share=0.25, endpoint_share=0.25, widest=0.4)
    assert diagonal == 16
    assert torch.equal(s[:16], t[:16])
    assert ((s <= u) & (u <= t)).all()
    assert (t - s).max() <= 0.4 + 1e-6
    assert s[-16:].eq(0).all()
    assert t[-16:].eq(0.4).all()
    full = draw(diagonal_share=0.0, endpoint_share=0.5, widest=1.0)
    assert full[2][-32:].eq(1).all()
    with pytest.raises(UsageError, match="exceeds 1"):
        draw(diagonal_share=0.7, endpoint_share=0.5, widest=1.0)
