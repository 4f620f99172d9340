"""Pre-training of causal models: figures by hand over ragged batches, exact resume, adapters, likelihood of the corpus."""

import copy
import math

import pytest
import torch
from helpers.causal import PackedStream, ToyCausal, ToyFiller, tiny_causal
from helpers.resume import assert_resumed_is_uninterrupted
from helpers.trainer import Losses, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM

from callbacks.ema import TrainableEMA
from callbacks.export import ExportModel
from callbacks.frontier import FrontierReport
from lightning_modules.pretrain import PretrainModule
from models.backbones.causal_lm import load_causal, save_causal
from models.diffusion.objective import MaskedDiffusion
from models.interfaces.objective import Terms
from models.objectives.latent import Latent
from models.objectives.masked_lm import MaskedLM
from models.objectives.multi_token import MultiToken
from models.objectives.next_token import NextToken
from models.objectives.span_corruption import SpanCorruption
from reporting.record import read_record


def build(objective, model=None, **options) -> PretrainModule:
    torch.manual_seed(0)
    model = model or tiny_causal(vocab_size=options.pop("vocab_size", 7))
    return PretrainModule(model, objective, **({"lr": 1e-2, "warmup_steps": 1, "seed": 7} | options))


def oracle_model(data, **options):
    torch.manual_seed(0)
    ids = data.special_ids()
    return tiny_causal(ids.pop("vocab_size"), **ids, **options)


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [False, True])
def test_validation_figures_by_hand_over_ragged_batches(documents):
    module, data = build(NextToken()), PackedStream(documents=documents)
    (found,) = quiet_trainer(1).validate(module, data, verbose=False)
    nats, text_nats, tokens, text_bytes = 0.0, 0.0, 0, 0
    for batch in data.batches:
        for row in range(len(batch["labels"])):
            for place in range(6):
                start = place // 4 * 4 if documents else 0
                seen = batch["input_ids"][row : row + 1, start : place + 1]
                with torch.no_grad():
                    log_p = module.model(input_ids=seen).logits[0, -1].log_softmax(-1)
                nll = -log_p[batch["labels"][row, place]].item()
                nats, tokens = nats + nll, tokens + 1
                text_nats += nll * bool(batch["target_bytes"][row, place])
                text_bytes += int(batch["target_bytes"][row, place])
    assert tokens == 36
    assert found["val/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["val/nll"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["val/bits_per_byte"] == pytest.approx(text_nats / math.log(2) / text_bytes, rel=1e-5)
    each = [module.objective(module.model, batch, torch.Generator()) for batch in data.batches]
    mean_of_means = sum(out.loss.item() for out in each) / 3
    assert abs(mean_of_means - nats / tokens) > 1e-3  # batches of different sizes do not weigh the same


def test_an_objective_without_a_likelihood_claims_none_and_a_bound_is_called_one():
    data = PackedStream()
    (found,) = quiet_trainer(1).validate(build(Latent(2)), data, verbose=False)
    assert set(found) == {"val/loss"}
    (found,) = quiet_trainer(1).validate(build(MaskedLM(), ToyFiller().float()), data, verbose=False)
    assert set(found) == {"val/loss", "val/nll_bound", "val/perplexity_bound", "val/bits_per_byte_bound"}
    (found,) = quiet_trainer(1).validate(build(MaskedDiffusion(), ToyFiller().float()), data, verbose=False)
    assert found["val/nll_bound"] == pytest.approx(found["val/loss"], rel=1e-5)


@pytest.mark.parametrize("objective", [NextToken, lambda: MultiToken(2), SpanCorruption])
def test_a_test_measures_the_exact_likelihood_of_the_corpus_and_its_truth(tiny_oracle, objective):
    module = build(objective(), oracle_model(tiny_oracle))
    quiet_trainer(1).test(module, tiny_oracle, verbose=False)
    figures, rows = module.model_figures(), tiny_oracle.rows["test"].columns
    texts = rows["input_ids"][:, tiny_oracle.prompt_length :]
    truth = -tiny_oracle.distribution.log_prob(texts, rows["reveal"]).sum().item() / texts.numel()
    assert figures["nll_truth"] == pytest.approx(truth)
    own = module.objective.text_nll(module.model, rows, torch.Generator()).detach().sum().item() / texts.numel()
    assert figures["nll"] == pytest.approx(own, rel=1e-5)
    assert figures["nll"] > truth
    (decoder,) = module.decoders()
    assert (decoder.name, decoder.forwards) == ("autoregressive", tiny_oracle.response_length)
    assert decoder.options["whole_prompt"] == isinstance(module.objective, SpanCorruption)


def test_a_corpus_without_prompts_is_reported_by_its_likelihood_alone(tmp_path):
    module, data = build(NextToken()), PackedStream()
    quiet_trainer(1, callbacks=[FrontierReport(tmp_path, "packed", {})]).test(module, data, verbose=False)
    (row,) = read_record(tmp_path / "record.json")["rows"]
    assert (row["method"], row["decoder"]) == ("model", "NextToken")
    (found,) = quiet_trainer(1).validate(module, data, verbose=False)
    assert row["quality"]["bits_per_byte"] == pytest.approx(found["val/bits_per_byte"], rel=1e-6)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [lambda: MultiToken(3), lambda: Latent(2, decay=0.5), SpanCorruption], ids=["multi", "latent", "span"]
)
def test_resumed_is_uninterrupted(tmp_path, tiny_oracle, objective):
    """Heads and the slowly following copy travel in the checkpoint."""

    def module() -> PretrainModule:
        return build(objective(), oracle_model(tiny_oracle))

    whole = assert_resumed_is_uninterrupted(module, tiny_oracle, tmp_path).whole
    held = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    kept = {name for name in whole.state_dict() if name.startswith("objective.")}
    assert {name for name in held if name.startswith("objective.")} == kept


class Keep(PretrainModule):
    """Notes down the gradient of every step as the optimiser gets it."""

    def configure_gradient_clipping(self, *_, **__) -> None:
        self.taken = [p.grad.clone() for p in self.parameters()]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("hidden", [0, 9])
def test_ragged_micro_batches_make_the_step_of_the_whole(monkeypatch, weighted, hidden):
    """Three micro-batches of 3, 1 and 2 rows, some of their labels ignored; without weights it is the mean of means."""
    data = PackedStream(sizes=(3, 1, 2))
    data.batches[0]["labels"].view(-1)[:hidden] = -100
    torch.manual_seed(0)
    module = Keep(tiny_causal(7), NextToken(), lr=1e-2, warmup_steps=1)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    if not weighted:
        monkeypatch.setattr("lightning_modules.training.token_weights.TokenWeights.weight", lambda *_: 1.0)
        monkeypatch.setattr("lightning_modules.training.token_weights.TokenWeights.finish", lambda *_: None)
    quiet_trainer(1, accumulate_grad_batches=3).fit(module, data)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(start[name])
    outs = [module.objective(module.model, batch, torch.Generator()) for batch in data.batches]
    assert [out.tokens for out in outs] == [18 - hidden, 6, 12]
    expected = torch.autograd.grad(
        sum(out.loss * out.tokens for out in outs) / sum(out.tokens for out in outs), module.parameters()
    )
    same = [
        torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6) for mine, theirs in zip(module.taken, expected, strict=True)
    ]
    assert all(same) == weighted


def test_micro_batches_whose_tokens_are_not_counted_weigh_alike():
    def objective(model, batch, generator):
        return Terms(NextToken()(model, batch, generator).loss, {})

    data = PackedStream(sizes=(3, 1, 2))
    torch.manual_seed(0)
    module = Keep(tiny_causal(7), objective, lr=1e-2, warmup_steps=1)
    twin = copy.deepcopy(module)
    quiet_trainer(1, accumulate_grad_batches=3).fit(module, data)
    mean = sum(objective(twin.model, batch, torch.Generator()).loss for batch in data.batches) / 3
    for mine, expected in zip(module.taken, torch.autograd.grad(mean, twin.parameters()), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_states_of_a_plain_objective_are_those_of_the_model():
    rows = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.bool)}
    plain, declared = build(lambda model, batch, generator: None), build(NextToken())
    assert torch.equal(plain.states(rows), declared.states(rows))


def test_a_tiny_model_learns_one_text_by_heart(tiny_oracle):
    rows = tiny_oracle.rows["train"].columns
    few = {name: column[:1].repeat_interleave(64, 0) for name, column in rows.items()}
    tiny_oracle.rows["train"].columns = few
    module, losses = build(NextToken(), oracle_model(tiny_oracle), warmup_steps=5), Losses()
    quiet_trainer(80, callbacks=[losses]).fit(module, tiny_oracle)
    assert losses.seen[-1] < losses.seen[0] / 20
    (sampler,) = module.decoders()
    text = few["input_ids"][:, tiny_oracle.prompt_length :]
    with torch.no_grad():
        share = (sampler(few, torch.Generator().manual_seed(0)) == text).double().mean().item()
    assert share > 0.95


def test_adapters_train_alone_travel_alone_and_leave_folders_that_others_read(tmp_path, tiny_oracle):
    folder = save_causal(oracle_model(tiny_oracle, architecture="qwen3"), tmp_path / "qwen")
    model = load_causal(folder, lora_rank=2)
    module = build(NextToken(), model)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    parts = [TrainableEMA(0.5), keep, ExportModel(str(tmp_path / "model"), merged=True)]
    quiet_trainer(4, callbacks=parts, enable_checkpointing=True).fit(module, tiny_oracle)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    held = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name for name in held)
    ids = tiny_oracle.rows["test"].columns["input_ids"][:4]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "model").eval()
        assert torch.equal(by_peft(input_ids=ids).logits, expected)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model_merged").eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "model_merged" / "tokenizer.json").is_file()


def test_flops_of_a_step_are_those_of_its_products():
    """One linear body by hand: 2 B T D V for the head's product, twice that again for its two gradients."""
    module = build(NextToken(), ToyCausal(width=4).float())
    batch = PackedStream(sizes=(4,)).batches[0]
    rows, length, width, vocabulary = 4, 6, 4, 7
    head = 2 * rows * length * width * vocabulary * 3
    averaging = 2 * rows * length * length * width * 2  # the mean over what is seen; its weights have no gradient
    assert module.flops_of_step(batch) == pytest.approx(head + averaging)
    assert all(p.grad is None for p in module.parameters())
