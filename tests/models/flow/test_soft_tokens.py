"""Soft tokens: a frozen base reads others' noise beside its masks, and each position's own noise by Bayes' rule."""

import pytest
import torch
from helpers.noisy_mask_student import build, psi, rows, same_base

from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.student_files import load_student, save_student
from models.functional.errors import UsageError

SOFT = {"adapter": "lora", "noise_input": "soft_token", "prior_length": 3}


def points(student, s, seed=0, moved=None):
    """A batch at time s; `moved`: the column that has other noise."""
    batch = rows()
    times = torch.full((4,), s)
    sample = student.path.sample(batch, batch["response_mask"], times, torch.Generator().manual_seed(seed))
    if moved is not None:
        other = student.path.sample(batch, batch["response_mask"], times, torch.Generator().manual_seed(seed + 1))
        z = sample.z.clone()
        z[:, moved] = other.z[:, moved]
        sample = sample._replace(z=z)
    return sample


def moved_prior(student):
    with torch.no_grad():
        student.soft_tokens.prior.weight.normal_(generator=torch.Generator().manual_seed(3))
    return student


def test_without_noise_and_for_every_noise_at_the_start_it_is_the_base_with_masks_beside_its_masks(tiny_llada):
    student, batch = moved_prior(build(tiny_llada, **SOFT)), rows()
    torch.testing.assert_close(psi(student, batch, seed=0), psi(student, batch, seed=1), atol=1e-6, rtol=1e-6)
    # a jump reads the noise from its first step on
    assert (psi(student, batch, t=1.0, seed=0) - psi(student, batch, t=1.0, seed=1)).abs().max() > 0.1


def test_a_position_reads_its_own_noise_by_bayes_rule_and_others_read_it_through_the_base(tiny_llada):
    """With one layer nothing of a position's noise returns to it by way of other soft tokens."""
    student = moved_prior(NoisyMaskStudent(tiny_llada(num_hidden_layers=1), hidden_size=8, rank=4, **SOFT))
    s, column = 0.3, 3
    before, after = points(student, s), points(student, s, moved=column)
    change = (student(after, after.s) - student(before, before.s)).detach().view(4, 4, -1)
    own, others = change[:, 1], change[:, [0, 2, 3]]
    evidence = [student.path.evidence(sample.z[:, column], sample.s) for sample in (before, after)]
    torch.testing.assert_close(own, (evidence[1] - evidence[0]).float(), atol=1e-3, rtol=1e-4)
    assert (others.abs().amax((1, 2)) > 1e-2).all()


def test_an_exact_prior_and_a_base_that_knows_no_more_give_the_exact_denoiser(tiny_llada):
    """Positions independent of each other: D_s is Bayes' rule, enumerated over all tokens."""
    student = build(tiny_llada, **SOFT)
    unigram = torch.randn(11, generator=torch.Generator().manual_seed(5))
    student.body.lm_head = torch.nn.Identity()
    student.body.states = lambda x, *_, **__: unigram.expand(*x.shape[:2], -1)
    sample = points(student, 0.4)
    found = student(sample, sample.s).softmax(-1)
    m, table, s, sigma = student.path.mask_embedding, student.path.embedding, 0.4, student.path.noise_scale
    z = sample.z[sample.masked].double()
    density = torch.distributions.Normal((1 - s) * m.double() + s * table.double(), (1 - s) * sigma)
    joint = unigram.double() + density.log_prob(z.unsqueeze(1)).sum(-1)
    torch.testing.assert_close(found.double(), joint.softmax(-1), atol=1e-4, rtol=1e-3)


def test_everything_that_trains_has_a_gradient_and_the_end_of_the_line_is_finite(tiny_llada):
    student = moved_prior(build(tiny_llada, **SOFT))
    sample = points(student, 0.2)
    (student(sample, sample.s + 0.5).log_softmax(-1) ** 2).mean().backward()
    assert student.soft_tokens.prior.weight.grad.abs().amax(-1).min() > 0
    assert student.soft_tokens.ahead.grad.abs().min() > 0
    late = points(student, 1.0)
    logits = student(late, late.s)
    assert logits.isfinite().all()
    assert torch.equal(logits.argmax(-1), late.x0[late.masked])


def test_the_forward_derivative_is_that_of_finite_differences(tiny_llada):
    student = moved_prior(build(tiny_llada, **SOFT)).double()
    sample = points(student, 0.3)
    z, s = sample.z.double(), sample.s.double()
    drift, one = torch.randn_like(z), torch.ones_like(s)
    with torch.no_grad():
        student.soft_prompt.gate.fill_(0.3)

    def at(step):
        return student(sample._replace(z=z + step * drift, s=s + step * one), s + 0.4)

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        out = student(sample._replace(z=dual(z, drift), s=dual(s, one)), s + 0.4)
        derivative = torch.autograd.forward_ad.unpack_dual(out).tangent
    with torch.no_grad():
        numeric = (at(1e-5) - at(-1e-5)) / 2e-5
    torch.testing.assert_close(derivative, numeric, atol=1e-4, rtol=1e-4)


def test_what_is_given_and_padding_are_as_without_soft_tokens(tiny_llada):
    """Rows of which other columns are masked, in one batch, are what they are alone."""
    student, batch = moved_prior(build(tiny_llada, **SOFT)), rows()
    masked = batch["response_mask"].clone()
    masked[0, 3] = False
    s = torch.full((4,), 0.3)
    sample = student.path.sample(batch, masked, s, torch.Generator().manual_seed(0))
    together = student(sample, s)
    alone = student(sample.rows(slice(1)), s[:1])
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-5, rtol=1e-5)
    # padding before a row changes nothing
    longer = sample._replace(
        **{
            name: torch.cat([torch.zeros_like(getattr(sample, name)[:, :2]), getattr(sample, name)], 1)
            for name in ("z", "masked", "attention_mask", "x0", "response_mask")
        }
    )
    torch.testing.assert_close(student(longer, s), together, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_it_is_the_same(tiny_llada, tmp_path):
    student, batch = moved_prior(build(tiny_llada, **SOFT)), rows()
    save_student(student, tmp_path / "student")
    again = load_student(tmp_path / "student", same_base(student, tiny_llada))
    assert again.options == student.options
    assert torch.equal(psi(again, batch, 0.2, 0.9), psi(student, batch, 0.2, 0.9))


def test_options_of_students_without_soft_tokens_are_those_of_saved_ones(tiny_llada):
    assert not {"noise_input", "prior_length"} & build(tiny_llada).options.keys()


def test_refused_where_there_can_be_none(tiny_llada):
    with pytest.raises(UsageError, match=r"module\.adapter=prefix, lora or full"):
        build(tiny_llada, **(SOFT | {"adapter": "prefix+mask_noise"}))
    blocks = tiny_llada()
    blocks.config.block_causal = True
    with pytest.raises(UsageError, match=r"module\.noise_input=embedding"):
        NoisyMaskStudent(blocks, **SOFT)
    with pytest.raises(UsageError, match=r"module\.noise_input"):
        build(tiny_llada, noise_input="tokens")
