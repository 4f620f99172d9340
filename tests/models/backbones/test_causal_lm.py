"""Causal bodies as plain Hugging Face folders: parity with transformers and peft, adapters in and out, refusals."""

import json
from pathlib import Path

import pytest
import torch
from helpers.causal import TINY_SHAPE, pair_batch, tiny_causal
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM

from models.backbones.causal import build_body, build_causal
from models.backbones.causal_lm import (
    causal_hidden,
    causal_logits,
    load_causal,
    load_trained,
    output_head,
    save_causal,
    save_merged,
    with_adapters,
)
from models.backbones.llada import LladaModel
from models.backbones.states import text_states
from models.functional.errors import UsageError
from models.functional.next_token import causal_text
from models.objectives.next_token import NextToken

IDS = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))
TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def move_adapters(model) -> None:
    """Give the adapters an effect: they start as no-ops."""
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)


@pytest.fixture
def qwen_folder(tmp_path) -> Path:
    return save_causal(tiny_causal(architecture="qwen3"), tmp_path / "qwen")


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_body_is_a_plain_folder_for_transformers(architecture, tmp_path):
    model = tiny_causal(architecture=architecture)
    folder = save_causal(model, tmp_path / "body")
    assert not list(tmp_path.glob("*.partial"))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is type(model)
    assert theirs.config.pad_token_id == 0
    assert torch.equal(logits_of(theirs), logits_of(model))
    assert torch.equal(logits_of(load_causal(folder)), logits_of(model))
    model.train()(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad[0].abs().sum() > 0  # the padding row trains like any other


def test_bodies_of_both_kinds_have_the_same_sizes():
    sizes = {
        "vocab_size": 11,
        "mask_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "rope_theta": 100.0,
    }
    bodies = {attention: build_body(attention=attention, **sizes) for attention in ("causal", "bidirectional")}
    shapes = [{name: tuple(p.shape) for name, p in body.named_parameters()} for body in bodies.values()]
    assert shapes[0] == shapes[1]
    assert isinstance(bodies["bidirectional"], LladaModel)
    assert bodies["causal"].config.rope_parameters["rope_theta"] == 100.0
    mask = torch.ones_like(IDS, dtype=torch.bool)
    for attention, body in bodies.items():
        changed = IDS.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 11
        same = torch.isclose(text_states(body, IDS, mask), text_states(body, changed, mask)).all(-1)[:, :-1].all()
        assert bool(same) == (attention == "causal")
    with pytest.raises(UsageError, match=r"model.attention=sideways"):
        build_body(attention="sideways", **sizes)
    with pytest.raises(UsageError, match=r"type a multiple of 8"):
        build_body(attention="causal", **(sizes | {"hidden_size": 12}))
    with pytest.raises(UsageError, match="type one of llama, qwen3"):
        build_body(attention="causal", architecture="gpt", **sizes)


def test_words_may_start_wider_than_layers():
    bodies = []
    for wide in ({}, {"embedding_range": 0.2}):
        torch.manual_seed(0)
        bodies.append(build_causal(vocab_size=300, **TINY_SHAPE, **wide))
    plain, wide = (dict(body.named_parameters()) for body in bodies)
    words = wide.pop("model.embed_tokens.weight")
    assert words.std().item() == pytest.approx(0.2, rel=0.05)
    torch.testing.assert_close(words, 10 * plain.pop("model.embed_tokens.weight"))
    assert all(torch.equal(weight, plain[name]) for name, weight in wide.items())


def test_a_loaded_model_is_the_one_that_transformers_loads(qwen_folder):
    ours, theirs = load_causal(qwen_folder), AutoModelForCausalLM.from_pretrained(qwen_folder)
    assert isinstance(ours, Qwen3ForCausalLM)
    assert torch.equal(logits_of(ours), logits_of(theirs))
    text = causal_text({"input_ids": IDS, "labels": IDS})
    with torch.no_grad():
        torch.testing.assert_close(causal_logits(ours, text), logits_of(theirs))
        torch.testing.assert_close(output_head(ours)(causal_hidden(ours, text)), logits_of(theirs))
    assert load_causal(qwen_folder, dtype="bfloat16").dtype == torch.bfloat16


def test_its_loss_and_gradient_are_those_of_transformers(qwen_folder):
    """A packed row, and prompts with responses padded on both sides, against each text alone with transformers' own labels."""
    ours, theirs = load_causal(qwen_folder).double(), AutoModelForCausalLM.from_pretrained(qwen_folder).double()
    packed = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}
    pairs = pair_batch()
    alone = [(row, 1) for row in IDS]
    for ids, mask, response in zip(*(pairs[n] for n in ("input_ids", "attention_mask", "response_mask")), strict=True):
        if (mask & ~response).any():  # without a prompt transformers scores nothing of the first token
            alone.append((ids[mask], int((mask & ~response).sum())))
    nats = []
    for ids, first in alone:
        labels = ids.clone()
        labels[:first] = -100
        nats.append(theirs(input_ids=ids[None], labels=labels[None]).loss * (len(ids) - first))
    outs = [NextToken()(ours, batch, torch.Generator()) for batch in (packed, pairs)]
    found = torch.cat([out.position_nll.sum(-1) for out in outs])
    prompted = torch.cat([torch.ones(2, dtype=torch.bool), (pairs["attention_mask"] & ~pairs["response_mask"]).any(-1)])
    torch.testing.assert_close(found[prompted].float(), torch.stack(nats))  # its loss is in single precision
    gradients = [torch.autograd.grad(total, model.parameters()) for total, model in
                 ((found[prompted].sum(), ours), (torch.stack(nats).sum(), theirs))]  # fmt: skip
    for mine, known in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, known, rtol=1e-4, atol=1e-6)
    assert outs[0].tokens == 16


def test_documents_in_a_row_do_not_see_each_other(qwen_folder):
    model = load_causal(qwen_folder).eval()
    row = torch.cat([IDS[:1, :4], IDS[1:, :5]], -1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    text = causal_text({"input_ids": row, "labels": row, "position_ids": positions})
    with torch.no_grad():
        together = causal_logits(model, text)[0]
        apart = torch.cat([model(input_ids=IDS[:1, :4]).logits[0], model(input_ids=IDS[1:, :5]).logits[0]])
        leaking = causal_logits(model, text._replace(position_ids=None))[0]
    torch.testing.assert_close(together, apart)
    assert not torch.allclose(leaking, apart)


def test_adapters_sit_on_attention_and_mlp_alone_and_start_as_no_ops(qwen_folder):
    model = load_causal(qwen_folder, lora_rank=2)
    assert torch.equal(logits_of(model), logits_of(load_causal(qwen_folder)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained} == TARGETS
    assert len(trained) == 2 * 2 * len(TARGETS)
    config = GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    other = with_adapters(GPT2LMHeadModel(config), 2)  # other names, other kinds of layers
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, p in other.named_parameters() if p.requires_grad}
    assert adapted == {"c_attn", "c_proj", "c_fc"}


def test_plain_peft_reads_the_adapter_and_plain_transformers_the_merged_model(qwen_folder, tmp_path):
    model = load_causal(qwen_folder, lora_rank=2)
    move_adapters(model)
    expected = logits_of(model)
    assert not torch.allclose(expected, logits_of(load_causal(qwen_folder)), atol=1e-2)
    adapter, merged = save_causal(model, tmp_path / "adapter"), save_merged(model, tmp_path / "merged")
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (adapter / "model.safetensors").exists()
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen_folder), adapter)
    assert torch.equal(logits_of(by_peft), expected)
    by_transformers = AutoModelForCausalLM.from_pretrained(merged)
    assert isinstance(by_transformers, Qwen3ForCausalLM)
    torch.testing.assert_close(logits_of(by_transformers), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits_of(model), expected)  # merging was done on a copy


def test_an_adapter_that_names_no_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UsageError, match=r"adapter_config\.json names no base_model_name_or_path"):
        load_trained(tmp_path)


def test_adapters_of_a_half_precision_model_train_in_single_precision(qwen_folder):
    model = load_causal(qwen_folder, dtype="bfloat16", lora_rank=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    out = NextToken()(model, {"input_ids": IDS, "labels": IDS}, torch.Generator())
    assert out.position_nll.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_cannot_be_read_gets_a_sentence(qwen_folder, tmp_path, tiny_llada):
    with pytest.raises(UsageError, match=r"model.path=.*nowhere: this folder does not exist"):
        load_causal(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"model.lora_rank=0 must be at least 1"):
        load_causal(qwen_folder, lora_rank=0)
    with pytest.raises(UsageError, match=r"model.lora_dropout=1"):
        load_causal(qwen_folder, lora_dropout=1.0)
    with pytest.raises(UsageError, match=r"model.dtype=int8"):
        load_causal(qwen_folder, dtype="int8")
    tiny_llada().save_pretrained(tmp_path / "llada")
    with pytest.raises(UsageError, match="leap_llada model, which is no causal LM"):
        load_causal(tmp_path / "llada")
    config = json.loads((qwen_folder / "config.json").read_text())
    (qwen_folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": {"x": "y"}}))
    with pytest.raises(UsageError, match="remote code is not run"):
        load_causal(qwen_folder)
    (qwen_folder / "config.json").write_text(json.dumps(config))
    weights = qwen_folder / "model.safetensors"
    weights.rename(qwen_folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="a pickle, which can run code"):
        load_causal(qwen_folder)
    weights.write_bytes((qwen_folder / "pytorch_model.bin").read_bytes()[:100])
    with pytest.raises(UsageError, match="not a complete safetensors file"):
        load_causal(qwen_folder)
