"""The figures of a router by hand."""

import torch
from helpers.online import HALF, texts, tiny_online
from torch.testing import assert_close

from models.online.cost import flops_share
from models.online.decoder import IncrementalForward
from models.online.router import LEAST_SPREAD, Router, Routing
from models.online.row_cache import held_bytes


def test_the_share_of_commits_is_one_of_valid_positions():
    valid = torch.tensor([[False, True, True, True, True]])
    commit = torch.tensor([[False, True, False, False, False]])
    nothing = torch.zeros(3)
    assert Routing(commit, commit.float(), valid, nothing, 1.0).realised == 0.25
    assert Routing(commit & False, commit.float(), valid & False, nothing, 1.0).realised == 0


def test_the_spread_of_scores_is_their_standard_deviation_and_never_0():
    scores = 3 + 2 * torch.randn(50, dtype=torch.float64)
    for own, expected in ((scores, scores.std(correction=0)), (torch.ones(5).double(), torch.tensor(LEAST_SPREAD))):
        moments = torch.stack([torch.tensor(float(len(own))).double(), own.sum(), own.square().sum()])
        assert_close(Router.spread(None, moments), expected.double())


def test_a_draft_is_made_at_each_commit_and_ends_with_the_first_token_it_did_not_expect():
    """Position by position: the draft in force is that of the last commit, whatever lies between."""
    model, ids = tiny_online(growth="draft", draft_tokens=3, most_nulls=5), texts(rows=4, length=40)
    router = model.stack.router
    with torch.no_grad():
        level = model.read(ids, settings=HALF)[1][0]
        threshold = float(router.offset)  # the bias at compression 2 is 0
        ends = set()
        for row, hidden, found in zip(ids, level.hidden, level.routing.commit.tolist(), strict=True):
            last, wanted = None, []
            for t, token in enumerate(row.tolist()):
                if last is None or t - last > 3:
                    commits = True  # nothing is drafted for it
                else:
                    logp = router.draft(hidden[last], torch.tensor(t - last)).log_softmax(-1)
                    commits = -float(logp[token]) > threshold
                    ends.add(commits)
                wanted.append(commits)
                last = t if commits else last
            assert found == wanted
        assert ends == {True, False}
        # control: drafts that are made anew at every position are others
        anew = router.draft(level.hidden[:, :-1], torch.ones_like(ids[:, 1:])).log_softmax(-1)
        anew = -anew.gather(-1, ids[:, 1:, None]).squeeze(-1) > threshold
        assert not torch.equal(anew, level.routing.commit[:, 1:])


def test_whole_states_are_those_of_the_plain_model():
    """Of every layer over every position; the concepts' layers are read beside them."""
    model, ids = tiny_online(router_reads="whole"), texts(rows=2, length=9)
    plain = model.backbone.get_decoder()(input_ids=ids).last_hidden_state
    level = model.read(ids, settings=HALF)[1][0]
    assert_close(model.backbone.get_decoder().norm(level.hidden), plain, atol=1e-12, rtol=1e-12)
    shallow = tiny_online().read(ids, settings=HALF)[1][0]
    assert (shallow.hidden - level.hidden).abs().max() > 0.1  # control
    assert flops_share(model, 4.0) > 1 > flops_share(tiny_online(), 1e9)
    # steps keep every position of these layers as well: 9 in 3 layers, keys and values of two heads of width 4
    forward = IncrementalForward(model)
    forward.prefill(ids)
    assert held_bytes([forward.state.rest]) == 2 * 9 * 3 * 2 * 2 * 4 * 8
    assert forward.state.rest in forward.state.caches()


def test_the_decision_of_the_whole_model_trains_its_layers():
    """With gate `slot` the text's loss reaches the layers that the router reads, but not those of a surprise."""
    for growth, reached in (("null", True), ("entropy", False)):
        model, ids = tiny_online(router_reads="whole", growth=growth).train(), texts()
        level = model.read(ids, settings=HALF)[1][0]
        level.hidden.retain_grad()
        probability = level.routing.probability.sum()
        assert probability.requires_grad == reached
        if reached:
            probability.backward()
            assert level.hidden.grad.abs().max() > 0


def test_a_state_s_parts_are_apart():
    """Writing one of them for some rows leaves the others as they are."""
    state = Router(4, 3).start(2, torch.device("cpu"), torch.float32)
    for name in ("since", "total", "position"):
        fresh = Router(4, 3).start(2, torch.device("cpu"), torch.float32)
        getattr(fresh, name)[0] = 5
        for other in ("since", "total", "position"):
            assert (getattr(fresh, other) == getattr(state, other)).all() == (other != name)
