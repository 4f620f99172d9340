"""Cached plans: by hand, the same on any number of ranks and after resuming, and what the steps of hard EM train."""

import pytest
import torch
from helpers.concept import batch_of
from helpers.concept import build_planner_executor as build
from helpers.trainer import Losses, quiet_trainer
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from models.functional.errors import UsageError
from models.functional.rows import response_columns
from models.plans.cache import PlanCache, Refresh
from models.plans.hard_em import HardEM
from models.plans.planner import Planner
from models.plans.search import Found

FIXED = {"a": {"codes": 3}, "b": {"codes": 4}}
VQ = {"types": FIXED, "sampler": "ema_vq", "planning": {"posterior": "slots"}, "quota": None}
EM = {"begin": 0.5, "candidates": 3, "explore": 0.34, "interval": 6}
WEIGHTS = {"text": 1.0, "planner": 1.0, "posterior": 1.0, "usage": (1.0, 0.0)}


def searching(data, **options):
    return build(data, **({"weights": WEIGHTS, "search": EM} | VQ | options))


def test_a_cache_by_hand():
    cache, rows = PlanCache(5, 2, Refresh(interval=10)), torch.tensor([3, 1])
    assert cache.due(rows, 0).all()
    assert not cache.known(rows).any()
    cache.put(rows, torch.tensor([[1, 2], [3, 4]]), torch.tensor([-1.0, -2.0]), 7)
    assert cache.get(torch.tensor([1, 3])).tolist() == [[3, 4], [1, 2]]
    assert cache.known(torch.arange(5)).tolist() == [False, True, False, True, False]
    assert cache.due(rows, 16).tolist() == [False, False]
    assert cache.due(rows, 17).tolist() == [True, True]
    assert cache.due(torch.tensor([0, 1]), 8).tolist() == [True, False]


def test_the_interval_follows_staleness():
    cache, step = PlanCache(1, 1, Refresh(interval=100, tolerance=1.0, least=40)), 0
    for gaps, expected in (([2.0, 4.0, torch.nan], 50), ([torch.nan], 50), ([0.7], 50), ([0.0], 75), ([9.0], 40)):
        step += 100
        cache.adapt(torch.tensor(gaps), step)
        assert cache.interval == expected
    for gap in (0.0, 9.0, 0.0):  # within one interval nothing changes, and all of it counts at its end
        cache.adapt(torch.tensor([gap]), step + 1)
    assert cache.interval == 40
    cache.adapt(torch.tensor([torch.nan]), step + 40)
    assert cache.interval == 40  # a mean of 3 is above the tolerance, and 40 the least
    assert cache.gaps.tolist() == [0.0, 0.0]


def test_a_few_stale_rows_do_not_decide():
    cache = PlanCache(1000, 1, Refresh(interval=100, tolerance=1.0, enough=8))
    cache.adapt(torch.tensor([9.0, torch.nan]), 100)  # one row of a thousand came round
    assert cache.interval == 100
    cache.adapt(torch.tensor([0.5] * 6), 101)  # seven, whose mean is above the tolerance
    assert cache.interval == 100
    cache.adapt(torch.tensor([0.0, 0.0]), 102)  # nine, of 1.33 nats on average
    assert (cache.interval, cache.adapted, cache.gaps.tolist()) == (50, 102, [0.0, 0.0])
    cache.adapt(torch.full((50,), 9.0), 103)  # enough rows, within the interval
    assert cache.interval == 50


class ByHand:
    """A search whose answer is a function of the text alone."""

    def __init__(self, prior) -> None:
        self.prior = prior

    def __call__(self, prompt, posterior_input, text, previous, known, generator, extra_score) -> Found:
        choices = torch.stack([1 + text.sum(-1) % 3, 1 + text[:, 0] % 4], -1)
        gaps = torch.where(known, text[:, 0].float(), torch.nan)
        return Found(choices, -text.sum(-1).float(), text[:, 1].float(), gaps, gaps)


def test_ranks_keep_what_one_rank_keeps(tiny_oracle):
    """Every rank has the whole cache; with the rows of one batch shared out it is the same."""
    prior = Planner(searching(tiny_oracle).model)

    def fresh() -> HardEM:
        em = HardEM(ByHand(prior), begin=0.0, end=1.0, interval=4, tolerance=0.5)
        em.prepare(64)
        return em

    def visit(em, rows, step, gather):
        columns = {name: column[rows] for name, column in tiny_oracle.rows["train"].columns.items()}
        text, read = columns["input_ids"][:, -6:], (columns["input_ids"], columns["attention_mask"])
        return em.plans(rows, read, read, text, step, torch.Generator(), gather)

    whole, ranks = fresh(), [fresh(), fresh()]
    for step, rows in enumerate(
        (torch.arange(8), torch.arange(4, 12), torch.arange(8), torch.arange(3, 11), torch.arange(8))
    ):
        chosen, _, figures = visit(whole, rows, step, lambda own: own.unsqueeze(0))
        shares = [rows[rank::2] for rank in range(2)]
        sent = []
        for em, share in zip(ranks, shares, strict=True):
            before, own = em.cache.state_dict(), []
            before = {name: value.clone() if torch.is_tensor(value) else value for name, value in before.items()}
            visit(em, share, step, lambda x, own=own: own.append(x) or x.unsqueeze(0))
            em.cache.load_state_dict(before)
            sent.append(own)
        for rank, (em, share) in enumerate(zip(ranks, shares, strict=True)):
            parts = iter(zip(*sent, strict=True))
            own, _, own_figures = visit(em, share, step, lambda _, parts=parts: torch.stack(next(parts)))
            assert torch.equal(own, chosen[rank::2])
            assert own_figures == pytest.approx(figures)
            for mine, all_of_it in zip(em.cache.state_dict().values(), whole.cache.state_dict().values(), strict=True):
                assert torch.equal(torch.as_tensor(mine), torch.as_tensor(all_of_it))
    assert whole.cache.known(torch.arange(12)).all()
    assert not whole.cache.known(torch.arange(12, 64)).any()


class Searches(Callback):
    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        found = trainer.callback_metrics.get("monitor/searched")
        self.seen.append(None if found is None else float(found))


def test_resumed_in_the_midst_of_searching_is_uninterrupted(tmp_path, tiny_oracle):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=14, save_top_k=-1)
    whole, first, second = searching(tiny_oracle), Losses(), Losses()
    quiet_trainer(20, callbacks=[keep, first], enable_checkpointing=True).fit(whole, tiny_oracle)
    resumed = searching(tiny_oracle)
    path = tmp_path / "step=14.ckpt"
    quiet_trainer(20, callbacks=[second]).fit(resumed, tiny_oracle, ckpt_path=path, weights_only=True)
    assert second.seen == first.seen[14:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert resumed.em.seconds["step"] > torch.load(path, weights_only=True)["concepts_found"]["seconds"]["step"] > 0
    for kept, again in zip(whole.em.cache.state_dict().values(), resumed.em.cache.state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(kept), torch.as_tensor(again))
    assert torch.load(path, weights_only=True)["concepts_found"]["found"].max() > 0


@pytest.mark.filterwarnings("ignore:the run took 8 rows a step and now takes 16")
def test_kept_plans_survive_another_batch_size(tmp_path, tiny_oracle):
    """The same rows, cut into other batches: nobody is searched before the time has come."""
    options = {"search": EM | {"interval": 100}}
    keep, seen = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16, save_top_k=-1), Searches()
    first = searching(tiny_oracle, **options)
    quiet_trainer(16, callbacks=[keep, seen], enable_checkpointing=True, log_every_n_steps=1).fit(first, tiny_oracle)
    assert seen.seen == [None] * 8 + [1.0] * 8
    tiny_oracle.batch_size = 16
    second, again = searching(tiny_oracle, **options), Searches()
    path = tmp_path / "step=16.ckpt"
    quiet_trainer(20, callbacks=[again], log_every_n_steps=1).fit(
        second, tiny_oracle, ckpt_path=path, weights_only=True
    )
    assert again.seen == [0.0] * 4
    assert torch.equal(first.em.cache.choices, second.em.cache.choices)
    other = searching(tiny_oracle, **options)
    tiny_oracle.rows["train"].columns = {k: v[:32] for k, v in tiny_oracle.rows["train"].columns.items()}
    with pytest.raises(UsageError, match=r"the checkpoint keeps plans of 64 training rows, data\.train has 32"):
        quiet_trainer(20).fit(other, tiny_oracle, ckpt_path=path, weights_only=True)


def test_plans_are_searched_again_in_time_and_what_that_costs_is_known(tiny_oracle):
    module, seen = searching(tiny_oracle, search=EM | {"begin": 0.0, "interval": 8, "tolerance": 1e9}), Searches()
    module.em.refresh.most = 8
    quiet_trainer(24, callbacks=[seen], log_every_n_steps=1).fit(module, tiny_oracle)
    assert len(seen.seen) == 24
    assert seen.seen[:8] == [1.0] * 8
    assert 0 < sum(seen.seen[8:]) <= 16  # a row met again before eight steps are over keeps its plan
    assert 0 < module.em.share < 1


def prepared(data):
    """A module that is ready to search, and a batch for it."""
    module = searching(data)
    module.em.prepare(64)
    for space in module.model.quantiser.spaces:  # codes at one point would make all plans equally probable
        torch.nn.init.normal_(space.codes, generator=torch.Generator().manual_seed(0))
    module.all_gather, module.trainer = (lambda own: own), quiet_trainer(1)
    return module, batch_of(data) | {"row": torch.arange(8)}


def losses_of_em(module, batch) -> dict[str, torch.Tensor]:
    """The losses of the plans in a step of hard EM."""
    return module._searched_plan(batch, module.final_values(), torch.Generator().manual_seed(0))[1]


def test_a_step_of_em_trains_prior_and_posterior_on_the_same_plan(tiny_oracle):
    """Each gets a gradient from its own loss alone, and codes stay where they are."""
    module, batch = prepared(tiny_oracle)
    codes = [space.codes.clone() for space in module.model.quantiser.spaces]
    raw = losses_of_em(module, batch)
    heads = {"planner": module.model.new_head.weight, "posterior": module.model.quantiser.spaces[0].to_point.weight}
    for name, own in heads.items():
        for other, weight in heads.items():
            (slope,) = torch.autograd.grad(raw[name], weight, retain_graph=True, allow_unused=True)
            assert (slope is not None and slope.abs().sum() > 0) == (name == other), (name, other)
        assert own.requires_grad
    for before, space in zip(codes, module.model.quantiser.spaces, strict=True):
        assert torch.equal(before, space.codes)


def test_a_step_of_em_trains_the_prior_on_the_prompt_alone(tiny_oracle):
    """The plans are cached: other responses change the posterior's loss and nothing that the prior reads."""
    module, batch = prepared(tiny_oracle)
    module.em.cache.put(batch["row"], torch.ones(8, 2, dtype=torch.long), torch.zeros(8), 0)
    ids, length = batch["input_ids"].clone(), response_columns(batch["response_mask"])
    ids[:, -length:] = ids[:, -length:].roll(1, 0)
    raw, other = (losses_of_em(module, rows) for rows in (batch, batch | {"input_ids": ids}))
    assert raw["planner"] == other["planner"]
    assert raw["posterior"] != other["posterior"]


def test_a_search_scores_plans_under_the_prior_of_the_prompt_alone(tiny_oracle):
    module, batch = prepared(tiny_oracle)
    search, calls = module.em.search, []
    module.em.search = lambda *arguments: calls.append(arguments) or search(*arguments)
    losses_of_em(module, batch)
    (prompt, posterior_input, text, *_), length = calls[0], response_columns(batch["response_mask"])
    assert torch.equal(prompt[0], batch["input_ids"][:, :-length])
    assert torch.equal(posterior_input[0], batch["input_ids"])
    assert torch.equal(text, batch["input_ids"][:, -length:])


@pytest.mark.parametrize("old", [torch.int16, torch.int32])
def test_large_codes_are_cached_as_they_are(old):
    """Also after a checkpoint that holds 16 bits."""
    cache, row = PlanCache(1, 1, Refresh()), torch.tensor([0])
    cache.load_state_dict(cache.state_dict() | {"choices": torch.tensor([[7]], dtype=old)})
    assert cache.get(row).tolist() == [[7]]
    cache.put(row, torch.tensor([[40_000]]), torch.zeros(1), 0)
    assert cache.get(row).tolist() == [[40_000]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"search": {"beam": 3}}, r"module\.search\.beam is not known; the options are begin, end"),
        ({"search": {"begin": 0.9, "end": 0.5}}, r"module\.search\.begin=0\.9 and end=0\.5"),
        ({"search": {"candidates": 0}}, r"module\.search needs candidates"),
        ({"sampler": "vq"}, r"module\.sampler=vq is not known; type one of gumbel_st, fsq, ema_vq"),
        ({"types": {"a": {"codes": 4, "least": 0}}}, r"module\.sampler=ema_vq has no code for an end"),
        ({"posterior_reads": "prompt"}, r"module\.posterior_reads=prompt is not known; type one of text, all"),
    ],
)
def test_mistakes_get_a_sentence(tiny_oracle, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        searching(tiny_oracle, **options)
