"""Plans that nobody learns: the executor reads them alone, the prior learns their price, and they are what they claim to be."""

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.trainer import quiet_trainer

from lightning_modules.concept_baseline import ConceptBaselineModule
from models.functional.errors import UsageError


def build(data, code: str, **options) -> ConceptBaselineModule:
    torch.manual_seed(0)
    ids = data.special_ids()
    model = tiny_causal(ids.pop("vocab_size"), **ids)
    return ConceptBaselineModule(model, code=code, **{"warmup_steps": 1, "lr": 1e-2, "seed": 7} | options)


def prepared(data, code: str, **options) -> ConceptBaselineModule:
    module = build(data, code, **options)
    module.trainer = quiet_trainer(1)
    module.trainer.datamodule = data
    module.setup("fit")
    return module


def test_the_plan_is_the_code(tiny_oracle):
    rows = {name: column[:8] for name, column in tiny_oracle.rows["val"].columns.items()}
    text = rows["input_ids"][:, -6:]
    module = prepared(tiny_oracle, "leading", tokens=2)
    plan = module._drawn(rows, torch.Generator(), 1.0, 1.0)
    assert torch.equal(plan.choices - 1, text[:, :2])
    assert plan.open_slots.all()
    # what the executor reads says which words: a code's id for each
    first = module.model.vocabulary.codes(0).start
    assert torch.equal(plan.ids[:, 1:3] - first, text[:, :2])
    surprising = prepared(tiny_oracle, "surprisal", tokens=3)
    words = surprising.codes_of(rows) - 1
    for row, chosen in zip(text.tolist(), words.tolist(), strict=True):
        best = sorted(sorted(range(6), key=lambda j, row=row: (-surprising.surprisal[row[j]].item(), j))[:3])
        assert chosen == [row[j] for j in best]


def test_a_hash_has_the_sizes_of_the_plan_that_it_stands_for(tiny_oracle):
    module = prepared(
        tiny_oracle, "hash", types={"a": {"codes": 3, "most": 2}, "b": {"codes": 5, "most": 1}, "c": None}
    )
    choices = module.codes_of(tiny_oracle.rows["train"].columns)
    assert choices.shape[1] == 3
    assert choices.min() == 1
    assert choices.amax(0).tolist() == [3, 3, 5]


def test_words_that_are_told_are_rebuilt_and_their_price_is_learnt(tiny_oracle):
    """On a handful of texts, told by two words each; figures hang together."""
    few = {name: column[:4].repeat(16, 1) for name, column in tiny_oracle.rows["train"].columns.items()}
    for split in ("train", "val"):
        tiny_oracle.rows[split].columns = few
    module = build(tiny_oracle, "surprisal", tokens=2)
    trainer = quiet_trainer(100)
    trainer.fit(module, tiny_oracle)
    (found,) = trainer.validate(module, tiny_oracle, verbose=False)
    assert found["val/nll"] < 0.1
    assert found["val/nll_bound"] == pytest.approx(found["val/nll"] + found["val/rate_bits"] * 0.6931 / 6, rel=1e-3)
    assert found["val/gain_bits"] == pytest.approx((found["val/nll_truth"] - found["val/nll"]) * 6 / 0.6931, rel=1e-3)
    assert found["val/efficiency"] == pytest.approx(found["val/gain_bits"] / found["val/rate_bits"], rel=1e-3)


@pytest.mark.parametrize(
    ("code", "options", "sentence"),
    [
        ("middle", {}, "module.code=middle is not known; type one of leading, surprisal, hash"),
        ("leading", {"tokens": 0}, "module.tokens=0 must be at least 1"),
        ("hash", {}, "module.types names no type"),
    ],
)
def test_mistakes_are_named(tiny_oracle, code, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        build(tiny_oracle, code, **options)


def test_options_of_learning_are_passed_over_and_unknown_ones_are_not(tiny_oracle):
    module = build(
        tiny_oracle, "leading", free_bits=1.0, noise=(1.0, 1.0), weights={"text": 2.0, "usage": 1.0}, quota=3.0
    )
    assert (module.free_bits, module.noise, module.quota) == (0.0, (0.0, 0.0), None)
    batch = {name: column[:8] for name, column in tiny_oracle.rows["train"].columns.items()}
    assert torch.equal(module._drawn(batch, torch.Generator(), 1.0, 1.0).choices, module.codes_of(batch))
    with pytest.raises(TypeError, match="unexpected keyword argument 'fre_bits'"):
        build(tiny_oracle, "leading", fre_bits=1.0)


def test_more_words_than_a_text_has_are_refused(tiny_oracle):
    with pytest.raises(UsageError, match=r"module.tokens=7 must not be above the response length 6"):
        prepared(tiny_oracle, "leading", tokens=7)
