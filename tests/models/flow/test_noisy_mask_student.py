"""The noisy-mask student: equal to the masked teacher at the start, one copy of frozen weights, saved and loaded."""

from functools import partial

import pytest
import torch

from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.student_files import load_student, save_student
from models.functional.errors import UsageError
from models.functional.jvp import value_and_jvp

ADAPTERS = ("prefix", "prefix+mask_noise", "lora", "full")


def build(tiny_llada, adapter="full", **options):
    torch.manual_seed(0)
    sizes = {"prompt_length": 3, "hidden_size": 8, "rank": 4, "lora_rank": 2}
    return NoisyMaskStudent(tiny_llada(), adapter=adapter, **(sizes | options))


def rows():
    input_ids = torch.randint(3, 11, (4, 6), generator=torch.Generator().manual_seed(1))
    response = torch.zeros(4, 6, dtype=torch.bool)
    response[:, 2:] = True
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(response), "response_mask": response}


def psi(student, batch, s=0.0, t=0.0, seed=0):
    start = student.path.start_sample(batch, torch.Generator().manual_seed(seed))
    return student(start._replace(s=start.s + s), start.s + t)


@pytest.mark.parametrize("noise_read", ["linear", "token", "blend"])
@pytest.mark.parametrize("adapter", ["prefix+mask_noise", "lora", "full"])
def test_at_the_start_it_is_the_masked_teacher_for_every_noise_with_a_live_gradient(tiny_llada, adapter, noise_read):
    student, batch = build(tiny_llada, adapter, noise_read=noise_read), rows()
    xt = batch["input_ids"].masked_fill(batch["response_mask"], student.base.mask_id)
    posterior = student.base(xt)[batch["response_mask"]]
    for seed, (s, t) in enumerate([(0.0, 0.0), (0.0, 1.0), (0.0, 0.7)]):
        torch.testing.assert_close(psi(student, batch, s, t, seed), posterior, atol=1e-5, rtol=1e-5)
    psi(student, batch).square().mean().backward()
    assert student.mask_noise.weight.grad.abs().max() > 0
    assert student.soft_prompt.gate.grad.abs().min() > 0


@pytest.mark.parametrize("noise_read", ["linear", "token", "blend"])
def test_at_the_end_of_the_line_it_is_the_teacher_that_reads_the_text_and_half_way_neither(tiny_llada, noise_read):
    student, batch = build(tiny_llada, noise_read=noise_read), rows()
    masked, clean = batch["response_mask"], student.base.embed(batch["input_ids"])
    read = student.base(batch["input_ids"])[masked]
    start = student.path.start_sample(batch, torch.Generator().manual_seed(0))

    def at(time):
        s = torch.full((len(clean),), time)
        return student(start._replace(z=torch.lerp(start.z, clean, time), s=s), s)

    torch.testing.assert_close(at(1.0), read, atol=1e-5, rtol=1e-5)
    assert (at(0.5) - read).abs().max() > 0.1


@pytest.mark.parametrize("noise_read", ["token", "blend"])
def test_reading_tokens_the_layers_get_the_mean_of_the_tokens_that_a_mask_may_stand_for(tiny_llada, noise_read):
    """A fresh student's layers read `certain_mean` of the exact posterior, row by row at its own time; the prompt as it is."""
    student, batch = build(tiny_llada, noise_read=noise_read), rows()
    path, masked = student.path, batch["response_mask"]
    s = torch.tensor([0.2, 0.4, 0.6, 0.9])
    sample = path.sample(batch, masked, s, torch.Generator().manual_seed(0))
    mean = (1 - s).view(-1, 1, 1, 1) * path.mask_embedding + s.view(-1, 1, 1, 1) * path.embedding
    density = torch.distributions.Normal(mean, (1 - s).view(-1, 1, 1, 1) * path.noise_scale)
    p = density.log_prob(sample.z.unsqueeze(2)).sum(-1).softmax(-1)  # (B, L, V), equal priors
    certainty = 1 - torch.distributions.Categorical(p).entropy() / torch.log(torch.tensor(float(p.shape[-1])))
    mask = path.mask_embedding
    noise = mask if noise_read == "token" else mask + path.gain(s).view(-1, 1, 1) * (sample.z - mask)
    wanted = (1 - certainty).unsqueeze(-1) * noise + certainty.unsqueeze(-1) * (p @ path.embedding)
    wanted = torch.where(masked.unsqueeze(-1), wanted, sample.z)
    logits = student.base.lm_head(student.base.hidden(wanted, batch["attention_mask"])[masked])
    torch.testing.assert_close(student(sample, s), logits, atol=1e-4, rtol=1e-4)
    for other in {"linear", "token", "blend"} - {noise_read}:  # the control: these are other inputs
        assert (build(tiny_llada, noise_read=other)(sample, s) - logits).abs().max() > 0.1


@pytest.mark.parametrize("blend", [False, True])
def test_the_derivative_goes_through_the_tokens_that_are_read(tiny_llada, blend):
    """Forward derivatives along z and s, which the mean-flow target needs, are finite differences in float64."""
    path, generator = build(tiny_llada).double().path, torch.Generator().manual_seed(0)
    s = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    z, along = torch.randn(2, 4, path.embedding.shape[1], dtype=torch.float64, generator=generator)
    directions = along, torch.ones_like(s)
    read = partial(path.own_token, blend=blend)
    ahead = value_and_jvp(read, (z, s), directions, backend="forward_ad")[1]
    differences = value_and_jvp(read, (z, s), directions, backend="finite_difference", step=1e-5)[1]
    torch.testing.assert_close(ahead, differences, atol=1e-7, rtol=1e-5)
    assert ahead.abs().max() > 0.01


def test_a_large_batch_of_positions_is_read_in_parts(tiny_llada, monkeypatch):
    student, batch = build(tiny_llada, noise_read="token"), rows()
    sample = student.path.sample(batch, batch["response_mask"], torch.full((4,), 0.5), torch.Generator().manual_seed(0))
    whole = student(sample, sample.s)
    monkeypatch.setattr("models.flow.path.POSITIONS_AT_ONCE", 3)
    torch.testing.assert_close(student(sample, sample.s), whole)


def test_without_the_gate_the_first_forward_pass_depends_on_the_noise(tiny_llada):
    """The control of the test above: `prefix` reads z as it is, and two noises give two posteriors."""
    student, batch = build(tiny_llada, "prefix"), rows()
    assert (psi(student, batch, seed=0) - psi(student, batch, seed=1)).abs().max() > 0.1


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_only_what_an_adapter_names_trains_and_the_teacher_is_one_copy(tiny_llada, adapter):
    student = build(tiny_llada, adapter)
    names = set(student.trainable())
    prompt = {n for n in names if n.startswith("soft_prompt.")}
    expected = {"prefix": 0, "prefix+mask_noise": 1, "lora": 1 + 2 * 7 * 2, "full": 1 + 2 * 9 + 2}[adapter]
    assert len(names) - len(prompt) == expected
    assert not any(name.startswith("base.") for name in names)
    frozen = {p.data_ptr() for p in student.parameters() if not p.requires_grad}
    assert frozen == {p.data_ptr() for p in student.base.parameters()}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_changed_student_leaves_the_teacher_as_it_was(tiny_llada, adapter):
    student, batch = build(tiny_llada, adapter), rows()
    before = student.base(batch["input_ids"])
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(0.3)
    assert torch.equal(student.base(batch["input_ids"]), before)
    assert (psi(student, batch) - before[batch["response_mask"]]).abs().max() > 0.1


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_weights_are_used_without_changing_ours(tiny_llada, adapter):
    student, batch = build(tiny_llada, adapter), rows()
    snapshot, first = student.trainable(), psi(student, batch)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(0.3)
    start = student.path.start_sample(batch, torch.Generator().manual_seed(0))
    again = student.with_weights(snapshot, start, start.s)
    torch.testing.assert_close(again, first, atol=1e-6, rtol=1e-6)
    assert (psi(student, batch) - first).abs().max() > 0.05


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_saved_and_loaded_it_is_the_same(tiny_llada, tmp_path, adapter):
    student, batch = build(tiny_llada, adapter, sigma=3.0), rows()
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(0.1)
    save_student(student, tmp_path / "student")
    again = load_student(tmp_path / "student", tiny_llada_like(student, tiny_llada))
    assert again.options == student.options
    assert torch.equal(psi(again, batch, 0.2, 0.9), psi(student, batch, 0.2, 0.9))


def tiny_llada_like(student, tiny_llada):
    base = tiny_llada()
    base.load_state_dict(student.base.state_dict())
    return base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "adapter"}, "type one of prefix"),
        ({"noise_read": "mask"}, "type one of linear"),
        (
            {"adapter": "prefix", "noise_read": "token"},
            "module.noise_read=token has no effect on module.adapter=prefix",
        ),
        ({"sigma": 0.0}, "above 0"),
        ({"time_center": 0.0}, "time_center"),
    ],
)
def test_wrong_options_are_named(tiny_llada, options, message):
    with pytest.raises(UsageError, match=message):
        build(tiny_llada, **options)
