"""Options of a planner-executor: defaults, lists of YAML, and a sentence for each mistake."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from lightning_modules.concept_baseline import NOT_LEARNED
from models.functional.errors import UsageError
from models.plans.options import FixedPlanOptions, PlanOptions, SearchOptions, plain


def test_lists_are_pairs_and_options_do_not_change():
    options = PlanOptions(quantise=[0.2, 0.3], weights={"text": 1.0, "usage": [1.0, 0.0]})
    assert (options.quantise, options.weight_ends["usage"]) == ((0.2, 0.3), (1.0, 0.0))
    assert options == PlanOptions(**plain(options))
    assert options.weight_ends["bag"] == (0.0, 0.0)  # not named
    with pytest.raises(FrozenInstanceError):
        options.quota = 1.0


def test_missing_parts_of_nested_options_have_their_defaults():
    assert PlanOptions(search={"begin": 0.5}).search_options == SearchOptions(begin=0.5)
    assert PlanOptions(planning={"prior": "types"}).planning == {"prior": "types", "posterior": "slots"}
    assert PlanOptions(planning=None).planning == {"prior": "sequential", "posterior": "sequential"}
    assert PlanOptions(search=None).search_options is None


def test_only_a_relaxed_choice_has_noise():
    assert PlanOptions(sampler="gumbel_st", noise=(0.5, 1.0)).draw_noise == (0.5, 1.0)
    assert PlanOptions(sampler="fsq", noise=(0.5, 1.0)).draw_noise == (0.0, 0.0)


def test_what_a_fixed_code_switches_off_are_options():
    assert set(NOT_LEARNED) < {option.name for option in fields(PlanOptions)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"quantise": (0.4, 0.1)}, r"module\.quantise=\[0\.4, 0\.1\] must be two shares in this order"),
        ({"planning": {"prior": "both"}}, r"module\.planning\.prior=both is not known; type one of sequential"),
        ({"search": {"prior_weight": -0.1}}, r"module\.search\.prior_weight=-0\.1 must be at least 0"),
        ({"search": {"tolerance": -0.1}}, r"module\.search\.tolerance=-0\.1 must be at least 0"),
        ({"planning": {"executor": "slots"}}, r"module\.planning=executor is not known; type one of prior, posterior"),
    ],
)
def test_mistakes_get_a_sentence(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        replace(PlanOptions(), **options)


@pytest.mark.parametrize(
    ("option", "allowed", "refused"),
    [
        ("temperatures", [(0.1, 0.1)], [(0.0, 0.5), (0.5, 0.0), (1.0,)]),
        ("noise", [(0.0, 1.0), (1.0, 0.0), (0.5, 1.0)], [(-0.1, 1.0), (1.1, 1.0), (0.0, 0.5), (1.0,)]),
        ("corruption", [(0.0, 1.0), (1.0, 0.0)], [(-0.1, 0.0), (0.0, -0.1), (1.1, 0.0), (0.0, 1.1), (1.0,)]),
        ("quantise", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)], [(-0.1, 0.5), (0.5, 0.4), (0.5, 1.1), (0.5,)]),
        ("plan_temperature", [0.0], [-0.1]),
        ("temperature", [0.0], [-0.1]),
        ("lora_rank", [1, None], [0]),
        ("quota", [0.0, None], [-0.1]),
        ("anneal_share", [0.0, 1.0], [-0.1, 1.1]),
        ("curriculum", [0.0, 1.0], [-0.1, 1.1]),
        ("code_decay", [0.0, 1.0], [-0.1, 1.1]),
        ("free_bits", [0.0], [-0.1]),
    ],
)
def test_bounds_are_allowed_and_what_lies_beyond_is_refused(option, allowed, refused):
    for value in allowed:
        assert getattr(replace(PlanOptions(), **{option: value}), option) == value
    for value in refused:
        with pytest.raises(UsageError, match=f"module.{option}="):
            replace(PlanOptions(), **{option: value})


def test_mistakes_of_fixed_codes_get_a_sentence():
    with pytest.raises(UsageError, match=r"module\.code=middle is not known; type one of leading, surprisal, hash"):
        FixedPlanOptions(code="middle")
