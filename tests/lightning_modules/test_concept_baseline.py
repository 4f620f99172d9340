"""Plans that are not learned: each is the right code, the executor reads it alone, the prior learns it."""

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
    plan = module.source.most_probable(rows)
    assert torch.equal(plan.choices - 1, text[:, :2])
    assert plan.open_slots.all()
    # the executor reads the id of each token's code
    first = module.model.vocabulary.codes(0).start
    assert torch.equal(plan.ids[:, 1:3] - first, text[:, :2])
    surprising = prepared(tiny_oracle, "surprisal", tokens=3)
    words = surprising.source.choices(rows) - 1
    for row, chosen in zip(text.tolist(), words.tolist(), strict=True):
        best = sorted(sorted(range(6), key=lambda j, row=row: (-surprising.source.surprisal[row[j]].item(), j))[:3])
        assert chosen == [row[j] for j in best]


def test_a_hash_has_the_sizes_of_the_plan_that_it_stands_for(tiny_oracle):
    module = prepared(
        tiny_oracle, "hash", types={"a": {"codes": 3, "most": 2}, "b": {"codes": 5, "most": 1}, "c": None}
    )
    choices = module.source.choices(tiny_oracle.rows["train"].columns)
    assert choices.shape[1] == 3
    assert choices.min() == 1
    assert choices.amax(0).tolist() == [3, 3, 5]


def test_texts_are_reconstructed_from_their_code_and_the_prior_learns_it(tiny_oracle):
    """On four texts with two tokens each as code; figures agree with each other."""
    few = {name: column[torch.arange(64) % 4] for name, column in tiny_oracle.rows["train"].columns.items()}
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
        ("hash", {"types": {"a": None}}, "module.types names no type"),
    ],
)
def test_mistakes_are_named(tiny_oracle, code, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        build(tiny_oracle, code, **options)


def test_options_of_learning_have_no_effect_and_unknown_ones_are_refused(tiny_oracle):
    module = build(
        tiny_oracle, "leading", free_bits=1.0, noise=(1.0, 1.0), weights={"text": 2.0, "usage": 1.0}, quota=3.0
    )
    options = module.options
    assert (options.free_bits, options.noise, options.quota) == (0.0, (0.0, 0.0), None)
    assert options.weights == {"text": 2.0, "planner": 1.0}
    batch = {name: column[:8] for name, column in tiny_oracle.rows["train"].columns.items()}
    plan, points = module.source.draw(batch, module.final_values(), torch.Generator())
    assert torch.equal(plan.choices, batch["input_ids"][:, -6:-4] + 1)
    assert points == {}
    with pytest.raises(TypeError, match="unexpected keyword argument 'fre_bits'"):
        build(tiny_oracle, "leading", fre_bits=1.0)


def test_more_words_than_a_text_has_are_refused(tiny_oracle):
    with pytest.raises(UsageError, match=r"module.tokens=7 must not be above the response length 6"):
        prepared(tiny_oracle, "leading", tokens=7)
