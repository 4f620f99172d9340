"""Options of the flows: lists become tuples, changes are checked, and a module has the options that it was given."""

from dataclasses import FrozenInstanceError, replace

import pytest
from helpers.noisy_mask import build

from models.flow.options import LogitFlowOptions, NoisyMaskFlowOptions, StepHalvingOptions
from models.functional.errors import UsageError


def test_lists_of_a_file_become_tuples():
    options = NoisyMaskFlowOptions(forwards=[1], student_forwards=[1, 2], ode_forwards=[2])
    assert (options.forwards, options.student_forwards, options.ode_forwards) == ((1,), (1, 2), (2,))
    assert LogitFlowOptions(forwards=[1, 2]).forwards == (1, 2)
    assert StepHalvingOptions(student_forwards=[1, 2]).student_forwards == (1, 2)


def test_options_do_not_change_and_a_changed_copy_is_checked():
    options = NoisyMaskFlowOptions()
    with pytest.raises(FrozenInstanceError):
        options.sigma = 1.0
    with pytest.raises(UsageError, match=r"module\.growth=2"):
        replace(options, growth=2.0)


AT_LEAST_ONE = ("prompt_length", "prompt_hidden_size", "prompt_rank")


@pytest.mark.parametrize(
    ("options_class", "change"),
    [
        (NoisyMaskFlowOptions, {"rho_min": 0.0}),
        (NoisyMaskFlowOptions, {"teacher_weight": -1.0}),
        (NoisyMaskFlowOptions, {"recent_texts": -1}),
        (NoisyMaskFlowOptions, {"ode_steps": 0}),
        (NoisyMaskFlowOptions, {"pair_window": 0}),
        (NoisyMaskFlowOptions, {"jvp_backend": "x"}),
        (LogitFlowOptions, {"hard_target": "x"}),
        (LogitFlowOptions, {"time_law": "x"}),
        (LogitFlowOptions, {"correction_limit": 0.0}),
        (LogitFlowOptions, {"equal_share": 1.5}),
        (StepHalvingOptions, {"start_forwards": 0}),
        (StepHalvingOptions, {"lora_rank": 0}),
        (NoisyMaskFlowOptions, {"lora_rank": 0}),
        *((kind, {name: 0}) for kind in (NoisyMaskFlowOptions, LogitFlowOptions) for name in AT_LEAST_ONE),
        (LogitFlowOptions, {"jvp_step": 0.0}),
        (LogitFlowOptions, {"eps": -0.1}),
        (LogitFlowOptions, {"data_weight": -0.1}),
    ],
)
def test_wrong_values_are_named(options_class, change):
    with pytest.raises(UsageError, match=rf"module\.{next(iter(change))}="):
        options_class(**change)


def test_shares_of_the_same_rows_are_named_together():
    with pytest.raises(UsageError, match=r"module\.equal_share \+ module\.endpoint_share = 1\.2"):
        LogitFlowOptions(equal_share=0.6, endpoint_share=0.6)


def test_keywords_change_the_options_that_a_module_is_given(tiny_llada, tiny_oracle):
    module = build(tiny_llada, tiny_oracle, options=NoisyMaskFlowOptions(sigma=1.0, growth=0.25), growth=0.75)
    assert (module.options.sigma, module.options.growth) == (1.0, 0.75)
    assert module.hparams["sigma"] == 1.0
