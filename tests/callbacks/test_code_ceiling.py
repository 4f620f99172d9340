"""The ceiling of codes of listed texts: 1 where they tell texts apart, less where not, silent where nothing is listed."""

import pytest
import torch
from helpers.concept import two_type_module as module_of
from helpers.trainer import quiet_trainer

from callbacks.code_ceiling import CodeCeiling
from models.plans.rows import response_of


def figures(data, most: int) -> dict[str, float]:
    def numbers(rows):
        """Each text's number modulo `most`."""
        text = response_of(rows)
        return ((text * 7 ** torch.arange(text.shape[1])).sum(-1, keepdim=True)) % most

    module = module_of(data, 4)
    module.probe.concepts, module.probe.posterior_reads = numbers, "text"
    quiet_trainer(1, callbacks=[CodeCeiling()]).test(module, data, verbose=False)
    return module.figures.values


def test_codes_of_their_own_pay_for_themselves_and_few_do_not(tiny_oracle):
    own = figures(tiny_oracle, 10**9)
    truth = tiny_oracle.true_nll(tiny_oracle.rows["test"].columns).mean().item() / 0.693147
    assert own["efficiency_best"] == pytest.approx(1)
    assert own["gain_bits_best"] == pytest.approx(truth, rel=0.2)  # H(x | u), of which the test texts are a draw
    assert own["nll_enumerated_best"] == pytest.approx(0, abs=1e-9)
    few = figures(tiny_oracle, 3)
    assert few["nll_enumerated_best"] > 0.1
    assert few["nll_enumerated"] > few["nll_enumerated_best"]  # of an executor that learnt nothing
    assert few["efficiency_best"] < 0.9
    assert few["rate_bits_best"] < own["rate_bits_best"]


def test_nothing_is_said_where_texts_are_not_listed(tiny_oracle):
    tiny_oracle.list_texts = lambda: None
    assert figures(tiny_oracle, 3) == {}
