"""One set of sampling options: flat names of three distillations, their checks, and blocks that fit."""

import pytest

from models.flow.options import LogitFlowOptions, NoisyMaskFlowOptions, StepHalvingOptions
from models.functional.errors import UsageError
from models.interfaces.masked_sampling import (
    MaskedSampling,
    ReusedColumns,
    TeacherOptions,
    forwards_in_blocks,
    require_blocks,
    temperature_name,
)

DISTILLATIONS = [TeacherOptions, NoisyMaskFlowOptions, LogitFlowOptions, StepHalvingOptions]


@pytest.mark.parametrize("options", DISTILLATIONS)
def test_the_flat_options_of_a_distillation_are_the_teachers_sampling(options):
    given = {"teacher_temperature": 0.5, "teacher_remasking": "low_confidence", "teacher_guidance": 2.0}
    how = options(forwards=[4, 8], teacher_block_length=2, **given).teacher_sampling
    wanted = {
        "temperature": 0.5,
        "remasking": "low_confidence",
        "guidance": 2.0,
        "block_length": 2,
        "reused": ReusedColumns(),
    }
    assert (how.forwards, how.options) == ((4, 8), wanted)
    assert options().teacher_sampling == MaskedSampling()


@pytest.mark.parametrize("options", DISTILLATIONS)
@pytest.mark.parametrize(
    "change", [{"remasking": "x"}, {"temperature": -1.0}, {"block_length": 0}, {"rule_block_length": 0}]
)
def test_wrong_values_are_named_as_they_are_typed(options, change):
    ((name, value),) = change.items()
    with pytest.raises(UsageError, match=rf"^module\.teacher_{name}={value}"):
        options(**{f"teacher_{name}": value})
    with pytest.raises(UsageError, match=rf"^{name}={value}"):
        MaskedSampling(**change)


@pytest.mark.parametrize("options", DISTILLATIONS)
def test_rules_have_blocks_of_their_own_or_those_of_the_schedule(options):
    for given, wanted in (((4, None), 4), ((4, 3), 3), ((None, 3), 3), ((None, None), None)):
        of_all, of_rules = given
        how = options(teacher_block_length=of_all, teacher_rule_block_length=of_rules).teacher_sampling
        assert (how.options["block_length"], how.rule_options["block_length"]) == (of_all, wanted)


def test_blocks_have_to_fit_before_anything_is_trained():
    require_blocks("module.block_length", None, [1, 2], 16)
    require_blocks("module.block_length", 4, [4, 8, 16], 16)
    with pytest.raises(UsageError, match=r"^module\.block_length=5 must divide the response length 16"):
        require_blocks("module.block_length", 5, [4], 16)
    with pytest.raises(
        UsageError, match=r"makes 4 blocks.*module\.forwards=\[2, 4\].*type for example module\.forwards=\[4,16\]"
    ):
        require_blocks("module.block_length", 4, [2, 4], 16)


def test_every_temperature_has_rows_of_all_forward_passes():
    how = MaskedSampling(forwards=[1, 4], temperature=1.0, temperatures=[0.8, 0])
    assert how.rows == [(1, 1.0), (4, 1.0), (1, 0.8), (4, 0.8), (1, 0), (4, 0)]
    assert TeacherOptions(teacher_temperatures=[0.8]).teacher_sampling.temperatures == (0.8,)
    assert [temperature_name(t) for t in (1.0, 0.8, 0.0)] == ["sampled", "sampled at 0.8", "greedy"]


@pytest.mark.parametrize("temperatures", [[1.0], [0.8, 0.8], [-0.5]])
def test_temperatures_are_different_and_not_negative(temperatures):
    with pytest.raises(UsageError, match=r"^temperatures=\[.*type for example \[0\.8, 0\.9\]"):
        MaskedSampling(temperatures=temperatures)
    with pytest.raises(UsageError, match=r"^module\.teacher_temperatures="):
        TeacherOptions(teacher_temperatures=temperatures)


def test_numbers_of_forward_passes_are_spread_over_blocks_or_left_out():
    assert forwards_in_blocks([1, 2, 4, 6, 8], None, 16) == [1, 2, 4, 6, 8]
    assert forwards_in_blocks([1, 2, 4, 6, 8], 4, 16) == [4, 8]
    assert forwards_in_blocks([1, 2, 6], 4, 16) == [4]


def test_reused_columns_are_options_of_their_own():
    how = MaskedSampling(cache="dual", cache_refresh=4)
    assert how.options["reused"] == ReusedColumns("dual", 4)
    for wrong, message in (
        ({"cache": "suffix"}, "^cache=suffix is not known; type one of none, prefix, dual"),
        ({"cache": "dual", "cache_refresh": 0}, "^cache_refresh=0 must be at least 1"),
        ({"cache_refresh": 2}, "^cache_refresh=2 needs a cache; type module.cache=prefix or dual"),
    ):
        with pytest.raises(UsageError, match=message):
            MaskedSampling(**wrong)
