"""Small models in folders, and requests and tasks of lm-evaluation-harness for them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast

from datamodules.tokenizer import build_tokenizer
from helpers.causal import TINY_SHAPE
from models.backbones.causal import build_causal
from models.backbones.causal_lm import save_causal
from models.backbones.llada import build_llada

CHAT = (
    "{{ bos_token }}{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, begins: bool = False) -> PreTrainedTokenizerFast:
    """A token for each byte; begins: every text begins with <bos>, as those of Llama do."""
    tokenizer = build_tokenizer("byte", [], 0, ".", packed=True)
    tokenizer.chat_template = CHAT
    # as pretrained tokenizers: the harness' own model passes special tokens on as text
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = False
    if begins:
        start = ("<bos>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[start])
    return tokenizer


def write_model(folder: Path, *, fills_masks: bool = False, begins: bool = False, spread: float = 0.4) -> Path:
    """A tiny model with large random weights and its tokenizer, for texts of 64 bytes."""
    tokenizer = byte_tokenizer(begins=begins)
    build = build_llada if fills_masks else build_causal
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build(vocab_size=len(tokenizer), **(TINY_SHAPE | ids | {"mask_token_id": tokenizer.mask_token_id}))
    for weight in model.parameters():
        if weight.ndim >= 2:
            nn.init.normal_(weight, std=spread)
    return save_causal(model, folder, tokenizer)


def requests(*arguments: tuple) -> list[Any]:
    """What models of the harness read of their requests."""
    return [SimpleNamespace(args=own, task_name="tiny") for own in arguments]


def write_tasks(folder: Path) -> Path:
    """Three tasks of the harness on sums: choices, generated answers with examples, and the likelihood of whole texts."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{a}+{b}=", "choices": [str(a + b), str(a + b + 1), "no"], "answer": 0} for a, b in SUMS]
    files = {"train": rows[:3], "test": rows[3:]}
    for split, own in files.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in files}},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    answer = {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}", "num_fewshot": 2}
    answer["generation_kwargs"] = {"until": ["\n", "q"], "max_gen_toks": 12}
    answer["metric_list"] = [{"metric": "exact_match"}]
    text = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt}}{{choices[0]}}"}
    text["metric_list"] = [{"metric": "byte_perplexity"}]
    for name, own in {"tiny_choice": choice, "tiny_answer": answer, "tiny_text": text}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **own}))
    return folder


SUMS = [(1, 2), (3, 4), (2, 2), (5, 3), (1, 1), (4, 4), (7, 1)]
