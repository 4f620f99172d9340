"""The distillation module: what trains, what stays, what a step computes, and that a resumed run is the same run."""

import pytest
import torch
from helpers.trainer import Losses, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.ema import TrainableEMA
from lightning_modules.logit_flow import LogitFlowModule, MaskingSample
from models.flow.student_files import load_student, save_student
from models.functional.errors import UsageError
from models.functional.meanflow import meanflow_target


def build(tiny_llada, data, **options):
    torch.manual_seed(0)
    ids = data.tokenizer
    teacher = tiny_llada(
        len(ids), mask_token_id=ids.mask_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    settings = {"prompt_length": 3, "prompt_hidden_size": 8, "prompt_rank": 4, "lr": 1e-2, "warmup_steps": 1}
    return LogitFlowModule(teacher, forwards=(1, 2), **(settings | options))


def test_student_equals_teacher_at_the_start_with_a_live_gradient(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle)
    rows = tiny_oracle.rows["test"].columns
    r, t = torch.zeros(32), torch.ones(32)
    logits = module.student(rows["input_ids"], rows["attention_mask"], r, t)
    torch.testing.assert_close(logits, module.teacher(rows["input_ids"], rows["attention_mask"]), atol=1e-5, rtol=1e-5)
    logits.square().mean().backward()
    assert (module.student.soft_prompt.gate.grad.abs() > 0).all()


def test_teacher_and_base_are_one_copy(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle)
    assert module.teacher is module.student.base
    stored = {p.data_ptr() for p in module.parameters()}
    assert len(stored) == len(list(module.parameters()))


@pytest.mark.parametrize("loss", ["kl", "ce", "mse", "hard"])
@pytest.mark.parametrize("backend", ["forward_ad", "finite_difference"])
def test_only_the_soft_prompt_changes_and_frozen_weights_stay_bit_identical(tiny_llada, tiny_oracle, loss, backend):
    module = build(tiny_llada, tiny_oracle, loss=loss, jvp_backend=backend)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    quiet_trainer(3).fit(module, tiny_oracle)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert all(name.startswith("student.soft_prompt.") for name in changed)
    assert {"student.soft_prompt.gate", "student.soft_prompt.head.bias"} <= changed
    assert module.student.soft_prompt.gate.min() >= 0


def test_rows_split_off_give_what_the_whole_batch_would(tiny_llada, tiny_oracle):
    """Skipping the derivative where r = t is exact: du/dt has weight t - r = 0 there."""
    module = build(tiny_llada, tiny_oracle)
    module.student.soft_prompt.gate.data.fill_(0.5)
    batch = next(iter(tiny_oracle.train_dataloader()))
    embeds = module.teacher.embed(batch["input_ids"])
    masked = batch["response_mask"]
    r, t = torch.tensor([0.4] * 4 + [0.1] * 4), torch.tensor([0.4] * 4 + [0.7] * 4)
    p = 0.999 * t + 1e-3
    v = module.teacher.lm_head(module.teacher.hidden(embeds, batch["attention_mask"])[masked]).detach()
    sample = MaskingSample(embeds, masked, batch["attention_mask"], masked, r, t, p, n_equal=4)
    u, du = module.student_logits_and_derivative(sample, v)
    whole_u, whole_du = module.student_logits_and_derivative(sample._replace(n_equal=0), v)
    torch.testing.assert_close(u, whole_u, atol=1e-5, rtol=1e-5)
    half = int(masked[:4].sum())
    assert du[:half].eq(0).all()
    torch.testing.assert_close(du[half:], whole_du[half:], atol=1e-4, rtol=1e-4)


def test_drawn_tangents_are_the_paths_where_the_teacher_is_certain(tiny_llada, tiny_oracle):
    """Of a certain teacher every draw is its token; a uniform draw is not, and the draws are the generator's."""
    batch = next(iter(tiny_oracle.train_dataloader()))
    embeds, masked = build(tiny_llada, tiny_oracle).teacher.embed(batch["input_ids"]), batch["response_mask"]
    r, t = torch.zeros(8), torch.full((8,), 0.5)
    sample = MaskingSample(embeds, masked, batch["attention_mask"], masked, r, t, 0.999 * t + 1e-3, n_equal=0)

    def derivative(tangent, sharpness, seed=0):
        module = build(tiny_llada, tiny_oracle, tangent=tangent, equal_share=0.0)
        module.student.soft_prompt.gate.data.fill_(0.5)
        v = sharpness * module.teacher.lm_head(module.teacher.hidden(embeds, batch["attention_mask"])[masked]).detach()
        return module.student_logits_and_derivative(sample, v, torch.Generator().manual_seed(seed))[1]

    along = derivative("path", 1e6)
    torch.testing.assert_close(derivative("sample", 1e6), along, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(derivative("argmax", 1e6), along, atol=1e-4, rtol=1e-4)
    assert (derivative("random", 1e6) - along).abs().max() > 0.1
    torch.testing.assert_close(derivative("sample", 1.0), derivative("sample", 1.0), atol=0, rtol=0)
    assert (derivative("sample", 1.0, seed=1) - derivative("sample", 1.0)).abs().max() > 0.1


@pytest.mark.parametrize(("hard_target", "loss"), [("flow", "kl"), ("data", "hard")])
@pytest.mark.parametrize("tangent", ["path", "source", "argmax"])
def test_a_step_by_hand_row_by_row(tiny_llada, tiny_oracle, tangent, loss, hard_target):
    """mean over hidden tokens of KL(softmax(v - (t - r) du/dt) || softmax u), du/dt from two forwards of the student."""
    options = {"tangent": tangent, "loss": loss, "hard_target": hard_target}
    module = build(tiny_llada, tiny_oracle, endpoint_share=0.25, correction_limit=None, **options)
    module.student.soft_prompt.gate.data.fill_(0.5)
    torch.nn.init.normal_(module.student.soft_prompt.head.weight, std=1.0)
    module.log = lambda *_, **__: None
    batch, draw, h = next(iter(tiny_oracle.train_dataloader())), torch.Generator().manual_seed(3), 1e-3
    first, second = torch.rand(2, 8, generator=draw)
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    t[:4], r[:4] = first[:4], first[:4]  # equal_share 0.5
    t[6:], r[6:] = 1.0, 0.0
    p = 0.999 * t + 1e-3
    chances = torch.rand(batch["input_ids"].shape, generator=draw)
    teacher, student, losses = module.teacher, module.student, []

    def logits(z, end, row):
        one = slice(row, row + 1)
        return teacher.lm_head(student.hidden(z.unsqueeze(0), batch["attention_mask"][one], r[one], end.view(1)))[0]

    with torch.no_grad():
        for row in range(8):
            x0 = batch["input_ids"][row]
            hidden = batch["response_mask"][row] & (chances[row] < p[row])
            xt = x0.masked_fill(hidden, teacher.mask_id)
            z, v = teacher.embed(xt), teacher(xt.unsqueeze(0))[0]
            drift = z - (teacher.embedding[v.argmax(-1)] if tangent == "argmax" else v.softmax(-1) @ teacher.embedding)
            drift = -drift if tangent == "source" else drift * 0.999 / p[row]
            drift = drift * hidden.unsqueeze(-1)
            du = (logits(z + h * drift, t[row] + h, row) - logits(z - h * drift, t[row] - h, row)) / (2 * h)
            u, target = logits(z, t[row], row), v - (t[row] - r[row]) * du
            if loss == "kl":
                one = (target.softmax(-1) * (target.log_softmax(-1) - u.log_softmax(-1))).sum(-1)
            else:
                one = -u.log_softmax(-1)[torch.arange(len(x0)), x0]
            losses.append(one[hidden])
    ours = module._step(batch, torch.Generator().manual_seed(3), "train").item()
    assert ours == pytest.approx(torch.cat(losses).mean().item(), rel=1e-2)


def test_a_batch_without_a_masked_token_has_loss_zero(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle)
    module.log = lambda *_, **__: None
    batch = {name: column[:1] for name, column in tiny_oracle.rows["train"].columns.items()}
    losses = [module._step(batch, torch.Generator().manual_seed(seed), "train") for seed in range(40)]
    assert all(loss.isfinite() for loss in losses)
    assert any(loss == 0 for loss in losses)


def test_corrections_are_bounded_without_the_part_that_no_softmax_sees():
    v, r, t = torch.zeros(2, 4), torch.zeros(2), torch.ones(2)
    du = torch.tensor([[3.0, -3.0, 3.0, -3.0], [100.1, 99.9, 100.1, 99.9]])
    bounded = meanflow_target(v, du, r, t, limit=1.0)
    torch.testing.assert_close(bounded[0], torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    torch.testing.assert_close(bounded[1], -du[1])
    with pytest.raises(UsageError, match="must be above 0"):
        meanflow_target(v, du, r, t, limit=0.0)


def test_raw_and_weighted_loss_differ_only_with_a_weighting(tiny_llada, tiny_oracle):
    batch = next(iter(tiny_oracle.train_dataloader()))
    values = {}
    for weighting in ("none", "inverse_p", "adaptive"):
        module = build(tiny_llada, tiny_oracle, weighting=weighting)
        module.student.soft_prompt.gate.data.fill_(0.5)
        seen = {}
        module.log = lambda name, value, seen=seen, **_: seen.__setitem__(name, value.item())
        module._step(batch, torch.Generator().manual_seed(3), "train")
        values[weighting] = (seen["train/raw_loss"], seen["train/loss"])
    assert values["none"][0] == values["none"][1]
    assert values["inverse_p"][0] == values["adaptive"][0] == values["none"][0]
    assert values["inverse_p"][1] > values["none"][1]
    assert values["adaptive"][1] <= 1.0


def _resume_options(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    return {"callbacks": [checkpoint, TrainableEMA(0.9)], "enable_checkpointing": True, "val_check_interval": 4}


@pytest.mark.parametrize("stop", [3, 8, 11])
def test_resume_gives_the_same_losses_and_weights_as_an_uninterrupted_run(tiny_llada, tiny_oracle, tmp_path, stop):
    """8 batches an epoch: stop in the middle of the first, at its end, and in the second."""
    whole, losses = build(tiny_llada, tiny_oracle), Losses()
    options = _resume_options(tmp_path)
    quiet_trainer(14, **(options | {"callbacks": [*options["callbacks"], losses]})).fit(whole, tiny_oracle)

    resumed, again = build(tiny_llada, tiny_oracle), Losses()
    trainer = quiet_trainer(14, callbacks=[TrainableEMA(0.9), again], val_check_interval=4)
    trainer.fit(resumed, tiny_oracle, ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True)
    assert again.seen == losses.seen[stop:]
    for name, p in resumed.named_parameters():
        assert torch.equal(p, dict(whole.named_parameters())[name]), name


def test_checkpoints_hold_only_what_trains_and_refuse_another_architecture(tiny_llada, tiny_oracle, tmp_path):
    module = build(tiny_llada, tiny_oracle)
    quiet_trainer(2, **_resume_options(tmp_path)).fit(module, tiny_oracle)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {name for name in dict(module.named_parameters()) if ".soft_prompt." in name}
    other = build(tiny_llada, tiny_oracle, prompt_length=5)
    with pytest.raises(UsageError, match="shape"):
        quiet_trainer(4).fit(other, tiny_oracle, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)


def test_saved_student_comes_back_and_refuses_another_base(tiny_llada, tiny_oracle, tmp_path):
    module = build(tiny_llada, tiny_oracle)
    quiet_trainer(2).fit(module, tiny_oracle)
    save_student(module.student, tmp_path / "student", {"teacher": "there"})
    assert sorted(p.name for p in (tmp_path / "student").iterdir()) == ["student.json", "student.safetensors"]
    again = load_student(tmp_path / "student", module.teacher)
    rows = tiny_oracle.rows["test"].columns
    r, t = torch.zeros(32), torch.ones(32)
    inputs = (rows["input_ids"], rows["attention_mask"], r, t)
    assert torch.equal(again(*inputs), module.student(*inputs))
    other = build(tiny_llada, tiny_oracle).teacher
    with torch.no_grad():
        other.embedding[5] += 0.1
    with pytest.raises(UsageError, match="trained on another base"):
        load_student(tmp_path / "student", other)
    (tmp_path / "student" / "student.safetensors").write_bytes(b"half")
    with pytest.raises(UsageError, match="cannot be read"):
        load_student(tmp_path / "student", module.teacher)


def test_a_checkpoint_of_another_teacher_is_refused(tiny_llada, tiny_oracle, tmp_path):
    module = build(tiny_llada, tiny_oracle)
    quiet_trainer(2, **_resume_options(tmp_path)).fit(module, tiny_oracle)
    other = build(tiny_llada, tiny_oracle)
    with torch.no_grad():
        other.teacher.embedding[5] += 0.1
    with pytest.raises(UsageError, match="another teacher"):
        quiet_trainer(4).fit(other, tiny_oracle, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)


def test_a_checkpoint_of_another_version_is_refused(tiny_llada, tiny_oracle, tmp_path):
    module = build(tiny_llada, tiny_oracle)
    quiet_trainer(2, **_resume_options(tmp_path)).fit(module, tiny_oracle)
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    torch.save(checkpoint | {"student_format": "leap-student-2"}, tmp_path / "old.ckpt")
    with pytest.raises(UsageError, match="another version"):
        quiet_trainer(4).fit(
            build(tiny_llada, tiny_oracle), tiny_oracle, ckpt_path=tmp_path / "old.ckpt", weights_only=True
        )


@pytest.mark.parametrize("option", [{"loss": "l1"}, {"hard_target": "x"}, {"tangent": "up"}, {"weighting": "w"}])
def test_unknown_options_are_named(tiny_llada, tiny_oracle, option):
    name = next(iter(option))
    with pytest.raises(UsageError, match=rf"module\.{name}=.* type one of"):
        build(tiny_llada, tiny_oracle, **option)
