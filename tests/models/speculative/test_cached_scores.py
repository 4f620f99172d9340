"""Cached scores against whole prefixes: ragged rows, replaced tokens, masked slots."""

import pytest
import torch
from helpers.daily import daily
from helpers.qwen import tiny_qwen
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    OpenAIGPTConfig,
    RwkvConfig,
)

from models.functional.errors import UsageError
from models.speculative.cached_scores import CachedScores
from models.speculative.decode import decode_qstar
from models.speculative.distribution import MixtureDist
from models.speculative.options import DraftOptions
from models.speculative.random_source import TorchRandomSource
from models.speculative.scores import CausalScores
from models.speculative.state import TextRules


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


def conversation(rows, rounds, seed=0, length=160):
    """Calls as decoding makes them: rows grow by different steps, and some tokens are replaced."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (rows, length), generator=draw)
    lengths = torch.randint(1, 9, (rows,), generator=draw)
    for _ in range(rounds):
        count = int(torch.randint(1, 5, (1,), generator=draw))
        yield ids, lengths, count
        lengths = lengths + torch.randint(0, 4, (rows,), generator=draw)
        for row, end in enumerate(lengths.tolist()):
            start = int(torch.randint(max(1, end - 3), end + 4, (1,), generator=draw))
            ids[row, start : start + 2] = torch.randint(0, 50, (2,), generator=draw)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_qwen(0)], ids=["llama", "qwen3"])
def test_a_cached_call_gives_what_reading_the_whole_prefix_gives(make, rows):
    model = make()
    cached, whole = CachedScores(model), CausalScores(model)
    for ids, lengths, count in conversation(rows, 50):
        torch.testing.assert_close(cached(ids, lengths, count), whole(ids, lengths, count), atol=2e-6, rtol=0)


def test_masked_slots_stay_within_bounds_and_are_removed():
    model = tiny_qwen(1)
    cached, removed = CachedScores(model), 0
    for ids, lengths, count in conversation(4, 50, seed=1):
        before = cached.tokens.shape[1]
        cached(ids, lengths, count)
        removed += cached.tokens.shape[1] < before - 8
        assert cached.tokens.shape[1] == cached.cache.get_seq_length() <= 1.5 * int(lengths.max()) + 24
    assert removed >= 1


def test_slots_that_are_not_masked_give_other_scores():
    """The negative control: a cache that forgets which slots are rejected is wrong."""
    model = tiny_qwen(0)
    cached, whole = CachedScores(model), CausalScores(model)
    worst = 0.0
    for ids, lengths, count in conversation(4, 10):
        worst = max(worst, float((cached(ids, lengths, count) - whole(ids, lengths, count)).abs().max()))
        cached.valid = torch.ones_like(cached.valid)
        cached._cached_lengths = lambda ids, lengths: torch.minimum(cached.positions.amax(-1) + 1, lengths - 1)
    assert worst > 0.1


def test_only_what_is_new_is_read():
    model, widths = tiny_qwen(0), []
    model.register_forward_pre_hook(lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True)
    cached = CachedScores(model)
    ids = torch.randint(0, 50, (1, 40), generator=torch.Generator().manual_seed(0))
    for length, count in [(10, 1), (11, 1), (12, 3), (12, 3), (16, 1)]:
        cached(ids, torch.tensor([length]), count)
    ids[0, 13] = (ids[0, 13] + 1) % 50
    cached(ids, torch.tensor([16]), 1)
    assert widths == [10, 1, 3, 3, 2, 3]


SCHEMES = [
    {"draft": draft, "verify": verify, "gamma": gamma}
    for draft, gamma in (("theta", 3), ("target", 1), ("alternate", "auto"), ("assistant", 3))
    for verify in ("token", "block")
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_decoding_with_caches_is_decoding_without(scheme):
    """float64: the same draws give the same texts, whatever was rejected."""
    models = [tiny_qwen(seed, dtype=torch.float64) for seed in range(3)]
    prompts, lengths = torch.randint(4, 50, (5, 6), generator=torch.Generator().manual_seed(0)), torch.arange(2, 7)
    outs = []
    for kind in (CausalScores, CachedScores):
        third = {"assistant": kind(models[2])} if scheme["draft"] == "assistant" else {}
        rng = TorchRandomSource(torch.Generator().manual_seed(1))
        pair = kind(models[0]), kind(models[1])
        rules = TextRules(24, eos_ids=(3,))
        outs.append(decode_qstar(*pair, prompts, DraftOptions(**scheme), rules, lengths=lengths, rng=rng, **third))
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    assert torch.equal(outs[0].lengths, outs[1].lengths)
    torch.testing.assert_close(outs[0].log_q, outs[1].log_q, atol=1e-10, rtol=0, equal_nan=True)
    assert len(set(outs[0].lengths.tolist())) > 1


@pytest.mark.parametrize("draft", ["theta", "alternate"])
def test_rows_that_have_ended_are_read_no_more_and_no_forward_pass_is_for_a_few_rows(draft):
    """Batches shrink to the rows that go on. A round takes gamma forward passes of the drafter, whatever rows are pending."""
    models, seen = [tiny_qwen(seed) for seed in range(2)], []

    class Recorded(CachedScores):
        def __call__(self, ids, lengths, count):
            seen.append(len(ids))
            return super().__call__(ids, lengths, count)

    prompts = torch.randint(4, 50, (8, 4), generator=torch.Generator().manual_seed(0))
    pair, rng = (Recorded(model) for model in models), TorchRandomSource(torch.Generator().manual_seed(0))
    out = decode_qstar(*pair, prompts, DraftOptions(draft, gamma=3), TextRules(30, eos_ids=(3, 4, 5)), rng=rng)
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) > 3
    assert seen[-1] == 1
    assert out.lengths.max() > out.lengths.min()
    alone = 4  # in rounds of one or two rows, all may be pending
    assert 3 * out.forwards["target"] <= out.forwards["theta"] + alone
    assert out.forwards["theta"] <= 3 * out.forwards["target"] + alone
    assert out.acceptance["theta"] < 0.95


@pytest.mark.parametrize("scheme", daily(SCHEMES, *SCHEMES[4:6]), ids=str)
def test_a_ragged_batch_is_its_rows_one_by_one(scheme):
    """With top_k=1 the text is determined, whatever is drafted: batch, row and plain decoding agree."""
    models = [tiny_qwen(seed) for seed in range(3)]
    prompts, lengths = torch.randint(4, 50, (6, 8), generator=torch.Generator().manual_seed(2)), torch.arange(3, 9)

    def texts(rows, **options):
        third = {"assistant": CachedScores(models[2])} if options["draft"] == "assistant" else {}
        rng = TorchRandomSource(torch.Generator().manual_seed(0))
        return decode_qstar(
            CachedScores(models[0]), CachedScores(models[1]), prompts[rows], DraftOptions(**options), TextRules(20),
            lengths=lengths[rows], mixture=MixtureDist(top_k=1), rng=rng, **third,
        ).tokens  # fmt: skip

    together = texts(slice(None), **scheme)
    assert torch.equal(together, torch.cat([texts(slice(k, k + 1), **scheme) for k in range(6)]))
    assert torch.equal(together, texts(slice(None), draft="theta", gamma=0))


def test_a_sliding_window_is_refused_with_what_to_type():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForCausalLM(MistralConfig(vocab_size=20, intermediate_size=16, sliding_window=8, **sizes))
    with pytest.raises(UsageError, match=r"module\.cache=false"):
        CachedScores(model)


def gemma_with_pictures():
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    text |= {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    seen = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    seen |= {"image_size": 16, "patch_size": 8}
    ids = {"image_token_index": 49, "boi_token_index": 48, "eoi_token_index": 47}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=seen, **ids))


SMALL = {"vocab_size": 50, "hidden_size": 16}
LOCAL = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}


@pytest.mark.parametrize(
    "make",
    [
        gemma_with_pictures,
        lambda: AutoModelForCausalLM.from_config(GPTNeoConfig(**SMALL, **LOCAL)),
        lambda: AutoModelForCausalLM.from_config(MptConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=2)),
        lambda: AutoModelForCausalLM.from_config(RwkvConfig(**SMALL, num_hidden_layers=2, attention_hidden_size=16)),
        lambda: AutoModelForCausalLM.from_config(OpenAIGPTConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2)),
    ],
    ids=["gemma3", "gpt_neo", "mpt", "rwkv", "openai-gpt"],
)
def test_models_that_would_count_masked_slots_are_refused(make):
    with pytest.raises(UsageError, match=r"module\.cache=false"):
        CachedScores(make())
