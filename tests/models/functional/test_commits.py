"""Commits against loops, masks against their definition, the rate's loss by hand, gates by their formulas."""

import math

import pytest
import torch
from torch import Tensor

from models.functional import commits
from models.functional.commit_gates import keep_null_mass, mix_slots, smooth_concepts, soft_visibility, visibility
from models.functional.commit_rate import correction, null_bias, rate_threshold, ratio_loss

G = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)


def random_gates(rows: int, length: int, rate: float, seed: int = 0) -> Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < rate


# -- packing ---------------------------------------------------------------------------------------------------------------


def test_packing_by_hand():
    found = commits.pack_commits(G)
    assert found.indices.tolist() == [[0, 3, 5], [2, 0, 1], [0, 1, 2]]
    assert found.real.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert found.segment.tolist() == [[1, 1, 1, 2, 2, 3], [0, 0, 1, 1, 1, 1], [0] * 6]
    assert found.slot.tolist() == [[0, 0, 0, 1, 1, 2], [0] * 6, [0] * 6]


def test_no_commit_is_dropped_and_all_come_first():
    g = random_gates(50, 23, 0.4)
    found = commits.pack_commits(g)
    for row, index, real in zip(g, found.indices, found.real, strict=True):
        assert index[real].tolist() == row.nonzero().flatten().tolist()
    assert commits.take(torch.arange(23).expand(50, -1), found.indices).equal(found.indices)


def test_the_latest_concept_by_hand():
    concepts, count = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[0, 1, 1, 2, 2]])
    assert commits.latest(concepts, count).flatten().tolist() == [0, 1, 1, 2, 2]
    documents, owners = torch.tensor([[0, 0, 1, 1, 2]]), torch.tensor([[0, 1]])
    assert commits.latest(concepts, count, documents, owners).flatten().tolist() == [0, 1, 0, 2, 0]


def test_tails_are_averaged_as_a_loop_does():
    g = random_gates(30, 17, 0.3)
    valid = torch.ones_like(g)
    valid[::2, :3] = valid[1::2, -4:] = False
    g &= valid
    documents = (torch.arange(17) >= 9).long().expand(30, -1)
    states = torch.randn(30, 17, 2, generator=torch.Generator().manual_seed(0))
    for of_rows in (None, documents):
        found = commits.tail_means(states, g, valid, of_rows)
        for b in range(30):
            tail = []
            for t in range(18):
                if of_rows is not None and t == 9:
                    tail = []
                expected = torch.stack(tail).mean(0) if tail else torch.zeros(2)
                torch.testing.assert_close(found[b, t], expected)
                if t < 17 and valid[b, t]:
                    tail = [] if g[b, t] else [*tail, states[b, t]]


def test_what_the_deep_stack_sees_is_the_concepts_and_the_tail():
    g = random_gates(30, 17, 0.3)
    valid = torch.ones_like(g)
    valid[::2, :3] = valid[1::2, -4:] = False
    g &= valid
    seen = commits.deep_mask(g, commits.pack_commits(g).segment, valid)
    for b in range(30):
        for q in range(17):
            own = [t for t in range(q + 1) if g[b, t]]
            tau = max(own, default=-1)
            tail = [t for t in range(tau + 1, q + 1) if valid[b, t]]
            expected = own if g[b, q] else [*own, *tail]
            assert seen[b, 0, q].nonzero().flatten().tolist() == sorted({*expected, q})


def test_the_shallow_stack_sees_what_is_real():
    valid = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    assert commits.text_mask(valid).int()[:, 0].tolist() == [
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    ]
    assert commits.text_mask(torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)) is None


# -- which positions commit --------------------------------------------------------------------------------------------------


def capped_slowly(natural: Tensor, valid: Tensor, most: int, since: int) -> tuple[list[bool], int]:
    out = []
    for g, real in zip(natural.tolist(), valid.tolist(), strict=True):
        commit = real and (g or since >= most)
        since = since if not real else 0 if commit else since + 1
        out.append(commit)
    return out, since


@pytest.mark.parametrize("most", [1, 3, 7])
def test_the_cap_and_its_state_are_those_of_a_loop(most):
    g = random_gates(200, 40, 0.15)
    valid = torch.ones_like(g)
    valid[:50, :7] = valid[50:100, -9:] = False
    g &= valid
    since = torch.arange(200) % (most + 1)
    found = commits.cap_nulls(g, valid, most, since)
    after = commits.nulls_since(found, valid, since)
    for b in range(200):
        expected = capped_slowly(g[b], valid[b], most, int(since[b]))
        assert (found[b].tolist(), int(after[b])) == expected
    assert (found & ~g).any()
    halves = commits.cap_nulls(g[:, :13], valid[:, :13], most, since)
    middle = commits.nulls_since(halves, valid[:, :13], since)
    assert torch.equal(commits.cap_nulls(g[:, 13:], valid[:, 13:], most, middle), found[:, 13:])


def test_the_realised_rate_is_above_what_the_router_asked_for():
    """A commit one time in four, forced every eighth slot: .278."""
    g = random_gates(400, 1000, 0.25)
    found = commits.cap_nulls(g, torch.ones_like(g), 7, torch.zeros(400, dtype=torch.long))
    renewal = 0.25 / (1 - 0.75**8)
    assert found.double().mean() == pytest.approx(renewal, abs=0.002)
    assert round(renewal, 3) == 0.278


def test_even_commits():
    position = torch.arange(12).expand(1, -1)
    assert commits.even_commits(position, 4.0)[0].nonzero().flatten().tolist() == [3, 7, 11]
    assert commits.even_commits(position, 1.5)[0].nonzero().flatten().tolist() == [
        1,
        2,
        4,
        5,
        7,
        8,
        10,
        11,
    ]  # 3 tokens, 2 latents
    assert commits.even_commits(position, 1.0).all()
    long = torch.arange(30_000).expand(1, -1)
    for compression in (3.0, 7.0, 2.5, 1.1):
        assert commits.even_commits(long, compression).sum() == int(30_000 / compression + 1e-6)


def test_random_commits_are_as_many_as_even_ones_and_lie_anywhere():
    position = torch.arange(64_000).expand(1, -1)
    for compression in (1.0, 2.0, 2.5, 4.0):
        even, random = commits.even_commits(position, compression), commits.random_commits(position, compression)
        assert random.view(-1, 16).sum(1).tolist() == even.view(-1, 16).sum(1).tolist()
    for at in range(16):  # no position of a block is preferred; of evenly spaced commits each is always one or never
        assert random.view(-1, 16)[:, at].double().mean() == pytest.approx(0.25, abs=0.03)
        assert even.view(-1, 16)[:, at].double().mean() in (0, 1)
    together = (random[0, 1:] & random[0, :-1]).double().mean()
    assert together == pytest.approx(0.051, abs=0.003)  # within a block 4/16 3/15, between two 1/16


def test_accumulated_commits_are_those_of_a_loop_and_have_the_rate_of_their_increments():
    increments = torch.rand(5, 300, generator=torch.Generator().manual_seed(0)) * 0.5
    found, total = commits.accumulated_commits(increments, torch.full((5,), 0.3))
    for b in range(5):
        sum_, expected = 0.3, []
        for x in increments[b].double().tolist():
            expected.append(math.floor(sum_ + x) > math.floor(sum_))
            sum_ += x
        assert found[b].tolist() == expected
        assert float(total[b]) == pytest.approx(sum_)
    assert found.double().mean() == pytest.approx(float(increments.mean()), abs=0.01)


def test_renewal_decisions_are_those_of_a_loop():
    scores = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    by_distance = torch.tensor([-2.0, 0.0, 0.5, 1.0])
    valid = torch.ones(20, 30, dtype=torch.bool)
    nulls = commits.renewal_nulls(scores, by_distance, valid, 3, torch.zeros(20, dtype=torch.long))
    natural = scores + by_distance[nulls] > 0
    found = commits.cap_nulls(natural, valid, 3, torch.zeros(20, dtype=torch.long))
    for b in range(20):
        since = 0
        for t in range(30):
            assert int(nulls[b, t]) == since
            commit = bool(scores[b, t] + by_distance[since] > 0) or since >= 3
            assert bool(found[b, t]) == commit
            since = 0 if commit else since + 1


# -- rates -------------------------------------------------------------------------------------------------------------------


def test_the_ratio_loss_by_hand():
    valid = torch.tensor([[1, 1, 1, 1, 0]], dtype=torch.bool)
    g = torch.tensor([[1, 0, 0, 0, 1]], dtype=torch.bool)
    p = torch.tensor([[0.9, 0.3, 0.2, 0.2, 0.99]], requires_grad=True)  # mean of the real ones .4
    loss = ratio_loss(g, p, valid, 4.0)
    assert loss.item() == pytest.approx(4 / 3 * (3 * 0.25 * 0.4 + 0.75 * 0.6))
    loss.backward()
    assert p.grad[0].tolist() == pytest.approx([4 / 3 * (4 * 0.25 - 1) / 4] * 4 + [0])
    busy = torch.tensor([[1, 1, 1, 0, 0]], dtype=torch.bool)
    p.grad = None
    ratio_loss(busy, p, valid, 4.0).backward()
    assert p.grad[0, 0].item() == pytest.approx(4 / 3 * (4 * 0.75 - 1) / 4)  # too many commits: down


def test_the_ratio_loss_is_no_lower_bound():
    """1 at its target, which is a saddle: less commits than the target with a high mean probability cost less than 1."""
    valid = torch.ones(1, 4, dtype=torch.bool)
    at_target = ratio_loss(torch.tensor([[1, 0, 0, 0]]).bool(), torch.full((1, 4), 0.25), valid, 4.0)
    beside = ratio_loss(torch.zeros(1, 4).bool(), torch.full((1, 4), 0.9), valid, 4.0)
    assert at_target.item() == pytest.approx(1.0)
    assert beside.item() < 0.2


def test_the_null_bias_gives_the_wanted_rate():
    for compression, codes in ((4.0, 4096), (2.0, 7), (1.5, 1)):
        logits = torch.zeros(codes + 1)
        logits[-1] = null_bias(compression, codes)
        assert 1 - logits.softmax(0)[-1].item() == pytest.approx(1 / compression, abs=1e-4)


def test_the_correction_holds_the_realised_rate_at_its_target():
    """Scores of any spread; forced commits are counted, and a fixed offset misses the rate."""
    generator = torch.Generator().manual_seed(0)
    for width in (0.05, 1.0, 20.0):
        offset, rates = torch.zeros(()), []
        for _ in range(300):
            scores = width * torch.randn(16, 128, generator=generator) + 3
            g = commits.cap_nulls(scores - offset > 0, torch.ones(16, 128).bool(), 7, torch.zeros(16, dtype=torch.long))
            rates.append(g.double().mean())
            offset = correction(offset, rates[-1], 4.0, (scores - offset).std())
            if len(rates) == 1 and width < 20:
                assert rates[0] > 0.9
        assert torch.stack(rates[-50:]).mean() == pytest.approx(0.25, abs=0.01)


def test_the_rate_threshold_lets_the_wanted_share_through():
    scores = 3 + 2 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    for compression in (1.1, 2.0, 8.0):
        share = (scores > rate_threshold(scores.mean(), scores.std(), compression)).double().mean()
        assert share == pytest.approx(1 / compression, abs=0.005)


# -- gates -------------------------------------------------------------------------------------------------------------------


def test_mixed_slots_have_the_value_of_the_choice_and_the_gradient_of_the_mixture():
    commit = torch.tensor([[True, False]])
    p = torch.tensor([[0.7, 0.4]], dtype=torch.float64, requires_grad=True)
    z, b = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    out = mix_slots(commit, p, z, b)
    assert torch.equal(out[0, 0], z[0, 0])
    assert torch.equal(out[0, 1], b[0, 1])
    pull = torch.randn_like(out)
    (out * pull).sum().backward()
    torch.testing.assert_close(p.grad, (pull * (z - b)).sum(-1))


def test_smoothed_concepts_by_hand_and_from_where_another_call_ended():
    z, p = torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[0.5, 0.5, 0.25]])
    assert smooth_concepts(z, p).flatten().tolist() == [1.0, 2.0, 0.25 * 5 + 0.75 * 2]
    first = smooth_concepts(z[:, :2], p[:, :2])
    assert torch.equal(smooth_concepts(z[:, 2:], p[:, 2:], first[:, -1]), smooth_concepts(z, p)[:, 2:])
    assert torch.equal(smooth_concepts(z, torch.ones_like(p)), z)


def test_null_gets_a_gradient_only_where_its_mass_is_kept():
    logits = torch.tensor([[[1.0, 0.5, -0.2]]], dtype=torch.float64, requires_grad=True)  # two codes, then NULL
    table = torch.tensor([[1.0, 2.0], [0.3, -1.0]], dtype=torch.float64)
    p = 1 - logits.softmax(-1)[..., 2]
    kept = keep_null_mass(logits[..., :2].softmax(-1), p)
    torch.testing.assert_close(kept, logits.softmax(-1)[..., :2])
    for soft, moves in ((kept, True), (logits[..., :2].softmax(-1), False)):
        (grad,) = torch.autograd.grad((soft @ table).sum(), logits, retain_graph=True)
        assert (grad[..., 2].abs().item() > 1e-3) == moves


def test_soft_visibility_is_the_share_of_drawn_commits_that_see():
    """Against all 2^5 outcomes of five decisions."""
    p, valid = torch.tensor([[0.3, 0.9, 0.5, 0.2, 0.6]], dtype=torch.float64), torch.ones(1, 5, dtype=torch.bool)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for outcome in range(32):
        g = torch.tensor([[bool(outcome >> t & 1) for t in range(5)]])
        mass = torch.where(g, p, 1 - p).prod()
        for q in range(5):
            for k in range(q):
                expected[q, k] += mass * bool(g[0, k] or not g[0, k + 1 : q + 1].any())
    torch.testing.assert_close(soft_visibility(p, commits.may_be_seen(valid))[0, 0], expected)
    padded = soft_visibility(p, commits.may_be_seen(torch.tensor([[False, True, True, True, True]])))[0, 0]
    assert padded[:, 0].abs().max() == 0
    torch.testing.assert_close(padded[:, 1:], expected[:, 1:])


def test_visibility_is_what_is_seen_with_the_gradient_of_what_would_be():
    g = random_gates(2, 6, 0.4)
    valid = torch.ones_like(g)
    seen, may = commits.deep_mask(g, commits.pack_commits(g).segment, valid), commits.may_be_seen(valid)
    p = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pull = torch.randn(2, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = visibility(seen, p, may)
    assert torch.equal(share.bool(), seen)
    (found,) = torch.autograd.grad((share * pull).sum(), p)
    (soft,) = torch.autograd.grad((soft_visibility(p, may) * pull).sum(), p)
    torch.testing.assert_close(found, soft)
    assert torch.autograd.gradcheck(lambda p: soft_visibility(p, may), p)
    sure = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    (finite,) = torch.autograd.grad(soft_visibility(sure, torch.ones(1, 4, 4, dtype=torch.bool)).sum(), sure)
    assert finite.isfinite().all()
