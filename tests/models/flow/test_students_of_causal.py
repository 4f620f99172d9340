"""Students of a teacher that was made from a causal LM: they begin as the teacher, and the teacher stays as it is."""

import pytest
import torch
from helpers.concept import generator
from helpers.foreign import foreign_model, foreign_tokenizer, save_foreign
from torch.testing import assert_close

from datamodules.batch import trim_columns
from models.backbones.masked_from_causal import load_from_causal, load_masked
from models.flow.endpoint_pairs import EndpointPairs
from models.flow.losses import adapt_to_noise, polish_endpoint, teacher_posterior
from models.flow.masked_student import MaskedStudent
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.one_step import generate_one_step
from models.flow.prefix_student import PrefixStudent
from models.flow.solver import NoisyMaskDecoder
from models.flow.student_files import (
    base_fingerprint,
    load_student,
    load_whole_student,
    save_student,
    save_whole_student,
)
from models.functional.errors import UsageError
from models.functional.jvp import value_and_jvp
from models.functional.noisy_mask import distribution_divergence

MASK, PROMPT, RESPONSE = 260, 4, 5
SIZES = {"prompt_length": 3, "hidden_size": 8, "rank": 4}
ADAPTERS = ("prefix", "prefix+mask_noise", "lora", "full")


@pytest.fixture(params=["llama", "qwen3", "gpt2", "gemma"])
def teacher(request, tmp_path):
    return make_teacher(tmp_path, request.param)


@pytest.fixture
def llama(tmp_path):
    return make_teacher(tmp_path, "llama")


def make_teacher(folder, architecture, **options):
    save_foreign(folder / "causal", foreign_model(architecture, **options), foreign_tokenizer())
    load_from_causal(folder / "causal", mask_token="<extra_260>").save_pretrained(folder / "teacher")
    return load_masked(folder / "teacher")


def rows(count=4):
    """Prompts of several lengths, padded on the left."""
    ids = torch.randint(2, 250, (count, PROMPT + RESPONSE), generator=generator(1))
    seen = torch.ones_like(ids, dtype=torch.bool)
    seen[1, :2] = False
    response = torch.arange(PROMPT + RESPONSE).expand(count, -1) >= PROMPT
    return {"input_ids": ids, "attention_mask": seen, "response_mask": response}


def psi(student, batch, s=0.0, t=0.0, seed=0, masked=None):
    start = student.path.start_sample(batch, generator(seed), masked)
    return student(start._replace(s=start.s + s), start.s + t)


def move(student, size=0.1):
    with torch.no_grad():
        for weight in student.parameters():
            if weight.requires_grad:
                weight.add_(size * torch.randn(weight.shape, generator=generator(3)))
    student.project_weights()


def masked_logits(model, batch, masked):
    xt = torch.where(masked, MASK, batch["input_ids"])
    return model(xt, batch["attention_mask"], batch["response_mask"])[masked]


@pytest.mark.parametrize("adapter", ["prefix+mask_noise", "lora", "full"])
def test_a_student_begins_as_the_teacher_for_every_noise_with_a_live_gradient(teacher, adapter):
    """Also where a part of the response is given: the prompt ends where it ended, not at the first mask."""
    student, batch = NoisyMaskStudent(teacher, adapter=adapter, lora_rank=2, **SIZES), rows()
    partly = batch["response_mask"] & (torch.arange(PROMPT + RESPONSE) != PROMPT + 1)
    for seed, (t, masked) in enumerate([(0.0, batch["response_mask"]), (1.0, partly)]):
        expected = masked_logits(student.base, batch, masked)
        assert_close(psi(student, batch, 0.0, t, seed, masked), expected, atol=1e-4, rtol=1e-4)
    psi(student, batch).softmax(-1).square().mean().backward()
    assert student.mask_noise.weight.grad.abs().max() > 0
    assert student.soft_prompt.gate.grad.abs().min() > 0
    # the control: without the gate of the noise two noises give two posteriors
    blunt = NoisyMaskStudent(teacher, adapter="prefix", **SIZES)
    assert (psi(blunt, batch, seed=0) - psi(blunt, batch, seed=1)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_changed_student_leaves_the_teacher_as_it_was_in_one_copy(teacher, adapter):
    student, batch = NoisyMaskStudent(teacher, adapter=adapter, lora_rank=2, **SIZES), rows()
    before, first = masked_logits(teacher, batch, batch["response_mask"]), psi(student, batch)
    snapshot = student.trainable()
    assert not any(name.startswith("base.") or "mask_change" in name for name in snapshot)
    assert any(name.startswith("body.") for name in snapshot) == (adapter in ("lora", "full"))
    frozen = {weight.data_ptr() for weight in student.parameters() if not weight.requires_grad}
    assert frozen == {weight.data_ptr() for weight in teacher.parameters()}
    move(student)
    assert torch.equal(masked_logits(teacher, batch, batch["response_mask"]), before)
    assert (psi(student, batch) - first).abs().max() > 0.01
    start = student.path.start_sample(batch, generator(0))
    assert_close(student.with_weights(snapshot, start, start.s), first, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_saved_student_reads_back_with_its_teacher_and_alone(teacher, tmp_path, adapter):
    student, batch = NoisyMaskStudent(teacher, adapter=adapter, lora_rank=2, sigma=3.0, **SIZES), rows()
    move(student)
    expected = psi(student, batch, 0.2, 0.9)
    save_student(student, tmp_path / "student")
    save_whole_student(student, tmp_path / "whole")
    for again in (
        load_student(tmp_path / "student", load_masked(tmp_path / "teacher")),
        load_whole_student(tmp_path / "whole"),
    ):
        assert again.options == student.options
        assert torch.equal(psi(again, batch, 0.2, 0.9), expected)
    other = load_masked(tmp_path / "teacher")
    other.mask_start.mul_(1.01)
    assert base_fingerprint(other) != base_fingerprint(teacher)
    with pytest.raises(UsageError, match="another base model"):
        load_student(tmp_path / "student", other)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_derivatives_by_forward_ad_are_those_of_differences(teacher, adapter):
    student, batch = NoisyMaskStudent(teacher, adapter=adapter, lora_rank=2, **SIZES), rows()
    move(student)
    student.double()
    start = student.path.start_sample(batch, generator(0))
    start = start._replace(z=start.z.double(), s=start.s.double() + 0.3)
    direction = torch.randn(start.z.shape, generator=generator(2)).double() * start.masked.unsqueeze(-1)
    t = torch.full_like(start.s, 0.8)

    def logits(z, s):
        return student(start._replace(z=z, s=s), t)[:, teacher.allowed == 0]

    def derivative(backend, direction):
        tangents = (direction, torch.ones_like(t))
        return value_and_jvp(logits, (start.z, start.s), tangents, backend=backend, step=1e-3)[1]

    exact = derivative("forward_ad", direction)
    # norms of transformers compute in float32, so differences are rounded
    assert (exact - derivative("finite_difference", direction)).norm() < 5e-3 * exact.norm()
    assert (exact - derivative("finite_difference", torch.zeros_like(direction))).norm() > 0.1 * exact.norm()


def test_columns_that_are_padding_in_every_row_change_neither_loss_nor_gradients(tmp_path):
    """In float64, which layer norms of GPT-2 leave as it is; data.group_by_length cuts such columns off."""
    student = NoisyMaskStudent(make_teacher(tmp_path, "gpt2"), adapter="lora", lora_rank=2, **SIZES).double()
    move(student)
    batch = rows()
    batch["attention_mask"][:, :2] = False
    start = student.path.start_sample(batch, generator(0))
    wide = start._replace(z=start.z.double(), s=start.s.double() + 0.3)
    assert trim_columns(batch)["input_ids"].shape[1] == PROMPT + RESPONSE - 2

    def loss_and_gradients(first):
        columns = {name: c[:, first:] for name, c in wide._asdict().items() if c.ndim > 1}
        loss = polish_endpoint(student, wide._replace(**columns)).loss
        student.zero_grad()
        loss.backward()
        return [loss, *(weight.grad for weight in student.parameters() if weight.grad is not None)]

    whole = [value.clone() for value in loss_and_gradients(0)]
    for one, other in zip(loss_and_gradients(2), whole, strict=True):
        assert_close(one, other, atol=1e-10, rtol=1e-10)
    # the control: a column of text
    assert not torch.allclose(loss_and_gradients(3)[0], whole[0], atol=1e-6)


@torch.no_grad()
def test_pairs_keep_the_response_where_a_part_of_it_is_given(llama):
    """What is noise is not the response: a token that is given belongs to the response, whose attention is another one."""
    student, batch = NoisyMaskStudent(llama, adapter="lora", lora_rank=2, **SIZES), rows(8)
    pairs = EndpointPairs(ode_steps=2, observed_share=1.0)
    drawn, _ = pairs.draw(student.path, student, batch, generator(0))
    assert torch.equal(drawn.response_mask, batch["response_mask"])
    assert not torch.equal(drawn.masked, drawn.response_mask)
    saved = pairs.state_dict()["pool"][0]
    assert torch.equal(saved["response_mask"], drawn.masked)
    # entries of older checkpoints are still read
    pairs.load_state_dict({"drawn": 1, "pool": [{name: value for name, value in saved.items() if name != "response"}]})
    again, _ = pairs.draw(student.path, student, batch, generator(0))
    assert torch.equal(again.masked, drawn.masked)
    assert torch.equal(again.z, drawn.z)


@pytest.mark.parametrize("vocab_size", [300, 320])
def test_losses_are_finite_and_forbidden_ids_are_never_generated(tmp_path, vocab_size):
    """Of a wider output layer as well: an infinite logit would make the divergence 0 times infinity."""
    teacher = make_teacher(tmp_path, "llama", vocab_size=vocab_size)
    student, batch = NoisyMaskStudent(teacher, adapter="lora", lora_rank=2, **SIZES), rows()
    move(student)
    terms = adapt_to_noise(student, teacher, batch, generator(0), teacher_weight=0.5, observed_share=0.5)
    assert torch.isfinite(terms.loss)
    terms.loss.backward()
    assert all(torch.isfinite(w.grad).all() for w in student.parameters() if w.grad is not None)
    start = student.path.start_sample(batch, generator(0))
    target, logits = teacher_posterior(teacher, start), student(start, start.s)
    forbidden = teacher.allowed != 0
    assert int(forbidden.sum()) == 1 + vocab_size - 300
    assert (target[:, forbidden] == 0).all()
    assert torch.isfinite(distribution_divergence(target, logits)).all()
    assert torch.isnan(distribution_divergence(target, logits.masked_fill(forbidden, -torch.inf))).all()
    for passes in (1, 2):
        tokens = NoisyMaskDecoder(student, passes)(batch, generator(0))
        assert tokens.shape == (4, RESPONSE)
        assert not torch.isin(tokens, forbidden.nonzero()).any()


@torch.no_grad()
def test_the_students_of_the_other_methods_begin_as_the_teacher(llama):
    batch = rows()
    masked, seen, response = batch["response_mask"], batch["attention_mask"], batch["response_mask"]
    xt, expected = torch.where(masked, MASK, batch["input_ids"]), masked_logits(llama, batch, masked)
    for adapter in ("lora", "full"):
        student = MaskedStudent(llama, adapter=adapter, lora_rank=2)
        assert_close(student(xt, masked, seen, response), expected, atol=1e-4, rtol=1e-4)
        move(student)
        assert (student(xt, masked, seen, response) - expected).abs().max() > 0.01
    student = PrefixStudent(llama, **SIZES)
    r = torch.zeros(4)
    assert_close(student(xt, seen, r, r + 1, response)[masked], expected, atol=1e-4, rtol=1e-4)
    tokens = generate_one_step(student, batch, generator(0))
    assert torch.equal(tokens, expected.argmax(-1).view(4, RESPONSE))


def test_teachers_that_cannot_have_a_student_are_named(tmp_path):
    save_foreign(tmp_path / "causal", foreign_model("llama"), foreign_tokenizer())
    adapted = load_from_causal(tmp_path / "causal", mask_token="<extra_260>", lora_rank=2)
    with pytest.raises(UsageError, match=r"type teacher\.path="):
        MaskedStudent(adapted)
    for architecture in ("falcon", "gpt_neox"):
        blind = make_teacher(tmp_path / architecture, architecture)
        with pytest.raises(UsageError, match=f"{architecture} takes no soft prompt.*step_halving"):
            NoisyMaskStudent(blind, **SIZES)
        MaskedStudent(blind)
