"""The teacher's rows in the tables of its students: guidance, blocks and rules as the options say, in all distillations."""

import pytest
import torch
from helpers.trainer import quiet_trainer

from callbacks.frontier import FrontierReport
from lightning_modules.logit_flow import LogitFlowModule
from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule
from lightning_modules.pretrain import PretrainModule
from lightning_modules.step_halving import StepHalvingModule
from models.diffusion.commit_rules import ConfidenceThreshold, EntropyBudget
from models.diffusion.objective import MaskedDiffusion
from models.diffusion.sampler import generate_by_rule, generate_masked_diffusion
from models.functional.errors import UsageError
from reporting.record import read_record

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


def rules_of(**options):
    return {
        "teacher_commit_rules": {"confidence": [0.3], "entropy": [100.0]},
        "teacher_rule_temperature": 0.8,
    } | options


def test_threshold_decoding_of_the_teacher_stands_in_the_table_of_its_student(tiny_llada, tiny_oracle, tmp_path):
    """Beside its scheduled passes and the student's, in the record and on the same curve of quality against TPF."""
    options = rules_of(teacher_block_length=3, student_forwards=(1, 2), ode_forwards=())
    module = NoisyMaskFlowModule(teacher_of(tiny_llada, tiny_oracle), forwards=(2, 4), **options)
    quiet_trainer(1, callbacks=[FrontierReport(tmp_path, "one", {})]).test(module, tiny_oracle, verbose=False)
    record = read_record(tmp_path / "record.json")
    rows = {row["decoder"]: row for row in record["rows"] if row["method"] == "teacher"}
    by_rule = [f"teacher, {rule}, sampled at 0.8" for rule in ("confidence ≥ 0.3", "entropy ≤ 100")]
    assert list(rows) == ["teacher, sampled", *by_rule]
    assert rows[by_rule[1]]["nfe"] == 2  # one pass a block
    assert 2 <= rows[by_rule[0]]["nfe"] <= 6
    assert all(row["cost"]["tokens_per_forward"] > 0 for row in rows.values())
    assert set(record["aup"]["methods"]) == {"teacher", "student"}
    assert (tmp_path / "tpf.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", STUDENTS)
def test_rows_by_rule_are_those_of_the_model_on_its_own(tiny_llada, tiny_oracle, kind):
    teacher = teacher_of(tiny_llada, tiny_oracle)
    rows = {name: column[:8] for name, column in tiny_oracle.rows["test"].columns.items()}
    given = {name.removeprefix("teacher_"): value for name, value in rules_of().items()}
    alone = PretrainModule(teacher, MaskedDiffusion(), forwards=[2], **given)
    module = kind(teacher, forwards=(2,), **rules_of(), **STUDENTS[kind])
    for one in (alone, module):
        one.trainer = type("Data", (), {"datamodule": tiny_oracle})()
    found = module.teacher_decoders()
    assert [decoder.name for decoder in found] == [decoder.name for decoder in alone.decoders()]
    for decoder, rule in zip(found[1:], (ConfidenceThreshold(0.3), EntropyBudget(100.0)), strict=True):
        wanted = generate_by_rule(teacher, rows, torch.Generator().manual_seed(0), rule=rule, temperature=0.8)
        assert torch.equal(texts(decoder, rows), wanted.responses)
    plain = kind(teacher, forwards=(2,), **STUDENTS[kind])
    plain.trainer = module.trainer
    assert len(plain.teacher_decoders()) == 1


@pytest.mark.parametrize("kind", STUDENTS)
def test_wrong_rules_of_the_teacher_are_named_as_they_are_typed(tiny_llada, tiny_oracle, kind):
    for change, said in (
        ({"teacher_commit_rules": {"margin": [1.0]}}, r"^module\.teacher_commit_rules=margin is not known"),
        ({"teacher_commit_rules": {"confidence": [1.5]}}, r"^module\.teacher_commit_rules\.confidence=1\.5 must lie"),
        ({"teacher_rule_temperature": -1}, r"^module\.teacher_rule_temperature=-1 must be at least 0"),
    ):
        with pytest.raises(UsageError, match=said):
            kind(teacher_of(tiny_llada, tiny_oracle), **rules_of(**change), **STUDENTS[kind])


@pytest.mark.parametrize("kind", STUDENTS)
def test_end_tokens_come_last_in_every_row_of_a_model_where_the_option_says_so(tiny_llada, tiny_oracle, kind):
    """In scheduled passes and by rule, of a model on its own and of a teacher: with the corpus' end tokens."""
    teacher = teacher_of(tiny_llada, tiny_oracle)
    rules = {name.removeprefix("teacher_"): value for name, value in rules_of().items()}
    for last in (False, True):
        alone = PretrainModule(teacher, MaskedDiffusion(), forwards=[2], ends_last=last, **rules)
        module = kind(teacher, forwards=(2,), teacher_ends_last=last, **rules_of(), **STUDENTS[kind])
        for one in (alone, module):
            one.trainer = type("Data", (), {"datamodule": tiny_oracle})()
        for decoders in (alone.decoders(), module.teacher_decoders()):
            scheduled, *by_rule = (decoder.options for decoder in decoders)
            assert scheduled["ends_last"] == (tiny_oracle.end_ids() if last else None)
            found = [(options["end_ids"], options["ends_last"]) for options in by_rule]
            assert found == [(tiny_oracle.end_ids(), last)] * 2
