"""Every loss has the gradients that it should have, figures by hand, exact resume, and a plan that is learned and used."""

import math

import pytest
import torch
from helpers.concept import ALL, SIGNALS, TYPES, batch_of
from helpers.concept import build_planner_executor as build
from helpers.resume import assert_resumed_is_uninterrupted
from helpers.trainer import Losses, quiet_trainer
from lightning import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch.testing import assert_close

from callbacks.frontier import FrontierReport
from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from models.functional.bag_of_words import bag_of_words_nll
from models.functional.errors import UsageError
from models.functional.rows import signals_of
from models.plans.planner import greedy, relaxed
from models.plans.rows import posterior_input, prompt_of, response_of
from models.plans.signals import SignalHeads
from models.plans.terms import NAMES, plan_terms
from reporting.record import read_record

DRAWN = [name for name in NAMES if name != "posterior"]  # that one teaches the posterior plans that were searched


class LossesAndFigures(Losses):
    def __init__(self) -> None:
        super().__init__()
        self.figures: list[dict[str, float]] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        self.figures.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


class KeepOptimizer(Callback):
    def __init__(self, kept: dict) -> None:
        self.kept = kept

    def on_train_start(self, trainer, pl_module) -> None:
        self.kept["optimizer"] = trainer.optimizers[0]


# -- losses ----------------------------------------------------------------------------------------------------------


def slopes(data, name: str, **options) -> dict[str, float]:
    """Size of one raw term's gradient in logits of posterior and prior, and in the plan that the executor reads."""
    module, batch = build(data, **options), batch_of(data)
    heads = SignalHeads(module.model, SIGNALS, data.signal_sizes)
    generator = torch.Generator().manual_seed(0)
    kept = {}

    def choose(logits):
        logits.retain_grad()
        kept.setdefault("posterior", []).append(logits)
        return relaxed(generator, 1.0)(logits)

    plan = module.planner.draw(*posterior_input(batch, "all"), choose)
    prior = module.planner.score(*prompt_of(batch), plan.choices)
    prior.retain_grad()
    text = response_of(batch)
    logits = module.executor.logits(plan.ids, plan.embeds, text)
    raw = {"text": torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.flatten())}
    raw |= plan_terms(
        plan, prior, module.model.vocabulary, tokens=text.shape[1], floor=module.options.free_bits, quota=1.0
    )
    raw["signals"] = -heads.log_prob(plan.embeds, signals_of(batch)).mean()
    raw["bag"] = bag_of_words_nll(module.bag(plan.embeds), text).mean()
    raw[name].backward()

    def size(tensors):
        return sum(float(t.grad.abs().sum()) for t in tensors if t.grad is not None)

    return {"posterior": size(kept["posterior"]), "prior": size([prior])}


@pytest.mark.parametrize("name", DRAWN)
def test_each_loss_moves_what_it_should(tiny_oracle, name):
    found = slopes(tiny_oracle, name)
    if name == "planner":
        assert found["prior"] > 1e-4
        assert found["posterior"] == 0
    else:
        assert found["posterior"] > 1e-6
        assert found["prior"] == 0


def test_free_bits_switch_the_rate_off_below_the_floor(tiny_oracle):
    assert slopes(tiny_oracle, "rate", free_bits=100.0)["posterior"] == 0


@pytest.mark.parametrize("name", DRAWN)
def test_each_loss_is_switched_by_its_weight(tiny_oracle, name):
    """The whole is the sum of its parts, and one alone is that part."""

    def loss(weights):
        losses = Losses()
        quiet_trainer(1, callbacks=[losses]).fit(build(tiny_oracle, weights=weights), tiny_oracle)
        return losses.seen[0]

    others = {other: 1.0 for other in NAMES if other != name}
    assert loss({name: 2.0}) + loss(others) - loss({name: 1.0}) == pytest.approx(loss(ALL), rel=1e-4)
    assert loss({name: 1.0}) != 0


def test_planning_alone_cannot_move_the_posterior_s_choices(tiny_oracle):
    """Types that may not end have no price for ends."""
    module, batch = build(tiny_oracle, types={"a": {"codes": 3, "most": 2}}), batch_of(tiny_oracle)
    plan = module.planner.draw(*posterior_input(batch, "all"), relaxed(torch.Generator().manual_seed(0), 1.0))
    prior = module.planner.score(*prompt_of(batch), plan.choices)
    raw = plan_terms(plan, prior, module.model.vocabulary, tokens=6, floor=0.0, quota=None)
    assert (raw["eos"], raw["quota"], raw["concepts"]) == (0, 0, 2)
    assert plan.open_slots.all()


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_figures_by_hand(tiny_oracle, noise):
    """Choice by choice; a plan that is no draw has no NLL under the posterior."""
    module = build(tiny_oracle, noise=(0.0, noise))
    (found,) = quiet_trainer(1).validate(module, tiny_oracle, verbose=False)
    rows, module = tiny_oracle.rows["val"].columns, module.eval()
    with torch.no_grad():
        plan = module.planner.draw(
            *posterior_input(rows, "all"), relaxed(module.step_generator(0, stream=1, epoch=0), 0.5, noise)
        )
        text, planner = response_of(rows), module.planner
        log_p = module.executor.logits(plan.ids, plan.embeds, text).log_softmax(-1)
        nll = -log_p.gather(-1, text.unsqueeze(-1)).sum().item()
        price = {}
        for name, context in (("prior", prompt_of(rows)), ("posterior", posterior_input(rows, "all"))):
            log_probs = planner.score(*context, plan.choices).log_softmax(-1)
            price[name] = -sum(
                log_probs[b, s, plan.choices[b, s]].item()
                for b in range(len(text))
                for s in range(plan.choices.shape[1])
                if plan.open_slots[b, s]
            )
    truth = tiny_oracle.true_nll(rows).sum().item()
    tokens, texts = text.numel(), len(text)
    assert found["val/nll"] == pytest.approx(nll / tokens, rel=1e-4)
    assert found["val/nll_truth"] == pytest.approx(truth / tokens, rel=1e-6)
    bound = nll + price["prior"] - noise * price["posterior"]
    assert found["val/nll_bound"] == pytest.approx(bound / tokens, rel=1e-4)
    assert found["val/rate_bits"] == pytest.approx(price["prior"] / texts / math.log(2), rel=1e-4)
    assert found["val/efficiency"] == pytest.approx((truth - nll) / price["prior"], rel=1e-4)
    assert {"val/dnll_shuffle", "val/joint_information", "val/joint_information_shuffled", "val/nmi", "val/ami"} < set(
        found
    )


def test_a_batch_has_the_same_figures_whole_or_in_parts(tiny_oracle):
    module = build(tiny_oracle)
    whole, parts = type(module.meter)(), [type(module.meter)() for _ in range(2)]
    concepts, plans = torch.randint(0, 3, (12, 2)), torch.randint(0, 3, (12, 2))
    sums = {name: torch.rand(12) for name in ("text", "shuffled", "prior", "posterior", "truth", "rebuilt")}
    tokens = torch.arange(1, 13)
    whole.update(sums, tokens, concepts, plans, concepts.flip(0))
    for meter, part in zip(parts, (slice(0, 5), slice(5, 12)), strict=True):
        meter.update(
            {k: v[part] for k, v in sums.items()}, tokens[part], concepts[part], plans[part], concepts.flip(0)[part]
        )
    for name in ("text", "shuffled", "prior", "posterior", "truth", "rebuilt", "texts", "tokens"):
        setattr(parts[0], name, getattr(parts[0], name) + getattr(parts[1], name))
    for name in ("concepts", "plans", "before"):
        getattr(parts[0], name).extend(getattr(parts[1], name))
    expected = whole.compute()
    assert parts[0].compute() == pytest.approx(expected)
    assert expected["flip_rate"] > 0
    assert expected["tokens_a_text"] == 6.5
    assert expected["nll"] == pytest.approx(float(sums["text"].double().sum() / tokens.sum()))


def test_information_of_plans_that_determine_the_hidden_plan_and_of_random_ones(tiny_oracle):
    meter = type(build(tiny_oracle).meter)()
    plans = torch.randint(0, 3, (400, 2), generator=torch.Generator().manual_seed(0))
    nothing = {name: torch.zeros(400) for name in ("text", "shuffled", "prior", "posterior", "rebuilt")}
    meter.update(nothing, torch.full((400,), 6), plans.flip(1), plans)
    found = meter.compute()
    for name in ("joint_information", "nmi", "ami"):
        assert found[name] == pytest.approx(1, abs=1e-3)
    meter.reset()
    other = torch.randint(0, 3, (400, 2), generator=torch.Generator().manual_seed(1))
    meter.update(nothing, torch.full((400,), 6), other, plans)
    for name in ("joint_information", "nmi", "ami"):
        assert abs(meter.compute()[name]) < 0.05
    assert "efficiency" not in found  # nobody knows the texts' own probabilities here


# -- training --------------------------------------------------------------------------------------------------------


class Concepts(Callback):
    """seen: the mean concepts a text of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.seen.append(float(trainer.callback_metrics["monitor/concepts"]))


@pytest.mark.slow
def test_a_multiplier_holds_the_mean_number_of_concepts_at_the_quota(tiny_oracle):
    """Another loss asks for early ends; the penalty alone leaves the mean where both forces balance."""
    found = []
    for gain in (0.05, 0.0):
        concepts, types = Concepts(), {"a": {"codes": 3, "most": 4, "least": 0}}
        options = {"types": types, "weights": {"eos": 1.0, "quota": 0.05}, "quota": 2.0, "quota_gain": gain}
        module = build(tiny_oracle, temperatures=(1.0, 1.0), **options)
        quiet_trainer(150, callbacks=[concepts], log_every_n_steps=1).fit(module, tiny_oracle)
        found.append(sum(concepts.seen[-50:]) / 50)
    assert found[0] == pytest.approx(2.0, abs=0.15)
    assert found[1] < 1.75


def test_the_multiplier_of_a_step_by_hand(tiny_oracle):
    """Two micro-batches a step: gain times the mean excess over both, and the next step's loss has it."""
    concepts, losses = Concepts(), Losses()
    options = {"weights": {"quota": 1.0}, "quota": 1.0, "quota_gain": 0.5}
    module, plain = build(tiny_oracle, **options), build(tiny_oracle, **(options | {"quota_gain": 0.0}))
    trainer = {"log_every_n_steps": 1, "accumulate_grad_batches": 2}
    quiet_trainer(2, callbacks=[concepts, losses], **trainer).fit(module, tiny_oracle)
    first = 0.5 * (sum(concepts.seen[:2]) / 2 - 1.0)
    assert float(module.quota.values) == pytest.approx(first + 0.5 * (sum(concepts.seen[2:]) / 2 - 1.0), abs=1e-6)
    without = Losses()
    quiet_trainer(2, callbacks=[without], **trainer).fit(plain, tiny_oracle)
    assert losses.seen[:2] == without.seen[:2]
    excess = [value - 1.0 for value in concepts.seen]
    assert losses.seen[2] * 2 == pytest.approx(excess[2] ** 2 + first * excess[2], abs=1e-5)


def test_muon_moves_the_matrices_of_layers_and_adamw_the_rest(tiny_oracle):
    module = build(tiny_oracle, optimizer="muon")
    kept = {}
    quiet_trainer(1, callbacks=[KeepOptimizer(kept)]).fit(module, tiny_oracle)
    muon, adamw = kept["optimizer"].parts
    names = {p: name for name, p in module.named_parameters()}
    moved = {names[p] for group in muon.param_groups for p in group["params"]}
    assert moved == {name for name, p in module.named_parameters() if ".layers." in name and p.ndim == 2} != set()
    others = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert {"model.new_head.weight", "model.type_embedding.weight"} <= others
    assert not moved & others
    with pytest.raises(UsageError, match=r"module\.optimizer=sgd is not known"):
        build(tiny_oracle, optimizer="sgd")


@pytest.mark.parametrize("changes", [{"quota_gain": 0.0}, {"quota_gain": 0.1}, {"optimizer": "muon"}])
def test_resumed_is_uninterrupted(tmp_path, tiny_oracle, changes):
    """Weights, losses and the figures that compare with earlier plans."""
    whole, resumed, first, second = assert_resumed_is_uninterrupted(
        lambda: build(tiny_oracle, **changes),
        tiny_oracle,
        tmp_path,
        note=LossesAndFigures,
        val_check_interval=4,
    )
    assert "val/flip_rate" not in first.figures[0]
    assert [figures["val/flip_rate"] for figures in second.figures] == [f["val/flip_rate"] for f in first.figures[1:]]
    for resumed_figures, figures in zip(second.figures, first.figures[1:], strict=True):
        assert resumed_figures == pytest.approx(figures)
    if changes.get("quota_gain"):
        assert torch.equal(whole.quota.values, resumed.quota.values)
        assert float(whole.quota.values) != 0


class Written(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step=None) -> None:
        self.steps[step] = {name: value for name, value in metrics.items() if name.startswith("monitor/")}


def test_the_logger_gets_the_monitors_of_its_own_steps(tiny_oracle):
    """What is written every other step is what would be written of these steps if all were."""
    every, other = Written(), Written()
    for logger, steps in ((every, 1), (other, 2)):
        quiet_trainer(4, logger=logger, log_every_n_steps=steps).fit(build(tiny_oracle), tiny_oracle)
    assert set(every.steps) == {0, 1, 2, 3}
    assert other.steps == {step: every.steps[step] for step in (1, 3)}
    assert other.steps[1]["monitor/text"] != other.steps[3]["monitor/text"]


def test_a_plan_is_learned_and_used(tiny_oracle):
    """On four texts: all are reconstructed from their plans, and the NLL is much higher given another text's plan."""
    rows = tiny_oracle.rows["train"].columns
    few = {name: column[torch.arange(64) % 4] for name, column in rows.items()}
    for split in ("train", "val"):
        tiny_oracle.rows[split].columns = few
    types, weights = {"a": {"codes": 4}, "b": {"codes": 4}}, {"text": 1.0, "planner": 1.0, "usage": 1.0}
    module = build(tiny_oracle, types=types, weights=weights, lr=1e-2, warmup_steps=5, corruption=(1.0, 0.0))
    trainer = quiet_trainer(120)
    trainer.fit(module, tiny_oracle)
    (found,) = trainer.validate(module, tiny_oracle, verbose=False)
    assert found["val/reconstruction"] == 1
    assert found["val/joint_information"] == pytest.approx(1)
    assert found["val/dnll_shuffle"] > 0.3
    plan = module.planner.draw(*posterior_input(few, "all"), greedy)
    assert len(torch.unique(plan.choices, dim=0)) == len(torch.unique(response_of(few), dim=0))


def test_decoders_record_and_figures_of_a_test(tmp_path, tiny_oracle):
    module = build(tiny_oracle)
    quiet_trainer(1, callbacks=[FrontierReport(tmp_path, "concept", {})]).test(module, tiny_oracle, verbose=False)
    rows = {row["decoder"]: row for row in read_record(tmp_path / "record.json")["rows"]}
    assert rows["plan greedy, text greedy"]["nfe"] == 6 + tiny_oracle.response_length
    figures = rows["ConceptPlannerExecutorModule"]["quality"]
    information = {"joint_information", "nmi", *(f"nmi_{kind}" for kind in TYPES)}
    prices = {"rate_bits", "gain_bits", "efficiency", "dnll_shuffle"}
    assert figures.keys() >= {"nll_given_plan", "nll_bound", "nll_truth"} | information | prices
    assert "nll" not in figures
    batch = batch_of(tiny_oracle, 8, "test")
    greedy_decoder, sampler = module.decoders()
    first, second = (greedy_decoder(batch, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(first, second)
    drawn = [sampler(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    hidden = {**batch, "input_ids": batch["input_ids"].clone()}
    hidden["input_ids"][:, -tiny_oracle.response_length :] = 3
    assert torch.equal(greedy_decoder(hidden, torch.Generator()), first)  # the response is not read


def test_adapters_train_alone_beside_the_new_tables(tiny_oracle):
    module = build(tiny_oracle, lora_rank=2, signals=None)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    quiet_trainer(3).fit(module, tiny_oracle)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert all("lora_" in name or name.startswith(("model.new_", "model.type_", "bag.")) for name in moved)
    assert len(moved) > 3


def test_temperature_and_corruption_fall_with_the_steps(tiny_oracle):
    module, seen = build(tiny_oracle, anneal_share=0.5), []

    class TokenCallback(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_) -> None:
            seen.append((module.annealed((1.0, 0.5), 0.5), module.annealed((0.4, 0.0), 0.5)))

    quiet_trainer(8, callbacks=[TokenCallback()]).fit(module, tiny_oracle)
    temperatures, corruptions = zip(*seen, strict=True)
    assert_close(torch.tensor(temperatures), torch.tensor([1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5, 0.5]))
    assert_close(torch.tensor(corruptions), torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weights": {"txt": 1.0}}, "module.weights.txt is not known; the losses are text, planner"),
        ({"weights": {"text": -1.0}}, "module.weights.text=-1.0 must be at least 0"),
        ({"weights": {"text": 0.0}}, "module.weights are all 0;"),
        ({"weights": {"text": (0.0, 1.0)}}, "module.weights are all 0 at the first step;"),
        ({"weights": {"text": (1.0, 0.0), "planner": (0.5, 0.0)}}, "module.weights are all 0 at the last step;"),
        ({"weights": {"quota": 1.0}, "quota": None}, "type for example module.quota=3"),
        ({"quota_gain": 0.1, "weights": {"text": 1.0}}, "type for example module.weights.quota=1"),
        ({"quota_gain": -0.1}, "module.quota_gain=-0.1 must be at least 0"),
        ({"temperatures": (1.0, 0.0)}, r"module.temperatures=\[1.0, 0.0\]"),
        ({"noise": (0.0, 0.5)}, r"module.noise=\[0.0, 0.5\] must begin between 0 and 1 and end in 0 or 1"),
        ({"corruption": (1.5, 0.0)}, r"module.corruption=\[1.5, 0.0\]"),
        ({"anneal_share": 2.0}, "module.anneal_share=2.0"),
        ({"types": {"a": {"codes": 1}}}, "module.types.a.codes=1"),
    ],
)
def test_mistakes_are_named(tiny_oracle, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        build(tiny_oracle, **options)


def test_a_model_that_looks_both_ways_is_refused(tiny_llada):
    with pytest.raises(UsageError, match="needs a causal model"):
        ConceptPlannerExecutorModule(tiny_llada(), types=TYPES, weights=ALL, quota=1.0)


def test_codes_follow_the_points_of_all_micro_batches_once_a_step(tiny_oracle, monkeypatch):
    types = {"a": {"codes": 3, "most": 2}, "b": {"codes": 2, "most": 1}}
    options = {"sampler": "ema_vq", "planning": {"posterior": "slots"}, "quota": None, "weights": {"text": 1.0}}
    module = build(tiny_oracle, types=types, quantise=(0.0, 1.0), **options)
    follow, calls = module.model.quantiser.follow, []

    def noted(points, *args, begin):
        calls.append((begin, [len(own) for own in points.values()]))
        return follow(points, *args, begin=begin)

    monkeypatch.setattr(module.model.quantiser, "follow", noted)
    quiet_trainer(3, accumulate_grad_batches=2).fit(module, tiny_oracle)
    rows = [2 * tiny_oracle.batch_size] * 3
    assert calls == [(True, rows), (False, rows), (False, rows)]


def test_an_epoch_that_ends_within_a_step_is_refused(tiny_oracle):
    trainer = quiet_trainer(3, accumulate_grad_batches=2, limit_train_batches=3)
    with pytest.raises(UsageError, match="does not divide an epoch of 3 batches"):
        trainer.fit(build(tiny_oracle), tiny_oracle)
