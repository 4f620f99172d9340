"""The classes of different methods fit the protocols that they meet in: the same methods with the same parameters."""

import inspect

import pytest
from helpers.causal import tiny_causal
from helpers.concept import concept_parts

from models.interfaces.executor import Executor
from models.interfaces.scores import CachedRows, Drafter, Scores
from models.plans.parallel_executor import ParallelExecutor
from models.speculative.cached_scores import CachedScores
from models.speculative.ngram import NgramScores
from models.speculative.scores import CausalScores

EXECUTOR = ["forwards", "refining", "logits", "nll", "nll_of_pairs", "training_nll", "generate"]
METHODS = {Scores: ["__call__"], CachedRows: ["keep_rows"], Executor: EXECUTOR}


def assert_fits(part, protocol) -> None:
    """`isinstance` sees that the methods are there; parameters are compared by name, kind and default."""
    assert isinstance(part, protocol)
    for name in METHODS[protocol]:
        wanted, found = (inspect.signature(getattr(kind, name)).parameters.values() for kind in (protocol, type(part)))
        assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted], name


@pytest.mark.parametrize("kind", [CausalScores, CachedScores])
def test_scores_of_a_causal_model(kind):
    assert_fits(kind(tiny_causal()), Scores)


def test_an_n_gram_table_is_a_drafter_without_a_state():
    assert_fits(NgramScores(11), Drafter)
    assert not isinstance(NgramScores(11), CachedRows)


def test_cached_scores_follow_their_rows():
    assert_fits(CachedScores(tiny_causal()), CachedRows)


def test_the_executor_of_plans():
    model, planner, executor = concept_parts()
    assert_fits(executor, Executor)
    assert_fits(ParallelExecutor(model), Executor)
    assert not isinstance(planner, Executor)
