"""A judge's nats, by hand and beside transformers' own loss; other vocabularies, long texts, what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.causal import tiny_causal
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.judged_text import JudgeOf
from datamodules.text_score import TextScorer
from datamodules.tokenizer import build_tokenizer
from models.backbones.causal_lm import save_causal
from models.backbones.judge import Judge, load_judge
from models.functional.errors import UsageError
from models.functional.generated_text import JudgedText
from models.functional.per_token import NORMAL_95

# of three tokens, which follows which: row a is p(next | a)
TABLE = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)
STORIES = [f"Tom saw {k} red birds and a big cat. The cat ran to mum! Ünï {k * k}.\n" for k in range(40)]


class Bigrams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(TABLE.log() + 3.0)  # a constant changes no probability

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits[input_ids])


@pytest.fixture
def tokenizer(tmp_path):
    return build_tokenizer("byte", [], 0, tmp_path, packed=True)


@pytest.fixture
def other(tmp_path):
    """A folder with a judge of another vocabulary, in float64, which reads 24 tokens together."""
    words = build_tokenizer("bpe", STORIES, 600, tmp_path, packed=True)
    model = tiny_causal(len(words), max_position_embeddings=24).double().eval()
    save_causal(model, tmp_path / "other", words)
    return tmp_path / "other"


def judge_of(folder) -> Judge:
    """In float64, so that sums in another order are equal."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    return Judge(model, AutoTokenizer.from_pretrained(folder))


# -- the same vocabulary ---------------------------------------------------------------------------------------------


def test_nats_and_perplexity_by_hand(tokenizer):
    texts = torch.tensor([[0, 0, 1], [1, 1, 1], [2, 0, 2]])
    expected = -torch.tensor([[0.5, 0.25], [0.8, 0.8], [0.25, 0.25]], dtype=torch.float64).log()
    judge = JudgeOf(Judge(Bigrams(), tokenizer, batch_tokens=6), tokenizer, ())  # the last batch is a smaller one
    nats, tokens = judge(texts)
    assert torch.allclose(nats, expected.sum(-1), atol=1e-12)
    assert tokens.tolist() == [2, 2, 2]
    score = TextScorer(judge)({}, texts)
    product = 0.5 * 0.25 * 0.8 * 0.8 * 0.25 * 0.25
    assert score.quality["judge_perplexity"] == pytest.approx(product ** (-1 / 6))
    low, high = score.ci95["judge_perplexity"]
    means = [math.log(8) / 2, -math.log(0.8), math.log(4)]
    assert math.log(high / low) == pytest.approx(2 * NORMAL_95 * torch.tensor(means).std().item() / 3**0.5, rel=1e-5)


def test_a_judge_finds_the_texts_of_its_own_model_likelier_than_others(tokenizer):
    generator = torch.Generator().manual_seed(0)
    own = torch.zeros(400, 12, dtype=torch.long)
    for k in range(1, 12):
        own[:, k] = torch.multinomial(TABLE[own[:, k - 1]], 1, generator=generator)[:, 0]
    shuffled = own[:, torch.randperm(12, generator=generator)]
    scorer = TextScorer(JudgeOf(Judge(Bigrams(), tokenizer), tokenizer, ()))
    mine, broken = (scorer({}, texts) for texts in (own, shuffled))
    assert mine.ci95["judge_perplexity"][1] < broken.ci95["judge_perplexity"][0]
    # variety within a text does not tell them apart, and a text that repeats itself beats both but for its entropy
    assert mine.quality["text_entropy"] == pytest.approx(broken.quality["text_entropy"])
    same = scorer({}, torch.ones(400, 12, dtype=torch.long))
    assert same.quality["judge_perplexity"] == pytest.approx(1 / 0.8)
    assert same.quality["judge_perplexity"] < mine.quality["judge_perplexity"]
    assert same.quality["text_entropy"] == 0 < mine.quality["text_entropy"]


def test_in_its_own_vocabulary_every_token_counts_documents_ends_among_them(tmp_path, tokenizer):
    model = tiny_causal(len(tokenizer)).eval()
    save_causal(model, tmp_path / "judge", tokenizer)
    judge = load_judge(tmp_path / "judge")
    texts = torch.randint(len(tokenizer), (5, 9), generator=torch.Generator().manual_seed(0))
    texts[:, 3] = texts[:, 6] = tokenizer.bos_token_id
    with torch.no_grad():
        loss = model(input_ids=texts, labels=texts).loss
    nats, tokens = JudgeOf(judge, tokenizer, (tokenizer.bos_token_id,))(texts)
    assert tokens.tolist() == [8] * 5
    assert nats.sum().item() / 40 == pytest.approx(loss.item(), rel=1e-5)


# -- another vocabulary ----------------------------------------------------------------------------------------------


def by_hand(folder, documents: list[str], context: int) -> tuple[float, int]:
    """Nats and tokens of one text with transformers alone, piece after piece and token after token."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    ids = []
    for k, document in enumerate(documents):
        ids += [end] * (k > 0) + tokenizer(document, add_special_tokens=False).input_ids
    nats, count, ended = 0.0, 0, False
    for at in range(0, len(ids), context):
        piece = ids[at : at + context]
        with torch.no_grad():
            log_p = model(torch.tensor([piece])).logits[0].log_softmax(-1)
        for k, token in enumerate(piece):
            repeated = token == end and ended
            ended |= token == end
            if k and not repeated:
                nats -= log_p[k - 1, token].item()
                count += 1
    return nats, count


def rows_of(tokenizer, texts: list[list[str]], columns: int) -> torch.Tensor:
    """Rows of documents with <bos> between them, the last one cut."""
    rows = []
    for documents in texts:
        ids = []
        for k, document in enumerate(documents):
            ids += [tokenizer.bos_token_id] * (k > 0) + tokenizer.encode(document, add_special_tokens=False)
        rows.append(ids[:columns])
    assert all(len(row) == columns for row in rows)
    return torch.tensor(rows)


def test_another_vocabulary_is_the_loop_over_decoded_texts(other, tokenizer):
    """Texts of one document, of three, and longer than the judge reads together."""
    cases = [[STORIES[0] * 2], ["Tom ran.\n", "A cat!", STORIES[1] * 2], ["", STORIES[2], STORIES[3]]]
    rows = rows_of(tokenizer, cases, columns=80)
    judge = judge_of(other)
    nats, tokens = JudgeOf(judge, tokenizer, (tokenizer.bos_token_id,))(rows)
    shown = [tokenizer.decode(row).split("<bos>") for row in rows.tolist()]
    expected = [by_hand(other, documents, 24) for documents in shown]
    assert tokens.tolist() == [count for _, count in expected]
    assert nats.tolist() == pytest.approx([total for total, _ in expected], rel=1e-12)
    # control: another text, or another context, has other nats
    assert by_hand(other, shown[0], 24)[0] != pytest.approx(by_hand(other, shown[0], 23)[0], rel=1e-6)
    assert min(map(len, shown)) == 1 < max(map(len, shown))


def test_what_is_read_together_changes_nothing(other, tokenizer):
    rows = rows_of(tokenizer, [[STORIES[k], STORIES[k + 1]] for k in range(6)], columns=60)
    judge = judge_of(other)
    whole = JudgeOf(judge, tokenizer, (tokenizer.bos_token_id,))(rows)
    judge.batch_tokens = 1  # every piece on its own
    alone = JudgeOf(judge, tokenizer, (tokenizer.bos_token_id,))(rows)
    assert torch.allclose(whole.nats, alone.nats, rtol=1e-12)
    assert torch.equal(whole.tokens, alone.tokens)


def test_a_special_token_that_a_text_spells_stays_characters(other, tokenizer):
    judge = JudgeOf(judge_of(other), tokenizer, (tokenizer.bos_token_id,))
    end = judge.judge.tokenizer.eos_token
    spelled = torch.tensor([tokenizer.encode(f"a{end}b", add_special_tokens=False)])
    ids, counts = judge._text(spelled[0].tolist())
    assert judge.judge.tokenizer.eos_token_id not in ids
    assert judge.judge.tokenizer.decode(ids) == f"a{end}b"
    assert counts == [False] + [True] * (len(ids) - 1)
    a, b = (tokenizer.encode(letter, add_special_tokens=False) for letter in "ab")
    real = judge._text([*a, tokenizer.bos_token_id, *b, tokenizer.bos_token_id])
    assert real.ids.count(judge.judge.tokenizer.eos_token_id) == 2
    assert real.counts == [False, True, True, False]  # of the end tokens the first one counts


def test_a_judge_that_begins_texts_with_a_token_is_given_it(other, tokenizer):
    judge = judge_of(other)
    begin = judge.tokenizer.bos_token_id
    plain = JudgeOf(judge, tokenizer, ())
    assert plain._begin == []
    judge.tokenizer.backend_tokenizer.post_processor = starts_with(judge.tokenizer)
    given = JudgeOf(judge, tokenizer, ())
    row = tokenizer.encode("Tom ran.", add_special_tokens=False)
    assert given._text(row).ids == [begin, *plain._text(row).ids]
    assert given._text(row).counts == [False, *[True] * len(plain._text(row).ids)]


def starts_with(tokenizer):
    bos = tokenizer.bos_token
    return TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])


def test_texts_without_tokens(other, tokenizer):
    judge = JudgeOf(judge_of(other), tokenizer, (tokenizer.bos_token_id,))
    bos, letter = tokenizer.bos_token_id, tokenizer.encode("a", add_special_tokens=False)[0]
    nats, tokens = judge(torch.tensor([[letter], [bos]]))  # nothing, after the first token
    assert (nats.tolist(), tokens.tolist()) == ([0.0, 0.0], [0, 0])
    assert TextScorer(judge)({}, torch.full((3, 4), bos)).quality["judge_perplexity"] is None
    assert judge.judge([]).nats.shape == (0,)
    assert judge.judge([JudgedText([], [])]).tokens.tolist() == [0]


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_no_judge_and_folders_that_are_none(tmp_path, tokenizer):
    assert load_judge(None) is None
    assert "judge_perplexity" not in TextScorer()({}, torch.tensor([[0, 1, 2]])).quality
    model = tiny_causal(len(tokenizer))
    with pytest.raises(UsageError, match=r"data\.judge\.path=.*nowhere: this folder does not exist"):
        load_judge(tmp_path / "nowhere")
    save_causal(model, tmp_path / "bare")
    with pytest.raises(UsageError, match=r"data\.judge\.path=.*bare holds no tokenizer"):
        load_judge(tmp_path / "bare")


def test_a_judge_of_another_vocabulary_needs_an_end_token(tmp_path, tokenizer, other):
    judge = judge_of(other)
    judge.tokenizer.eos_token = None
    with pytest.raises(UsageError, match=r"data\.judge\.path: a judge of another vocabulary .* needs a fast tokenizer"):
        JudgeOf(judge, tokenizer, ())
