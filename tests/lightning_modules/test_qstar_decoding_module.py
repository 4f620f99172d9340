"""q* of two small random models on the tiny corpus: comparison, training, resume, files."""

import pytest
import torch
from helpers.trainer import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM

from callbacks.frontier import FrontierReport
from datamodules.oracle.datamodule import OracleDataModule
from lightning_modules.qstar_decoding import QStarDecodingModule
from models.backbones.causal import build_causal
from models.functional.errors import UsageError
from models.functional.next_token import causal_text, until_end
from models.functional.rows import with_responses
from models.speculative.options import QStarOptions


def corpus(**options) -> OracleDataModule:
    data = OracleDataModule(
        size="tiny", style=0.5, train_rows=64, val_rows=16, test_rows=32, batch_size=16, eval_batch_size=16, **options
    )
    data.setup()
    return data


def network(data, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = build_causal(**data.special_ids(), **sizes, max_position_embeddings=32, rope_theta=10_000.0)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    return model


@pytest.fixture
def data():
    return corpus()


def build(data, **options):
    options = {"exactness_samples": 0, "lr": 1e-2, "warmup_steps": 0} | options
    return QStarDecodingModule(network(data, 0), network(data, 1), **options)


def attach(module, data):
    """Decoders without a run."""
    trainer = quiet_trainer(1)
    trainer.datamodule = data
    module.trainer = trainer
    module.setup("test")
    return module


def test_a_test_run_records_that_q_lies_between_the_models(data, tmp_path):
    report = FrontierReport(str(tmp_path), "trial", {})
    module = build(data, schemes=("naive", "alternate"), exactness_samples=500)
    quiet_trainer(1, callbacks=[report]).test(module, data, verbose=False)
    rows = {row["decoder"]: row for row in report.record["rows"]}
    assert list(rows)[:4] == ["π_θ alone", "π_t alone", "q*, both at every token", "q*, alternating"]
    own, other = rows["π_θ alone"]["quality"], rows["π_t alone"]["quality"]
    for name in ("q*, both at every token", "q*, alternating"):
        quality, cost = rows[name]["quality"], rows[name]["cost"]
        assert own["nll_theta"] < quality["nll_theta"] < other["nll_theta"]
        assert other["nll_target"] < quality["nll_target"] < own["nll_target"]
        assert quality["g_test_p"] > 1e-3
        assert quality["max_enumeration_error"] < 1e-12
        assert 0 <= quality["style"] <= 1
        assert cost["speedup_vs_naive"] > 0
        assert cost["speedup_vs_naive_q1"] <= cost["speedup_vs_naive_q3"]
    assert rows["q*, both at every token"]["cost"]["speedup_vs_naive"] == 1.0
    assert rows["q*, both at every token"]["cost"]["acceptance"] is None
    assert 0 < rows["q*, alternating"]["cost"]["acceptance"] < 1
    assert rows["q*, alternating"]["cost"]["speedup_formula"] > 1


def test_a_corpus_without_a_list_of_texts_is_tested_after_its_first_prompt(data, tmp_path, monkeypatch):
    monkeypatch.setattr(type(data), "list_texts", lambda self: None)
    report = FrontierReport(str(tmp_path), "trial", {})
    module = build(data, schemes=("alternate",), exactness_samples=400)
    quiet_trainer(1, callbacks=[report]).test(module, data, verbose=False)
    quality = report.record["rows"][2]["quality"]
    assert quality["g_test_p"] > 1e-3
    assert "max_enumeration_error" not in quality
    row = data.rows["test"][:1]
    first = len(row["input_ids"][0]) - data.response_length
    prompt = row["input_ids"][0, :first][row["attention_mask"][0, :first].bool()]
    assert module._first_prompt(data).tolist() == prompt.tolist()


def test_a_test_run_draws_the_divergences_along_alpha(data, tmp_path):
    """Over the test texts' own positions up to their ends; both models by hand."""
    report = FrontierReport(str(tmp_path), "trial", {})
    module = build(data, schemes=("naive",), alpha_points=5)
    quiet_trainer(1, callbacks=[report]).test(module, data, verbose=False)
    found = report.record["alpha_curve"]
    rows = data.rows["test"].columns
    texts = rows["input_ids"][:, -data.response_length :]
    counts = until_end(texts, data.tokenizer.eos_token_id)
    assert found["positions"] == counts.sum() < counts.numel()
    # KL(π_θ‖π_t), row by row without padding
    total = 0.0
    for ids, real, count in zip(rows["input_ids"], rows["attention_mask"], counts.sum(-1), strict=True):
        first = len(ids) - data.response_length
        prompt = ids[:first][real[:first].bool()]
        text = torch.cat([prompt, ids[first:]])
        own, other = (
            m(text[None], attention_mask=torch.ones_like(text[None]))
            .logits[0, len(prompt) - 1 :][:count]
            .log_softmax(-1)
            for m in (module.theta, module.target)
        )
        total += float((own.exp() * (own - other)).sum().detach())
    assert found["kl_target"][-1] == pytest.approx(total / int(counts.sum()), rel=1e-4)
    half = found["alphas"].index(0.5)
    assert found["kl_theta"][0] > found["kl_theta"][half] > found["kl_theta"][-1] == pytest.approx(0.0, abs=1e-9)
    assert found["kl_target"][-1] > found["kl_target"][half] > found["kl_target"][0] == pytest.approx(0.0, abs=1e-9)
    assert 0 < found["alpha_star"] < 1
    assert found["chernoff_mean"] > found["kl_star"]  # the best α of each position is no worse than one for all
    assert (tmp_path / "alpha.png").stat().st_size > 1000


def test_other_responses_are_scored_to_their_own_end(data):
    """Also where the corpus marks the ends of its own responses."""
    module, rows = attach(build(data), data), data.rows["test"][:4]
    end, columns = data.tokenizer.eos_token_id, data.response_length
    responses = torch.full((4, columns), end)
    for row in range(4):
        responses[row, : row + 2] = 5
    for batch in (rows, rows | {"completion_mask": rows["response_mask"]}):
        text = causal_text(with_responses(batch, responses, module.end_ids))
        assert text.weights.sum(-1).tolist() == [3, 4, 5, 6]
        assert text.targets[text.weights].tolist() == [t for row in responses for t in row[: int((row == 5).sum()) + 1]]


def test_training_draws_theta_toward_q_and_leaves_the_target_alone(data):
    module = build(data)
    before = [weight.clone() for weight in module.target.parameters()]
    trainer = quiet_trainer(30, limit_val_batches=1, val_check_interval=1)
    trainer.validate(module, data, verbose=False)
    start = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.fit(module, data)
    end = trainer.callback_metrics
    assert end["val/kl_theta"] < 0.5 * start["val/kl_theta"]
    assert end["val/beta_theta"] > start["val/beta_theta"]
    assert end["val/accepted_length"] > start["val/accepted_length"]
    assert all(torch.equal(a, b) for a, b in zip(before, module.target.parameters(), strict=True))


def test_texts_of_a_step_are_generated_by_theta(data):
    module = attach(build(data), data)
    batch = next(iter(data.train_dataloader()))
    rows = module._with_generated(batch, 0, 0)
    columns = data.response_length
    assert torch.equal(rows["input_ids"][:, :-columns], batch["input_ids"][:, :-columns])
    assert not torch.equal(rows["input_ids"][:, -columns:], batch["input_ids"][:, -columns:])
    generated = rows["input_ids"][:, -columns:]
    assert causal_text(rows).weights.sum() == until_end(generated, data.tokenizer.eos_token_id).sum()


def test_what_follows_the_end_does_not_count(data):
    module = attach(build(data), data)
    end, batch = data.tokenizer.eos_token_id, next(iter(data.train_dataloader()))
    responses = torch.full((len(batch["input_ids"]), data.response_length), 9)
    responses[0, 2], responses[1, 0] = end, end
    rows = with_responses(batch, responses, module.end_ids)
    counts = causal_text(rows).weights.sum(-1)
    assert counts[:3].tolist() == [3, 1, data.response_length]
    other = responses.clone()
    other[0, 3:], other[1, 1:] = 12, 7
    again = module._nll(batch, other)
    for ours, theirs in zip(module._nll(batch, responses), again, strict=True):
        torch.testing.assert_close(ours, theirs)
    for decoder in module.decoders()[:2]:
        texts = decoder(batch, torch.Generator().manual_seed(0))
        ended = (texts == end).cumsum(-1) > 0
        assert (texts[ended] == end).all()


def test_output_layers_may_be_padded_differently(data):
    """As those of Qwen2.5's sizes: ids beyond the tokenizer's are never generated and take no part."""
    module = build(data)
    module.target.resize_token_embeddings(len(data.tokenizer) + 8, mean_resizing=False)
    trainer = quiet_trainer(2, limit_val_batches=1)
    before = [weight.clone() for weight in module.theta.parameters()]
    trainer.fit(module, data)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.theta.parameters(), strict=True))
    trainer.test(module, data, verbose=False)
    batch = next(iter(data.test_dataloader()))
    for decoder in module.decoders():
        assert decoder(batch, torch.Generator().manual_seed(0)).max() < len(data.tokenizer)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_training_is_the_uninterrupted_one(data, tmp_path, stop):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = build(data, lora_rank=2), build(data, lora_rank=2)
    quiet_trainer(7, callbacks=[keep], enable_checkpointing=True).fit(whole, data)
    quiet_trainer(7).fit(resumed, corpus(), ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True)
    names = [name for name, weight in whole.theta.named_parameters() if weight.requires_grad]
    assert names
    ours, theirs, fresh = (dict(m.theta.named_parameters()) for m in (resumed, whole, build(data, lora_rank=2)))
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], atol=0, rtol=0)
        assert not torch.equal(ours[name], fresh[name])


def test_exports_are_read_by_peft_and_by_transformers(data, tmp_path):
    module = build(data, lora_rank=2)
    with torch.no_grad():
        for name, weight in module.theta.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    ids = torch.arange(6).unsqueeze(0)
    wanted = module.theta.eval()(ids).logits
    adapter, merged = module.export(tmp_path / "a"), module.export(tmp_path / "m", merged=True)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(plain(ids).logits, wanted, atol=1e-5, rtol=0)
    read = PeftModel.from_pretrained(network(data, 0), adapter).eval()
    torch.testing.assert_close(read(ids).logits, wanted, atol=1e-6, rtol=0)


def test_predictions_are_responses(data):
    module = build(data)
    answers = quiet_trainer(1).predict(module, datamodule=data)
    assert answers[0].shape == (16, data.response_length)


def test_a_missing_third_model_and_wrong_options_are_named(data):
    with pytest.raises(UsageError, match="no third model"):
        build(data, schemes=("assistant",))
    with pytest.raises(UsageError, match="loss=mse is not known"):
        build(data, loss="mse")


def test_options_come_as_an_object_or_as_keywords(data):
    options = QStarOptions(schemes=("ngram",), lr=0.5)
    module = QStarDecodingModule(network(data, 0), network(data, 1), options, gamma=3)
    assert module.options == QStarOptions(schemes=("ngram",), lr=0.5, gamma=3)
    assert module.lr == module.hparams["lr"] == 0.5
