"""One forward of the student against its own logits, its softmax, and what it must not look at."""

import pytest
import torch
from scipy.stats import chi2

from models.flow.one_step import OneStepDecoder
from models.flow.prefix_student import PrefixStudent
from models.functional.errors import UsageError

MASK, VOCABULARY, PROMPT, RESPONSE = 2, 11, 2, 3


@pytest.fixture
def student(tiny_llada) -> PrefixStudent:
    """A student with a strong prefix that depends on its times: another interval gives another answer."""
    torch.manual_seed(0)
    made = PrefixStudent(tiny_llada(VOCABULARY), prompt_length=3, hidden_size=8, rank=4).eval()
    made.soft_prompt.gate.data.fill_(2.0)
    for layer in (made.soft_prompt.low_rank, made.soft_prompt.head):
        torch.nn.init.normal_(layer.weight, std=3.0)
    return made


def make_rows(batch: int = 64, same_prompt: bool = False) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (batch, PROMPT + RESPONSE), generator=draw)
    if same_prompt:
        ids[:, :PROMPT] = torch.tensor([4, 7])
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, PROMPT:] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(response), "response_mask": response}


@torch.no_grad()
def logits_by_hand(student: PrefixStudent, rows: dict, r: float = 0.0, t: float = 1.0) -> torch.Tensor:
    """u(x_1, r, t) at the response columns, without the mask token: (B, R, V)."""
    text = rows["input_ids"].clone()
    text[:, PROMPT:] = MASK
    times = [torch.full((len(text),), time) for time in (r, t)]
    logits = student(text, rows["attention_mask"], *times)[:, PROMPT:]
    return logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)


def test_greedy_is_the_argmax_of_the_students_logits_over_the_whole_interval(student):
    rows = make_rows()
    decoder = OneStepDecoder(student)
    ours = decoder(rows, torch.Generator())
    assert ours.shape == (64, RESPONSE)
    assert torch.equal(ours, logits_by_hand(student, rows).argmax(-1))
    for r, t in ((1.0, 1.0), (0.0, 0.0), (0.0, 0.5)):
        assert not torch.equal(ours, logits_by_hand(student, rows, r, t).argmax(-1))
    assert (decoder.name, decoder.method, decoder.forwards) == ("student, greedy", "student", 1)
    assert OneStepDecoder(student, temperature=1.0).name == "student, sampled"


def test_one_forward_is_one_forward(student, monkeypatch):
    calls = []
    hidden = student.base.hidden
    monkeypatch.setattr(student.base, "hidden", lambda *inputs, **more: calls.append(1) or hidden(*inputs, **more))
    OneStepDecoder(student)(make_rows(), torch.Generator())
    assert len(calls) == OneStepDecoder.forwards == 1


def g_statistic(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, float]:
    """G of the counts against the probabilities, rare cells pooled, and its 0.1 % point."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 20
    cells = [
        torch.cat([values[~rare], values[rare].sum().view(1)]) if rare.any() else values
        for values in (counts.double(), expected)
    ]
    observed, expected = (values[cells[1] > 0] for values in cells)
    return float(2 * torch.xlogy(observed, observed / expected).sum()), float(chi2.ppf(0.999, len(observed) - 1))


def test_temperature_one_draws_from_the_softmax_and_positions_are_independent(student):
    """G-tests of each position and of a pair of positions; another temperature and another interval fail them."""
    rows = make_rows(20_000, same_prompt=True)
    drawn = OneStepDecoder(student, temperature=1.0)(rows, torch.Generator().manual_seed(0))
    few = {name: column[:1] for name, column in rows.items()}
    logits = logits_by_hand(student, few)[0]
    others = (logits / 0.8, logits_by_hand(student, few, 1.0, 1.0)[0])
    for position in range(RESPONSE):
        counts = torch.bincount(drawn[:, position], minlength=VOCABULARY)
        statistic, limit = g_statistic(counts, logits[position].softmax(-1))
        assert statistic < limit
        for other in others:
            statistic, limit = g_statistic(counts, other[position].softmax(-1))
            assert statistic > 2 * limit
    joint = torch.bincount(drawn[:, 0] * VOCABULARY + drawn[:, 1], minlength=VOCABULARY**2)
    product = torch.outer(*logits[:2].softmax(-1)).flatten()
    statistic, limit = g_statistic(joint, product)
    assert statistic < limit
    together = drawn.sort(0).values  # the same counts at each position, paired in order
    tied = torch.bincount(together[:, 0] * VOCABULARY + together[:, 1], minlength=VOCABULARY**2)
    assert g_statistic(tied, product)[0] > 2 * limit


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_prompt_counts_and_the_responses_ids_and_the_padding_do_not(student, temperature):
    rows = make_rows()

    def run(given):
        return OneStepDecoder(student, temperature=temperature)(given, torch.Generator().manual_seed(0))

    ours = run(rows)
    before = {name: column.clone() for name, column in rows.items()}
    for filler in (0, 1, MASK, 7):
        assert torch.equal(
            ours, run({**rows, "input_ids": rows["input_ids"].masked_fill(rows["response_mask"], filler)})
        )
    padded = {
        name: torch.nn.functional.pad(column, (4, 0), value=9 if name == "input_ids" else False)
        for name, column in rows.items()
    }
    assert torch.equal(ours, run(padded))
    other_prompt = rows["input_ids"].clone()
    other_prompt[:, 0] = 3 + (other_prompt[:, 0] - 2) % 8
    assert not torch.equal(ours, run({**rows, "input_ids": other_prompt}))
    assert all(torch.equal(rows[name], before[name]) for name in rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_is_never_an_answer(student, monkeypatch, temperature):
    """Even where its logit is far above every other."""
    rows, head = make_rows(), student.base.lm_head.forward
    favour = torch.zeros(VOCABULARY).index_fill(0, torch.tensor([MASK]), 1000.0)
    monkeypatch.setattr(student.base.lm_head, "forward", lambda hidden: head(hidden) + favour)
    ones = torch.ones(len(rows["input_ids"]))
    with torch.no_grad():
        raw = student(rows["input_ids"], rows["attention_mask"], 0 * ones, ones)
    assert raw.argmax(-1).eq(MASK).all()
    drawn = OneStepDecoder(student, temperature=temperature)(rows, torch.Generator().manual_seed(0))
    assert not drawn.eq(MASK).any()


def test_draws_are_a_function_of_the_generator_alone(student):
    rows, sampled, greedy = make_rows(), OneStepDecoder(student, temperature=1.0), OneStepDecoder(student)
    first, again, other = (sampled(rows, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(99)
    assert torch.equal(first, sampled(rows, torch.Generator().manual_seed(3)))  # the global one plays no part
    assert torch.equal(*(greedy(rows, torch.Generator().manual_seed(seed)) for seed in (3, 4)))
    assert not sampled(rows, torch.Generator()).requires_grad


@pytest.mark.parametrize(("r", "t"), [(0.6, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_an_interval_outside_the_unit_interval_is_refused(student, r, t):
    with pytest.raises(UsageError, match="0 <= r <= t <= 1"):
        logits_by_hand(student, make_rows(2), r, t)
