"""Hugging Face folders as users bring them: small random models of many architectures, each with one oddity."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WORDS = 300  # ids of the tokenizer
CONTEXT = 64  # positions

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}

# architecture -> options of its configuration
ARCHITECTURES: dict[str, dict] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "qwen2": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": None},
    "gemma": _LLAMA | {"tie_word_embeddings": True},
    "gemma2": _LLAMA | {"sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": _LLAMA | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "granite": _LLAMA | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    "gpt2": _GPT,
    "gpt_neox": _LLAMA | {"rotary_pct": 0.5},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": False},
    "phi3": _LLAMA,
    "cohere": _LLAMA | {"logit_scale": 0.25},
    "gptj": _GPT | {"rotary_dim": 4},
    "starcoder2": _LLAMA | {"sliding_window": 8},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": CONTEXT,
    },
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": CONTEXT},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "openai-gpt": _GPT,
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def foreign_model(architecture: str, *, vocab_size: int = WORDS, seed: int = 0, **options) -> PreTrainedModel:
    """A random model whose weights are so large that every token matters; options: of its configuration."""
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(architecture, vocab_size=vocab_size, **(ids | ARCHITECTURES[architecture] | options))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(std=0.25)
    return model.eval()


def foreign_tokenizer(*, words: int = WORDS, end: int = 1, **special) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of so many ids; special: its special tokens, by default `<pad>` (0) and `<end>` (end).

    Ids from 258 on are added tokens, such as `<extra_258>`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<end>": end} | {token: k + 2 for k, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<end>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})
    tokenizer.add_tokens([f"<extra_{k}>" for k in range(len(tokenizer), words)])
    return tokenizer


def save_foreign(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    max_shard_size: str = "5GB",
    **config: object,
) -> Path:
    """A folder as `save_pretrained` writes it; config: entries of config.json to change afterwards."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def _plain(folder: Path, **options) -> Path:
    return save_foreign(folder, foreign_model("llama", **options), foreign_tokenizer())


def _of(architecture: str, **options):
    return lambda folder: save_foreign(folder, foreign_model(architecture, **options), foreign_tokenizer())


def _with_tokenizer(**special):
    return lambda folder: save_foreign(folder, foreign_model("llama"), foreign_tokenizer(**special))


def _several_ends(folder: Path) -> Path:
    """As an instruct model that ends a turn with one token and a document with another."""
    model = foreign_model("llama", eos_token_id=[1, 260])
    model.generation_config.eos_token_id = [1, 260]
    return save_foreign(folder, model, foreign_tokenizer(eos_token="<end>"))


def _chat(folder: Path) -> Path:
    tokenizer = foreign_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<extra_258>{{ m['content'] }}{% endfor %}"
    return save_foreign(folder, foreign_model("llama"), tokenizer)


def _sharded(folder: Path) -> Path:
    return save_foreign(folder, foreign_model("llama"), foreign_tokenizer(), max_shard_size="20KB")


def _bfloat16(folder: Path) -> Path:
    return save_foreign(folder, foreign_model("llama").to(torch.bfloat16), foreign_tokenizer())


def _gpt2_files(folder: Path) -> Path:
    """A tokenizer as GPT-2 was published: vocab.json and merges.txt, no tokenizer.json."""
    save_foreign(folder, foreign_model("gpt2"), None)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return folder


def _gaps(folder: Path) -> Path:
    """The end token has the last id, and most ids before it belong to no token."""
    return save_foreign(folder, foreign_model("llama"), foreign_tokenizer(words=0, end=WORDS - 1))


# what is unlike other folders -> writes one
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "untied": _plain,
    "tied": _of("llama", tie_word_embeddings=True),
    "one key for all heads": _of("llama", num_key_value_heads=1),
    "sliding window": _of("gemma2", sliding_window=CONTEXT),
    "short window": _of("gemma3_text"),
    "tied gpt2": _of("gpt2"),
    "wider output": _of("qwen3", vocab_size=WORDS + 20),
    "no padding token": _with_tokenizer(pad_token=None),
    "no beginning token": _with_tokenizer(bos_token=None),
    "unusual ids": _with_tokenizer(pad_token="<extra_299>", eos_token="<extra_270>", bos_token=None),
    "several ends": _several_ends,
    "ids without a token": _gaps,
    "chat template": _chat,
    "rope scaling": _of("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    "bfloat16": _bfloat16,
    "shards": _sharded,
    "files of gpt2": _gpt2_files,
}


def _adapter(folder: Path) -> Path:
    from models.backbones.causal_lm import save_causal, with_adapters

    return save_causal(with_adapters(_plain_model(folder), 2), folder, foreign_tokenizer())


def _plain_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(_plain(folder.with_name("base")))


def _pickle(folder: Path) -> Path:
    _plain(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def _without(*names: str):
    def make(folder: Path) -> Path:
        _plain(folder)
        for name in names:
            (folder / name).unlink()
        return folder

    return make


# what is wrong with a folder -> writes one, and what the answer has to name
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "narrower output": (_of("llama", vocab_size=WORDS - 20), "the model has 280 token ids"),
    "adapter alone": (_adapter, "holds an adapter"),
    "pickle": (_pickle, "only safetensors are read"),
    "no tokenizer": (_without("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
    "no configuration": (_without("config.json"), "config.json"),
    "no end token": (_with_tokenizer(eos_token=None, bos_token=None), "no eos_token"),
    "encoder": (_of("bert"), "reads texts in both directions"),
    "no cache": (_of("openai-gpt"), "cannot answer prompts"),
}
