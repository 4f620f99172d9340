"""A uniform mixture as a module: figures by hand, exact resume, refused options, and what it learns."""

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.concept import only_few
from helpers.resume import assert_resumed_is_uninterrupted
from helpers.trainer import quiet_trainer

from callbacks.frontier import FrontierReport
from lightning_modules.uniform_mixture import UniformMixtureModule
from models.functional.errors import UsageError
from models.plans.rows import prompt_of, response_of
from reporting.record import read_record


def build(data, **options) -> UniformMixtureModule:
    torch.manual_seed(0)
    ids = data.special_ids()
    model = tiny_causal(ids.pop("vocab_size"), **ids)
    return UniformMixtureModule(model, **{"indices": 4, "lr": 1e-2, "warmup_steps": 1, "seed": 7} | options)


def test_the_record_has_the_exact_likelihood_and_one_forward_pass(tmp_path, tiny_oracle):
    module, report = build(tiny_oracle), FrontierReport(tmp_path, "mixture", {})
    quiet_trainer(1, callbacks=[report]).test(module, tiny_oracle, verbose=False)
    rows = {row["decoder"]: row for row in read_record(tmp_path / "record.json")["rows"]}
    assert rows["index uniform, text sampled"]["nfe"] == rows["index uniform, text greedy"]["nfe"] == 1
    figures, columns = rows["UniformMixtureModule"]["quality"], tiny_oracle.rows["test"].columns
    text, total = response_of(columns), 0.0
    with torch.no_grad():
        for k in range(4):
            nll = module.mixture.nll(prompt_of(columns), torch.full((len(text),), k), text).sum(-1)
            total = total + (-nll).double().exp() / 4
    assert figures["nll_exact"] == pytest.approx(float(-total.log().sum()) / text.numel(), rel=1e-4)
    assert figures["nll_truth"] == pytest.approx(float(tiny_oracle.true_nll(columns).sum()) / text.numel(), rel=1e-6)
    assert 0 < figures["index_bits"] < 2
    (found,) = quiet_trainer(1).validate(module, tiny_oracle, verbose=False)
    assert found["val/loss"] != pytest.approx(figures["nll_exact"])  # of other texts


@pytest.mark.parametrize(("temperature", "decoders"), [(0, 1), (0.5, 2)])
def test_every_decoder_has_a_name_of_its_own(tiny_oracle, temperature, decoders):
    module = build(tiny_oracle, temperature=temperature)
    module.trainer = quiet_trainer(1)
    module.trainer.datamodule = tiny_oracle
    names = [decoder.name for decoder in module.decoders()]
    assert len(names) == len(set(names)) == decoders


def test_resumed_is_uninterrupted(tmp_path, tiny_oracle):
    assert_resumed_is_uninterrupted(lambda: build(tiny_oracle), tiny_oracle, tmp_path, 8)


def test_four_texts_become_four_indices(tiny_oracle):
    """With an index each, all texts are learned; with independent tokens the likelihood stays at their marginals'."""
    only_few(tiny_oracle)
    for split in ("train", "val"):  # one prompt for all
        columns = tiny_oracle.rows[split].columns
        length = columns["input_ids"].shape[1] - response_of(columns).shape[1]
        columns["input_ids"][:, :length] = columns["input_ids"][0, :length]
        columns["attention_mask"][:, :length] = columns["attention_mask"][0, :length]
    text = response_of(tiny_oracle.rows["val"].columns)
    assert len(torch.unique(text[:4], dim=0)) == 4
    found = {}
    for indices in (1, 4):
        module, trainer = build(tiny_oracle, indices=indices), quiet_trainer(150)
        trainer.fit(module, tiny_oracle)
        (figures,) = trainer.validate(module, tiny_oracle, verbose=False)
        found[indices] = figures["val/loss"] * text.shape[1]
    independent = 0.0
    for column in text[:4].unbind(-1):
        share = column.unique(return_counts=True)[1].double() / 4
        independent -= float((share * share.log()).sum())
    truth = torch.tensor(4.0).log()
    assert found[1] > 0.98 * independent > 1.5 * truth
    assert found[4] < 1.2 * truth


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"indices": 0}, "module.indices=0 must be at least 1"), ({"temperature": -1.0}, "module.temperature=-1.0")],
)
def test_mistakes_are_named(tiny_oracle, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        build(tiny_oracle, **options)
