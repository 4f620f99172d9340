"""The three stages: what each step computes, what trains, and that a run resumed inside any of them is the same run."""

import pytest
import torch
from helpers.noisy_mask import ALL, build, perturb
from helpers.trainer import Losses, quiet_trainer
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules.noisy_mask_flow import STAGES, NoisyMaskFlowModule
from lightning_modules.training.stages import Stages
from models.flow.losses import match_flow_map
from models.flow.options import NoisyMaskFlowOptions
from models.flow.solver import follow_flow
from models.functional.errors import UsageError


def test_steps_are_cut_among_the_stages():
    stages = Stages(ALL, STAGES)
    stages.plan(10)
    assert [stages.at(step)[0].name for step in range(10)] == ["adapt"] * 4 + ["flow"] * 3 + ["polish"] * 3
    assert stages.at(5)[1] == pytest.approx(1 / 3)
    stages.plan(3)
    assert [stages.at(step)[0].name for step in range(3)] == ["adapt", "flow", "polish"]
    uneven = {
        "adapt": {"share": 0.9, "lr": 1e-2},
        "flow": {"share": 0.05, "lr": 1e-2},
        "polish": {"share": 0.05, "lr": 1e-2},
    }
    crowded = Stages(uneven, STAGES)
    for steps, names in (
        (1, ["adapt"]),
        (2, ["adapt", "flow"]),
        (3, ["adapt", "flow", "polish"]),
        (10, ["adapt"] * 8 + ["flow", "polish"]),
    ):
        crowded.plan(steps)
        assert [crowded.at(step)[0].name for step in range(steps)] == names
    alone = Stages({"adapt": {"share": 0, "lr": 1e-3}, "flow": {"share": 1, "lr": 1e-3}}, STAGES)
    alone.plan(2)
    assert [stage.name for stage in alone.all] == ["flow"]
    assert 0 < alone.lr(1) < alone.lr(0) == pytest.approx(1e-3)


@pytest.mark.parametrize(("own", "peak"), [({}, 99), ({"warmup_steps": 400}, 399), ({"warmup_steps": 4000}, 499)])
def test_a_stage_warms_up_as_long_as_it_says_but_for_a_twentieth_at_most(own, peak):
    stages = Stages({"adapt": {"share": 1.0, "lr": 1e-3} | own}, STAGES)
    stages.plan(10_000)
    rates = [stages.lr(step) for step in range(1000)]
    assert max(range(1000), key=rates.__getitem__) == peak
    assert rates[(peak + 1) // 2 - 1] == pytest.approx(0.5e-3, rel=2e-2)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"adapt": {"share": 0.5, "lr": 1e-3}}, "must add up to 1, not 0.5"),
        ({"warm": {"share": 1.0, "lr": 1e-3}}, "module.stages.warm is not known"),
        ({"adapt": {"share": 1.0, "lr": 0.0}}, "lr above 0"),
        ({"adapt": {"share": 1.0, "lr": 1e-3, "warmup_steps": -1}}, "warmup_steps=-1 must be at least 0"),
        ({"adapt": {"share": 1.0, "lr": 1e-3, "warmup": 5}}, "adapt.warmup is not known"),
    ],
)
def test_wrong_stages_are_named(stages, message):
    with pytest.raises(UsageError, match=message):
        Stages(stages, STAGES)


@pytest.mark.parametrize("adapter", ["prefix", "prefix+mask_noise", "lora", "full"])
@pytest.mark.parametrize("target", ["psd", "meanflow"])
def test_every_adapter_and_target_trains_through_all_stages_and_the_teacher_stays(
    tiny_llada, tiny_oracle, adapter, target
):
    module = build(tiny_llada, tiny_oracle, adapter=adapter, target=target, lora_rank=2)
    before = {name: p.detach().clone() for name, p in module.teacher.named_parameters()}
    start, losses = module.student.trainable(), Losses()
    quiet_trainer(10, callbacks=[losses]).fit(module, tiny_oracle)
    assert all(torch.equal(p, before[name]) for name, p in module.teacher.named_parameters())
    changed = {
        name for name, p in module.student.named_parameters() if p.requires_grad and not torch.equal(p, start[name])
    }
    assert len(changed) >= len(start) - 1
    assert len(losses.seen) == 10
    assert all(torch.equal(p, module.average[name]) for name, p in module.student.named_parameters() if p.requires_grad)


def test_the_denoiser_is_what_adapt_left_and_stays(tiny_llada, tiny_oracle):
    module, seen = build(tiny_llada, tiny_oracle), {}

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                seen["average"] = {name: w.clone() for name, w in pl_module.average.items()}
            if trainer.global_step == 5:
                seen["denoiser"] = {name: w.clone() for name, w in pl_module.denoiser.items()}

    quiet_trainer(10, callbacks=[Recorder()]).fit(module, tiny_oracle)
    for name, weight in seen["average"].items():
        assert torch.equal(weight, seen["denoiser"][name]), name
        assert torch.equal(weight, module.denoiser[name]), name
    assert any(not torch.equal(w, module.denoiser[name]) for name, w in module.average.items())


@pytest.mark.parametrize("stop", [2, 4, 5, 7, 9])
def test_resumed_inside_any_stage_or_between_two_it_is_the_uninterrupted_run(tiny_llada, tiny_oracle, tmp_path, stop):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, losses = build(tiny_llada, tiny_oracle), Losses()
    options = {"enable_checkpointing": True, "val_check_interval": 4}
    quiet_trainer(10, callbacks=[checkpoint, losses], **options).fit(whole, tiny_oracle)

    resumed, again = build(tiny_llada, tiny_oracle), Losses()
    trainer = quiet_trainer(10, callbacks=[again], val_check_interval=4)
    trainer.fit(resumed, tiny_oracle, ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True)
    assert again.seen == losses.seen[stop:]
    for name, p in resumed.named_parameters():
        assert torch.equal(p, dict(whole.named_parameters())[name]), name


def test_compared_from_a_checkpoint_the_average_answers(tiny_llada, tiny_oracle, tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    module = build(tiny_llada, tiny_oracle)
    quiet_trainer(9, callbacks=[checkpoint], enable_checkpointing=True).fit(module, tiny_oracle)
    again = build(tiny_llada, tiny_oracle)
    quiet_trainer(9).test(again, tiny_oracle, ckpt_path=tmp_path / "step=9.ckpt", verbose=False, weights_only=True)
    for name, p in again.student.named_parameters():
        assert not p.requires_grad or torch.equal(p, module.average[name])


def test_a_run_is_resumed_with_its_own_optimizer_or_refused(tiny_llada, tiny_oracle, tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    quiet_trainer(4, callbacks=[checkpoint], enable_checkpointing=True).fit(build(tiny_llada, tiny_oracle), tiny_oracle)
    path = tmp_path / "step=2.ckpt"
    other = build(tiny_llada, tiny_oracle, optimizer="adamw")
    with pytest.raises(UsageError, match=r"type module\.optimizer=muon to go on"):
        quiet_trainer(4).fit(other, tiny_oracle, ckpt_path=path, weights_only=True)
    # to compare decoders no optimiser is needed
    quiet_trainer(4).test(other, tiny_oracle, ckpt_path=path, verbose=False, weights_only=True)


@pytest.mark.parametrize("weighted", [True, False])
def test_targets_of_the_flow_stage_do_not_move_with_the_student(tiny_llada, tiny_oracle, weighted):
    """With ψ^- and D from the same weights as the student the diagonal is at its optimum; with others it is not."""
    module = build(tiny_llada, tiny_oracle)
    perturb(module)
    student, batch = module.student, next(iter(tiny_oracle.train_dataloader()))
    own, other = student.trainable(), {name: w + 0.1 for name, w in student.trainable().items()}
    shares = {"diagonal_share": 1.0, "endpoint_share": 0.0, "observed_share": 0.0}
    options = NoisyMaskFlowOptions(target="psd", weighted=weighted, **shares)

    def gap(weights):
        networks, draw = (module.network(weights), module.network(weights)), torch.Generator().manual_seed(0)
        return match_flow_map(student, *networks, batch, draw, options, widest=1.0).raw["diagonal_gap"]

    assert gap(own).item() == pytest.approx(0.0, abs=1e-6)
    assert gap(other).item() > 1e-3


def moved(weights, size):
    draw = torch.Generator().manual_seed(7)
    return {name: w + size * torch.randn(w.shape, generator=draw) for name, w in weights.items()}


def flow_gaps(module, batch, **weights):
    """The gaps of a step of the flow stage, at intervals of every length, with other weights of its networks."""
    before = {name: getattr(module, name) for name in weights}
    for name, value in weights.items():
        setattr(module, name, value)
    raw = module.stage_terms("flow", batch, 1.0, torch.Generator().manual_seed(0)).raw
    for name, value in before.items():
        setattr(module, name, value)
    return raw["diagonal_gap"].item(), raw["flow_gap"].item()


@pytest.mark.parametrize("target", ["psd", "meanflow"])
def test_the_diagonal_is_the_denoisers_and_jumps_are_the_averages(tiny_llada, tiny_oracle, target):
    """Neither is the student's: with its own weights as targets the identities would hold for any student."""
    module, batch = build(tiny_llada, tiny_oracle, target=target), next(iter(tiny_oracle.train_dataloader()))
    perturb(module)
    own = module.student.trainable()
    module.average, module.denoiser = own, own
    diagonal, flow = flow_gaps(module, batch)
    assert diagonal == pytest.approx(0.0, abs=1e-6)  # the same weights
    other_diagonal, other_flow = flow_gaps(module, batch, denoiser=moved(own, 0.1))
    assert other_diagonal > 1e-3
    assert (abs(other_flow - flow) > 1e-4) == (target == "meanflow")  # whose identity is that of D
    same_diagonal, other_flow = flow_gaps(module, batch, average=moved(own, 0.1))
    assert same_diagonal == diagonal
    assert abs(other_flow - flow) > 1e-4


def test_pairs_are_made_with_the_denoiser(tiny_llada, tiny_oracle):
    module, batch = build(tiny_llada, tiny_oracle, observed_share=0.0), next(iter(tiny_oracle.train_dataloader()))
    perturb(module)
    module.denoiser = moved(module.student.trainable(), 0.3)
    module.stage_terms("polish", batch, 0.0, torch.Generator().manual_seed(0))
    (entry,), path = module.pairs.pool, module.student.path
    start = path.start_sample(entry, torch.Generator().manual_seed(entry["seed"]))
    ends = [
        follow_flow(path, net, start, forwards=4, step="ode")
        for net in (module.network(module.denoiser), module.student)
    ]
    same = [torch.equal(end[start.masked], entry["input_ids"][start.masked]) for end in ends]
    assert same == [True, False]


def test_derivatives_by_forward_ad_and_by_differences_give_the_same_loss(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle, adapter="lora", lora_rank=2)  # its frozen norms stay in float64
    perturb(module, 0.1)
    module.double()
    student, batch = module.student, next(iter(tiny_oracle.train_dataloader()))
    networks = (module.network(student.trainable()), module.network(student.trainable()))
    shares = {"diagonal_share": 0.0, "endpoint_share": 0.0, "observed_share": 0.0}

    def loss(**changes):
        options = NoisyMaskFlowOptions(meanflow_until=0.97, jvp_step=1e-5, **shares, **changes)
        draw = torch.Generator().manual_seed(1)
        return match_flow_map(student, *networks, batch, draw, options, widest=0.9).loss.item()

    torch.set_default_dtype(torch.float64)
    try:
        losses = [loss(jvp_backend=backend) for backend in ("forward_ad", "finite_difference")]
        psd = loss(target="psd")
    finally:
        torch.set_default_dtype(torch.float32)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - psd) > 1e-2 * psd  # another target


def test_the_denoisers_row_is_the_frozen_denoiser_and_not_the_student(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle)
    quiet_trainer(10).fit(module, tiny_oracle)
    rows, draw = tiny_oracle.rows["test"].columns, lambda: torch.Generator().manual_seed(0)
    before = module.decoders()[-1](rows, draw())
    perturb(module, 2.0)
    assert torch.equal(module.decoders()[-1](rows, draw()), before)
    assert not torch.equal(module.decoders()[-2](rows, draw())[:, :1].expand_as(before), before)


def test_a_plan_of_other_length_is_refused_and_says_what_to_type(tiny_llada, tiny_oracle, tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    quiet_trainer(6, callbacks=[checkpoint], enable_checkpointing=True).fit(build(tiny_llada, tiny_oracle), tiny_oracle)
    other, path = build(tiny_llada, tiny_oracle), tmp_path / "step=3.ckpt"
    with pytest.raises(UsageError, match=r"planned for 6 steps, this run has 20; type trainer\.max_steps=6"):
        quiet_trainer(20).fit(other, tiny_oracle, ckpt_path=path, weights_only=True)


def test_snapshots_follow_the_module_to_its_device(tiny_llada, tiny_oracle):
    """Checkpoints are read before the module moves: what they bring must be moved when fitting starts."""
    module = build(tiny_llada, tiny_oracle)
    module.stages.plan(10)
    module.average = module.denoiser = module.student.trainable()
    module.to("meta")
    module.on_fit_start()
    assert all(weight.is_meta for part in (module.average, module.denoiser) for weight in part.values())


def test_flow_without_an_adapted_student_is_refused(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle, stages={"flow": {"share": 1.0, "lr": 1e-3}})
    with pytest.raises(UsageError, match="was never adapted"):
        quiet_trainer(2).fit(module, tiny_oracle)


def test_half_precision_training_is_refused_with_a_sentence(tiny_llada, tiny_oracle):
    with pytest.raises(UsageError, match=r"trainer\.precision=bf16-true"):
        quiet_trainer(2, precision="bf16-true").fit(build(tiny_llada, tiny_oracle), tiny_oracle)


@pytest.mark.parametrize("adapter", ["prefix", "prefix+mask_noise", "lora"])
def test_a_base_in_half_precision_trains_and_answers(tiny_llada, tiny_oracle, adapter):
    ids = tiny_oracle.tokenizer
    teacher = tiny_llada(len(ids), mask_token_id=ids.mask_token_id, eos_token_id=1, pad_token_id=0).to(torch.bfloat16)
    sizes = {"prompt_length": 3, "prompt_hidden_size": 8, "prompt_rank": 4, "lora_rank": 2, "ode_steps": 2}
    module = NoisyMaskFlowModule(teacher, adapter=adapter, stages=ALL, forwards=(1,), ode_forwards=(2,), **sizes)
    losses = Losses()
    quiet_trainer(6, callbacks=[losses]).fit(module, tiny_oracle)
    assert all(torch.isfinite(torch.tensor(losses.seen)))
    rows = tiny_oracle.rows["test"].columns
    for decoder in module.decoders():
        assert decoder(rows, torch.Generator().manual_seed(0)).shape == (32, tiny_oracle.response_length)


def test_rows_of_the_student_say_how_many_weights_train(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle, adapter="prefix")
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    base = sum(p.numel() for p in module.teacher.parameters())
    of_student = {"trained_weights": trained, "base_weights": base, "trained_share": trained / base}
    figures = [module.decoder_figures(k)["cost"] for k in range(6)]  # the last one is a control of the corpus
    assert figures == [{}, {}, of_student, of_student, of_student, {}]
    assert trained != base


def test_decoders_are_named_and_answer(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle)
    rows = {name: column[:3] for name, column in tiny_oracle.rows["test"].columns.items()}
    names = [(d.name, d.forwards) for d in module.decoders()]
    assert names == [
        ("teacher, sampled", 1),
        ("teacher, sampled", 2),
        ("student", 1),
        ("student", 2),
        ("denoiser's flow", 2),
    ]
    for decoder in module.decoders():
        assert decoder(rows, torch.Generator().manual_seed(0)).shape == (3, tiny_oracle.response_length)
    warmer = build(tiny_llada, tiny_oracle, teacher_temperatures=(0.8,)).decoders()
    assert [d.name for d in warmer[:4]] == ["teacher, sampled"] * 2 + ["teacher, sampled at 0.8"] * 2


@pytest.mark.parametrize(
    "option",
    [{"target": "up"}, {"few_step": "far"}, {"adapter": "x"}, {"coupling": "none"}, {"growth": 2.0}, {"meanflow_until": 1.0},
     {"pair_reuse": 0}, {"sigma": -1.0}, {"teacher_remasking": "x"}, {"promote": 0.3}, {"diagonal_share": -0.5},
     {"interval_share": 1.0}, {"few_step": "ode"}],
)  # fmt: skip
def test_unknown_options_are_named(tiny_llada, tiny_oracle, option):
    with pytest.raises(UsageError, match=rf"module\.{next(iter(option))}="):
        build(tiny_llada, tiny_oracle, **option)
