"""One forward pass writes a text: its law sums to 1, is exact by enumeration over plans, and refinement keeps the plan."""

from itertools import product

import pytest
import torch
from helpers.causal import EOS, TINY_SHAPE
from helpers.concept import BASE, concept_parts, generator, log_prob, some_texts
from helpers.concept import every_plan as plans_by_hand
from torch.testing import assert_close

from models.backbones.llada import build_llada
from models.functional.attention import padding_mask
from models.functional.errors import UsageError
from models.plans.decoder import PlannedDecoder
from models.plans.enumeration import every_plan, log_priors, log_prob_of_texts
from models.plans.executor_columns import opening, text_columns
from models.plans.executors import build_executor
from models.plans.layout import joined
from models.plans.options import PlanOptions
from models.plans.parallel_executor import ParallelExecutor
from models.plans.plan_text import parse_plan, plan_texts
from models.plans.planner import Planner, greedy, sampled


def parts(**options):
    model, planner, _ = concept_parts()
    return model, planner, ParallelExecutor(model, EOS, **options)


def all_texts(length: int) -> torch.Tensor:
    """Every text of ids below BASE, cut at its first end and filled with ends."""
    texts = torch.tensor(list(product(range(BASE), repeat=length)))
    ended = (texts == EOS).cumsum(-1) > 0
    return torch.unique(texts.masked_fill(ended, EOS), dim=0)


def test_one_pass_predicts_every_token_from_the_plan_alone():
    _, planner, executor = parts()
    text, _ = some_texts()
    blocks = planner.block(plans_by_hand(planner.layout)[::200][:5])
    with torch.no_grad():
        plain = executor.logits(*blocks, text)
        other = executor.logits(*blocks, text.flip(-1))
        shuffled = executor.logits(blocks[0].roll(1, 0), blocks[1].roll(1, 0), text)
    assert torch.equal(plain, other)  # no word of the text is read
    assert (plain - shuffled).abs().max() > 1e-3
    assert (plain[:, 0] - plain[:, 1]).abs().max() > 1e-3  # positions differ


def test_it_reads_as_llada_does():
    """The same weights in a LLaDA body give the logits of each token at its own column."""
    model, planner, executor = parts()
    text, _ = some_texts()
    ids, embeds = planner.block(plans_by_hand(planner.layout)[::200][:5])
    llada = build_llada(vocab_size=BASE, **TINY_SHAPE).double()
    llada.load_state_dict(model.backbone.state_dict())
    hidden = torch.arange(4).expand(5, -1) % 2 == 0
    opened, columns = opening(model, ids, embeds)
    words, places = text_columns(model, text.masked_fill(hidden, model.vocabulary.blank))
    read, both = torch.cat([opened, words], 1), joined(columns, places)
    with torch.no_grad():
        states = llada.states(read, padding_mask(both.mask), both.position_ids)
        expected = llada.lm_head(states[:, -4:])
        assert_close(executor.logits(ids, embeds, text, hidden), expected, rtol=1e-6, atol=1e-6)
        causal = model.text_logits(model.states(read, both)[:, -4:])
    assert (causal - expected).abs().max() > 1e-2  # the control


def test_a_token_sees_those_on_both_sides_and_the_hidden_ones_not():
    _, planner, executor = parts()
    text, _ = some_texts()
    blocks = planner.block(plans_by_hand(planner.layout)[::200][:5])
    hidden = torch.zeros_like(text, dtype=torch.bool)
    hidden[:, 1:3] = True
    changes = {}
    with torch.no_grad():
        plain = executor.logits(*blocks, text, hidden)
        for place in range(4):
            other = text.clone()
            other[:, place] = (text[:, place] - 2) % (BASE - 3) + 3
            changes[place] = (executor.logits(*blocks, other, hidden) - plain)[:, 1:3].abs().amax((0, 2))
    assert changes[0].min() > 1e-4
    assert changes[3].min() > 1e-4
    assert changes[1].max() == changes[2].max() == 0


def test_the_probabilities_of_all_texts_sum_to_one():
    """Over texts that are cut at their first end; counting the columns after it as well would lose probability."""
    _, planner, executor = parts()
    blocks, texts = planner.block(plans_by_hand(planner.layout)[[3, 300]]), all_texts(3)
    with torch.no_grad():
        nll = executor.nll_of_pairs(*blocks, texts)
        assert_close(torch.exp(-nll).sum(0), torch.ones(2).double())
        many = blocks[0][:1].expand(len(texts), -1), blocks[1][:1].expand(len(texts), -1, -1)
        by_token = executor.nll(*many, texts)
        assert_close(by_token.sum(-1), nll[:, 0])
        executor.end_ids = None
        assert torch.exp(-executor.nll(*many, texts).sum(-1)).sum() < 0.995  # the control
    ended = (texts == EOS).cumsum(-1) > 1
    assert (by_token[ended] == 0).all()
    assert (by_token[~ended] > 0).all()


@pytest.mark.parametrize("kind", ["parallel", "autoregressive"])
@pytest.mark.parametrize("planning", ["sequential", "slots"])
def test_the_probability_of_a_text_is_the_sum_over_plans(planning, kind):
    model, _, causal = concept_parts(types={"a": {"codes": 3, "most": 2, "least": 0}, "b": {"codes": 2, "most": 1}})
    planner = Planner(model, planning)
    executor = ParallelExecutor(model, EOS) if kind == "parallel" else causal
    plans, (prompt, mask) = every_plan(planner.layout), some_texts(6)
    assert len(plans) == (1 + 3 + 9) * 2
    prompt = prompt[[0, 1, 0, 2, 1, 1]]
    mask = mask.clone()
    mask[3:, 0] = False
    text = all_texts(3)[::200][:6] if kind == "parallel" else some_texts(6, 3)[0]
    text = text.clone()
    with torch.no_grad():
        found = log_prob_of_texts(planner, executor, (prompt, mask), text, plans)
        total, bounds = torch.zeros(6, dtype=torch.float64), []
        for plan in plans:
            own = plan.expand(6, -1)
            log_text = -executor.nll(*planner.block(own), text).sum(-1)
            both = log_prob(planner, prompt, mask, own) + log_text
            bounds.append(both)
            total += both.exp()
        assert_close(found.exp(), total)
        assert_close(log_priors(planner, (prompt, mask), plans).exp().sum(-1), torch.ones(6).double())
    assert (found > torch.stack(bounds).amax(0)).all()  # each plan alone is a bound
    assert every_plan(planner.layout, most=25) is None


def test_the_law_of_whole_texts_given_a_prompt_sums_to_one():
    _, planner, executor = parts()
    model = planner.model
    small = Planner(model, "slots")
    plans, texts = plans_by_hand(planner.layout), all_texts(2)
    prompt = tuple(part.expand(len(texts), -1) for part in some_texts(1))
    with torch.no_grad():
        assert_close(log_prob_of_texts(small, executor, prompt, texts, plans).exp().sum(), torch.ones(()).double())


def test_generated_texts_follow_the_law_of_one_pass():
    _, planner, executor = parts()
    ids, embeds = planner.block(plans_by_hand(planner.layout)[300:301])
    texts, many = all_texts(2), 4000
    with torch.no_grad():
        law = torch.exp(-executor.nll_of_pairs(ids, embeds, texts)).squeeze(-1)
    rows = ids.expand(many, -1), embeds.expand(many, -1, -1)
    drawn = executor.generate(*rows, 2, generator())
    colder = executor.generate(*rows, 2, generator(), temperature=0.7)

    def distance(sample):
        counts = (sample.unsqueeze(1) == texts).all(-1).sum(0)
        assert counts.sum() == many
        return (counts / many - law).abs().sum() / 2

    floor = torch.multinomial(law, many, True, generator=generator(1)).bincount(minlength=len(texts)) / many
    assert distance(drawn) < 1.5 * (floor - law).abs().sum() / 2
    assert distance(colder) > 2 * (floor - law).abs().sum() / 2  # the control


class Passes:
    """Counts the forward passes of an executor, and what each of them hides."""

    def __init__(self, executor) -> None:
        self.hidden, self.texts, self.entropies, logits = [], [], [], executor.logits

        def noted(ids, embeds, text, blank=None):
            self.hidden.append(blank)
            self.texts.append(text)
            found = logits(ids, embeds, text, blank)
            log_p = found.log_softmax(-1)
            self.entropies.append(-(log_p.exp() * log_p).sum(-1))
            return found

        executor.logits = noted


@pytest.mark.parametrize("refinements", [0, 1, 2])
def test_refinements_redraw_the_least_certain_tokens_under_the_same_plan(refinements):
    _, planner, executor = parts(refinements=refinements, redraw=0.5)
    blocks = planner.block(plans_by_hand(planner.layout)[::60])
    passes = Passes(executor)
    written = executor.generate(*blocks, 4, generator(), vocab_size=BASE)
    assert len(passes.hidden) == executor.forwards(4) == 1 + refinements
    assert passes.hidden[0].all()
    for before, hidden in zip(passes.texts[1:], passes.hidden[1:], strict=True):
        counted = (before == EOS).cumsum(-1) - (before == EOS).long() == 0
        assert hidden[~counted].all()  # a text may grow
        assert torch.equal((hidden & counted).sum(-1), (counted.sum(-1) * 0.5).ceil().long())
    # a token keeps the entropy of the pass that drew it
    doubt = torch.zeros_like(passes.entropies[0])
    for before, drawn, entropies, hidden in zip(
        passes.texts[1:], passes.hidden, passes.entropies, passes.hidden[1:], strict=False
    ):
        doubt = torch.where(drawn, entropies, doubt)
        counted = (before == EOS).cumsum(-1) - (before == EOS).long() == 0
        lowest = doubt.masked_fill(~hidden | ~counted, torch.inf).amin(-1)
        assert (lowest >= doubt.masked_fill(hidden | ~counted, -torch.inf).amax(-1)).all()
    # the tokens that were not redrawn are those of before
    if refinements == 1:
        kept = ~passes.hidden[1]
        assert torch.equal(written[kept & (written != EOS)], passes.texts[1][kept & (written != EOS)])
        assert (written != passes.texts[1])[~kept].any()


def test_a_refinement_of_sure_tokens_changes_nothing():
    """A pass in which every token is certain ends the generation; with unsure tokens another pass is made."""
    model, planner, executor = parts(refinements=2, redraw=1.0)
    blocks = planner.block(plans_by_hand(planner.layout)[::60])
    once = executor.refining(0).generate(*blocks, 4, generator(), temperature=1.0)
    with torch.no_grad():
        model.backbone.get_output_embeddings().weight.mul_(1e4)  # all probability on one token
    sure, passes = executor.refining(0).generate(*blocks, 4, generator()), Passes(executor)
    assert torch.equal(executor.generate(*blocks, 4, generator(5)), sure)
    assert len(passes.hidden) == 1
    assert not torch.equal(once, sure)


def test_the_text_after_an_end_is_filled_and_never_generated():
    _, planner, executor = parts(refinements=1)
    blocks = planner.block(plans_by_hand(planner.layout)[::20])
    seen = []
    written = executor.generate(*blocks, 5, generator(), on_tokens=seen.append)
    ended = (written == EOS).cumsum(-1) > 0
    assert ended[:, -1].any()
    assert (written[ended] == EOS).all()
    assert torch.equal(seen[-1], written)
    assert executor.generate(*blocks, 5, generator(), vocab_size=3).max() < 3


def test_the_training_loss_by_hand():
    """Rows that are hidden whole have the exact NLL; the others a bound's unbiased draw, by the number of hidden tokens."""
    _, planner, executor = parts()
    texts = torch.tensor([[4, EOS, EOS], [EOS, EOS, EOS], [5, 6, EOS], [7, 8, 9]])
    blocks = planner.block(plans_by_hand(planner.layout)[::200][[0, 1, 2, 1]])
    with torch.no_grad():
        whole = executor.training_nll(*blocks, texts, 1.0, generator())
        assert_close(whole, executor.nll(*blocks, texts).sum(-1) / 3)
        passes = Passes(executor)
        part = executor.training_nll(*blocks, texts, 0.0, generator())
        (hidden,) = passes.hidden
        counted = (texts == EOS).cumsum(-1) - (texts == EOS).long() == 0
        assert hidden[~counted].all()
        log_p = executor.logits(*blocks, texts, hidden).log_softmax(-1)
    for row in range(4):
        chosen = [place for place in range(3) if hidden[row, place] and counted[row, place]]
        nll = -sum(float(log_p[row, place, texts[row, place]]) for place in chosen)
        assert float(part[row]) == pytest.approx(nll * int(counted[row].sum()) / len(chosen) / 3)


def test_gradients_reach_the_plan_through_its_embeddings():
    _, planner, executor = parts()
    ids, embeds = planner.block(plans_by_hand(planner.layout)[::100][:6])
    text, embeds = some_texts(6)[0], embeds.detach().requires_grad_()
    executor.training_nll(ids, embeds, text, 1.0, generator()).sum().backward()
    slots = planner.layout.slot_columns
    assert (embeds.grad[:, slots].abs().amax(-1) > 0).any(0).all()
    assert (embeds.grad[ids == planner.layout.vocabulary.pad] == 0).all()  # what is no part of the plan


def test_the_executor_sees_the_plan_and_never_the_prompt():
    model, planner, executor = parts()
    text, _ = some_texts(8)
    rows = {"input_ids": torch.cat([text, text], 1), "attention_mask": torch.ones(8, 8, dtype=torch.bool)}
    plan = "a=1,2 b=0 c=2"
    fixed = parse_plan(model.vocabulary, plan)
    decoder = PlannedDecoder(planner, executor, 4, temperature=1.0, fixed=fixed, vocab_size=BASE)
    written = decoder(rows, generator(3))
    assert decoder.plans == [plan] * 8
    other = rows | {"input_ids": rows["input_ids"].flip(0)}
    assert torch.equal(decoder(other, generator(3)), written)
    free = PlannedDecoder(planner, executor, 4, plan_temperature=0.0, temperature=0.0, vocab_size=BASE)
    assert not torch.equal(
        free(rows, generator()), free(other, generator())
    )  # without a plan by hand the prompt decides


# -- plans by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planning", ["sequential", "types", "slots"])
def test_a_plan_fixed_by_hand_is_honoured_and_the_rest_is_drawn(planning):
    model, _, _ = concept_parts()
    planner, (text, mask) = Planner(model, planning), some_texts(64)
    fixed = parse_plan(model.vocabulary, "b=1 a=2")
    with torch.no_grad():
        plan = planner.draw(text, mask, sampled(generator()), fixed)
        free = planner.draw(text, mask, sampled(generator()))
    assert all(line.startswith("a=2 b=1 c=") for line in plan_texts(model.vocabulary, plan.choices))
    assert len(torch.unique(plan.choices[:, 3:], dim=0)) > 5
    assert len(torch.unique(free.choices[:, :3], dim=0)) > 3
    ids, embeds = planner.block(plan.choices)
    assert torch.equal(plan.ids, ids)
    real = ids != model.vocabulary.pad
    assert_close(plan.embeds[real], embeds[real])
    if planning == "sequential":  # what is planned later knows the fixed concepts
        known = planner.score(text, mask, plan.choices)[:, 3:]
        assert_close(plan.logits[:, 3:][plan.open_slots[:, 3:]], known[plan.open_slots[:, 3:]], rtol=1e-6, atol=1e-6)


def test_plans_are_read_as_they_are_written():
    model, planner, _ = concept_parts()
    plans = plans_by_hand(planner.layout)
    lines = plan_texts(model.vocabulary, plans)
    assert len(set(lines)) == len(plans)
    assert lines[0].startswith("a=none b=")
    for choices, line in list(zip(plans, lines, strict=True))[::120]:
        text, mask = some_texts(1)
        with torch.no_grad():
            again = planner.draw(text, mask, greedy, parse_plan(model.vocabulary, line))
        assert torch.equal(again.choices[0], choices)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ("d=1", "“d=1” names no type; the types are a, b, c"),
        ("b=2", "“b=2” must be a number from 0 to 1; type for example plan='b=0'"),
        ("b=x", "“b=x” must be a number from 0 to 1"),
        ("b=", "“b=” must be a number"),
        ("b", "“b=” must be a number"),
        ("b=-1", "“b=-1” must be a number"),
        ("b=0,1", "“b=0,1” has 2 concepts; b needs 1"),
        ("c=none", "“c=none” has 0 concepts; c needs 1 to 3"),
        ("a=1 a=2", "a is there twice"),
        ("b=0.1", "“b=0.1” must be a number"),
    ],
)
def test_mistakes_in_a_plan_are_named(plan, sentence):
    model, _, _ = concept_parts()
    with pytest.raises(UsageError, match=sentence):
        parse_plan(model.vocabulary, plan)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"executor": "both"}, "module.executor=both"),
        ({"refinements": (1,)}, r"module.refinements=\[1\] redraws tokens of the parallel executor"),
        ({"executor": "parallel", "refinements": (-1,)}, r"module.refinements=\[-1\] must be"),
        ({"executor": "parallel", "refinements": (1, 1)}, r"module.refinements=\[1, 1\] must be different"),
        ({"executor": "parallel", "refinements": ()}, r"module.refinements=\[\] must be"),
        ({"hidden_rows": (0.5, 1.5)}, r"module.hidden_rows=\[0.5, 1.5\]"),
        ({"redraw": 0.0}, "module.redraw=0.0"),
    ],
)
def test_mistakes_in_options_are_named(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        PlanOptions(**options)


def test_another_executor_redraws_nothing():
    _, _, causal = concept_parts()
    assert causal.refining(0) is causal
    with pytest.raises(UsageError, match="redraws tokens"):
        causal.refining(1)


def test_a_backbone_that_stays_causal_is_refused():
    model, _, _ = concept_parts()
    options = PlanOptions(executor="parallel")
    assert isinstance(build_executor(model, options, EOS), ParallelExecutor)
    decoder = model.backbone.get_decoder()
    read = type(decoder).forward

    def causal(*args, attention_mask=None, **more):
        return read(decoder, *args, attention_mask=None, **more)

    decoder.forward = causal
    with pytest.raises(UsageError, match="cannot be read in both directions"):
        build_executor(model, options, EOS)
