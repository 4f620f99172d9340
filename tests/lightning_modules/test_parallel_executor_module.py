"""A planner with a parallel executor: figures by hand, exact resume, searched plans, what an exported folder answers."""

import pytest
import torch
from helpers.concept import batch_of
from helpers.concept import build_planner_executor as build
from helpers.resume import assert_resumed_is_uninterrupted
from helpers.trainer import quiet_trainer

from app.trained import load_planned, trained_decoder
from callbacks.exact_likelihood import ExactLikelihood
from callbacks.frontier import FrontierReport
from models.functional.errors import UsageError
from models.plans.enumeration import every_plan
from models.plans.planner import relaxed
from models.plans.rows import posterior_input, prompt_of, response_of
from reporting.record import read_record

TYPES = {"a": {"codes": 3}, "b": {"codes": 2}, "c": {"codes": 3}}
PARALLEL = {"executor": "parallel", "types": TYPES, "quota": None, "weights": {"text": 1.0, "planner": 1.0}}


def nll_by_hand(module, plan, text, eos: int) -> list[float]:
    """Of each text: tokens up to its first end, each from the one pass over its plan and nothing but masks."""
    nothing = torch.zeros_like(text)
    log_p = module.executor.logits(plan.ids, plan.embeds, nothing).log_softmax(-1)
    found = []
    for row, words in enumerate(text.tolist()):
        length = words.index(eos) + 1 if eos in words else len(words)
        found.append(-sum(float(log_p[row, place, words[place]]) for place in range(length)))
    return found


def test_shuffled_plans_lose_what_dnll_shuffle_says(tiny_oracle):
    module = build(tiny_oracle, **PARALLEL, noise=(0.0, 1.0))
    (found,) = quiet_trainer(1).validate(module, tiny_oracle, verbose=False)
    rows, module, eos = tiny_oracle.rows["val"].columns, module.eval(), tiny_oracle.tokenizer.eos_token_id
    text = response_of(rows)
    assert (text == eos).any()
    assert not (text == eos).any(-1).all()
    with torch.no_grad():
        choose = relaxed(module.step_generator(0, stream=1, epoch=0), 0.5, 1.0)
        plan = module.planner.draw(*posterior_input(rows, "all"), choose)
        other = plan._replace(ids=plan.ids.roll(1, 0), embeds=plan.embeds.roll(1, 0))
        own, shuffled = (sum(nll_by_hand(module, p, text, eos)) / text.numel() for p in (plan, other))
    assert found["val/nll"] == pytest.approx(own, rel=1e-4)
    assert found["val/dnll_shuffle"] == pytest.approx(shuffled - own, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("search", [None, {"begin": 0.4, "candidates": 3}])
def test_resumed_is_uninterrupted(tmp_path, tiny_oracle, search):
    options = PARALLEL | {"search": search, "hidden_rows": (1.0, 0.3)}
    assert_resumed_is_uninterrupted(lambda: build(tiny_oracle, **options), tiny_oracle, tmp_path, 8)


def test_searched_plans_are_scored_by_one_pass_each(tiny_oracle):
    """S(z) = log p(x | z) + log p(z | u) of every candidate, by hand."""
    module, rows = build(tiny_oracle, **PARALLEL, search={"candidates": 3}).eval(), batch_of(tiny_oracle, 4)
    module.executor.end_ids = tiny_oracle.end_ids()
    plans = every_plan(module.model.layout)[torch.randperm(18, generator=torch.Generator().manual_seed(0))[:12]]
    plans, text = plans.view(4, 3, 3), response_of(rows)
    with torch.no_grad():
        found = module.em.search.scores(prompt_of(rows), text, plans)
        for k in range(3):
            plan = module.planner.certain(plans[:, k])
            nll = torch.tensor(nll_by_hand(module, plan, text, tiny_oracle.tokenizer.eos_token_id))
            log_p = module.planner.score(*prompt_of(rows), plans[:, k]).log_softmax(-1)
            own = log_p.gather(-1, plans[:, k].unsqueeze(-1)).sum((1, 2))
            torch.testing.assert_close(found[:, k], own - nll, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_plan_is_learned_and_all_words_are_written_from_it_at_once(tiny_oracle):
    """Four texts: each is written again in one forward pass, and another text's plan is much worse."""
    rows = tiny_oracle.rows["train"].columns
    few = {name: column[torch.arange(64) % 4] for name, column in rows.items()}
    for split in ("train", "val"):
        tiny_oracle.rows[split].columns = few
    types, weights = {"a": {"codes": 4}, "b": {"codes": 4}}, {"text": 1.0, "bag": 1.0, "usage": 1.0}
    options = {"types": types, "weights": weights, "lr": 1e-2, "warmup_steps": 5, "hidden_rows": (1.0, 0.5)}
    module, trainer = build(tiny_oracle, **(PARALLEL | options)), quiet_trainer(150)
    trainer.fit(module, tiny_oracle)
    (found,) = trainer.validate(module, tiny_oracle, verbose=False)
    assert found["val/reconstruction"] == 1
    assert found["val/dnll_shuffle"] > 0.3


def test_the_record_has_the_exact_likelihood_and_a_row_for_every_number_of_passes(tmp_path, tiny_oracle):
    module = build(tiny_oracle, **PARALLEL, refinements=(0, 1), planning={"prior": "slots"})
    report = FrontierReport(tmp_path, "plans", {})
    quiet_trainer(1, callbacks=[ExactLikelihood(16), report]).test(module, tiny_oracle, verbose=False)
    rows = {row["decoder"]: row for row in read_record(tmp_path / "record.json")["rows"]}
    assert rows["plan sampled, text sampled"]["nfe"] == 2
    assert rows["plan greedy, text greedy, 1 refinement"]["nfe"] == 3
    figures = rows["ConceptPlannerExecutorModule"]["quality"]
    assert figures["nll_exact"] < figures["nll_exact_bound"]
    few = {name: column[:16] for name, column in tiny_oracle.rows["test"].columns.items()}
    module, plans = module.eval(), every_plan(module.model.layout)
    text = response_of(few)
    total = torch.zeros(16, dtype=torch.float64)
    with torch.no_grad():
        for choices in plans:
            plan = module.planner.certain(choices.expand(16, -1))
            log_p = module.planner.score(*prompt_of(few), plan.choices).log_softmax(-1)
            own = log_p.gather(-1, plan.choices.unsqueeze(-1)).sum((1, 2))
            nll = torch.tensor(nll_by_hand(module, plan, text, tiny_oracle.tokenizer.eos_token_id))
            total += (own - nll).double().exp()
    assert figures["nll_exact"] == pytest.approx(float(-total.log().sum()) / text.numel(), rel=1e-4)


def test_the_record_has_the_any_order_bound_of_the_texts(tmp_path, tiny_oracle):
    """By hand with the same draws; validations do not measure it, and the autoregressive executor has none."""
    module = build(tiny_oracle, **PARALLEL, sampler="ema_vq", planning={"prior": "slots", "posterior": "slots"})
    quiet_trainer(1, callbacks=[FrontierReport(tmp_path, "plans", {})]).test(module, tiny_oracle, verbose=False)
    (found,) = quiet_trainer(1).validate(module, tiny_oracle, verbose=False)
    assert "val/nll_any_order" not in found
    figures = {row["decoder"]: row for row in read_record(tmp_path / "record.json")["rows"]}[type(module).__name__][
        "quality"
    ]
    module, total, tokens = module.eval(), 0.0, 0
    for number, batch in enumerate(tiny_oracle.test_dataloader()):
        plan, text = module.source.most_probable(batch), response_of(batch)
        with torch.no_grad():
            draws = module.step_generator(number, stream=1, epoch=0)
            total += float(module.executor.training_nll(plan.ids, plan.embeds, text, 0.0, draws).sum()) * text.shape[1]
        tokens += text.numel()
    assert figures["nll_any_order"] == pytest.approx(total / tokens, rel=1e-5)
    assert figures["nll_any_order"] != pytest.approx(figures["nll_given_plan"], rel=1e-3)
    causal = build(tiny_oracle, types=TYPES, quota=None, weights={"text": 1.0, "planner": 1.0})
    quiet_trainer(1, callbacks=[FrontierReport(tmp_path, "plans", {})]).test(causal, tiny_oracle, verbose=False)
    figures = {row["decoder"]: row for row in read_record(tmp_path / "record.json")["rows"]}[type(module).__name__][
        "quality"
    ]
    assert "nll_any_order" not in figures


def test_an_exported_folder_answers_as_what_was_trained(tmp_path, tiny_oracle):
    module = build(tiny_oracle, **PARALLEL, refinements=(0, 2), planning={"prior": "slots"})
    quiet_trainer(2).fit(module, tiny_oracle)
    folder = module.export(tmp_path / "model", tiny_oracle.tokenizer)
    rows, module = batch_of(tiny_oracle, 8, "test"), module.eval()
    device = torch.device("cpu")

    def answer(decoder):
        return decoder(rows, torch.Generator().manual_seed(3))

    read = trained_decoder(folder, tiny_oracle, 1.0, device)
    assert read.forwards == 4
    assert torch.equal(answer(read), answer(module.decoders()[-1]))
    assert trained_decoder(folder, tiny_oracle, 1.0, device, forwards=2).forwards == 2
    with pytest.raises(UsageError, match="forwards=1 must be at least 2"):
        trained_decoder(folder, tiny_oracle, 1.0, device, forwards=1)
    causal = build(tiny_oracle).export(tmp_path / "causal", tiny_oracle.tokenizer)
    with pytest.raises(UsageError, match="forwards=2: this executor writes token after token"):
        trained_decoder(causal, tiny_oracle, 1.0, device, forwards=2)
    fixed = trained_decoder(folder, tiny_oracle, 1.0, device, plan="b=1 c=0")
    answer(fixed)
    assert all(plan.endswith("b=1 c=0") for plan in fixed.plans)
    assert len(set(fixed.plans)) > 1
    text = response_of(rows)
    blocks = module.planner.block(every_plan(module.model.layout)[:8])
    with torch.no_grad():  # the folder knows where texts end
        torch.testing.assert_close(load_planned(folder).executor.nll(*blocks, text), module.executor.nll(*blocks, text))


@torch.no_grad()
def test_texts_told_what_the_corpus_knows_by_hand(tiny_oracle):
    """The true plan of a text has, of each matched type, the code that texts with its attribute's value have most often."""
    module, rows = build(tiny_oracle, **PARALLEL).eval(), batch_of(tiny_oracle, 64, "test")
    module.executor.end_ids, module.probe.tokenizer = tiny_oracle.end_ids(), tiny_oracle.tokenizer
    attributes = tiny_oracle.attributes_of(rows)
    generator = torch.Generator().manual_seed(0)
    # codes that say the attributes of all texts but a few: type a says the second attribute, b the first, c the third
    choices = 1 + attributes[:, [1, 0, 2]] % torch.tensor([3, 2, 3])
    wrong = torch.rand(choices.shape, generator=generator) < 0.1
    noisy = torch.where(wrong, 1 + torch.randint(0, 2, choices.shape, generator=generator), choices)
    assert not torch.equal(noisy, choices)
    batch = module.probe.probe_batch(rows, generator).under({"choices": noisy, "seen": torch.ones_like(noisy).bool()})
    told = module.probe.given_attributes(batch, attributes)["choices"]
    for kind, attribute in ((0, 1), (1, 0), (2, 2)):
        for value in attributes[:, attribute].unique():
            own = attributes[:, attribute] == value
            assert (told[own, kind] == noisy[own, kind].mode().values).all()
    assert (told == choices).double().mean() > (noisy == choices).double().mean()
    figures = ExactLikelihood(64)
    figures.attributes_of = tiny_oracle.attributes_of
    module.probe.probe_batch = lambda *_: batch
    found = figures.measure(module.probe, rows, generator)
    text, eos = batch.text, tiny_oracle.tokenizer.eos_token_id
    for name, own in (("nll_own_plan", noisy), ("nll_true_plan", told)):
        nll = nll_by_hand(module, module.planner.certain(own), text, eos)
        assert found[name] == pytest.approx(sum(nll) / text.numel(), rel=1e-4)
    log_p = module.planner.score(*prompt_of(rows), noisy).log_softmax(-1).gather(-1, noisy.unsqueeze(-1)).sum()
    expected = found["nll_own_plan"] - float(log_p) / text.numel()
    assert found["nll_exact_bound"] == pytest.approx(expected, rel=1e-4)
    assert found["nll_exact"] < found["nll_exact_bound"]
