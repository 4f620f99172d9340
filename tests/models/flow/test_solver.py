"""Following the flow: by hand on a network of which everything is known, and on a small student."""

import pytest
import torch

from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.solver import NoisyMaskDecoder, follow_flow, surest
from models.functional.errors import UsageError
from models.functional.noisy_mask import second_order_step


@pytest.fixture
def student(tiny_llada):
    torch.manual_seed(0)
    student = NoisyMaskStudent(tiny_llada(), adapter="prefix+mask_noise", prompt_length=3, hidden_size=8, rank=4)
    torch.nn.init.eye_(student.mask_noise.weight)
    return student.eval()


@pytest.fixture
def rows():
    input_ids = torch.randint(3, 11, (5, 6), generator=torch.Generator().manual_seed(1))
    response = torch.zeros(5, 6, dtype=torch.bool)
    response[:, 2:] = True
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(response), "response_mask": response}


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("step", ["chain", "renoise", "refine", "ode"])
@pytest.mark.parametrize("forwards", [1, 3])
def test_prompts_never_move_and_the_mask_is_never_generated(student, rows, step, forwards):
    seen = []

    def network(sample, t):
        seen.append((sample.z.clone(), sample.s[0].item(), t[0].item()))
        return student(sample, t)

    start = student.path.start_sample(rows, draw())
    tokens = follow_flow(student.path, network, start, forwards=forwards, step=step, generator=draw(1))
    prompt = student.base.embed(rows["input_ids"])[:, :2]
    assert all(torch.equal(z[:, :2], prompt) for z, _, _ in seen)
    assert len(seen) == forwards
    assert (tokens[:, 2:] != student.base.mask_id).all()
    ends = {"chain": [(k + 1) / forwards for k in range(forwards)], "renoise": [1.0] * forwards}
    starts = [k / forwards for k in range(forwards)]
    if step == "refine":  # always from noise to the text
        starts, ends = [0.0] * forwards, {"refine": [1.0] * forwards}
    assert [s for _, s, _ in seen] == pytest.approx(starts)
    assert [t for _, _, t in seen] == pytest.approx(ends.get(step, starts))


def test_two_steps_of_the_chain_by_hand(student, rows):
    start = student.path.start_sample(rows, draw())
    z, masked, half, one = start.z, start.masked, torch.full((5,), 0.5), torch.ones(5)
    with torch.no_grad():
        logits = student(start, half)
        logits[:, student.base.mask_id] = -1e9
        middle = z.clone()
        middle[masked] = 0.5 * z[masked] + 0.5 * logits.softmax(-1) @ student.base.embedding
        last = student(start._replace(z=middle, s=half), one)
        last[:, student.base.mask_id] = -1e9
    tokens = follow_flow(student.path, student, start, forwards=2)
    assert torch.equal(tokens[masked], last.argmax(-1))


def test_many_small_steps_of_a_constant_denoiser_end_where_one_step_does(student, rows):
    """If D never changes, every step lies on the same straight line, and N forward passes give the text of one."""
    start = student.path.start_sample(rows, draw())
    fixed = torch.randn(int(start.masked.sum()), 11, generator=draw(3))
    network = lambda sample, t: fixed.clone()  # noqa: E731
    once = follow_flow(student.path, network, start, forwards=1)
    assert torch.equal(follow_flow(student.path, network, start, forwards=7, step="ode"), once)


def test_five_steps_of_the_flow_by_hand(tiny_llada, rows):
    """The first is Euler's, the others are of second order; times are not even."""
    torch.manual_seed(0)
    student = NoisyMaskStudent(tiny_llada(), time_center=0.3, prompt_length=3, hidden_size=8, rank=4).eval()
    torch.nn.init.eye_(student.mask_noise.weight)
    path, seen = student.path, []
    now = path.start_sample(rows, draw())
    tokens = follow_flow(path, student, now, forwards=5, step="ode", on_step=seen.append)
    grid = path.warp(torch.linspace(0, 1, 6))
    with torch.no_grad():
        before = None
        for k, step in enumerate(seen):
            torch.testing.assert_close(step.sample.z, now.z, atol=1e-6, rtol=0)
            here, then = grid[k : k + 1], grid[k + 1 : k + 2]
            assert (step.sample.s, step.t) == (here, then)
            now = now._replace(s=here)
            logits = student(now, here)
            logits[:, student.base.mask_id] = -1e9
            psi = d = logits.softmax(-1)
            if 0 < k < 4:
                psi = second_order_step(d, before, grid[k - 1 : k], here, then)
                assert (psi - d).abs().max() > 1e-4
            now, before = path.move(now, psi, then), d
    assert torch.equal(tokens[now.masked], d.argmax(-1))
    assert torch.equal(seen[-1].psi.argmax(-1), d.argmax(-1))
    assert seen[-1].psi.max(-1).values.eq(1).all()


def test_only_the_steps_of_the_flow_itself_are_shown(student, rows):
    start = student.path.start_sample(rows, draw())
    for options in ({"step": "chain"}, {"step": "ode", "promote": 0.9}):
        with pytest.raises(ValueError, match="on_step needs step=ode without promote"):
            follow_flow(student.path, student, start, forwards=2, on_step=lambda step: None, **options)


@pytest.mark.parametrize("step", ["chain", "ode"])
def test_certain_positions_become_text_for_the_following_forward_passes(student, rows, step):
    seen = []

    def network(sample, t):
        masked = sample.masked
        seen.append((sample.z.clone(), masked.clone()))
        logits = torch.zeros(int(masked.sum()), 11)
        first = masked.cumsum(-1).eq(1)  # token 7 is certain at the first masked position of each row
        logits[first[masked], 7] = 50.0
        return logits

    start = student.path.start_sample(rows, draw())
    tokens = follow_flow(student.path, network, start, forwards=3, step=step, promote=0.9)
    assert [int(masked.sum()) for _, masked in seen] == [20, 15, 10]
    assert torch.equal(seen[1][0][:, 2], student.base.embedding[7].expand(5, -1))
    assert tokens[:, 2:5].eq(7).all()


def confidences(values, masked):
    """Logits (M, 11): token 4 has the probability values (B, L), the other tokens share the rest."""
    p = values[masked].unsqueeze(-1)
    logits = ((1 - p) / 9).log().expand(-1, 11).clone()
    logits[:, 4] = p.squeeze(-1).log()
    return logits


@pytest.mark.parametrize(
    ("promote", "kept"),
    [
        (None, [[], [3, 5], [2, 3, 5]]),  # ceil(4 / 3), then ceil(2 / 2)
        (0.75, [[], [2, 3, 5], [2, 3, 4, 5]]),  # three at once; then the one that is left, by its share
    ],
)
def test_the_surest_positions_become_text_and_the_others_keep_their_noise(student, rows, promote, kept):
    values = torch.tensor([0.0, 0.0, 0.8, 0.9, 0.6, 0.95]).expand(5, -1)
    start = student.path.start_sample(rows, draw())
    seen = []

    def network(sample, t):
        seen.append(sample)
        return confidences(values, sample.masked)

    tokens = follow_flow(student.path, network, start, forwards=3, step="refine", promote=promote)
    text = student.base.embedding[4]
    for sample, positions in zip(seen, kept, strict=True):
        expected = start.z.clone()
        expected[:, positions] = text
        assert torch.equal(sample.z, expected)
        assert sample.masked.nonzero()[:, 1].tolist() == [n for n in range(2, 6) if n not in positions] * 5
    assert tokens[:, 2:].eq(4).all()


def test_each_row_keeps_its_own_share():
    """Rows with 4, 1 and no masked positions of 2 passes keep 2, 1 and 0."""
    masked = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    psi = torch.tensor([0.5, 0.9, 0.5, 0.7, 0.3]).unsqueeze(-1) * torch.tensor([1.0, 0.0])
    kept = surest(psi, masked, passes=2)
    assert kept.tolist() == [[False, True, False, True], [False, False, True, False], [False] * 4]


def test_the_same_seed_gives_the_same_texts_and_another_one_others(student, rows):
    decoder = NoisyMaskDecoder(student, 2)
    assert torch.equal(decoder(rows, draw(0)), decoder(rows, draw(0)))
    assert not torch.equal(decoder(rows, draw(0)), decoder(rows, draw(1)))
    assert decoder(rows, draw(0)).shape == (5, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forwards": 0}, "at least 1"),
        ({"forwards": 1, "step": "leap"}, "few_step=leap"),
        ({"forwards": 1, "promote": 0.4}, "0.5"),
    ],
)
def test_wrong_options_are_named(student, rows, options, message):
    with pytest.raises(UsageError, match=message):
        follow_flow(student.path, student, student.path.start_sample(rows, draw()), **options)
