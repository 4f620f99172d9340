"""The monitor on students of which the figures are known."""

import math

import pytest
import torch
from helpers.noisy_mask import build, exact_denoiser
from helpers.trainer import quiet_trainer

from callbacks.flow_monitor import FlowMonitor
from models.interfaces.probes import FlowMapProbe, find_probe

STAGES = {"adapt": {"share": 0.5, "lr": 1e-3}, "flow": {"share": 0.5, "lr": 1e-3}}
SLOW = {name: stage | {"lr": 1e-6} for name, stage in STAGES.items()}


def figures(tiny_llada, data, **options):
    trainer = quiet_trainer(2, callbacks=[FlowMonitor(prompts=2, noises=16)], val_check_interval=2)
    trainer.fit(build(tiny_llada, data, **({"stages": STAGES} | options)), data)
    return {name.removeprefix("monitor/"): value.item() for name, value in trainer.callback_metrics.items()}


def test_all_figures_are_there_and_a_student_that_ignores_the_noise_shows_it(tiny_llada, tiny_oracle):
    """Two steps from the start the gate is all but shut: one text a prompt."""
    seen = figures(tiny_llada, tiny_oracle, stages=SLOW)
    assert seen["noise_information"] == pytest.approx(0.0)
    assert seen["distinct"] == pytest.approx(1 / 16)
    assert seen["noise_information_truth"] > 1
    for figure in ("accuracy", "denoiser_gap"):
        assert {f"{figure}_at_{s}" for s in ("0", "0.25", "0.5", "0.75", "0.9")} <= seen.keys()
    assert min(seen[f"denoiser_gap_at_{s}"] for s in ("0", "0.25", "0.5")) > 1  # nats a text: it has learned nothing


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_a_student_of_flat_distributions_jumps_consistently(tiny_llada, tiny_oracle, scale):
    """The control has sharp distributions: the second of two jumps sees what one jump does not."""
    module = build(tiny_llada, tiny_oracle)
    module.student.body.lm_head.weight.data.mul_(scale)
    rows = tiny_oracle.rows["val"].columns
    gap = find_probe(module, FlowMapProbe).consistency_gap(rows, torch.Generator().manual_seed(0))
    assert gap > 0.1 if scale == 1 else gap < 1e-3


@pytest.mark.parametrize("spoiled", [0.0, 0.1])
def test_the_denoiser_of_the_corpus_has_no_gap(tiny_llada, tiny_oracle, spoiled):
    """The control has a tenth of its mass anywhere."""
    module = build(tiny_llada, tiny_oracle)
    rows, student = tiny_oracle.rows["val"].columns, module.student

    def denoiser(sample, t):
        p = exact_denoiser(student, tiny_oracle, rows, sample.z, sample.s)
        return ((1 - spoiled) * p + spoiled / p.shape[-1]).clamp(min=1e-30).log().flatten(0, 1)

    student.forward = denoiser
    trainer = quiet_trainer(2)
    trainer.datamodule = tiny_oracle
    seen = FlowMonitor()._denoiser(trainer, find_probe(module, FlowMapProbe), rows, torch.Generator().manual_seed(0))
    gaps = [value for name, value in seen.items() if name.startswith("denoiser_gap")]
    assert len(gaps) == 5
    assert min(gaps) > 0.1 if spoiled else max(map(abs, gaps)) < 1e-6


def test_a_student_that_reads_the_noise_has_information_and_inconsistent_jumps(tiny_llada, tiny_oracle):
    seen = figures(tiny_llada, tiny_oracle, adapter="prefix")
    assert 1 < seen["noise_information"] < math.log(16) + 0.5
    assert seen["distinct"] > 0.5
    assert seen["consistency_gap"] > 0.1


def test_it_leaves_the_weights_as_they_are(tiny_llada, tiny_oracle):
    module_weights = []

    class Watched(FlowMonitor):
        def on_validation_epoch_end(self, trainer, pl_module):
            before = pl_module.student.trainable()
            super().on_validation_epoch_end(trainer, pl_module)
            module_weights.append(all(torch.equal(w, before[n]) for n, w in pl_module.student.trainable().items()))

    module = build(tiny_llada, tiny_oracle, stages=STAGES)
    quiet_trainer(4, callbacks=[Watched(noises=4)], val_check_interval=2).fit(module, tiny_oracle)
    assert module_weights == [True, True]
