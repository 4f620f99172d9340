"""The distribution of texts that are drafted in blocks, by enumerating every outcome of every draw, in float64.

Drafters are tables here, so that every rule of drafting and verification is seen alone. The network has tests of its own.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from models.functional.block_draft import draw_with_noise
from models.functional.errors import UsageError
from models.interfaces.scores import BlockProposal, ProposesBlocks, StateScores
from models.speculative import decode as decode_module
from models.speculative.decode import decode_qstar
from models.speculative.distribution import MixtureDist
from models.speculative.ngram import NgramScores
from models.speculative.options import DraftOptions
from models.speculative.random_source import TorchRandomSource, enumerate_outcomes
from models.speculative.roles import roles
from models.speculative.state import TextRules

GRID = 2  # of uniform noise; the drafter of `noise` has probabilities that are multiples of 1 / GRID
PROMPT = torch.tensor([[0, 1]])


class TableScores:
    """log p(next | the last two tokens), whose state of a position is the token read there."""

    def __init__(self, seed, words):
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.randn(words, words, words, generator=draw, dtype=torch.float64).log_softmax(-1)
        self.read = None

    def __call__(self, ids, lengths, count):
        positions = lengths.unsqueeze(-1) + torch.arange(count)
        self.read = ids[:, : int(lengths.max()) + count - 1].clone()
        return self.table[ids.gather(1, positions - 2), ids.gather(1, positions - 1)]

    def keep_states(self, layers):
        assert layers == (1,)

    def keep_rows(self, stay):
        self.read = self.read[stay]

    def states_before(self, ids, ends, window):
        place = ends.unsqueeze(-1) - window + torch.arange(window)
        assert (place < self.read.shape[1]).all()
        tokens = self.read.gather(1, place.clamp(min=0))
        assert torch.equal(tokens, ids.gather(1, place.clamp(min=0)))  # never the state of a rejected token
        return tokens.unsqueeze(-1), place >= 0


class TableDrafter:
    """ψ_l from (the token before the last, the last one, l) and, by dependence, the drafted token or the noise before l."""

    block_length, window = 3, 1

    def __init__(self, dependence, words, names=("theta", "target"), control=None):
        self.dependence, self.control = dependence, control
        self.state_layers = dict.fromkeys(names, (1,))
        draw = torch.Generator().manual_seed(9)
        shape = (words, words, self.block_length, max(GRID, words), words)
        p = torch.rand(shape, generator=draw, dtype=torch.float64).softmax(-1)
        if dependence == "noise":  # multiples of 1 / GRID, of which some are 0
            p = torch.distributions.Multinomial(GRID, p).sample().double() / GRID
        self.logp = p.log()

    def propose(self, states, read, last, size, draws, shape):
        noise = draws.uniform(len(last), size, last) if self.dependence == "noise" else None
        before = states[:, -1, 0]
        tokens, logp = [], []
        for k in range(size):
            own = torch.zeros_like(last)
            if self.dependence == "markov":
                own = tokens[-1] if tokens else last
            elif self.dependence == "noise":  # the control reads the noise that draws its own token
                seen = k if self.control == "reads its own noise" else k - 1
                own = (noise[:, seen] * GRID).long() if seen >= 0 else own
            logp.append(shape(self.logp[before, last, k, own]))
            tokens.append(draws.choose(logp[-1].exp()) if noise is None else draw_with_noise(logp[-1], noise[:, k]))
        if self.control == "reports others":
            logp = [row.roll(1, -1) for row in logp]
        if self.control == "reports the marginal":  # of a product over positions, where the draws were dependent
            logp = [self.logp[before, last, k].exp().mean(1).log() for k in range(size)]
        return BlockProposal(torch.stack(tokens, 1), torch.stack(logp, 1))


def exact(scores, length, words, mixture, eos_id=None):
    found = {}
    for text in itertools.product(range(words), repeat=length):
        probability, ids = 1.0, PROMPT[0].tolist()
        for token in text:
            if eos_id is not None and eos_id in ids[2:]:
                probability *= float(token == eos_id)
            else:
                here, n = torch.tensor([ids]), torch.tensor([len(ids)])
                both = [mixture.tempered(model(here, n, 1)[0]) for model in scores]
                probability *= mixture(*both).log_q[0, token].exp().item()
            ids.append(token)
        found[text] = probability
    return found


def error(
    dependence,
    *,
    length,
    words=2,
    verify="token",
    gamma=2,
    alone=False,
    control=None,
    eos_id=None,
    cost=1.0,
    w=0.0,
    names=None,
    **options,
):
    """Largest error of P(text). names: of the models whose states the drafter reads; None: all."""
    mixture = MixtureDist(**options)
    theta = TableScores(0, words)
    target = theta if alone else TableScores(1, words)
    names = names or (("theta",) if alone else ("theta", "target"))
    drafter = TableDrafter(dependence, words, names, control)
    rules = TextRules(length, () if eos_id is None else (eos_id,))
    found = dict.fromkeys(itertools.product(range(words), repeat=length), 0.0)

    def run(rng):
        drafting = DraftOptions("block_drafter", gamma, verify, cost, w)
        return decode_qstar(theta, target, PROMPT, drafting, rules, rng=rng, assistant=drafter, mixture=mixture)

    for probability, out in enumerate_outcomes(run, GRID):
        found[tuple(out.tokens[0].tolist())] += probability
    wanted = exact((theta, target), length, words, mixture, eos_id)
    return max(abs(found[text] - wanted[text]) for text in wanted)


def test_the_toys_have_the_protocols():
    assert isinstance(TableScores(0, 2), StateScores)
    assert isinstance(TableDrafter("none", 2), ProposesBlocks)
    assert not isinstance(NgramScores(2), ProposesBlocks | StateScores)


@pytest.mark.parametrize("verify", ["token", "block"])
@pytest.mark.parametrize("dependence", ["none", "markov", "noise"])
def test_the_distribution_is_that_of_no_drafter(dependence, verify):
    """A first token, a draft of two, and the token after it: rejections at every position and drafts accepted whole."""
    assert error(dependence, length=4, verify=verify) < 1e-12


@pytest.mark.parametrize("dependence", ["none", "markov", "noise"])
def test_the_distribution_of_one_model(dependence):
    assert error(dependence, length=4, alone=True) < 1e-12


@pytest.mark.parametrize("names", [("theta",), ("target",)])
def test_a_drafter_of_one_model_drafts_for_both(names):
    """Of a drafter that was trained for one model, q* of it and another keeps its distribution."""
    assert error("markov", length=4, names=names) < 1e-12


@pytest.mark.parametrize("verify", ["token", "block"])
@pytest.mark.parametrize("dependence", ["none", "markov", "noise"])
def test_three_words(dependence, verify):
    assert error(dependence, length=3, words=3, verify=verify, gamma=1) < 1e-12


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_k": 1}, {"top_p": 0.6}, {"eos_id": 1}, {"theta_weight": 0.0}], ids=str
)
@pytest.mark.parametrize("dependence", ["none", "markov"])
def test_options_keep_the_distribution(dependence, options):
    assert error(dependence, length=3, **options) < 1e-12


@pytest.mark.parametrize("verify", ["token", "block"])
@pytest.mark.parametrize(
    ("dependence", "control"),
    [
        ("none", "reports others"),
        ("markov", "reports others"),
        ("markov", "reports the marginal"),
        ("noise", "reports others"),
        ("noise", "reads its own noise"),
    ],
)
def test_a_drafter_that_reports_other_probabilities_than_it_drew_from_fails(dependence, control, verify):
    assert error(dependence, length=4 if verify == "block" else 3, verify=verify, control=control) > 1e-3


def decode(scores, drafter, prompts, length, **options):
    rng = TorchRandomSource(torch.Generator().manual_seed(0))
    drafting = DraftOptions("block_drafter", **({"gamma": 3} | options))
    return decode_qstar(*scores, prompts, drafting, TextRules(length), rng=rng, assistant=drafter)


@pytest.mark.parametrize("verify", ["token", "block"])
def test_a_draft_costs_one_forward_pass_and_acceptance_is_counted_by_position(verify):
    scores = TableScores(0, 3), TableScores(1, 3)
    out = decode(scores, TableDrafter("markov", 3), PROMPT, 40, verify=verify)
    assert out.forwards["theta"] == out.forwards["target"] == out.forwards["block_drafter"] + 1
    assert out.drafts == out.forwards["block_drafter"]
    assert out.undrafted == 1
    assert sum(out.verified_at) == out.verified["block_drafter"]
    assert sum(out.accepted_at) == out.accepted["block_drafter"]
    assert out.verified_at[0] == out.drafts
    assert out.verified_at[1] == out.accepted_at[0]  # what is verified was reached
    assert out.verified_at[3:] == [0] * len(out.verified_at[3:])
    assert out.totals.tokens_per_forward == 40 / out.forwards["theta"]
    assert out.totals.accepted_length == sum(out.accepted_at) / out.drafts
    assert out.draft_starts[:, 1].tolist() == sorted(out.draft_starts[:, 1].tolist())
    assert out.draft_starts[0].tolist() == [0, 1]
    assert out.draft_lengths.shape == out.draft_starts[:, 0].shape
    assert out.draft_lengths[0] == 3
    assert int(out.draft_lengths.sum()) == out.drafted_tokens


def test_a_single_model_runs_once_and_needs_no_pair():
    theta = TableScores(0, 3)
    out = decode((theta, theta), TableDrafter("none", 3, ("theta",)), PROMPT.expand(5, -1), 12)
    assert set(out.forwards) == {"theta", "block_drafter"}
    assert torch.equal(out.lengths, torch.full((5,), 12))
    naive = decode_qstar(
        theta, theta, PROMPT, DraftOptions(gamma=0), TextRules(5), rng=TorchRandomSource(torch.Generator())
    )
    assert naive.forwards == {"theta": 5}


def test_wrong_drafters_are_named():
    scores = TableScores(0, 2), TableScores(1, 2)
    with pytest.raises(UsageError, match="a third model needs draft=assistant, or draft=block_drafter"):
        decode(scores, None, PROMPT, 2)
    with pytest.raises(UsageError, match="type draft=assistant"):
        decode(scores, NgramScores(2), PROMPT, 2)
    with pytest.raises(UsageError, match="type draft=block_drafter"):
        decode_qstar(
            *scores, PROMPT, DraftOptions("assistant"), TextRules(2),
            rng=TorchRandomSource(torch.Generator()), assistant=TableDrafter("none", 2),
        )  # fmt: skip
    with pytest.raises(UsageError, match="hidden states of judge"):
        decode(scores, TableDrafter("none", 2, ("judge",)), PROMPT, 2)
    stateless = [lambda ids, lengths, count, s=s: s(ids, lengths, count) for s in scores]
    with pytest.raises(UsageError, match="hidden states of theta"):
        decode(stateless, TableDrafter("none", 2), PROMPT, 2)


@pytest.mark.parametrize("verify", ["token", "block"])
@pytest.mark.parametrize("dependence", ["none", "markov"])
def test_lengths_that_follow_acceptance_keep_the_distribution(dependence, verify, monkeypatch):
    """Lengths change from text to text; the control lets a length depend on the tokens to be drafted."""
    lengths = set()
    chosen = decode_module._draft_length

    def recorded(run, drafting, who, rounds):
        length = chosen(run, drafting, who, rounds)
        lengths.update({length} if rounds else ())
        return length

    monkeypatch.setattr(decode_module, "_draft_length", recorded)
    assert error(dependence, length=3, gamma="auto", verify=verify, cost=0.4, w=0.35) < 1e-12
    assert lengths == {0, 3}  # after a rejection at the first position a draft no longer pays


def length_chosen(accepted, verified, cost, position_cost, rounds=1, longest=3):
    """What gamma=auto drafts after so many rounds and such counts by position."""
    drafting = DraftOptions("block_drafter", "auto", "token", cost, position_cost)
    blocks = SimpleNamespace(block_length=longest)
    run = SimpleNamespace(models={"block_drafter": blocks}, accepted_at=accepted, verified_at=verified)
    return decode_module._draft_length(run, drafting, roles(drafting), rounds)


@pytest.mark.parametrize(
    ("accepted", "verified", "position_cost", "wanted"),
    [
        ([97, 0, 0, 0], [100, 97, 0, 0], 0.1, 1),  # the rate of all positions together would draft two
        ([97, 90, 80, 0], [100, 97, 90, 0], 0.1, 3),
        ([0, 90, 80, 0], [100, 95, 90, 0], 0.1, 0),  # nothing behind a token that is never accepted counts
        ([0, 0, 0, 0], [0, 0, 0, 0], 0.5, 3),  # before anything is known, as if all were accepted
        ([3, 0, 0, 0], [4, 0, 0, 0], 0.5, 2),  # then from three of four on at each position
    ],
)
def test_the_length_of_a_block_follows_the_rate_of_each_position(accepted, verified, position_cost, wanted):
    assert length_chosen(accepted, verified, 0.2, position_cost) == wanted


def test_a_block_is_at_most_as_long_as_the_longest_draft():
    for longest, wanted in ((5, 5), (40, 16)):
        assert length_chosen([0] * 18, [0] * 18, 0.1, 0.0, longest=longest) == wanted


def test_one_token_of_a_block_is_drafted_now_and_then_where_no_draft_pays():
    found = [length_chosen([0] * 4, [20, 0, 0, 0], 1.0, 0.1, rounds) for rounds in range(40)]
    assert [rounds for rounds, length in enumerate(found) if length] == [15, 31]
    assert set(found) == {0, 1}


def test_where_no_acceptance_could_pay_nothing_is_kept_or_tried_for_drafts(monkeypatch):
    """4 tokens at most for 1 + 2.8 + 3 · .1 rounds; a cheaper drafter is tried."""
    kept = []
    monkeypatch.setattr(TableScores, "keep_states", lambda self, layers: kept.append(layers))
    for cost, tried in ((2.8, False), (2.6, True)):
        kept.clear()
        scores = [TableScores(seed, 2) for seed in (0, 1)]
        out = decode(scores, TableDrafter("markov", 2), PROMPT, 40, gamma="auto", cost=cost, position_cost=0.1)
        assert bool(kept) == (out.forwards["block_drafter"] > 0) == tried


def test_a_length_that_depends_on_the_drafted_tokens_fails(monkeypatch):
    """The control: a draft is cut before a token that would probably be rejected."""
    whole = decode_module._propose_block

    def cut(run, gamma, drafter):
        draft = whole(run, gamma, drafter)
        return (
            draft._replace(tokens=draft.tokens[:, :1], logp=draft.logp[:, :1], lengths=draft.lengths.clamp(max=1))
            if (draft.tokens[0, 0] == 1)
            else draft._replace(tokens=draft.tokens[:, :0], logp=draft.logp[:, :0], lengths=draft.lengths * 0)
        )

    monkeypatch.setattr(decode_module, "_propose_block", cut)
    assert error("none", length=3, gamma=1) > 1e-3
