"""The path: noise of the right size, moves that agree with each other, and prompts that stay."""

import pytest
import torch

from models.flow.path import NoisyMaskPath, PathSample
from models.functional.masked_diffusion import row_of_masked


@pytest.fixture
def path(tiny_llada) -> NoisyMaskPath:
    torch.manual_seed(0)
    return NoisyMaskPath(tiny_llada(), sigma=2.0, time_center=0.3)


def rows(n=4):
    input_ids = torch.randint(3, 11, (n, 6), generator=torch.Generator().manual_seed(1))
    response = torch.zeros(n, 6, dtype=torch.bool)
    response[:, 2:] = True
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(response), "response_mask": response}


def test_noise_has_its_size_and_prompts_have_none(path):
    batch = rows(2000)
    start = path.start_sample(batch, torch.Generator().manual_seed(0))
    assert torch.equal(start.z[~start.masked], path.embed(batch["input_ids"])[~start.masked])
    noise = (start.z[start.masked] - path.mask_embedding) / path.embedding.square().mean().sqrt()
    assert noise.std().item() == pytest.approx(2.0, rel=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.03)
    assert start.s.eq(0).all()


def test_a_sample_lies_on_the_line_from_its_noise_to_its_text(path):
    batch = rows()
    masked, s = batch["response_mask"], torch.tensor([0.0, 0.3, 0.7, 1.0])
    start = path.start_sample(batch, torch.Generator().manual_seed(0))
    sample = path.sample(batch, masked, s, torch.Generator().manual_seed(0))
    line = torch.lerp(start.z, path.embed(batch["input_ids"]), s.view(-1, 1, 1))
    torch.testing.assert_close(sample.z, line)
    assert torch.equal(sample.s, s)
    assert torch.equal(sample.x0, batch["input_ids"])


def test_a_jump_to_the_own_text_stays_on_the_line_and_the_velocity_points_along_it(path):
    batch = rows()
    masked, s, t = batch["response_mask"], torch.full((4,), 0.2), torch.tensor([0.2, 0.5, 0.9, 1.0])
    sample, later = (path.sample(batch, masked, time, torch.Generator().manual_seed(0)) for time in (s, t))
    certain = torch.nn.functional.one_hot(sample.x0[masked], len(path.embedding)).float()
    moved = path.move(sample, certain, t)
    torch.testing.assert_close(moved.z, later.z)
    assert torch.equal(moved.s, t)
    drift = path.velocity(sample, certain)
    torch.testing.assert_close(sample.z + (t - s).view(-1, 1, 1) * drift, later.z)
    assert drift[~masked].eq(0).all()


def test_re_noised_samples_have_other_noise_and_the_same_text(path):
    batch = rows(2000)
    start = path.start_sample(batch, torch.Generator().manual_seed(0))
    certain = torch.nn.functional.one_hot(start.x0[start.masked], len(path.embedding)).float()
    half = torch.tensor([0.5])
    again = path.renoise(start, certain, half, torch.Generator().manual_seed(1))
    clean = path.embed(batch["input_ids"])
    noise = (2 * again.z - clean)[start.masked] - path.mask_embedding
    old = start.z[start.masked] - path.mask_embedding
    assert noise.std().item() == pytest.approx(path.noise_scale, rel=0.02)
    assert abs((noise * old).mean() / path.noise_scale**2) < 0.02
    assert torch.equal(again.z[~start.masked], clean[~start.masked])


def test_evidence_is_the_density_of_the_line_up_to_a_constant(path):
    s = torch.tensor(0.4)
    z = torch.randn(3, path.embedding.shape[-1], generator=torch.Generator().manual_seed(0))
    mean = (1 - s) * path.mask_embedding + s * path.embedding
    exact = torch.distributions.Normal(mean.double(), 0.6 * path.noise_scale).log_prob(z.unsqueeze(1).double()).sum(-1)
    ours = path.evidence(z, s.expand(3))
    torch.testing.assert_close(ours - ours[:, :1], exact - exact[:, :1], rtol=1e-5, atol=1e-5)


def test_rows_of_samples_are_taken_and_joined_with_their_times_and_texts(path):
    sample = path.sample(rows(), rows()["response_mask"], torch.linspace(0, 0.9, 4), torch.Generator().manual_seed(0))
    joined = sample.rows(slice(3, None)).followed_by(sample.rows(torch.tensor([0, 1])))
    assert isinstance(joined, PathSample)
    for column, whole in zip(joined, sample, strict=True):
        assert torch.equal(column, whole[[3, 0, 1]])
    assert row_of_masked(joined.masked).max() == 2
