"""The oracle corpus against brute-force enumeration, sampled frequencies, and its own parser."""

import itertools
import math

import pytest
import torch

from datamodules.oracle.datamodule import OracleDataModule
from datamodules.oracle.score import prompt_kind, total_variation
from models.functional.errors import UsageError
from models.functional.monitor import plug_in_entropy


def enumerate_texts(distribution):
    """{text: {plan: p(plan, text)}} by looping over every plan, template and word: no formula of the corpus is used."""
    grammar, table = distribution.grammar, {}
    priors = [[w / sum(a.prior) for w in a.prior] for a in grammar.attributes]
    names = [a.name for a in grammar.attributes]
    for plan in itertools.product(*(range(len(a.values)) for a in grammar.attributes)):
        p_plan = math.prod(prior[k] for prior, k in zip(priors, plan, strict=True))
        for template in grammar.templates:
            if any(plan[names.index(name)] not in only for name, only in template.only.items()):
                continue
            choices = [s.words[0 if s.attribute is None else plan[names.index(s.attribute)]] for s in template.slots]
            for words in itertools.product(*choices):
                ids = [distribution.word_id[word] for word, _ in words]
                text = tuple(ids + [distribution.eos_id] * (distribution.length - len(ids)))
                p = p_plan * template.weight * math.prod(weight for _, weight in words)
                table.setdefault(text, {}).setdefault(plan, 0.0)
                table[text][plan] += p
    return table


@pytest.fixture(scope="module")
def tiny():
    data = OracleDataModule(size="tiny", train_rows=64, val_rows=16, test_rows=64)
    data.setup()
    return data


@pytest.fixture(scope="module")
def truth(tiny):
    return enumerate_texts(tiny.distribution)


def reveals(distribution):
    """Every prompt: each attribute hidden or showing one of its values."""
    ranges = [range(-1, len(prior)) for prior in distribution.prior]
    return torch.tensor(list(itertools.product(*ranges)))


def test_log_prob_equals_enumeration_for_every_text_and_prompt(tiny, truth):
    texts = torch.tensor(list(truth))
    for reveal in reveals(tiny.distribution):
        joint = [
            sum(p for plan, p in plans.items() if all(c in (-1, k) for c, k in zip(reveal.tolist(), plan, strict=True)))
            for plans in truth.values()
        ]
        exact = torch.tensor(joint, dtype=torch.float64)
        exact = exact / exact.sum()
        ours = tiny.distribution.log_prob(texts, reveal.expand(len(texts), -1)).exp()
        torch.testing.assert_close(ours, exact, atol=1e-14, rtol=1e-12)


def test_probabilities_sum_to_one_and_other_texts_have_none(tiny, truth):
    hidden = torch.full((1, 3), -1)
    texts = torch.tensor(list(truth))
    assert tiny.distribution.log_prob(texts, hidden.expand(len(texts), -1)).exp().sum().item() == pytest.approx(1.0)
    changed = texts.clone()
    changed[:, 0] = tiny.tokenizer.unk_token_id
    assert tiny.distribution.log_prob(changed, hidden.expand(len(texts), -1)).isinf().all()


def test_entropy_marginals_and_total_correlation_equal_enumeration(tiny, truth):
    texts = torch.tensor(list(truth))
    for reveal in reveals(tiny.distribution)[::3]:
        rows = reveal.expand(len(texts), -1)
        p = tiny.distribution.log_prob(texts, rows).exp()
        entropy = -torch.xlogy(p, p).sum()
        one_hot = torch.nn.functional.one_hot(texts, tiny.distribution.vocab_size).double()
        marginals = torch.einsum("n,nrv->rv", p, one_hot)
        torch.testing.assert_close(tiny.distribution.entropy(rows[:1])[0], entropy)
        torch.testing.assert_close(tiny.distribution.marginals(rows[:1])[0], marginals)
        correlation = -torch.xlogy(marginals, marginals).sum() - entropy
        torch.testing.assert_close(tiny.distribution.total_correlation(rows[:1])[0], correlation)


def test_marginals_after_evidence_equal_enumeration_for_every_prompt(tiny, truth):
    """Bayes over all texts; equal evidence for all words changes nothing, nor does a constant at a position."""
    distribution, generator = tiny.distribution, torch.Generator().manual_seed(0)
    texts = tiny.list_texts()[1]
    evidence = 2 * torch.randn(
        1, distribution.length, distribution.vocab_size, generator=generator, dtype=torch.float64
    )
    log_evidence = sum(evidence[0, position, texts[:, position]] for position in range(distribution.length))
    one_hot = torch.nn.functional.one_hot(texts, distribution.vocab_size).double()
    for reveal in reveals(distribution):
        reveal = reveal.view(1, -1)
        weight = torch.softmax(distribution.log_prob(texts, reveal.expand(len(texts), -1)) + log_evidence, -1)
        seen = distribution.seen_marginals(evidence, reveal)
        torch.testing.assert_close(seen[0], torch.einsum("n,nrv->rv", weight, one_hot))
        torch.testing.assert_close(distribution.seen_marginals(evidence + 3.0, reveal), seen)
        torch.testing.assert_close(
            distribution.seen_marginals(torch.zeros_like(evidence), reveal), distribution.marginals(reveal)
        )


def test_total_correlation_is_the_divergence_to_the_product_of_marginals(tiny, truth):
    """KL(p || product) = TC, and any other product over positions is further away."""
    texts = torch.tensor(list(truth))
    hidden = torch.full((len(texts), 3), -1)
    p = tiny.distribution.log_prob(texts, hidden).exp()
    marginals = tiny.distribution.marginals(hidden[:1])[0]

    def divergence(product):
        log_q = product.gather(1, texts.T).log().sum(0)
        return (p * (p.log() - log_q)).sum()

    correlation = tiny.distribution.total_correlation(hidden[:1])[0]
    torch.testing.assert_close(divergence(marginals), correlation)
    other = 0.9 * marginals + 0.1 * marginals.roll(1, 0)
    assert divergence(other) > correlation + 1e-3


@pytest.mark.parametrize("size", ["tiny", "small", "large"])
def test_sampled_frequencies_match_the_claimed_probabilities(size):
    """Chi-square of plan values and words against the marginals; the same counts refuse a slightly wrong claim."""
    data = OracleDataModule(size=size, train_rows=20_000, val_rows=8, test_rows=8)
    data.setup()
    texts = data.rows["train"].columns["input_ids"][:, data.prompt_length :]
    hidden = torch.full((1, data.prompt_length), -1)
    marginals = data.distribution.marginals(hidden)[0]

    def surprise(claim):
        """Largest standardised deviation of any word frequency at any position, over claims of at least 0.01."""
        counts = torch.stack(
            [torch.bincount(texts[:, position], minlength=claim.shape[1]) for position in range(len(claim))]
        )
        deviation = (counts / len(texts) - claim) / (claim * (1 - claim) / len(texts)).sqrt()
        return deviation[(claim > 0.01) & (claim < 0.99)].abs().max()

    assert surprise(marginals) < 5.0
    assert surprise(0.9 * marginals + 0.1 * (marginals > 0) / (marginals > 0).sum(-1, keepdim=True)) > 6.0


def test_mean_nll_of_samples_is_the_entropy():
    data = OracleDataModule(size="small", train_rows=8, val_rows=8, test_rows=20_000)
    data.setup()
    rows = data.rows["test"].columns
    nll = -data.distribution.log_prob(rows["input_ids"][:, data.prompt_length :], rows["reveal"])
    entropy = data.distribution.entropy(rows["reveal"])
    assert nll.isfinite().all()
    assert abs((nll - entropy).mean()) < 4 * (nll - entropy).std() / math.sqrt(len(nll))


def test_prompts_reveal_all_part_and_none_in_the_shares_asked_for():
    data = OracleDataModule(size="small", train_rows=1000, val_rows=8, test_rows=8, reveal_all=0.2, reveal_part=0.5)
    data.setup()
    counts = torch.bincount(prompt_kind(data.rows["train"].columns["reveal"]), minlength=3).tolist()
    assert [round(c / 100) for c in counts] == [2, 5, 3]


def test_splits_are_reproducible_and_differ():
    first, second = (OracleDataModule(size="small", train_rows=50, val_rows=50, test_rows=50) for _ in range(2))
    first.setup()
    second.setup()
    ids = {split: rows.columns["input_ids"] for split, rows in first.rows.items()}
    assert torch.equal(ids["train"], second.rows["train"].columns["input_ids"])
    assert not torch.equal(ids["train"], ids["test"])
    other = OracleDataModule(size="small", train_rows=50, val_rows=50, test_rows=50, seed=1)
    assert other.fingerprint() != first.fingerprint() == second.fingerprint()


def test_the_parser_names_what_is_wrong():
    data = OracleDataModule(size="small", train_rows=8, val_rows=8, test_rows=8)
    text = "anna the baker went to paris and bought red apples . anna felt happy near seine"
    ids = torch.tensor(data.tokenizer.encode(text))
    hidden = torch.full((4,), -1)
    assert data.explain(ids, hidden) == []
    wrong = torch.tensor(data.tokenizer.encode(text.replace("anna felt", "boris felt").replace("seine", "tiber")))
    faults = data.explain(wrong, hidden)
    assert faults == [
        "word 12 (who again) is “boris”, not “anna”, although word 1 is “anna”",
        "word 16 (river) is “tiber”, not “seine”, although word 6 is “paris”",
    ]
    assert "which the prompt asks for" in data.explain(ids, torch.tensor([1, -1, -1, -1]))[0]


def test_parser_and_likelihood_agree_on_what_is_valid(tiny):
    """On the corpus' texts and on texts with one word changed, "no fault" and "finite likelihood" are the same."""
    rows = tiny.rows["test"].columns
    texts = rows["input_ids"][:, 3:].clone()
    position = torch.arange(len(texts)) % texts.shape[1]
    texts[torch.arange(0, len(texts), 2), position[::2]] = torch.randint(4, len(tiny.tokenizer), (len(texts) // 2,))
    finite = tiny.distribution.log_prob(texts, rows["reveal"]).isfinite().tolist()
    clean = [not tiny.explain(text, reveal) for text, reveal in zip(texts, rows["reveal"], strict=True)]
    assert finite == clean
    assert 0 < sum(finite) < len(finite)


def test_scores_of_the_controls(tiny):
    data = OracleDataModule(size="small", train_rows=8, val_rows=8, test_rows=4000)
    data.setup()
    rows = data.rows["test"].columns
    product, floor = (c(rows, torch.Generator().manual_seed(0)) for c in data.controls())
    best, worst = data.scorer(rows, floor), data.scorer(rows, product)
    assert best.quality["validity"] == 1.0
    assert abs(best.quality["exact_nll"] - best.quality["exact_nll_truth"]) < 0.1
    assert best.quality["exact_match"] == 1.0
    assert best.quality["coverage"] > 0.97
    assert abs(best.entropy - best.quality["entropy_truth"]) < 0.1
    assert worst.quality["validity_all"] == 1.0  # the whole plan leaves only free words open: they factorise
    assert worst.quality["validity_none"] < 0.05
    assert worst.quality["tv"] > best.quality["tv"] + 0.5


def test_estimators_by_hand():
    samples = torch.tensor([[0], [0], [1], [2]])
    assert plug_in_entropy(samples) == pytest.approx(1.5 * math.log(2) + 2 / 8)
    log_prob = torch.tensor([0.25, 0.25, 0.25, 0.0], dtype=torch.float64).log()
    assert total_variation(samples, log_prob) == pytest.approx(0.25 + 0.25)


def test_prompts_are_parsed_in_any_order_and_refused_with_advice(tiny):
    rows = tiny.encode_prompts(["where=paris who=boris", ""])
    assert rows["reveal"].tolist() == [[1, 0, -1], [-1, -1, -1]]
    assert tiny.decode_prompts(rows) == ["who=boris where=paris events=?", "who=? where=? events=?"]
    with pytest.raises(UsageError, match=r"who is one of anna, boris, clara or \?"):
        tiny.encode_prompts(["who=zoe"])
    with pytest.raises(UsageError, match="type for example prompt='who=anna where=paris events=rain'"):
        tiny.encode_prompts(["hello"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": "huge"}, "type data.size=tiny"), ({"reveal_all": 0.8, "reveal_part": 0.4}, "together at most 1")],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        OracleDataModule(**options)
