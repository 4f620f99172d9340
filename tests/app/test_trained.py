"""A planner-executor in a folder is the one that was trained; a checkpoint is exported as the model that it holds."""

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.concept import DRAWN
from helpers.trainer import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from app.trained import fill_from_checkpoint, load_planned, newest_model, trained_decoder
from callbacks.ema import TrainableEMA
from callbacks.export import ExportModel
from lightning_modules.concept_baseline import ConceptBaselineModule
from lightning_modules.concept_planner_executor import ConceptPlannerExecutorModule
from models.functional.errors import UsageError

TYPES = {"a": {"codes": 3, "most": 2, "least": 0}, "b": {"codes": 4, "most": 1}}


def build(data, kind=ConceptPlannerExecutorModule, **options):
    torch.manual_seed(0)
    ids = data.special_ids()
    model = tiny_causal(ids.pop("vocab_size"), **ids)
    own = (
        {"types": TYPES, "weights": {"text": 1.0, "planner": 1.0}} | DRAWN
        if kind is ConceptPlannerExecutorModule
        else {}
    )
    return kind(model, **own | {"warmup_steps": 1, "lr": 3e-3, "seed": 7} | options)


def answers(decoder, data) -> list[str]:
    rows = {name: column[:8] for name, column in data.rows["test"].columns.items()}
    return data.decode_responses(decoder(rows, torch.Generator().manual_seed(3)))


FIXED = {"a": {"codes": 4, "most": 2}, "b": {"codes": 4}}
QUANTISED = {
    "types": FIXED,
    "sampler": "ema_vq",
    "planning": {"prior": "types", "posterior": "slots"},
    "search": {"begin": 0.5},
}


LEVELS = QUANTISED | {"types": {"a": {"codes": 3, "most": 2, "levels": 2}, "b": {"codes": 4}}}
NAMED = QUANTISED | {
    "types": {"a": {"codes": 4}, "b": {"codes": 4, "most": 2}},
    "signals": {"a": "who"},
    "signal_codes": True,
    "search": None,
    "weights": {"text": 1.0, "planner": 1.0, "signals": 1.0},
}


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_rank": 2}, QUANTISED, LEVELS, NAMED, {"kind": ConceptBaselineModule, "code": "leading", "tokens": 2}],
)
def test_what_is_read_back_answers_as_what_was_trained(tmp_path, tiny_oracle, options):
    module = build(tiny_oracle, **options)
    folder = tmp_path / "runs" / "one" / "model"
    trainer = quiet_trainer(3, callbacks=[TrainableEMA(0.5), ExportModel(folder)])
    trainer.fit(module, tiny_oracle)
    module.eval()
    again = load_planned(folder)
    text = tiny_oracle.rows["test"].columns["input_ids"][:8]
    mask, choices = torch.ones_like(text, dtype=torch.bool), torch.ones(8, len(module.model.layout.slot_columns)).long()
    with torch.no_grad():
        for one, other in ((module, again), (again, module)):
            scores = [m.planner.score(text, mask, choices) for m in (one, other)]
            torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)  # float32, and merged weights round otherwise
        said = [m.executor.logits(*m.planner.block(choices), text[:, -6:]) for m in (module, again)]
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)
    assert newest_model(tmp_path / "runs") == folder
    if "kind" not in options:
        greedy = trained_decoder(folder, tiny_oracle, 0.0, torch.device("cpu"))
        assert answers(greedy, tiny_oracle) == answers(module.decoders()[0], tiny_oracle)
    plain = AutoModelForCausalLM.from_pretrained(folder / "backbone")  # without this project
    assert plain.config.vocab_size == len(tiny_oracle.tokenizer)


def test_a_checkpoint_is_exported_with_its_averaged_weights(tmp_path, tiny_oracle):
    module, keep = build(tiny_oracle), ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    quiet_trainer(4, callbacks=[TrainableEMA(0.5), keep], enable_checkpointing=True).fit(module, tiny_oracle)
    fresh = build(tiny_oracle)
    fill_from_checkpoint(fresh, tmp_path / "last.ckpt")
    for name, value in module.named_parameters():  # the end of the training shows the average
        torch.testing.assert_close(value, dict(fresh.named_parameters())[name], msg=name)


def test_what_does_not_fit_is_refused(tmp_path, tiny_oracle):
    folder = build(tiny_oracle).export(tmp_path / "model", tiny_oracle.tokenizer)
    options = folder / "concepts.json"
    good = options.read_text()
    options.write_text(good.replace('"codes": 4', '"codes": 5'))
    with pytest.raises(UsageError, match=r"concepts.safetensors holds .* its options ask for"):
        load_planned(folder)
    options.write_text(good.replace("leap-concepts-1", "leap-concepts-0"))
    with pytest.raises(UsageError, match="is of format leap-concepts-0"):
        load_planned(folder)
    options.write_text(good.replace("ConceptPlannerExecutorModule", "Unknown"))
    with pytest.raises(UsageError, match="names no module of this version"):
        load_planned(folder)
    with pytest.raises(UsageError, match="there is nothing to export"):
        fill_from_checkpoint(torch.nn.Linear(1, 1), tmp_path / "x.ckpt")
