"""Against the corpus' own likelihood it says what the meter says; without a baseline it says nothing."""

import pytest
from helpers.concept import two_type_module as module_of
from helpers.trainer import quiet_trainer

from callbacks.plan_gain import PlanGain
from models.functional.errors import UsageError


def figures(data, nll) -> tuple[dict, dict]:
    module = module_of(data, 4)
    quiet_trainer(1, callbacks=[PlanGain(nll)]).test(module, data, verbose=False)
    return module.meter.compute(), module.figures.values


def test_the_truth_as_baseline_gives_the_meter_s_own_figures(tiny_oracle):
    known, _ = figures(tiny_oracle, None)
    _, added = figures(tiny_oracle, known["nll_truth"])
    assert added["gain_bits"] == pytest.approx(known["gain_bits"], rel=1e-5)
    assert added["efficiency"] == pytest.approx(known["efficiency"], rel=1e-5)
    _, better = figures(tiny_oracle, known["nll_truth"] / 2)  # a better model leaves the plan less to save
    assert better["gain_bits"] < added["gain_bits"]


def test_without_a_baseline_nothing_is_added(tiny_oracle):
    assert figures(tiny_oracle, None)[1] == {}


def test_a_baseline_without_nats_is_refused():
    with pytest.raises(UsageError, match=r"callbacks.gain.nll=0 must be above 0"):
        PlanGain(0)
