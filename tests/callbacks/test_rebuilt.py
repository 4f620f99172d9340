"""Words rebuilt from plans: all of them where plans are learnt, by hand where the executor errs once, few by chance."""

import pytest
import torch
from helpers.concept import only_few
from helpers.concept import two_type_module as module_of
from helpers.trainer import quiet_trainer

from callbacks.rebuilt import Rebuilt


def measured(module, data) -> dict[str, float]:
    trainer = quiet_trainer(120, callbacks=[Rebuilt(rows=64)])
    if module.lr:
        trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    return module.figures.values


@pytest.mark.slow
def test_learnt_texts_are_rebuilt_in_both_ways_and_fresh_ones_in_neither(tiny_oracle, capsys):
    only_few(tiny_oracle)
    found = measured(module_of(tiny_oracle, 4), tiny_oracle)
    for how in ("teacher_forced", "free_running"):
        assert found[f"token_accuracy_{how}"] == 1
        assert found[f"bleu_{how}"] == pytest.approx(100)
    assert "reconstructed from plans, teacher forced: token accuracy 1.000" in capsys.readouterr().out
    fresh = module_of(tiny_oracle, 4)
    fresh.lr = 0.0
    assert measured(fresh, tiny_oracle)["token_accuracy_free_running"] < 0.7


def test_words_are_counted_up_to_the_first_end(tiny_oracle):
    def predictions(rows, batch):
        """Right but for the first token when forced, wrong everywhere when free."""
        batch.counts[:, 4:] = False
        forced, wrong = batch.text.clone(), (batch.text + 1) % 4
        forced[:, 0], forced[:, 5] = wrong[:, 0], wrong[:, 5]
        return torch.stack([forced, wrong], 1)

    module = module_of(tiny_oracle, 4)
    module.probe.predictions, module.lr = predictions, 0.0
    found = measured(module, tiny_oracle)
    assert found["token_accuracy_teacher_forced"] == pytest.approx(3 / 4)
    assert found["token_accuracy_free_running"] == 0
    assert found["bleu_teacher_forced"] > found["bleu_free_running"]
