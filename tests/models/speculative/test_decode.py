"""The distribution of what q* decoding generates, by enumerating every outcome of every random draw, in float64.

The sampling code itself runs once for each outcome. Negative controls break one rule at a time and must fail.
"""

import itertools

import pytest
import torch
from scipy.stats import chisquare, power_divergence

import models.speculative.decode as decoding
import models.speculative.state as state
from models.functional.errors import UsageError
from models.functional.qstar import mix, solve_alpha, truncate
from models.speculative.decode import decode_qstar
from models.speculative.distribution import MixtureDist
from models.speculative.options import DraftOptions
from models.speculative.random_source import TorchRandomSource, enumerate_outcomes
from models.speculative.state import TextRules

V = 3


def table_model(seed, vocabulary=V, sharp=1.0):
    """log p(next | the last two tokens), as scores for decoding."""
    draw = torch.Generator().manual_seed(seed)
    table = (sharp * torch.randn(vocabulary, vocabulary, vocabulary, generator=draw, dtype=torch.float64)).log_softmax(
        -1
    )

    def scores(ids, lengths, count):
        positions = lengths.unsqueeze(-1) + torch.arange(count)
        return table[ids.gather(1, positions - 2), ids.gather(1, positions - 1)]

    return scores


THETA, TARGET = table_model(0), table_model(1)
SMALL = table_model(2, 2), table_model(3, 2)
ASSISTANT, SMALL_ASSISTANT = table_model(4), table_model(5, 2)
PROMPT = torch.tensor([[0, 1]])
MIXTURE_OPTIONS = ("theta_weight", "temperature", "top_k", "top_p")


def exact_dist(
    length, theta_weight=None, top_k=None, top_p=None, temperature=1.0, eos_id=None, models=(THETA, TARGET), words=V
):
    found = {}
    for text in itertools.product(range(words), repeat=length):
        probability, ids = 1.0, [0, 1]
        for token in text:
            if eos_id is not None and eos_id in ids[2:]:
                probability *= float(token == eos_id)
                ids.append(token)
                continue
            here, n = torch.tensor([ids]), torch.tensor([len(ids)])
            a, b = (m(here, n, 1)[0] for m in models)
            a, b = (a / temperature).log_softmax(-1), (b / temperature).log_softmax(-1)
            alpha = solve_alpha(a, b).alpha if theta_weight is None else theta_weight
            alpha = alpha(a, b) if callable(alpha) else alpha
            probability *= truncate(mix(a, b, alpha)[0], top_k, top_p)[0, token].exp().item()
            ids.append(token)
        found[text] = probability
    return found


def generated_dist(length, models=(THETA, TARGET), words=V, eos_id=None, assistant=None, **options):
    """P(text) of `decode_qstar`; options of `MixtureDist` and of `DraftOptions` alike."""
    found = dict.fromkeys(itertools.product(range(words), repeat=length), 0.0)
    mixture = MixtureDist(**{name: options.pop(name) for name in list(options) if name in MIXTURE_OPTIONS})
    drafting, rules = DraftOptions(**options), TextRules(length, () if eos_id is None else (eos_id,))

    def run(rng):
        return decode_qstar(*models, PROMPT, drafting, rules, rng=rng, assistant=assistant, mixture=mixture)

    for probability, out in enumerate_outcomes(run):
        found[tuple(out.tokens[0].tolist())] += probability
    return found


def decode(theta, target, prompts, length, rng, assistant=None, **drafting):
    """`decode_qstar` with the options of drafts as keywords."""
    return decode_qstar(
        theta, target, prompts, DraftOptions(**drafting), TextRules(length), rng=rng, assistant=assistant
    )


def worst(first, second):
    return max(abs(first[text] - second[text]) for text in first)


SCHEMES = [
    {"draft": draft, "gamma": gamma, "verify": verify}
    for draft in ("theta", "target", "alternate", "assistant")
    for gamma in (1, 2)
    for verify in ("token", "block")
]


def third(scheme, small=False):
    """The scheme, with the third model that it names."""
    if scheme.get("draft") != "assistant":
        return scheme
    return scheme | {"assistant": SMALL_ASSISTANT if small else ASSISTANT}


@pytest.mark.parametrize("options", [{"gamma": 0}, *SCHEMES], ids=str)
def test_every_scheme_generates_q_star(options):
    """Rejections at every position and drafts accepted whole all occur; two tokens where drafts are longer."""
    if options["gamma"] == 2:
        options = third(options, small=True) | {"models": SMALL, "words": 2}
        assert worst(generated_dist(3, **options), exact_dist(3, models=SMALL, words=2)) < 1e-12
    else:
        assert worst(generated_dist(2, **third(options)), exact_dist(2)) < 1e-12


@pytest.mark.parametrize("cost", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("scheme", SCHEMES[2::4], ids=str)
def test_a_draft_length_that_follows_the_acceptance_rate_keeps_the_distribution(scheme, cost, monkeypatch):
    """`auto` depends on past draws only; every length from 0 to 3 occurs here."""
    lengths = []

    def varied(beta, cost, scheme, longest, position_cost):
        lengths.append(int(beta * 71) % 4)
        return lengths[-1]

    monkeypatch.setattr(decoding, "best_gamma", varied)
    options = third(scheme, small=True) | {"models": SMALL, "words": 2, "gamma": "auto", "cost": cost}
    assert worst(generated_dist(3, **options), exact_dist(3, models=SMALL, words=2)) < 1e-12
    assert set(lengths) == {0, 1, 2, 3}


def test_a_weight_may_be_a_function_of_both_models():
    weight = lambda theta, target: 0.25 + 0.5 * theta[..., 0].exp()  # noqa: E731
    alone = lambda a, b: weight(a, b)  # noqa: E731
    for scheme in SCHEMES[::5]:
        assert worst(generated_dist(2, theta_weight=weight, **third(scheme)), exact_dist(2, theta_weight=alone)) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"theta_weight": 0.3},
        {"top_k": 2},
        {"top_p": 0.8},
        {"temperature": 0.7},
        {"eos_id": 2},
        {"theta_weight": 0.0},
        {"theta_weight": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[5], SCHEMES[8], SCHEMES[12]], ids=str)
def test_options_keep_the_distribution(options, scheme):
    assert worst(generated_dist(2, **third(scheme), **options), exact_dist(2, **options)) < 1e-12


@pytest.mark.parametrize("draft", ["theta", "target", "alternate", "assistant"])
def test_a_draft_that_follows_a_draft_accepted_whole(draft):
    """Four tokens: a draft of one, the token after it, and the next draft with the token after that."""
    options = third({"draft": draft, "gamma": 1}, small=True) | {"models": SMALL, "words": 2}
    assert worst(generated_dist(4, **options), exact_dist(4, models=SMALL, words=2)) < 1e-12


def resample_q(log_q, _):
    return log_q.exp()


def test_a_bonus_token_of_the_verifier_fails(monkeypatch):
    """The verifier's proposal is committed unverified, as in speculative sampling of the verifier itself."""

    class Trusting(decoding.QStarRun):
        def verify(self, rows, tokens, dist, proposer, proposal):
            if proposer == "target":
                self.commit(rows, tokens, dist)
                return rows
            return super().verify(rows, tokens, dist, proposer, proposal)

    monkeypatch.setattr(decoding, "QStarRun", Trusting)
    assert worst(generated_dist(2, draft="alternate", gamma=1), exact_dist(2)) > 1e-3


@pytest.mark.parametrize(("candidates", "expected"), [(1, 0.70), (5, 0.83)])
def test_several_candidates_and_then_q_fail(candidates, expected, monkeypatch):
    """k candidates, each accepted with min(1, q/p), then q: min(p, q) (1 - R^k)/(1 - R) + R^k q, R = 1 - overlap."""

    class Candidates(decoding.QStarRun):
        def verify(self, rows, tokens, dist, proposer, proposal):
            for _ in range(candidates):
                if self.rng.accept((dist.log_q - proposal)[:, int(tokens)]):
                    break
                tokens = self.rng.choose(proposal.exp())
            else:
                tokens = self.rng.choose(dist.log_q.exp())
            self.commit(rows, tokens, dist)
            return rows

    p, q = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.5, 0.5]).double()  # q* of p and its mirror image
    models = [lambda ids, lengths, count, p=p: p.log().expand(len(ids), count, -1) for p in (p, p.flip(0))]
    options = {"models": models, "words": 2, "draft": "theta", "gamma": 1}
    assert list(generated_dist(1, **options).values()) == pytest.approx(q.tolist())
    monkeypatch.setattr(decoding, "QStarRun", Candidates)
    least, rejected = torch.minimum(p, q), 1 - float(torch.minimum(p, q).sum())
    formula = least * (1 - rejected**candidates) / (1 - rejected) + rejected**candidates * q
    found = generated_dist(1, **options)
    assert list(found.values()) == pytest.approx(formula.tolist())
    assert found[(0,)] == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("scheme", SCHEMES[::5], ids=str)
def test_samples_have_the_distribution_and_those_of_the_control_have_not(scheme, monkeypatch):
    """Chi-square on 9 texts of a batch of 8 000, drawn together: ragged rows do not disturb each other."""
    n, exact = 8_000, exact_dist(2)
    batch = PROMPT.expand(n, -1)

    def p_value():
        rng = TorchRandomSource(torch.Generator().manual_seed(0))
        out = decode(THETA, TARGET, batch, 2, rng, **third(scheme))
        codes = (out.tokens * torch.tensor([V, 1])).sum(-1)
        counts = torch.bincount(codes, minlength=V * V).numpy()
        return chisquare(counts, [n * exact[text] for text in itertools.product(range(V), repeat=2)]).pvalue

    assert p_value() > 1e-3
    if scheme["verify"] == "token":
        monkeypatch.setattr(state, "residual", resample_q)
        assert p_value() < 1e-5


def test_prompts_of_different_lengths_and_the_figures_of_each_token():
    ids = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 0]])
    rng = TorchRandomSource(torch.Generator().manual_seed(3))
    lengths = torch.tensor([4, 2])
    drafting = DraftOptions("alternate", gamma=3)
    out = decode_qstar(THETA, TARGET, ids, drafting, TextRules(6), lengths=lengths, rng=rng)
    assert out.tokens.shape == (2, 6)
    for row, length in enumerate(lengths.tolist()):
        text = ids[row, :length].tolist()
        for k, token in enumerate(out.tokens[row].tolist()):
            here, n = torch.tensor([text]), torch.tensor([len(text)])
            a, b = THETA(here, n, 1)[0], TARGET(here, n, 1)[0]
            found = solve_alpha(a, b)
            assert out.alpha[row, k].item() == pytest.approx(found.alpha.item(), abs=1e-9)
            assert out.chernoff[row, k].item() == pytest.approx(found.chernoff.item(), abs=1e-9)
            assert out.logp_theta[row, k].item() == pytest.approx(a[0, token].item())
            assert out.log_q[row, k].item() == pytest.approx(mix(a, b, found.alpha)[0][0, token].item(), abs=1e-9)
            text.append(token)
    assert 0 < out.acceptance["theta"] < 1
    assert out.forwards["target"] < 6 < out.forwards["theta"] + out.forwards["target"]


def test_drafts_of_equal_models_are_accepted_whole_and_blocks_accept_more():
    batch = PROMPT.expand(500, -1)
    accepted = {}
    for verify in ("token", "block"):
        draw = lambda: TorchRandomSource(torch.Generator().manual_seed(0))  # noqa: E731
        same = decode(THETA, THETA, batch, 6, draw(), gamma=3, verify=verify)
        assert same.acceptance == {"theta": 1.0}
        out = decode(THETA, TARGET, batch, 12, draw(), gamma=4, verify=verify)
        accepted[verify] = out.accepted["theta"] / out.drafted_tokens
    assert accepted["block"] > accepted["token"]


def test_texts_end_at_their_end_token():
    rng = TorchRandomSource(torch.Generator().manual_seed(0))
    out = decode_qstar(THETA, TARGET, PROMPT.expand(50, -1), DraftOptions(gamma=2), TextRules(8, (2,)), rng=rng)
    for tokens, figures in zip(out.tokens.tolist(), out.log_q, strict=True):
        end = tokens.index(2) if 2 in tokens else 7
        assert all(token == 2 for token in tokens[end + 1 :])
        assert figures[: end + 1].isfinite().all()
        assert figures[end + 1 :].isnan().all()


@pytest.mark.parametrize("verify", ["token", "block"])
def test_q_need_not_exist_behind_a_token_that_is_certain_to_be_rejected(verify):
    """After token 1, which π_t forbids, the models share no token; q* has token 0 alone."""
    theta = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]).double().log()
    target = torch.tensor([0.5, 0.0, 0.5]).double().log()

    def last_token(ids, lengths, count):
        return theta[ids.gather(1, lengths.unsqueeze(-1) + torch.arange(count) - 1)]

    def always(ids, lengths, count):
        return target.expand(len(ids), count, -1)

    rng = TorchRandomSource(torch.Generator().manual_seed(0))
    out = decode(last_token, always, torch.zeros(20, 1).long(), 4, rng, gamma=2, verify=verify)
    assert (out.tokens == 0).all()
    with pytest.raises(UsageError, match="no common token"):
        decode(last_token, always, torch.ones(1, 1).long(), 4, rng, gamma=2, verify=verify)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "both"}, "draft=both"),
        ({"verify": "x"}, "verify=x"),
        ({"gamma": -1}, "gamma=-1"),
        ({"gamma": "long"}, "gamma=long"),
        ({"cost": 0.0}, "cost=0.0"),
        ({"position_cost": -0.1}, "position_cost=-0.1"),
        ({"length": 0}, "max_new_tokens=0"),
        ({"draft": "assistant"}, "draft=assistant needs a third model"),
        ({"assistant": ASSISTANT}, "a third model needs draft=assistant"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        decode(THETA, TARGET, PROMPT, rng=TorchRandomSource(torch.Generator()), **({"length": 2} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta_weight": 2.0}, "theta_weight=2"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0; top_k=1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_wrong_options_of_the_mixture_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        MixtureDist(**options)


def g_test_p(options, models, words, length, n, batch=20_000):
    """p-value of n texts of `length` tokens under the exact distribution."""
    exact = exact_dist(length, models=models, words=words)
    weights = torch.tensor([words**k for k in reversed(range(length))])
    counts = torch.zeros(words**length)
    rng = TorchRandomSource(torch.Generator().manual_seed(0))
    for _ in range(n // batch):
        out = decode(*models, PROMPT.expand(batch, -1), length, rng, **options)
        counts += torch.bincount((out.tokens * weights).sum(-1), minlength=words**length)
    expected = n * torch.tensor(list(exact.values())).double()
    return power_divergence(counts.double().numpy(), expected.numpy(), lambda_="log-likelihood").pvalue


FOUR = table_model(6, 4), table_model(7, 4)
LONG = [
    {"draft": draft, "gamma": gamma, "verify": verify}
    for draft in ("theta", "target", "alternate", "assistant")
    for gamma in (1, 3)
    for verify in ("token", "block")
]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"gamma": 0}, *LONG], ids=str)
def test_two_hundred_thousand_texts_pass_a_g_test_and_a_biased_rule_fails(options, monkeypatch):
    """All 4^4 texts of four tokens, 200 000 samples: every scheme with drafts of 1 and 3."""
    options = options | ({"assistant": table_model(8, 4)} if options.get("draft") == "assistant" else {})
    assert g_test_p(options, FOUR, 4, 4, 200_000) > 1e-3
    if options.get("verify") == "token":
        monkeypatch.setattr(state, "residual", resample_q)
        assert g_test_p(options, FOUR, 4, 4, 200_000) < 1e-9
