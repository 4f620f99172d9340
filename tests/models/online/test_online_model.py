"""The parallel form is the slow one: logits, gradients, warm start, causality, padding."""

from typing import get_args

import pytest
import torch
from helpers.causal import tiny_causal
from helpers.online import HALF, in_float64, naive_logits, padded, ragged, texts, tiny_online
from torch import Tensor

from models.backbones.causal_lm import with_adapters
from models.functional import commit_gates
from models.functional.errors import UsageError
from models.online.concept_stack import CompressionSettings
from models.online.growth import GROWTH
from models.online.layer_stack import nested_split
from models.online.model import OnlineConceptModel
from models.online.options import Gate

# ways of growth, and states that they read
WAYS = [*((growth, "shallow") for growth in GROWTH), *((growth, "whole") for growth in ("null", "entropy", "draft"))]
NESTED = ([1, [1, 1, 1], 1], {})


def commits_of(model, ids, settings=HALF):
    return model.read(ids, settings=settings)[1][0].routing.commit


@pytest.mark.parametrize(("growth", "reads"), WAYS)
def test_one_forward_is_one_forward_a_position(growth, reads):
    model, ids = tiny_online(growth=growth, gate="none", router_reads=reads), texts()
    logits = model.logits(model.read(ids, settings=HALF)[0])
    slow = torch.stack([naive_logits(model, row, HALF) for row in ids])
    assert 0.2 < commits_of(model, ids).double().mean() < 0.9  # both kinds of positions are there
    torch.testing.assert_close(logits, slow, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("growth", GROWTH)
def test_the_first_position_of_every_text_commits_if_asked(growth):
    """Also behind padding and in later documents of a row; the other form of the forward pass agrees."""
    model, ids = tiny_online(growth=growth, gate="none", commit_first=True), texts()
    with torch.no_grad():
        logits = model.logits(model.read(ids, settings=HALF)[0])
        slow = torch.stack([naive_logits(model, row, HALF) for row in ids])
        torch.testing.assert_close(logits, slow, atol=1e-12, rtol=1e-12)
        part, valid = padded(ragged(), left=True)
        documents = (torch.arange(ids.shape[1]) >= 6).long().expand_as(ids)
        behind = model.read(part, valid, settings=HALF)[1][0].routing
        apart = model.read(ids, settings=HALF, documents=documents)[1][0].routing
    assert commits_of(model, ids)[:, 0].all()
    assert behind.commit[valid & (valid.cumsum(1) == 1)].all()
    assert apart.commit[:, [0, 6]].all()
    assert not apart.commit.all()
    assert (apart.probability[:, [0, 6]] == 1).all()


@pytest.mark.parametrize("gate", get_args(Gate))
def test_every_gate_takes_a_first_position_that_commits_in_any_case(gate):
    model, ids = tiny_online(growth="null", gate=gate, commit_first=True), texts()
    model.train()
    states, levels = model.read(ids, settings=HALF)
    assert levels[0].routing.commit[:, 0].all()
    model.logits(states).square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert (levels[0].routing.probability[:, 0] == 1).all()


def test_a_forced_commit_leaves_nothing_for_the_sum_of_the_next_position():
    """Continuous integrate-and-fire: the first position counts as one whole, not as nearly one."""
    model = tiny_online(growth="accumulate", gate="none", commit_first=True)
    with torch.no_grad():
        for weight in model.stack.router.parameters():
            weight.zero_()  # every other position has one half
    assert commits_of(model, texts())[:, :5].int().tolist() == [[1, 0, 1, 0, 1]] * 3


def test_without_being_asked_a_first_position_can_be_a_null():
    model = tiny_online(growth="fixed", gate="none")
    assert not commits_of(model, texts())[:, 0].any()


@pytest.mark.parametrize("options", [{"carry": False}, {"pool": False}, {"carry": False, "pool": False}])
def test_without_pool_or_carry_it_is_one_forward_a_position_too(options):
    """Each of them changes the logits, and neither does while its weights are 0, as they start."""
    model, ids = tiny_online(growth="null", gate="none", **options), texts()
    logits = model.logits(model.read(ids, settings=HALF)[0])
    slow = torch.stack([naive_logits(model, row, HALF) for row in ids])
    torch.testing.assert_close(logits, slow, atol=1e-12, rtol=1e-12)
    whole = tiny_online(growth="null", gate="none")
    missing, unknown = whole.load_state_dict(model.state_dict(), strict=False)
    assert (sorted(missing), unknown) == (sorted(f"stack.{part}.weight" for part in options), [])
    assert (whole.logits(whole.read(ids, settings=HALF)[0]) - logits).abs().max() > 1e-3
    for part in options:
        torch.nn.init.zeros_(getattr(whole.stack, part).weight)
    torch.testing.assert_close(whole.logits(whole.read(ids, settings=HALF)[0]), logits, atol=0, rtol=0)


@pytest.mark.parametrize(("split", "architecture"), [((1, 2, 1), "qwen3"), ((1, [1, 1, 1], 1), "llama")])
def test_gradients_are_those_of_one_forward_a_position(split, architecture):
    """A middle that is split again is the same thing inside of itself."""
    model, ids = tiny_online(split, architecture=architecture, gate="none", growth="autoregressive"), texts()
    mix = torch.randn(*ids.shape, 13, dtype=torch.float64)
    grads = []
    for logits in (
        model.logits(model.read(ids, settings=HALF)[0]),
        torch.stack([naive_logits(model, row, HALF) for row in ids]),
    ):
        model.zero_grad()
        (logits * mix).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert {"stack.bridge.weight", "stack.codes.embedding.weight", "stack.codes.head.weight"} <= grads[0].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-10, rtol=1e-10, msg=name)


def test_a_tail_that_sees_dropped_positions_is_seen_by_the_oracle():
    """Negative control: a deep stack that is merely causal gives something else."""
    model, ids = tiny_online(growth="fixed", gate="none"), texts()
    right = model.logits(model.read(ids, settings=HALF)[0])
    run = model.stack.deep.run
    model.stack.deep.run = lambda states, positions, mask, cache=None: run(states, positions, None, cache)
    wrong = model.logits(model.read(ids, settings=HALF)[0])
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("levels", [1, 2])
def test_without_compression_it_is_the_backbone(architecture, levels):
    split = [1, 3, 1]
    model, ids = tiny_online(split, architecture=architecture, levels=levels), texts()
    every = CompressionSettings(compression=1.0, quantisation=0.0)
    ours = model.logits(model.read(ids, settings=every)[0])
    assert torch.equal(ours, model.backbone(input_ids=ids, use_cache=False).logits)
    part, valid = padded(ragged(), left=True)
    theirs = model.backbone(
        input_ids=part, attention_mask=valid.long(), position_ids=(valid.cumsum(1) - 1).clamp(min=0), use_cache=False
    ).logits
    ours = model.logits(model.read(part, valid, settings=every)[0])
    torch.testing.assert_close(ours[valid], theirs[valid], atol=1e-12, rtol=1e-12)
    assert not torch.equal(model.logits(model.read(ids, settings=HALF)[0]), model.backbone(input_ids=ids).logits)


def test_every_gate_leaves_a_sure_choice_as_it_is():
    ids, every = texts(), CompressionSettings(compression=1.0, quantisation=0.0)
    for gate in get_args(Gate):
        model = tiny_online(gate=gate)
        assert torch.equal(model.logits(model.read(ids, settings=every)[0]), model.backbone(input_ids=ids).logits)


@pytest.mark.parametrize("gate", ["slot", "smooth", "mass", "visibility"])
@pytest.mark.parametrize(("growth", "reads"), WAYS)
def test_nothing_looks_ahead(growth, reads, gate):
    """Neither a value nor a gradient: changing a token changes nothing before it."""
    model, ids = tiny_online(growth=growth, gate=gate, router_reads=reads), texts(rows=1)
    model.train()
    states, levels = model.read(ids, settings=HALF)
    for t in (4, 8):
        other = ids.clone()
        other[:, t] = 3 + (other[:, t] - 2) % 10
        changed, again = model.read(other, settings=HALF)
        torch.testing.assert_close(changed[:, :t], states[:, :t], atol=1e-12, rtol=1e-12)
        assert torch.equal(again[0].routing.commit[:, :t], levels[0].routing.commit[:, :t])
        assert (changed[:, t] - states[:, t]).abs().max() > 1e-4  # the change is seen where it is
    embeds = model.backbone.get_input_embeddings()(ids).detach().requires_grad_()
    out, _ = model.stack.read(embeds, torch.arange(11)[None], torch.ones_like(ids, dtype=torch.bool), HALF, tokens=ids)
    (grad,) = torch.autograd.grad(out[0, 5].sum(), embeds)
    assert grad[0, :6].abs().amax(-1).min() > 0
    assert grad[0, 6:].abs().max() == 0


@pytest.mark.parametrize(("growth", "reads"), WAYS)
@pytest.mark.parametrize("left", [True, False])
def test_padding_moves_nothing(growth, reads, left):
    model, rows = tiny_online(growth=growth, router_reads=reads), ragged()
    ids, valid = padded(rows, left)
    states, levels = model.read(ids, valid, settings=HALF)
    for k, row in enumerate(rows):
        alone, level = model.read(row[None], settings=HALF)
        torch.testing.assert_close(states[k, valid[k]], alone[0], atol=1e-12, rtol=1e-12)
        assert torch.equal(levels[0].routing.commit[k, valid[k]], level[0].routing.commit[0])
    assert not levels[0].routing.commit[~valid].any()


@pytest.mark.parametrize(
    ("growth", "reads", "gate", "split"),
    [
        *((growth, reads, "slot", (1, 2, 1)) for growth, reads in WAYS),
        *(("null", "shallow", gate, (1, 2, 1)) for gate in ("smooth", "visibility")),
        *(("autoregressive", "whole", gate, (1, [1, 1, 1], 1)) for gate in ("slot", "smooth")),
    ],
)
def test_documents_of_a_row_are_documents_alone(growth, reads, gate, split):
    """Values and gradients: a row of three documents is three rows, whatever was before them."""
    model = tiny_online(split, growth=growth, gate=gate, router_reads=reads).double().train()
    ids = texts(rows=2, length=30)
    documents = torch.tensor([[0] * 11 + [1] * 1 + [2] * 18, [0] * 7 + [1] * 21 + [2] * 2])
    positions = torch.cat([torch.arange(n) for n in (11, 1, 18, 7, 21, 2)]).view(2, 30)
    mix = torch.randn(2, 30, 16, dtype=torch.float64)
    together, levels = model.read(ids, positions=positions, settings=HALF, documents=documents)
    (together * mix).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row in range(2):
        for document in range(3):
            own = documents[row] == document
            alone, level = model.read(ids[row, own][None], settings=HALF)
            torch.testing.assert_close(together[row, own], alone[0], atol=1e-12, rtol=1e-12)
            assert torch.equal(levels[0].routing.commit[row, own], level[0].routing.commit[0])
            (alone[0] * mix[row, own]).sum().backward()
    for name, grad in found.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, atol=1e-10, rtol=1e-10, msg=name)
    merged, _ = model.read(ids, positions=positions, settings=HALF)  # the control: one text a row
    assert (merged - together).abs().max() > 1e-3


@pytest.mark.parametrize("gate", ["slot", "smooth", "mass", "visibility", "none"])
def test_the_decision_to_commit_gets_a_gradient_from_the_text(gate):
    model, ids = tiny_online(gate=gate, growth="null").train(), texts()
    model.read(ids, settings=HALF)[0].sum().backward()
    grad = model.stack.router.null.weight.grad
    assert (grad is None or grad.abs().max() == 0) == (gate == "none")


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_gate_of_visibility_sees_what_the_mask_lets_see(architecture):
    model, ids = tiny_online(gate="visibility", architecture=architecture), texts()
    dense = model.logits(model.read(ids, settings=HALF)[0])
    plain = model.logits(model.read(ids, settings=HALF._replace(gated=False))[0])
    torch.testing.assert_close(dense, plain, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad(logits.square().sum(), model.stack.bridge.weight)[0] for logits in (dense, plain)]
    torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)


def test_the_gate_of_visibility_has_the_gradient_of_the_text_s_loss(monkeypatch):
    """Finite differences: let one position be a little likelier to commit, and everything that hangs on it a little so."""
    model, ids = tiny_online(gate="visibility", growth="null"), texts(rows=1)
    route, way, first = model.stack._route, torch.zeros(ids.shape, dtype=torch.float64), []

    def routed(*given):
        routing, after = route(*given)
        moved.append((routing.probability.detach() + way).requires_grad_())
        return routing._replace(probability=moved[-1]), after

    def kept(hard, soft):
        first.append(soft.detach())
        return hard + (soft - soft.detach())

    def away_from_the_first(hard, soft):
        return hard + (soft - next(before))

    moved = []
    monkeypatch.setattr(model.stack, "_route", routed)
    monkeypatch.setattr(commit_gates, "straight_through", kept)
    causal_nll_of(model, ids).backward()
    assert len(first) == 3  # what a position is, what concepts see and what the deep stack sees
    found, expected, step = moved[0].grad[0], [], 1e-6
    monkeypatch.setattr(commit_gates, "straight_through", away_from_the_first)
    for t in range(ids.shape[1]):
        ends = []
        for size in (step, -step):
            way.zero_()[0, t], before = size, iter(first)
            ends.append(float(causal_nll_of(model, ids).detach()))
        expected.append((ends[0] - ends[1]) / (2 * step))
    assert found.abs().max() > 1e-4
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=1e-5)


def causal_nll_of(model, ids) -> Tensor:
    """Nats of every token after the first."""
    log_p = model.logits(model.read(ids, settings=HALF)[0])[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None]).sum()


def test_adapters_and_new_weights_train_alone():
    backbone = with_adapters(in_float64(tiny_causal(13, num_hidden_layers=4)), rank=2)
    model = OnlineConceptModel(backbone, split=[1, 2, 1], codes=8)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("stack.") or "lora" in name for name in names)
    assert not any(
        name.startswith("stack.shallow") for name, _ in model.named_parameters()
    )  # owned by the backbone alone


def test_the_middle_is_as_long_as_the_concepts():
    model, ids = tiny_online(growth="fixed"), texts(length=12)
    lengths = []
    run = model.stack.middle.run
    model.stack.middle.run = lambda states, *more: lengths.append(states.shape[1]) or run(states, *more)
    for compression in (1.0, 2.0, 4.0):
        model.read(ids, settings=CompressionSettings(compression, 1.0))
    assert lengths == [12, 6, 3]


@pytest.mark.parametrize(
    ("split", "levels", "part"),
    [
        ([1, 2], 1, "module.split=[1, 2] must be [shallow, middle, deep]"),
        ([1, 1, 1], 1, "has 3 layers, the model 4"),
        ([0, 3, 1], 1, "at least one layer each"),
        ([1, 2, 1], 2, "module.split"),
        ([1, [1, 1], 1], 1, "must be [shallow, middle, deep]"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(split, levels, part):
    with pytest.raises(UsageError) as found:
        OnlineConceptModel(tiny_causal(num_hidden_layers=4), split=split, levels=levels, codes=8)
    assert part in str(found.value)


def test_a_gate_of_visibility_is_of_one_level():
    with pytest.raises(UsageError, match=r"module.gate=visibility is of one level; type module.levels=1"):
        tiny_online([1, [1, 1, 1], 1], gate="visibility")


def test_proportions_are_kept_at_every_level():
    assert nested_split([8, 12, 8], 2) == [8, [3, 6, 3], 8]
    assert nested_split([8, 12, 8], 1) == [8, 12, 8]


def test_other_models_are_refused():
    eager, scaled, lopsided = (tiny_causal(num_hidden_layers=4) for _ in range(3))
    eager.config._attn_implementation = "eager"
    with pytest.raises(UsageError, match="attention eager takes no boolean mask"):
        OnlineConceptModel(eager, split=[1, 2, 1])
    lopsided.config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(UsageError, match="layers of sliding_attention"):
        OnlineConceptModel(lopsided, split=[1, 2, 1])
    scaled.model.embed_tokens.register_forward_hook(lambda module, given, found: found)
    decoder = scaled.model.forward
    scaled.model.forward = lambda **given: decoder(
        inputs_embeds=3 * scaled.model.embed_tokens(given.pop("input_ids")),
        **{k: v for k, v in given.items() if v is not None},
    )
    with pytest.raises(UsageError, match="computes more than its layers"):
        OnlineConceptModel(scaled, split=[1, 2, 1])
