"""Types matched to attributes, accuracy and locality of swaps: by hand, with controls."""

import math

import pytest
import torch
from helpers.concept import build_planner_executor as build
from helpers.trainer import quiet_trainer

from models.backbones.code_space import NamedCodes
from models.functional.errors import UsageError
from models.plans.matching import as_numbers, hungarian_accuracy, match_types, swap_locality
from models.plans.meter import PlanMeter
from models.plans.rows import prompt_of, response_of
from models.plans.signals import SignalCodes
from models.plans.vocabulary import ConceptVocabulary


def draws(rows: int, *values: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(v, (rows,), generator=generator) for v in values], -1)


def test_rows_as_numbers():
    numbers = as_numbers(torch.tensor([[1, 2], [2, 1], [1, 2], [1, 3]]))
    assert len(set(numbers.tolist())) == 3
    assert numbers[0] == numbers[2]


def test_renamed_attributes_are_found_in_whatever_order():
    plans = draws(500, 4, 3, 2)
    concepts = torch.stack([7 - plans[:, 2], (plans[:, 0] * 3) % 4, plans[:, 1] + 5], -1)
    pairs, shared = match_types(concepts, plans)
    assert pairs == [(0, 2), (1, 0), (2, 1)]
    assert shared == pytest.approx([1, 1, 1], abs=1e-5)
    assert max(match_types(draws(500, 4, 3, 2, seed=1), plans)[1]) < 0.1  # the control


def test_accuracy_of_codes_matched_one_to_one_by_hand():
    values = torch.tensor([0, 0, 0, 1, 1, 2])
    assert hungarian_accuracy(torch.tensor([5, 5, 5, 2, 2, 7]), values) == 1
    assert hungarian_accuracy(torch.tensor([5, 5, 9, 2, 2, 7]), values) == pytest.approx(5 / 6)  # one code too many
    assert hungarian_accuracy(torch.zeros(6), values) == 0.5  # one code for all: the most frequent value


def test_locality_by_hand():
    """Text 0 changes in both attributes, text 1 in none of them: only text 0's swaps are asked for."""
    plans, donors = torch.tensor([[0, 0], [1, 1]]), torch.tensor([[1, 1], [1, 1]])
    local = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [1, 1]]])
    pairs = [(0, 0), (1, 1)]
    assert swap_locality(plans, donors, local, pairs) == 1
    spilt = local.clone()
    spilt[0, 1] = torch.tensor([1, 1])  # type 1 moved attribute 0 as well
    assert swap_locality(plans, donors, spilt, pairs) == 0.5
    still = plans.unsqueeze(1).expand(-1, 2, -1)
    assert swap_locality(plans, donors, still, pairs) == 0
    assert math.isnan(swap_locality(plans, plans, local, pairs))


def test_the_meter_has_a_figure_of_each_type():
    """Types of two slots: a code is both of them."""
    meter, plans = PlanMeter({"x": slice(0, 2), "y": slice(2, 3)}), draws(400, 4, 3)
    concepts = torch.stack([plans[:, 0] // 2, plans[:, 0] % 2, plans[:, 1]], -1)
    nothing = {name: torch.zeros(400) for name in ("text", "shuffled", "prior", "posterior", "rebuilt")}
    meter.update(nothing, torch.full((400,), 6), concepts, plans)
    donors = plans.roll(1, 0)
    swapped = torch.stack(
        [torch.stack([donors[:, 0], plans[:, 1]], -1), torch.stack([plans[:, 0], donors[:, 1]], -1)], 1
    )
    meter.update_swaps(donors, swapped)
    found = meter.compute()
    assert (found["hungarian_accuracy"], found["swap_locality"]) == (1, 1)
    assert (found["nmi_x"], found["nmi_y"]) == pytest.approx((1, 1), abs=1e-5)
    assert found["nmi"] < 0.9  # no single slot is the attribute


SIGNALLED = {
    "types": {"a": {"codes": 3}, "b": {"codes": 2}, "c": {"codes": 4}},
    "sampler": "ema_vq",
    "planning": {"posterior": "slots"},
    "posterior_reads": "text",
    "quota": None,
    "lr": 1e-2,
    "warmup_steps": 5,
}


CODED = {"signal_codes": True, "weights": {"text": 1.0, "signals": 1.0}}


@pytest.fixture
def few_texts(tiny_oracle):
    rows = tiny_oracle.rows["train"].columns
    for split in ("train", "val"):
        tiny_oracle.rows[split].columns = {name: column[torch.arange(48) % 12] for name, column in rows.items()}
    return tiny_oracle


@pytest.mark.slow
def test_types_that_must_predict_a_signal_are_about_it(few_texts):
    """On few texts: with signals each type is its attribute; the same training without them leaves that to chance."""
    tiny_oracle, shared = few_texts, {}
    for weight in (1.0, 0.0):
        weights = {"text": 1.0, "usage": (1.0, 0.0), "signals": weight}
        module, trainer = build(tiny_oracle, weights=weights, **SIGNALLED), quiet_trainer(150)
        trainer.fit(module, tiny_oracle)
        (found,) = trainer.validate(module, tiny_oracle, verbose=False)
        shared[weight] = [found[f"val/nmi_{name}"] for name in "abc"]
    assert min(shared[1.0]) > 0.9
    assert min(shared[0.0]) < 0.8


@pytest.mark.parametrize(
    ("signals", "sentence"),
    [
        ({"z": "who"}, r"module\.signals\.z is no type; the types are a, b, c"),
        ({"a": "when"}, r"module\.signals\.a=when is not known; the corpus' signals are who, where, events"),
    ],
)
def test_mistakes_get_a_sentence(tiny_oracle, signals, sentence):
    with pytest.raises(UsageError, match=sentence):
        quiet_trainer(1).fit(build(tiny_oracle, signals=signals), tiny_oracle)


@pytest.mark.parametrize("signal_codes", [True, False])
def test_codes_are_the_values_of_their_signals(few_texts, signal_codes):
    """The posterior learns to predict each text's values; without signal codes the numbers of codes are arbitrary."""
    weights = {"text": 1.0, "signals": 1.0}
    module = build(few_texts, weights=weights, signal_codes=signal_codes, **SIGNALLED)
    quiet_trainer(60).fit(module, few_texts)
    rows = few_texts.rows["train"].columns
    values = few_texts.signals(rows)
    values = torch.stack([values[name] for name in ("who", "where", "events")], -1)
    predicted = module.probe.posterior_concepts(rows) - 1
    assert (float((predicted == values)[values >= 0].float().mean()) > 0.95) is signal_codes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"signals": None}, r"needs signals; type for example module\.signals=\{a: who\}"),
        ({"sampler": "gumbel_st"}, "draws no codes; type module.sampler=ema_vq or module.sampler=fsq"),
        ({"search": {}}, r"nothing to search for in those types; type module\.search=null"),
        (
            {"weights": {"text": 1.0}, "signals": {"a": "who", "b": "where"}},
            r"trains the posterior by the loss signals alone; type for example module\.weights\.signals=0\.1, or give c a",
        ),
        (
            {"types": {"a": {"codes": 2}, "b": {"codes": 2}, "c": {"codes": 4}}},
            r"module\.types\.a\.codes=3, the values of who",
        ),
    ],
)
def test_what_signal_codes_need(tiny_oracle, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        quiet_trainer(1).fit(build(tiny_oracle, **(SIGNALLED | CODED | options)), tiny_oracle)


def test_the_log_probability_of_known_codes_by_hand():
    """Slots a and c have signals; the second text has no value of c."""
    vocabulary = ConceptVocabulary({"a": {"codes": 2}, "b": {"codes": 2}, "c": {"codes": 2}}, 10)
    known = SignalCodes(vocabulary, {"a": "x", "c": "y"})
    signals = {"x": torch.tensor([0, 1]), "y": torch.tensor([1, -1])}
    shares = torch.tensor([[[0.0, 0.5, 0.5], [0.0, 1.0, 0.0], [0.0, 0.75, 0.25]]]).expand(2, -1, -1)
    assert known.log_prob(shares.log(), signals).exp().tolist() == pytest.approx([0.5 * 0.25, 0.5])
    assert sorted(known.codes(signals)) == [0, 2]


def test_the_executor_reads_known_codes(few_texts):
    """In training it reads the signals' values, where a text has them, before the posterior can predict one of them."""
    module, read = build(few_texts, **SIGNALLED, **CODED), []
    draw = module.source.draw

    def recorded(batch, now, generator):
        plan, points = draw(batch, now, generator)
        read.append((batch, plan.ids))
        return plan, points

    module.source.draw = recorded
    quiet_trainer(1).fit(module, few_texts)
    batch, ids = read[0]
    values, vocabulary = few_texts.signals(batch), module.model.vocabulary
    for k, signal in enumerate(("who", "where", "events")):
        given = values[signal] >= 0
        column = module.model.layout.slot_columns[k]
        assert given.any()
        assert (ids[given, column] == vocabulary.choices[k][1 + values[signal][given]]).all()
    module.eval()  # and so it is where texts are measured
    wanted = torch.stack([values[name] for name in ("who", "where", "events")], -1)
    given = wanted >= 0
    read, predicted = module.probe.concepts(batch), module.probe.posterior_concepts(batch)
    assert torch.equal((read - 1)[given], wanted[given])
    assert (predicted - 1 != wanted)[given].any()  # the posterior cannot predict them yet
    assert torch.equal(read[~given], predicted[~given])


def test_a_known_code_takes_the_place_of_the_predicted_one():
    """The head predicts code 0. Where code 1 is known its embedding is row 1, and row 1 alone gets a gradient."""
    codes = NamedCodes(2, 3, 1.0)
    codes.head.weight = torch.nn.Parameter(torch.eye(2, 3))
    state = torch.tensor([[1.0, 0.0, 5.0]]).expand(3, -1)
    coded = codes(state, 1.0, torch.tensor([1, 0, -1]))
    assert torch.equal(coded.embeds, codes.table()[[1, 0, 0]])
    assert torch.equal(coded.logits, torch.tensor([[1.0, 0.0]]).expand(3, -1))  # the prediction stays
    coded.embeds[0].sum().backward()
    assert torch.equal(codes.rows.weight.grad, torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    assert codes.head.weight.grad is None or not codes.head.weight.grad.any()


def test_types_with_signal_codes_have_no_usage_loss(few_texts):
    usage, weights = {}, {"text": 1.0, "usage": 1.0, "signals": 1.0}
    for signal_codes in (True, False):
        module = build(few_texts, weights=weights, signal_codes=signal_codes, **SIGNALLED)
        quiet_trainer(1).fit(module, few_texts)
        batch = {name: column[:8] for name, column in few_texts.rows["train"].columns.items()}
        plan = module.source.most_probable(batch)
        prior = module.planner.score(*prompt_of(batch), plan.choices)
        usage[signal_codes] = module._plan_terms(plan, prior, response_of(batch))["usage"].item()
    assert usage[True] == 0 < usage[False]
