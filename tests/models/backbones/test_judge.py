"""A judge's nats, by hand and beside transformers' own loss; what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.causal import tiny_causal
from torch import nn

from datamodules.text_score import TextScorer
from datamodules.tokenizer import build_tokenizer
from models.backbones.causal_lm import save_causal
from models.backbones.judge import Judge, load_judge
from models.functional.errors import UsageError

# of three tokens, which follows which: row a is p(next | a)
TABLE = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)


class Bigrams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(TABLE.log() + 3.0)  # a constant changes no probability

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits[input_ids])


@pytest.fixture
def tokenizer(tmp_path):
    return build_tokenizer("byte", [], 0, tmp_path, packed=True)


def test_nats_and_perplexity_by_hand(tokenizer):
    texts = torch.tensor([[0, 0, 1], [1, 1, 1], [2, 0, 2]])
    expected = -torch.tensor([[0.5, 0.25], [0.8, 0.8], [0.25, 0.25]], dtype=torch.float64).log()
    judge = Judge(Bigrams(), tokenizer, batch_size=2)  # the last batch is a smaller one
    assert torch.allclose(judge(texts), expected, atol=1e-12)
    score = TextScorer(judge)({}, texts)
    product = 0.5 * 0.25 * 0.8 * 0.8 * 0.25 * 0.25
    assert score.quality["judge_perplexity"] == pytest.approx(product ** (-1 / 6))
    low, high = score.ci95["judge_perplexity"]
    means = [math.log(8) / 2, -math.log(0.8), math.log(4)]
    assert math.log(high / low) == pytest.approx(2 * 1.96 * torch.tensor(means).std().item() / 3**0.5, rel=1e-5)


def test_a_judge_finds_the_texts_of_its_own_model_likelier_than_others(tokenizer):
    generator = torch.Generator().manual_seed(0)
    own = torch.zeros(400, 12, dtype=torch.long)
    for k in range(1, 12):
        own[:, k] = torch.multinomial(TABLE[own[:, k - 1]], 1, generator=generator)[:, 0]
    shuffled = own[:, torch.randperm(12, generator=generator)]
    scorer = TextScorer(Judge(Bigrams(), tokenizer))
    mine, broken = (scorer({}, texts) for texts in (own, shuffled))
    assert mine.ci95["judge_perplexity"][1] < broken.ci95["judge_perplexity"][0]
    # variety within a text does not tell them apart, and a text that repeats itself beats both but for its entropy
    assert mine.quality["text_entropy"] == pytest.approx(broken.quality["text_entropy"])
    same = scorer({}, torch.ones(400, 12, dtype=torch.long))
    assert same.quality["judge_perplexity"] == pytest.approx(1 / 0.8)
    assert same.quality["judge_perplexity"] < mine.quality["judge_perplexity"]
    assert same.quality["text_entropy"] == 0 < mine.quality["text_entropy"]


def test_the_nats_are_those_of_the_exported_model(tmp_path, tokenizer):
    model = tiny_causal(len(tokenizer)).eval()
    save_causal(model, tmp_path / "judge", tokenizer)
    judge = load_judge(tmp_path / "judge")
    texts = torch.randint(len(tokenizer), (5, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(input_ids=texts, labels=texts).loss
    assert judge(texts).shape == (5, 8)
    assert judge(texts).mean().item() == pytest.approx(loss.item(), rel=1e-5)
    judge.require_vocabulary(tokenizer)


def test_no_judge_another_vocabulary_and_a_folder_that_is_none(tmp_path, tokenizer):
    assert load_judge(None) is None
    assert "judge_perplexity" not in TextScorer()({}, torch.tensor([[0, 1, 2]])).quality
    model = tiny_causal(len(tokenizer))
    other = build_tokenizer("bpe", ["some text, and more of it"] * 9, 300, tmp_path, packed=True)
    with pytest.raises(UsageError, match=r"type data\.tokenizer=<the judge's folder>"):
        Judge(model, other).require_vocabulary(tokenizer)
    with pytest.raises(UsageError, match="nowhere"):
        load_judge(tmp_path / "nowhere")
    save_causal(model, tmp_path / "bare")
    with pytest.raises(UsageError, match="holds no tokenizer"):
        load_judge(tmp_path / "bare")
