"""Step halving: targets against enumeration, rounds that hand over, and a resumed run that is the same run."""

import pytest
import torch
from helpers.trainer import quiet_trainer
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules.step_halving import StepHalvingModule
from models.flow.step_halving import halve_steps, two_step_target
from models.functional.errors import UsageError

JOINT = torch.tensor([[0.4, 0.1], [0.0, 0.5]])  # p(first, second) of two words that hang together


def exact_teacher(xt, masked, attention_mask, response_mask):
    """Logits of p(x_l | the other word where it is known) over the words 0, 1 and the mask 2."""
    rows = []
    for (a, b), hidden in zip(xt.tolist(), masked, strict=True):
        first = JOINT.sum(1) if b == 2 else JOINT[:, b] / JOINT[:, b].sum()
        second = JOINT.sum(0) if a == 2 else JOINT[a] / JOINT[a].sum()
        rows += [p for p, h in zip((first, second), hidden, strict=True) if h]
    return torch.cat([torch.stack(rows), torch.ones(len(rows), 1)], -1).log() if rows else torch.zeros(0, 3)


def target(n, t=1.0, step=0.5, seed=0):
    xt = torch.full((n, 2), 2)
    everything = torch.ones(n, 2, dtype=torch.bool)
    options = (exact_teacher, xt, everything, everything, everything, torch.full((n,), t))
    return two_step_target(*options, step, 2, torch.Generator().manual_seed(seed)).view(n, 2, 3)


def test_targets_are_the_teachers_where_it_decides():
    """Each word has the marginal of the first step, or the conditional on the word that the first step revealed."""
    got = target(400)
    allowed = [JOINT.sum(1), JOINT.sum(0), *(JOINT / JOINT.sum(1, keepdim=True)), *(JOINT / JOINT.sum(0)).T]
    distance = torch.stack([(got[..., :2] - p).abs().amax(-1) for p in allowed]).amin(0)
    assert distance.max() < 1e-5
    assert got[..., 2].max() < 1e-6  # the mask is never a target
    conditioned = (got[:, 0, :2] - JOINT.sum(1)).abs().amax(-1) > 1e-3
    assert conditioned.float().mean().item() == pytest.approx(0.25, abs=0.06)  # revealed second, the other one first


def test_on_average_the_target_is_the_marginal_so_one_forward_cannot_do_better():
    got = target(4000).mean(0)
    torch.testing.assert_close(got[:, :2], torch.stack([JOINT.sum(1), JOINT.sum(0)]), atol=0.02, rtol=0)
    # control: without the second step nothing depends on the first one's draws
    assert target(400, t=1.0, step=1e-9)[:, 0].std(0).max() < 1e-6
    assert target(400)[:, 0].std(0).max() > 0.05


def build(tiny_llada, data, **options):
    torch.manual_seed(0)
    ids = data.tokenizer
    teacher = tiny_llada(len(ids), mask_token_id=ids.mask_token_id, eos_token_id=1, pad_token_id=0)
    return StepHalvingModule(teacher, **({"start_forwards": 4, "forwards": (1,), "student_forwards": (1, 2)} | options))


def test_at_its_own_optimum_the_loss_is_the_spread_of_the_targets_and_other_weights_raise_it(tiny_llada, tiny_oracle):
    module, batch = build(tiny_llada, tiny_oracle), next(iter(tiny_oracle.train_dataloader()))
    teacher = module.network(module.student.trainable())
    same = halve_steps(module.student, teacher, batch, 0.25, torch.Generator().manual_seed(0)).loss
    with torch.no_grad():
        for p in module.student.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    moved = halve_steps(module.student, teacher, batch, 0.25, torch.Generator().manual_seed(0)).loss
    assert 0 <= same < moved


def test_a_round_learns_from_its_own_teacher_and_not_from_the_student(tiny_llada, tiny_oracle):
    module, batch = build(tiny_llada, tiny_oracle), next(iter(tiny_oracle.train_dataloader()))

    def loss():
        return module.stage_terms("to_2", batch, 0.0, torch.Generator().manual_seed(0)).loss.item()

    own = module.student.trainable()
    module.round_teacher = own
    before = loss()
    draw = torch.Generator().manual_seed(7)
    module.round_teacher = {name: w + 0.3 * torch.randn(w.shape, generator=draw) for name, w in own.items()}
    assert loss() > before + 1e-2


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_rounds_hand_over_and_the_first_teacher_stays(tiny_llada, tiny_oracle, adapter):
    module = build(tiny_llada, tiny_oracle, adapter=adapter, lora_rank=2)
    before = {name: p.detach().clone() for name, p in module.teacher.named_parameters()}
    seen = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.stage_begun)

    quiet_trainer(6, callbacks=[Recorder()]).fit(module, tiny_oracle)
    assert seen == ["to_2"] * 3 + ["to_1"] * 3
    assert all(torch.equal(p, before[name]) for name, p in module.teacher.named_parameters())
    names = [(decoder.name, decoder.forwards) for decoder in module.decoders()]
    assert names == [("teacher, sampled", 1), ("step halving", 1), ("step halving", 2)]


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resumed_in_any_round_it_is_the_uninterrupted_run(tiny_llada, tiny_oracle, tmp_path, stop):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = build(tiny_llada, tiny_oracle)
    quiet_trainer(6, callbacks=[checkpoint], enable_checkpointing=True, val_check_interval=2).fit(whole, tiny_oracle)
    resumed = build(tiny_llada, tiny_oracle)
    path = tmp_path / f"step={stop}.ckpt"
    quiet_trainer(6, val_check_interval=2).fit(resumed, tiny_oracle, ckpt_path=path, weights_only=True)
    for name, p in resumed.named_parameters():
        assert torch.equal(p, dict(whole.named_parameters())[name]), name


@pytest.mark.parametrize("forwards", [1, 12])
def test_forwards_that_cannot_be_halved_are_named(tiny_llada, tiny_oracle, forwards):
    with pytest.raises(UsageError, match=rf"module\.start_forwards={forwards} must be a power of two"):
        build(tiny_llada, tiny_oracle, start_forwards=forwards)
