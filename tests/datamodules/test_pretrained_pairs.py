"""A pretrained causal LM on pairs, against a loop of transformers and peft alone."""

from pathlib import Path

import pytest
import torch
from helpers.pairs import ROWS
from helpers.qwen import tiny_qwen
from helpers.trainer import Losses, quiet_trainer
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from transformers import get_cosine_schedule_with_warmup

from callbacks.frontier import FrontierReport
from datamodules.pairs import PairsDataModule
from lightning_modules.pretrain import PretrainModule
from models.backbones.causal_lm import with_adapters
from models.objectives.next_token import NextToken

STEPS, WARMUP, LR, RANK = 12, 3, 5e-3, 4

pytestmark = pytest.mark.filterwarnings("ignore:.*val_dataloader", "ignore:.*does not have many workers")


def body(data):
    return tiny_qwen(0, vocabulary=len(data.tokenizer), scale=1.0)


def plain_loop(data: PairsDataModule) -> list[float]:
    """The losses of peft's LoRA on labels that are -100 outside the response and after its first end token."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(body(data), config).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = AdamW(trained, lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses, end = [], data.tokenizer.eos_token_id
    for batch, _ in zip(data.train_dataloader(), range(STEPS), strict=False):
        rows = []
        for number in batch["row_index"].tolist():
            prompt = data.tokenizer(ROWS[number % 25]["q"] + "\n")["input_ids"]
            response = [*data.tokenizer(ROWS[number % 25]["a"])["input_ids"], end]
            rows.append((prompt, response))
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (end, -100, 0))
        for row, (prompt, response) in enumerate(rows):  # padded on the right, as transformers' collators do
            length = len(prompt) + len(response)
            ids[row, :length] = torch.tensor(prompt + response)
            labels[row, len(prompt) : length] = torch.tensor(response)
            mask[row, :length] = 1
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def own_losses(data: PairsDataModule) -> list[float]:
    torch.manual_seed(0)
    model = with_adapters(body(data), RANK)
    module = PretrainModule(model, NextToken(), lr=LR, warmup_steps=WARMUP)
    losses = Losses()
    quiet_trainer(STEPS, callbacks=[losses], limit_val_batches=0, gradient_clip_val=1.0).fit(module, data)
    return losses.seen


def test_training_is_that_of_transformers_and_peft(build_pairs):
    options = {"train": ROWS * 3, "val": ROWS, "test": ROWS, "prompt_suffix": "\n", "mark_prompt_end": False}
    grouped = {"group_by_length": True, "batch_size": 5, "end_padding": False}
    data = build_pairs(**options, **grouped)
    expected, found = torch.tensor(plain_loop(data)), torch.tensor(own_losses(data))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert expected[-1] < expected[0] - 0.1
    padded = torch.tensor(own_losses(build_pairs(**options, **(grouped | {"end_padding": True}))))
    assert (padded - expected).abs().max() > 0.02


def test_forward_passes_and_speed_count_the_tokens_of_each_text(build_pairs):
    """The comparison of a model whose texts end: rows end after different numbers of forward passes."""
    options = {"val": ROWS, "test": ROWS, "mark_prompt_end": False, "eval_batch_size": 25, "response_length": 64}
    passes = {}
    for end_padding in (True, False):
        data = build_pairs(**options, end_padding=end_padding)
        module = PretrainModule(tiny_qwen(3, scale=1.0, vocabulary=len(data.tokenizer)), NextToken())
        frontier = FrontierReport(Path("none"), "pairs", {}, 0)
        quiet_trainer(1, callbacks=[frontier], fast_dev_run=True).test(module, data)
        (row,) = (row for row in frontier.record["rows"] if row["decoder"] == "autoregressive")
        passes[end_padding] = row["nfe"], row["cost"]["tokens_per_forward"], data.response_length
    nfe, tokens, length = passes[False]
    assert nfe < length
    assert tokens == 1
    nfe, tokens, length = passes[True]
    assert nfe == length
    assert tokens < 1
