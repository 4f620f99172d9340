"""The teacher's rows in the tables of its students: guidance and blocks as the options say, the same for every distillation."""

import pytest
import torch

from lightning_modules.logit_flow import LogitFlowModule
from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule
from lightning_modules.pretrain import PretrainModule
from lightning_modules.step_halving import StepHalvingModule
from models.diffusion.objective import MaskedDiffusion
from models.diffusion.sampler import generate_masked_diffusion

STUDENTS = {
    LogitFlowModule: {"prompt_length": 3, "prompt_hidden_size": 8, "prompt_rank": 4},
    NoisyMaskFlowModule: {"student_forwards": (1,), "ode_forwards": (1,)},
    StepHalvingModule: {"start_forwards": 2, "student_forwards": (1,)},
}
SAMPLED = {"temperature": 0.7, "remasking": "low_confidence", "guidance": 1.5, "block_length": 3}


def teacher_of(tiny_llada, data):
    torch.manual_seed(0)
    special = {name: getattr(data.tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    return tiny_llada(len(data.tokenizer), **special)


def texts(decoder, rows):
    return decoder(rows, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_teachers_rows_are_sampled_as_the_options_say(tiny_llada, tiny_oracle, kind):
    """By the sampler itself, with the same draws; guidance takes two forward passes for one."""
    rows = {name: column[:8] for name, column in tiny_oracle.rows["test"].columns.items()}
    named = {f"teacher_{name}": value for name, value in SAMPLED.items()}
    module = kind(teacher_of(tiny_llada, tiny_oracle), forwards=(2, 4), **named, **STUDENTS[kind])
    decoders = module.teacher_decoders()
    assert [decoder.forwards for decoder in decoders] == [4, 8]
    for decoder, steps in zip(decoders, (2, 4), strict=True):
        generator = torch.Generator().manual_seed(0)
        wanted = generate_masked_diffusion(module.teacher, rows, generator, steps=steps, **SAMPLED)
        assert torch.equal(texts(decoder, rows), wanted)
    # control: without the options the texts are others, and each pass counts once
    plain = kind(teacher_of(tiny_llada, tiny_oracle), forwards=(2, 4), **STUDENTS[kind]).teacher_decoders()
    assert [decoder.forwards for decoder in plain] == [2, 4]
    assert not torch.equal(texts(plain[0], rows), texts(decoders[0], rows))


def test_a_model_on_its_own_has_the_rows_that_it_has_as_a_teacher(tiny_llada, tiny_oracle):
    teacher = teacher_of(tiny_llada, tiny_oracle)
    rows = {name: column[:8] for name, column in tiny_oracle.rows["test"].columns.items()}
    alone = PretrainModule(teacher, MaskedDiffusion(), forwards=[2, 4], **SAMPLED).decoders()
    named = {f"teacher_{name}": value for name, value in SAMPLED.items()}
    student = LogitFlowModule(teacher, forwards=[2, 4], **named, **STUDENTS[LogitFlowModule])
    for own, again in zip(alone, student.teacher_decoders(), strict=True):
        assert (own.forwards, own.name) == (again.forwards, again.name)
        assert torch.equal(texts(own, rows), texts(again, rows))
