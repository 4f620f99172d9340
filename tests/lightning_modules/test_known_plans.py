"""Plans that are known from signals alone: no posterior runs, codes begin as their words, texts end at their first end."""

import math
from contextlib import nullcontext

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.concept import DRAWN, batch_of
from helpers.pairs import write
from helpers.trainer import quiet_trainer
from torch.testing import assert_close

from app.trained import trained_decoder
from callbacks.frontier import FrontierReport
from callbacks.plan_gain import PlanGain
from datamodules.pairs import PairsDataModule
from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from models.functional.bits_per_byte import token_nll
from models.functional.errors import UsageError
from models.functional.next_token import until_end
from models.functional.rows import signals_of
from models.plans.rows import response_of
from models.plans.sources import KnownPlans
from reporting.record import read_record

ROWS = [
    {"q": {"name": name, "food": food} if food else {"name": name}, "a": f"{name} has {food or 'no food'}"}
    for name in ("Aromi", "Blue Spice", "Cocum")
    for food in ("Thai", "Pub food", "")
]
TYPES = {
    "name": {"codes": 4, "most": 1},
    "food": {"codes": 3, "most": 1},
    "length": {"codes": 8, "most": 1},
    "opening": {"codes": 5, "most": 1},
}
SIGNALS = {"name": "name", "food": "food", "length": "text length", "opening": "text opening"}
KNOWN = {"text": 1.0, "planner": 1.0}


@pytest.fixture
def restaurants(tmp_path):
    """Prompts with slots, responses whose loss ends at their first end token."""
    parts = {"train": ROWS, "val": ROWS[:4], "test": ROWS[4:]}
    files = {split: write(tmp_path / f"{split}.jsonl", rows) for split, rows in parts.items()}
    given = {"prompt_field": "q", "response_field": "a", "tokenizer": "byte", "vocab_size": 512, "cache_dir": tmp_path}
    data = PairsDataModule(name="e2e", **files, **given, batch_size=4, eval_batch_size=4, end_padding=False)
    data.setup("fit")
    return data


def build(data, **changes) -> ConceptPlannerExecutorModule:
    torch.manual_seed(0)
    ids = data.special_ids()
    model = tiny_causal(ids.pop("vocab_size"), **ids, max_position_embeddings=256)
    options = {"types": TYPES, "signals": SIGNALS, "signal_codes": True, "sampler": "ema_vq", "weights": KNOWN}
    options |= {"planning": {"prior": "types", "posterior": "slots"}, "corruption": (0.0, 0.0)}
    return ConceptPlannerExecutorModule(model, **DRAWN | options | {"lr": 1e-3, "warmup_steps": 1} | changes)


def ready(data, stage: str = "fit", **changes) -> ConceptPlannerExecutorModule:
    """A module that has met its corpus."""
    module, trainer = build(data, **changes), quiet_trainer(1)
    trainer.datamodule = data
    module.trainer = trainer
    module.setup(stage)
    return module


def test_nats_of_a_plan_are_a_token_of_text_however_long_its_rows_are(restaurants):
    losses = {}
    for length in (24, 96):
        restaurants.response_length = length
        restaurants.setup("fit")
        module = ready(restaurants)
        batch = next(iter(restaurants.val_dataloader()))
        module.log = lambda *_, **__: None
        module.log_monitors = lambda raw, found=losses, length=length: found.update({length: raw})
        with torch.no_grad():
            module.training_step(batch, 0)
    for name in ("text", "planner"):
        assert_close(losses[24][name], losses[96][name], rtol=1e-4, atol=1e-5)


# -- known plans -----------------------------------------------------------------------------------------------------


def test_the_plan_is_the_number_of_each_signal_and_nothing_of_the_text_is_read(restaurants, monkeypatch):
    module, batch = ready(restaurants), batch_of(restaurants)
    assert isinstance(module.source, KnownPlans)
    monkeypatch.setattr(module.posterior, "draw", pytest.fail)
    plan = module.source.draw(batch, None, None)[0]
    signals = signals_of(batch)
    wanted = torch.stack([1 + signals[SIGNALS[name]] for name in TYPES], -1)
    assert torch.equal(plan.choices, wanted)
    assert len(torch.unique(wanted, dim=0)) > 4
    assert torch.equal(module.source.without_signals(batch).choices, wanted)


def test_the_executor_reads_what_it_reads_with_a_posterior(restaurants):
    """The oracle: the same module with a posterior, whose known codes are taken instead of predictions."""
    known, with_posterior = ready(restaurants), ready(restaurants, weights=KNOWN | {"signals": 0.1})
    assert not isinstance(with_posterior.source, KnownPlans)
    with_posterior.load_state_dict(known.state_dict())
    batch = batch_of(restaurants)
    one, other = (module.source.most_probable(batch) for module in (known, with_posterior))
    assert torch.equal(one.ids, other.ids)
    assert_close(one.embeds, other.embeds)
    assert_close(known.model.new_table(), with_posterior.model.new_table())


def test_a_step_trains_prior_executor_and_the_codes_but_no_head_of_a_posterior(restaurants):
    module = build(restaurants)
    heads = {name for name, _ in module.named_parameters() if name.endswith("head.weight") and "quantiser" in name}
    assert len(heads) == len(TYPES)
    assert not heads & module.trainable_names()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    quiet_trainer(2).fit(module, restaurants)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert not heads & moved
    assert {"model.new_head.weight", *(f"model.quantiser.spaces.{k}.rows.weight" for k in range(4))} <= moved


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"types": TYPES | {"free": {"codes": 4}}}, "or give free a signal too"),
        ({"signal_codes": False, "code_words": True}, "module.code_words=true needs codes with a meaning"),
    ],
)
def test_what_is_refused(restaurants, changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        build(restaurants, **changes)


def test_a_text_without_a_signal_is_refused(tiny_oracle):
    types = {"a": {"codes": 8}}
    first = next(iter(tiny_oracle.signal_sizes))
    tiny_oracle.rows["val"].columns[f"signal/{first}"][3] = -1
    with pytest.raises(UsageError, match=f"weights.signals=0.*{first} .type a. is not known of all texts of the val"):
        ready(tiny_oracle, types=types, signals={"a": first})


def test_monitors_have_no_posterior_that_could_collapse(restaurants):
    known, learned = ready(restaurants), ready(restaurants, weights=KNOWN | {"signals": 0.1})
    rows, generator = batch_of(restaurants), torch.Generator()
    assert set(known.probe.choices(rows, generator)) == {"prior"}
    assert set(learned.probe.choices(rows, generator)) == {"posterior", "prior"}


# -- columns of the prior --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planning", ["sequential", "types", "slots"])
def test_the_prior_reads_no_column_that_no_choice_depends_on(restaurants, planning):
    module = ready(restaurants, planning={"prior": planning, "posterior": "slots"})
    read, layout = module.model.layout.columns_before_slots(planning), module.model.layout
    separators = (layout.slot_columns - 1).tolist()
    assert read.tolist() == (list(range(layout.columns - 2)) if planning == "sequential" else separators)


# -- words -----------------------------------------------------------------------------------------------------------


def test_signals_have_the_words_of_their_values(restaurants):
    words = restaurants.signal_words()
    encode = restaurants.encode_texts
    assert set(words) == set(restaurants.signal_sizes)
    assert words["name"].values == encode([" none", " Aromi", " Blue Spice", " Cocum"])
    assert words["food"].name == encode([" food"])[0]
    assert words["text length"].values == [[]] * 8
    first = response_of(batch_of(restaurants, 9))[:, 0]
    opening = restaurants.signals(restaurants.rows["train"].columns)["text opening"]
    assert [words["text opening"].values[k] for k in opening.tolist()] == [[token] for token in first.tolist()]


def test_a_plan_begins_as_names_and_values_in_a_row(restaurants):
    plain, module = ready(restaurants), ready(restaurants, code_words=True)
    model, v = module.model, module.model.vocabulary
    read, write = model.backbone.get_input_embeddings().weight, model.backbone.get_output_embeddings().weight

    def mean(table, text):
        return table[restaurants.encode_texts([text])[0]].mean(0)

    # codes and what chooses them
    table, first = model.new_table(), v.codes(1).start - v.base
    for code, text in enumerate([" none", " Thai", " Pub food"]):
        assert_close(table[first + code], mean(read, text))
        assert_close(model.new_head.weight[first + code], mean(write, text))
        assert_close(model.quantiser.spaces[1].head.weight[code], mean(write, text))
    # no text has the last code of openings: it is never preferred
    last = v.codes(3).stop - 1 - v.base
    assert len(restaurants.signal_words()["text opening"].values) == v.types[3].codes - 1
    assert not model.new_head.weight[last].any()
    assert plain.model.new_head.weight[last].any()
    # what stands around them
    for own, text in (
        (v.separator(1), " food"),
        (v.separator(2), " text length"),
        (v.eos, ","),
        (v.text, "\n"),
        (v.plan, "\n"),
    ):
        assert_close(table[own - v.base], mean(read, text))
    assert not model.type_embedding.weight.any()
    # without words: as large as tokens, and all equally likely
    length = v.codes(2).start - v.base
    for own in (length, v.blank - v.base):
        assert_close(5 * table[own], plain.model.new_table()[own])
    assert not model.new_head.weight[length : length + 8].any()
    assert plain.model.new_head.weight[length : length + 8].any()


def test_codes_begin_once_and_stay_as_they_were_trained(restaurants):
    module = ready(restaurants, code_words=True)
    trained = torch.randn_like(module.model.new_table())
    with torch.no_grad():
        for space in module.model.quantiser.spaces:
            space.rows.weight.normal_()
    trained = module.model.new_table().clone()
    for stage in ("fit", "test"):
        module.setup(stage)
    assert torch.equal(module.model.new_table(), trained)
    tested = ready(restaurants, stage="test", code_words=True)
    assert torch.equal(tested.model.new_table(), ready(restaurants).model.new_table())


def test_a_corpus_without_words_is_refused(tiny_oracle):
    first = next(iter(tiny_oracle.signal_sizes))
    with pytest.raises(UsageError, match="OracleDataModule has none; type module"):
        ready(
            tiny_oracle,
            types={"a": {"codes": 8}},
            signals={"a": first},
            code_words=True,
            weights=KNOWN | {"signals": 1},
        )


# -- ends ------------------------------------------------------------------------------------------------------------


def test_the_loss_of_texts_ends_at_their_first_end(restaurants):
    module, batch = ready(restaurants), batch_of(restaurants, 9)
    plan, text = module.source.most_probable(batch), response_of(batch)
    counted = until_end(text, restaurants.end_ids())
    assert not counted.all()
    with torch.no_grad():
        every = token_nll(module.executor.logits(plan.ids, plan.embeds, text), text)
        nll = module.executor.nll(plan.ids, plan.embeds, text)
        generator = torch.Generator().manual_seed(0)
        loss = module.executor.training_nll(plan.ids, plan.embeds, text, 0.0, generator).mean()
        module.executor.padding = True
        padded = module.executor.training_nll(plan.ids, plan.embeds, text, 0.0, generator)
    assert_close(nll, every * counted)
    assert_close(loss, every[counted].mean())  # nats a token of the batch, as of a causal model
    assert_close(padded, every.mean(-1))
    assert abs(float(loss - padded.mean())) > 1e-3


def test_figures_are_nats_a_token_up_to_the_end(restaurants):
    module, trainer = build(restaurants), quiet_trainer(1, callbacks=[PlanGain(nll=3.0)])
    trainer.test(module, restaurants, verbose=False)
    figures, batch = module.model_figures(), batch_of(restaurants, 5, "test")
    plan, text = module.source.most_probable(batch), response_of(batch)
    counted = until_end(text, restaurants.end_ids())
    with torch.no_grad():
        nll = token_nll(module.executor.logits(plan.ids, plan.embeds, text), text)[counted].mean()
    assert figures["nll_given_plan"] == pytest.approx(float(nll), rel=1e-5)
    tokens = float(counted.sum()) / 5
    assert figures["tokens_a_text"] == pytest.approx(tokens)
    assert figures["gain_bits"] == pytest.approx((3.0 - float(nll)) * tokens / math.log(2), rel=1e-4)


def test_texts_of_a_validation_are_written_to_their_last_end(restaurants):
    module, batch, columns = ready(restaurants), batch_of(restaurants, 4), restaurants.response_length
    plan = module.source.most_probable(batch)
    free = module.measurement.greedy_text((plan.ids, plan.embeds), columns, restaurants)
    module.executor.end_ids = tuple(free[:, 3].tolist())  # every text has one of these by its fourth token
    shown = []
    found = module.executor.generate(
        plan.ids, plan.embeds, columns, torch.Generator(), temperature=0.0, on_tokens=lambda ids: shown.append(ids)
    )
    assert len(shown) <= 4
    assert found.shape == free.shape
    counted = until_end(free, module.executor.end_ids)
    assert torch.equal(found[counted], free[counted])
    assert (found[~counted] == module.executor.end_ids[0]).all()
    module.executor.padding = True  # what is beyond counts, and is written
    assert torch.equal(module.measurement.greedy_text((plan.ids, plan.embeds), columns, restaurants), free)


def test_a_texts_forward_passes_end_with_it(restaurants, tmp_path):
    module = build(restaurants)
    quiet_trainer(1, callbacks=[FrontierReport(tmp_path, "known", {})]).test(module, restaurants, verbose=False)
    decoder, batch = module.decoders()[0], batch_of(restaurants, 5, "test")
    found = decoder(batch, torch.Generator())
    assert decoder.end_ids == restaurants.end_ids()
    end = found[0, 2].item()
    decoder.end_ids = (end,)
    found = decoder(batch, torch.Generator())
    passes = 1 + until_end(found, (end,)).sum(-1)  # all types in one pass, then one a token
    assert torch.equal(decoder.forward_passes, passes)
    assert passes[0] <= 4
    assert decoder.forwards == 1 + restaurants.response_length
    rows = {row["decoder"]: row for row in read_record(tmp_path / "record.json")["rows"]}
    assert rows["plan greedy, text greedy"]["nfe"] <= decoder.forwards
    restaurants.end_padding = True
    assert module.decoders()[0].end_ids is None


# -- plans as a person reads them ------------------------------------------------------------------------------------


def test_an_exported_model_says_what_its_codes_stand_for(restaurants, tmp_path):
    module = ready(restaurants)
    module.export(tmp_path / "model", restaurants.tokenizer)
    rows = restaurants.encode_prompts(["name[Aromi]"])
    decoder = trained_decoder(
        tmp_path / "model", restaurants, 0.0, torch.device("cpu"), plan='name="Blue Spice" food=none'
    )
    decoder(rows, torch.Generator())
    assert decoder.plans[0].startswith('name="Blue Spice" food=none length=')
    opening = decoder.plans[0].split("opening=")[1]
    assert opening in ("other", "A", "B", "C", "4")


def test_a_baseline_of_tokens_up_to_the_end_is_not_compared_with_all_columns(restaurants):
    for executor, refused in (("parallel", True), ("autoregressive", False)):
        module, trainer = build(restaurants, executor=executor), quiet_trainer(1)
        trainer.datamodule = restaurants
        with pytest.raises(UsageError, match=r"type callbacks\.gain\.nll=null") if refused else nullcontext():
            PlanGain(1.0).on_test_start(trainer, module)
        PlanGain(None).on_test_start(trainer, module)
