"""The monitor on students of which the figures are known."""

import math

import pytest
import torch
from helpers_trainer import quiet_trainer

from callbacks.flow_monitor import FlowMonitor
from lightning_modules.noisy_mask_flow import NoisyMaskFlowModule

STAGES = {"adapt": {"share": 0.5, "lr": 1e-3}, "flow": {"share": 0.5, "lr": 1e-3}}


def figures(tiny_llada, data, spoil=lambda module: None, **options):
    ids = data.tokenizer
    torch.manual_seed(0)
    teacher = tiny_llada(
        len(ids), mask_token_id=ids.mask_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    sizes = {"prompt_length": 3, "prompt_hidden_size": 8, "prompt_rank": 4}
    module = NoisyMaskFlowModule(teacher, stages=STAGES, **sizes, **options)
    spoil(module)
    trainer = quiet_trainer(2, callbacks=[FlowMonitor(prompts=2, noises=16)], val_check_interval=2)
    trainer.fit(module, data)
    return {name.removeprefix("monitor/"): value.item() for name, value in trainer.callback_metrics.items()}


def test_all_figures_are_there_and_a_student_that_ignores_the_noise_shows_it(tiny_llada, tiny_oracle):
    """Two steps from the start the gate is all but shut: one text a prompt, and one long jump is what two short ones are."""
    seen = figures(tiny_llada, tiny_oracle)
    assert seen["noise_information"] == pytest.approx(0.0)
    assert seen["distinct"] == pytest.approx(1 / 16)
    assert seen["noise_information_truth"] > 1
    assert seen["consistency_gap"] < 0.05
    assert {f"accuracy_at_{s}" for s in ("0", "0.25", "0.5", "0.75", "0.9")} <= seen.keys()


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

    ids = tiny_oracle.tokenizer
    teacher = tiny_llada(len(ids), mask_token_id=ids.mask_token_id, eos_token_id=1, pad_token_id=0)
    module = NoisyMaskFlowModule(teacher, stages=STAGES, prompt_length=3, prompt_hidden_size=8, prompt_rank=4)
    quiet_trainer(4, callbacks=[Watched(noises=4)], val_check_interval=2).fit(module, tiny_oracle)
    assert module_weights == [True, True]
