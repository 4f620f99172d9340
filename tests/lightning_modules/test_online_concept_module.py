"""Nothing compressed is the plain model; terms move what they should; rates are held; records, resume, files."""

import pytest
import torch
from helpers.causal import PackedStream, packed_batch
from helpers.daily import daily
from helpers.online_module import ALL, PLAIN, body, build, oracle_body
from helpers.resume import assert_resumed_is_uninterrupted
from helpers.trainer import Losses, quiet_trainer
from lightning import Callback
from torch.testing import assert_close

from callbacks.frontier import FrontierReport
from lightning_modules.online_concept import OnlineConceptModule
from lightning_modules.pretrain import PretrainModule
from models.backbones.causal_lm import causal_nll, save_causal
from models.functional.next_token import causal_text
from models.objectives.next_token import NextToken
from models.online.concept_stack import CompressionSettings
from models.online.growth import GROWTH
from models.online.terms import online_terms
from reporting.record import read_record


class Rates(Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_) -> None:
        self.seen.append(1 / float(trainer.callback_metrics.get("monitor/compression", 1)))


# -- what is learned -----------------------------------------------------------------------------------------------------


def test_without_compression_it_trains_as_the_plain_model_does(tiny_oracle):
    found = []
    for module in (
        build(oracle_body(tiny_oracle), **PLAIN),
        PretrainModule(oracle_body(tiny_oracle), NextToken(), lr=3e-3, warmup_steps=1, seed=7),
    ):
        losses = Losses()
        trainer = quiet_trainer(6, callbacks=[losses], val_check_interval=6)
        trainer.fit(module, tiny_oracle)
        found.append([*losses.seen, trainer.callback_metrics["val/nll"].item()])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# term -> weights that it may move, beside what lies below the states it is worked out from
MOVES = {
    "text": ("backbone", "router", "codes", "bridge", "carry", "pool"),
    "ratio": ("backbone", "router", "codes"),  # codes: what NULL is weighed against
    "code": ("backbone", "codes", "pool"),
    "usage": ("backbone", "codes.head", "pool"),
}


@pytest.mark.parametrize("name", MOVES)
def test_each_term_moves_what_it_should(name):
    module, text = build(), causal_text(packed_batch(4, 12))
    module.model.train()
    settings = CompressionSettings(2.0, 0.5, 1.0, 1.0, torch.Generator().manual_seed(0))
    nll, levels = module._nll(text, settings)
    raw = {"text": nll.mean(), **online_terms(module.model, levels, text)}
    raw[name].backward()
    moved = {n for n, p in module.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    for part in MOVES[name]:
        assert any(part in n for n in moved), part
    assert all(any(part in n for part in MOVES[name]) for n in moved), moved


def test_codes_that_no_layer_reads_have_no_terms():
    states, codes = build(quantisation=(0.0, 0.0)), build(quantisation=(0.0, 0.1))
    assert states.weights == ALL | {"code": 0.0, "usage": 0.0}
    assert codes.weights == ALL


def test_what_is_new_is_in_training_mode_from_the_first_step():
    """A backbone that comes in evaluation mode stays in it: codes would not learn while states still go through."""
    model = body().eval()
    module, modes = build(model), []
    watch = type("W", (Callback,), {"on_train_batch_start": lambda s, t, m, *_: modes.append(m.model.stack.training)})
    quiet_trainer(1, callbacks=[watch()]).fit(module, PackedStream())
    assert modes == [True]
    assert not model.training


def test_the_draft_learns_from_its_own_loss_alone():
    module, text = build(growth="entropy"), causal_text(packed_batch(4, 12))
    _, levels = module._nll(text, CompressionSettings(2.0, 0.5))
    online_terms(module.model, levels, text)["draft"].backward()
    grads = {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert "stack.router.adapt.weight" in grads
    assert not any("layers" in n for n in grads)  # the states are held
    assert online_terms(build().model, build()._nll(text, CompressionSettings(2.0, 0.5))[1], text)["draft"] == 0


def test_the_draft_of_several_tokens_is_the_mean_over_all_of_them_in_the_mean():
    """Each position draws one of the tokens after it: the mean over draws is that over all, and states get no gradient."""
    module, text = build(growth="draft", most_nulls=2, compression=(1.0, 2.0)), causal_text(packed_batch(4, 12))
    router, hidden = module.model.stack.router, module._nll(text, CompressionSettings(2.0, 0.5))[1][0].hidden
    torch.nn.init.normal_(router.adapt.weight)
    draw = torch.Generator().manual_seed(0)
    each = []
    with torch.no_grad():
        for k in range(2):  # of every position that has a token so far ahead
            logits = router.draft(hidden[:, : 12 - k], torch.full((4, 12 - k), k + 1))
            each.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.targets[:, k:].flatten()))
        drawn = torch.stack([router.draft_nll(hidden, text, draw) for _ in range(400)])
    assert (each[0] - each[1]).abs() > 0.1  # control: the next token alone has another mean
    # drawn alike, the second token counts for 11 of 12 positions
    assert_close(drawn.mean(), (12 * each[0] + 11 * each[1]) / 23, atol=0.02, rtol=0)
    router.draft_nll(hidden, text, draw).backward()
    moved = {n for n, p in module.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {f"stack.router.{part}.weight" for part in ("ahead", "mix", "adapt")} <= moved
    assert not any("layers" in name for name in moved)


def test_ratio_is_skipped_where_nothing_is_compressed_or_learned():
    text = causal_text(packed_batch(4, 12))
    for module, compression, there in (
        (build(), 1.0, False),
        (build(growth="fixed"), 2.0, False),
        (build(), 2.0, True),
    ):
        _, levels = module._nll(text, CompressionSettings(compression, 0.5))
        assert bool(online_terms(module.model, levels, text)["ratio"]) == there


@pytest.mark.parametrize("growth", daily(GROWTH, "null", "accumulate", "draft"))
def test_the_realised_rate_is_held(growth):
    data = PackedStream((4, 4, 4))
    data.batches = [packed_batch(6, 40, seed=k) for k in range(3)]
    rates = Rates()
    options = {"growth": growth, "compression": (2.5, 2.5), "noise": (0.0, 0.0), "most_nulls": 7}
    quiet_trainer(45, callbacks=[rates], log_every_n_steps=1).fit(build(**options), data)
    assert sum(rates.seen[-15:]) / 15 == pytest.approx(0.4, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("growth", ["null", "accumulate"])
def test_multipliers_train_a_router_to_the_rate(growth):
    """From an offset that leaves forced commits nearly alone; a router without rate control stays off the rate."""
    found = []
    for hold in (True, False):
        data, rates = PackedStream(), Rates()
        data.batches = [packed_batch(6, 40, seed=k) for k in range(3)]
        options = {"growth": growth, "compression": (2.5, 2.5), "noise": (0.0, 0.0), "most_nulls": 7, "hold_rate": hold}
        options |= {"weights": {"text": 1.0}, "rate_control": "multiplier"}
        module = build(**options)
        module.model.stack.router.offset.fill_(1.0)
        quiet_trainer(150, callbacks=[rates], log_every_n_steps=1).fit(module, data)
        assert float(module.model.stack.router.offset) == 1.0
        found.append(abs(sum(rates.seen[-15:]) / 15 - 0.4))
    assert found[0] < 0.03
    assert found[1] > 0.06


def test_multipliers_count_every_micro_batch_of_a_step():
    """Gain times the mean excess of all positions of both micro-batches, and a loss of the mean commit probability."""
    data = PackedStream()
    data.batches = [packed_batch(rows, 12, seed=rows) for rows in (4, 2)]
    module = build(compression=(2.0, 2.0), noise=(0.0, 0.0), rate_control="multiplier", lr=0.0)
    with torch.no_grad():
        levels = [module._nll(causal_text(batch), CompressionSettings(2.0, 0.5))[1] for batch in data.batches]
    excess = sum(float((r.commit.double() - 0.5 * r.valid).sum()) for r in (level[0].routing for level in levels))
    quiet_trainer(1, accumulate_grad_batches=2).fit(module, data)
    value = module.multipliers.GAIN * excess / (6 * 12)
    assert module.multipliers.values.tolist() == pytest.approx([value])
    r = levels[0][0].routing
    weight = value + module.multipliers.PENALTY * (r.commit.double().mean() - 0.5)
    wanted = float(weight * (r.probability.mean() - 0.5))
    assert float(module.multipliers.loss(levels[0])) == pytest.approx(wanted, rel=1e-4)


def test_entropies_get_a_threshold_after_one_step():
    """Before it every position commits; a step of half their spread at a time would need as many steps as they lie above 0."""
    data, rates = PackedStream(), Rates()
    data.batches = [packed_batch(6, 40)]
    options = {"growth": "entropy", "compression": (2.5, 2.5), "most_nulls": 15, "lr": 1e-6}
    quiet_trainer(3, callbacks=[rates], log_every_n_steps=1).fit(build(**options), data)
    assert rates.seen[0] > 0.95
    assert rates.seen[1:] == pytest.approx([0.4, 0.4], abs=0.1)


def test_a_rate_that_is_not_held_goes_its_own_way():
    data, rates = PackedStream((4,)), Rates()
    data.batches = [packed_batch(8, 48)]
    module = build(growth="autoregressive", compression=(2.5, 2.5), noise=(0.0, 0.0), hold_rate=False, most_nulls=7)
    module.model.stack.router.offset.fill_(1.0)
    quiet_trainer(20, callbacks=[rates], log_every_n_steps=1).fit(module, data)
    assert rates.seen[0] == pytest.approx(1 / 8)  # forced commits alone
    assert float(module.model.stack.router.offset) == 1.0


def test_values_are_annealed_from_the_first_to_the_last():
    module, seen = build(anneal_share=0.5, quantisation=(0.0, 1.0)), []
    watch = type("W", (Callback,), {"on_train_batch_end": lambda self, t, m, *_: seen.append(m.model.setting.tolist())})
    quiet_trainer(8, callbacks=[watch()]).fit(module, PackedStream((2, 2)))
    assert seen == [[1 + k / 4, k / 4] for k in range(4)] + [[2.0, 1.0]] * 4


class Settings(Callback):
    """What every step was trained with, and the progress behind it."""

    def __init__(self) -> None:
        self.seen, self.gaps = [], []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.seen.append(module.model.setting.tolist())
        self.gaps.append(module.pace.gap)


def test_compression_waits_for_the_loss():
    """Within the tolerance it is annealed as by the steps alone; beyond it, it stays where it is."""
    data, paced = PackedStream((2, 2)), {"anneal_share": 0.5, "quantisation": (0.0, 1.0), "gap_every": 1}
    free, held = Settings(), Settings()
    quiet_trainer(8, callbacks=[free]).fit(build(gap_tolerance=100.0, **paced), data)
    assert free.seen == [[1 + k / 4, k / 4] for k in range(4)] + [[2.0, 1.0]] * 4
    assert free.gaps[0] == 0.0  # nothing is compressed yet
    assert free.gaps[-1] != 0.0
    module = build(gap_tolerance=1e-6, **paced)
    module._measure_gap = lambda pace, nll, text: pace.add(nll.sum() + 1.0, nll.sum(), text.weights.sum())
    quiet_trainer(8, callbacks=[held]).fit(module, data)
    assert held.seen == [[1.0, 0.0]] * 8


def test_the_gap_is_measured_in_one_step_of_so_many():
    module, seen = build(gap_tolerance=1.0, gap_every=3), []
    module._measure_gap = lambda *_: seen.append(module.global_step)
    quiet_trainer(7).fit(module, PackedStream((2, 2)))
    assert seen == [0, 3, 6]


def test_the_gap_is_the_loss_beside_that_of_the_same_weights():
    module = build(gap_tolerance=1.0, compression=(2.0, 2.0), quantisation=(1.0, 1.0), noise=(0.0, 0.0))
    text = causal_text(packed_batch(4, 12))
    compressed = module._nll(text)[0]
    module._measure_gap(module.pace, compressed, text)
    module.pace.apply(0.0, lambda own: own.unsqueeze(0))
    plain = causal_nll(module.model.backbone, text)
    wanted = (compressed.sum() - plain.sum()) / text.weights.sum()
    assert abs(wanted) > 1e-3
    assert module.pace.gap == pytest.approx(float(wanted), rel=1e-4)


def test_codes_start_at_centres_of_their_points_and_follow_them():
    """Before the first step they all lie at 0; a lattice stays where it is."""
    data, seen, dead = PackedStream((4,)), [], []
    module = build(sampler="ema_vq", growth="fixed", compression=(2.0, 2.0), code_decay=0.9)
    space = module.model.stack.codes.space

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            seen.append(space.books[0])
            dead.append(float(trainer.callback_metrics["monitor/dead_codes"]))

    quiet_trainer(3, callbacks=[Watch()]).fit(module, data)
    assert seen[0].codes.abs().max() > 0
    assert seen[0].counts.min() > 0
    assert dead[0] == 0  # k-means centres all have points
    assert seen[2].codes.sub(seen[1].codes).abs().max() > 1e-4
    fixed = build(sampler="fsq")
    lattice = fixed.model.stack.codes.space.codes.clone()
    quiet_trainer(2).fit(fixed, PackedStream((4,)))
    assert torch.equal(lattice, fixed.model.stack.codes.space.codes)


@pytest.mark.parametrize("growth", ["fixed", "entropy"])  # scores of entropy differ from row to row
def test_codes_and_rates_of_accumulated_micro_batches_are_those_of_one_big_batch(growth):
    """Two optimiser steps over the same rows in the same order."""
    stream, found = packed_batch(9, 12), []
    for rows, accumulated in (([6, 3], 1), ([2, 2, 2, 1, 1, 1], 3)):
        parts = {name: column.split(rows) for name, column in stream.items()}
        data = PackedStream()
        data.batches = [{name: parts[name][k] for name in parts} for k in range(len(rows))]
        options = {"sampler": "ema_vq", "growth": growth, "code_decay": 0.9, "weights": {"text": 1.0}}
        module = build(**options, compression=(2.5, 2.5), quantisation=(1.0, 1.0), noise=(0.0, 0.0))
        quiet_trainer(2, accumulate_grad_batches=accumulated).fit(module, data)
        found.append((*module.model.stack.codes.space.books[0], module.model.stack.router.offset))
    for big, small in zip(*found, strict=True):
        assert_close(small, big, atol=1e-5, rtol=1e-4)
    assert (found[0][-1] != 0) == (growth == "entropy")


@pytest.mark.parametrize("sampler", ["fsq", "ema_vq"])
def test_points_learn_from_the_text(sampler):
    module, text = build(sampler=sampler), causal_text(packed_batch(4, 12))
    if sampler == "ema_vq":
        torch.nn.init.normal_(module.model.stack.codes.space.codes)
    nll, _ = module._nll(text, CompressionSettings(2.0, 1.0))
    nll.mean().backward()
    for part in (module.model.stack.codes.space.to_point, module.model.stack.codes.space.to_embedding):
        assert part.weight.grad.abs().max() > 1e-6
    assert module.model.backbone.model.embed_tokens.weight.grad.abs().max() > 1e-6


def test_a_gate_whose_gradient_is_computed_on_some_steps():
    module, seen = build(gate="visibility", gate_every=2), []
    read = module.model.read
    module.model.read = lambda *given, **more: seen.append(given[3].gated) or read(*given, **more)
    quiet_trainer(4, limit_val_batches=0).fit(module, PackedStream((2, 2)))
    assert seen == [True, False, True, False]


# -- what is kept ----------------------------------------------------------------------------------------------------------


def test_the_record_has_quality_and_cost(tmp_path, tiny_oracle):
    base = oracle_body(tiny_oracle)
    save_causal(base, tmp_path / "base")
    module = build(oracle_body(tiny_oracle), baseline=str(tmp_path / "base"), **PLAIN)
    quiet_trainer(1, callbacks=[FrontierReport(tmp_path, "online", {})]).test(module, tiny_oracle, verbose=False)
    rows = read_record(tmp_path / "record.json")["rows"]
    (model,) = (row for row in rows if row["method"] == "model")
    quality = model["quality"]
    assert quality["nll"] == pytest.approx(quality["baseline_nll"], rel=1e-6)  # nothing is compressed: the same model
    assert quality["compression"] == 1.0
    assert quality["nll_truth"] < quality["nll"]
    online = [row for row in rows if row["method"] == "student"]
    assert [row["decoder"] for row in online] == ["online concepts, greedy", "online concepts"]
    for row in (model, *online):
        assert row["cost"]["prefill_tokens_per_s"] > 0
        assert row["cost"]["decode_tokens_per_s"] > 0
    a_token = 3 * 2 * 2 * 4 * 4  # three layers, keys and values, two heads of width 4, float32
    few = tiny_oracle.rows["test"].columns["attention_mask"][:16].sum() / 16
    tokens = model["cost"]["kv_bytes"] / a_token
    assert few - 2 < tokens - 32 <= few + 1
    assert all("kv_bytes" not in row["cost"] for row in rows if row["method"] == "control")


def test_documents_alone_are_recorded_too(tmp_path):
    save_causal(body(), tmp_path / "base")
    module, data = build(baseline=str(tmp_path / "base"), growth="fixed", compression=(2.0, 2.0)), PackedStream()
    quiet_trainer(2, callbacks=[FrontierReport(tmp_path, "online", {})]).fit(module, data)
    quiet_trainer(1, callbacks=[FrontierReport(tmp_path, "online", {})]).test(module, data, verbose=False)
    (row,) = read_record(tmp_path / "record.json")["rows"]
    assert {"nll", "bits_per_byte"} <= row["quality"].keys()
    assert row["quality"]["compression"] == pytest.approx(2.0)
    assert row["quality"]["nll"] != pytest.approx(row["quality"]["baseline_nll"], abs=1e-4)  # one of them was trained
    # six columns and 32 new ones, every second a concept: of three layers one keeps all, one concepts, one no tail
    a_slot = 2 * 2 * 4 * 4  # keys and values of two heads of width 4, float32
    assert row["cost"]["kv_bytes"] == a_slot * (38 + 19 + 19)
    assert min(row["cost"]["prefill_tokens_per_s"], row["cost"]["decode_tokens_per_s"]) > 0
    # a layer of width 16 with keys and values of half of it, feed-forward 24; 7 tokens, 8 codes
    layer, output, bridge, codes = 16 * (16 + 8 + 8 + 16) + 3 * 16 * 24, 7 * 16, 16 * 16, 8 * 16
    ours = (
        2 * layer + 2 * bridge + (layer + bridge + codes) / 2
    )  # a token, the concept before it; a concept, the tail it ends
    assert row["cost"]["flops_share"] == pytest.approx((ours + output) / (3 * layer + output))
    assert row["cost"]["equal_layers"] == pytest.approx(ours / layer)


def test_documents_of_a_row_are_kept_apart():
    """The NLL of a row with two documents is that of the documents alone."""
    module = build(growth="fixed", compression=(2.0, 2.0))
    batch = PackedStream((3,), documents=True).batches[0]
    own = module.eval()._nll(causal_text(batch))[0]
    for part in (slice(0, 4), slice(4, 6)):
        alone = {name: column[:, part] for name, column in batch.items() if name in ("input_ids", "labels")}
        assert_close(own[:, part], module._nll(causal_text(alone))[0])
    merged = {name: batch[name] for name in ("input_ids", "labels")}
    assert not torch.allclose(own, module._nll(causal_text(merged))[0])
    losses = Losses()
    quiet_trainer(2, callbacks=[losses]).fit(build(), PackedStream(documents=True))
    assert len(losses.seen) == 2


@pytest.mark.parametrize(
    ("growth", "sampler", "control"),
    [("null", "gumbel_st", "offset"), ("accumulate", "ema_vq", "offset"), ("null", "gumbel_st", "multiplier")],
)
@pytest.mark.parametrize("tolerance", [None, 0.02])
def test_resumed_is_uninterrupted(tmp_path, tiny_oracle, growth, sampler, control, tolerance):
    def module() -> OnlineConceptModule:
        paced = {"gap_tolerance": tolerance, "gap_every": 2}
        return build(oracle_body(tiny_oracle), growth=growth, sampler=sampler, rate_control=control, **paced)

    whole, resumed, *_ = assert_resumed_is_uninterrupted(module, tiny_oracle, tmp_path, val_check_interval=4)
    assert (float(whole.model.stack.router.offset) != 0) == (control == "offset")
    if control == "multiplier":
        assert whole.multipliers.values.tolist() == resumed.multipliers.values.tolist() != [0.0]
    if tolerance is not None:
        assert whole.pace.progress > 0
        assert whole.pace.state().tolist() == resumed.pace.state().tolist()
