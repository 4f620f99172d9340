"""Every objective: its gradient against finite differences, its value against one worked out token by token."""

import itertools
import math

import pytest
import torch
from helpers.causal import EOS, MASK, PAD, ToyCausal, ToyFiller, packed_batch, pair_batch
from helpers.llada import build_small

from models.backbones.llada import LladaModel
from models.diffusion.block_diffusion import BlockDiffusion
from models.diffusion.objective import MaskedDiffusion
from models.flow.denoiser_objective import ContinuousDiffusion
from models.flow.losses import adapt_to_noise
from models.functional.errors import UsageError
from models.functional.latent import covariance_penalty, variance_penalty
from models.functional.masked_diffusion import mask_probability
from models.objectives.latent import Latent
from models.objectives.masked_lm import MaskedLM
from models.objectives.multi_token import MultiToken
from models.objectives.next_token import NextToken
from models.objectives.span_corruption import SpanCorruption


def small_body() -> LladaModel:
    """LLaDA's, with weights so large that every token matters; in float64, norms included."""
    torch.manual_seed(0)
    special = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": PAD}
    model = build_small(vocab_size=7, num_hidden_layers=1, **special)
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.4)
    for part in [*model.modules()]:
        for name, child in part.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(part, name, torch.nn.RMSNorm(len(child.weight), child.variance_epsilon))
    return model.double()


MAKE = {
    "next_token": (NextToken, ToyCausal),
    "multi_token": (lambda: MultiToken(3), ToyCausal),
    "masked_lm": (lambda: MaskedLM(0.6), ToyFiller),
    "masked_diffusion": (MaskedDiffusion, ToyFiller),
    "block_diffusion": (lambda: BlockDiffusion(2), small_body),
    "short": (lambda: SpanCorruption({"short": 1.0}), ToyCausal),
    "long": (lambda: SpanCorruption({"long": 1.0}), ToyCausal),
    "prefix": (lambda: SpanCorruption({"prefix": 1.0}), ToyCausal),
    "latent": (lambda: Latent(2), ToyCausal),
}
BATCHES = {"packed": packed_batch, "pairs": pair_batch}


def draw(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(name: str):
    make_objective, make_model = MAKE[name]
    objective, model = make_objective(), make_model()
    objective.attach(model)
    if isinstance(objective, torch.nn.Module):
        objective.double()
        for weight in objective.parameters():  # heads start as no-ops, where half of their gradients are 0
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.5)
    return objective, model


def weights_of(objective, model) -> list[torch.nn.Parameter]:
    own = list(objective.parameters()) if isinstance(objective, torch.nn.Module) else []
    return [p for p in [*model.parameters(), *own] if p.requires_grad]


@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("name", MAKE)
def test_gradients_are_those_of_finite_differences(name, form):
    objective, model = made(name)
    batch, weights = BATCHES[form](), weights_of(objective, model)

    def loss() -> torch.Tensor:
        return objective(model, batch, draw()).loss

    gradients = torch.autograd.grad(loss(), weights)
    generator, step = torch.Generator().manual_seed(0), 1e-5
    moved = 0
    for weight, gradient in zip(weights, gradients, strict=True):
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            weight += step * direction
            above = loss()
            weight -= 2 * step * direction
            below = loss()
            weight += step * direction
        expected = (above - below) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), expected.double(), rtol=1e-4, atol=1e-6)
        moved += bool(expected.abs() > 1e-6)
    assert moved >= len(weights) - 1  # every weight has an effect (of a padding row at most one has none)


# -- values, token by token -----------------------------------------------------------------------------------------


def mean_state(model, ids: list[int]) -> torch.Tensor:
    return torch.tanh(torch.stack([model.body.table.weight[i] for i in ids]).mean(0))


def say(model, state: torch.Tensor, token: int) -> float:
    return -(model.head.weight @ state).log_softmax(-1)[token].item()


PROMPTS = [[3, 4, 5], [0], [6]]  # an empty prompt begins with its padding
RESPONSES = [[4, 5, 1, 1], [6, 3, 4, 5], [3, 1, 1, 1]]


def test_next_token_by_hand():
    objective, model = made("next_token")
    out = objective(model, pair_batch(), draw())
    expected = [
        [say(model, mean_state(model, prompt + response[:k]), response[k]) for k in range(4)]
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    torch.testing.assert_close(out.position_nll[:, 3:], torch.tensor(expected, dtype=torch.float64))
    assert out.position_nll[:, :3].eq(0).all()
    assert out.tokens == 12
    assert out.loss.item() == pytest.approx(sum(map(sum, expected)) / 12)

    batch = packed_batch(rows=1)
    row, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    by_hand = [say(model, mean_state(model, row[: k + 1]), labels[k]) for k in range(6)]
    found = objective(model, batch, draw()).position_nll
    torch.testing.assert_close(found, torch.tensor([by_hand], dtype=torch.float64))
    assert torch.equal(objective.text_nll(model, batch, draw()), found)


def test_one_head_is_next_token_prediction_and_none_is_refused():
    batch, model = packed_batch(3, 8), ToyCausal()
    one, own = MultiToken(1), NextToken()
    one.attach(model), own.attach(model)
    found, wanted = (objective(model, batch, torch.Generator().manual_seed(0)) for objective in (one, own))
    assert found.loss.item() == pytest.approx(wanted.loss.item())
    assert len(one.heads) == 0
    with pytest.raises(UsageError, match=r"module\.objective\.n=0 must be at least 1"):
        MultiToken(0)


@pytest.mark.parametrize(
    ("stored", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_further_heads_are_at_least_float32(stored, kept):
    objective = MultiToken(2)
    objective.attach(ToyCausal().to(stored))
    assert {p.dtype for p in objective.parameters()} == {kept}


def test_multi_token_by_hand():
    objective, model = made("multi_token")
    out = objective(model, pair_batch(), draw())
    total = 0.0
    for ahead in (1, 2, 3):
        nlls = []
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            for k in range(4 - ahead + 1):
                state = mean_state(model, prompt + response[:k])
                if ahead > 1:
                    head = objective.heads[ahead - 2]
                    normed = state / (state.square().mean() + torch.finfo(torch.float64).eps).sqrt() * head.norm.weight
                    inner = head.up.weight @ normed
                    state = state + head.down.weight @ (inner * torch.sigmoid(inner))
                nlls.append(say(model, state, response[k + ahead - 1]))
        total += sum(nlls) / len(nlls)
    assert out.loss.item() == pytest.approx(total)
    next_token = NextToken()(model, pair_batch(), draw())
    torch.testing.assert_close(out.position_nll, next_token.position_nll)
    torch.testing.assert_close(objective.text_nll(model, pair_batch(), draw()), next_token.position_nll)


def test_fresh_heads_say_what_the_model_says():
    model, objective = ToyCausal(), MultiToken(3)
    objective.attach(model)
    objective.double()
    hidden = torch.randn(5, 4, dtype=torch.float64)
    for ahead in (2, 3):
        torch.testing.assert_close(objective.logits(model, hidden, ahead), model.head(hidden))


def test_masked_lm_scores_what_it_chose_and_keeps_prompts():
    objective, model = made("masked_lm")
    batch, seen = pair_batch(), []
    embed = model.embed
    model.embed = lambda ids: (seen.append(ids.clone()), embed(ids))[1]
    out = objective(model, batch, draw())
    xt, x0 = seen[0], batch["input_ids"]
    assert torch.equal(xt[:, :3], x0[:, :3])
    chosen = out.position_nll > 0
    assert out.tokens == int(chosen.sum())
    assert not chosen[:, :3].any()
    assert torch.equal(xt[~chosen], x0[~chosen])
    logits = model.lm_head(model.hidden(embed(xt), batch["attention_mask"])).log_softmax(-1)
    expected = -logits.gather(-1, x0.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.position_nll[chosen], expected[chosen])
    assert out.loss.item() == pytest.approx(expected[chosen].mean().item())


@pytest.mark.parametrize("name", ["masked_lm", "masked_diffusion"])
def test_the_bound_is_that_of_every_order(name):
    """Enumerated: all orders of filling 3 tokens, each conditioned on what stands there so far."""
    objective, model = made(name)
    x0 = torch.tensor([[3, 5, 4, 6]])
    response = torch.tensor([[False, True, True, True]])
    batch = {"input_ids": x0, "attention_mask": torch.ones_like(response), "response_mask": response}
    orders = []
    for order in itertools.permutations([1, 2, 3]):
        total = 0.0
        for k, place in enumerate(order):
            xt = x0.clone()
            xt[0, list(order[k:])] = MASK
            logits = model.lm_head(model.hidden(model.embed(xt), batch["attention_mask"]))[0, place]
            total -= logits.log_softmax(-1)[x0[0, place]].item()
        orders.append(total)
    many = {key: column.expand(4000, -1) for key, column in batch.items()}
    with torch.no_grad():
        found = objective.text_nll(model, many, draw()).sum(-1)
    near = 4 * found.std().item() / math.sqrt(4000)
    assert abs(found.mean().item() - sum(orders) / 6) < near
    assert sum(orders) / 6 > -math.log(sum(math.exp(-nll) for nll in orders) / 6)  # and a bound it is
    assert abs(max(orders) - sum(orders) / 6) > near  # the test would see a single order


def test_masked_diffusion_of_packed_rows_hides_their_labels_and_cuts_none():
    model, objective = ToyFiller(), MaskedDiffusion("pretrain", random_length_probability=1.0)
    batch = packed_batch(rows=400)
    out = objective(model, batch, draw())
    assert out.tokens == batch["labels"].numel()
    assert out.position_nll.shape == batch["labels"].shape
    hidden = (out.position_nll > 0).double().mean().item()
    assert abs(hidden - mask_probability(torch.tensor(0.5)).item()) < 0.05


def test_a_prefix_model_reads_both_ways_and_its_likelihood_is_exact():
    objective, model = made("prefix")
    batch = pair_batch()
    found = objective.text_nll(model, batch, draw())
    expected = [
        # the first token is said by the last prompt token, which sees the whole prompt
        [say(model, mean_state(model, prompt + response[:k]), response[k]) for k in range(4)]
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    torch.testing.assert_close(found[:, 3:], torch.tensor(expected, dtype=torch.float64))
    for seed in range(20):  # any split: what is asked for is said from everything before it
        out = objective(model, batch, draw(seed))
        asked = out.position_nll > 0
        torch.testing.assert_close(out.position_nll[asked], found[asked])
        assert out.tokens == int(asked.sum())


def test_span_corruption_by_hand(monkeypatch):
    """Text 10 .. 14 with 11 and 13, 14 cut out: read 10 S 12 S, then S 11 S 13 14 from left to right."""
    model = ToyCausal(vocab_size=16)
    objective = SpanCorruption({"long": 1.0})
    cut = torch.tensor([[False, True, False, True, True]])
    monkeypatch.setattr("models.objectives.span_corruption.random_spans", lambda *_: cut)
    text = torch.tensor([[10, 11, 12, 13, 14]])
    out = objective(model, {"input_ids": text, "labels": text}, draw())
    read, answer = [10, MASK, 12, MASK], [MASK, 11, MASK, 13, 14]
    by_hand = [say(model, mean_state(model, read + answer[:k]), answer[k]) for k in range(5)]
    assert out.tokens == 5
    torch.testing.assert_close(out.position_nll[0, 4:], torch.tensor(by_hand, dtype=torch.float64))
    assert out.loss.item() == pytest.approx(sum(by_hand) / 5)


def test_latent_by_hand():
    objective, model = made("latent")
    batch = packed_batch(rows=3)
    with torch.no_grad():  # the target is a copy of its own, not the model
        objective.target.body.table.weight.mul_(0.5)
    out = objective(model, batch, draw())
    states, targets, errors = [], [], []
    for row in batch["input_ids"].tolist():
        mine = [norm(mean_state(model, row[: k + 1])) for k in range(6)]
        theirs = [norm(mean_state(objective.target, row[: k + 1])) for k in range(6)]
        states += mine[:4]
        targets += [(theirs[k + 1] + theirs[k + 2]) / 2 for k in range(4)]
    for state, target in zip(states, targets, strict=True):
        errors.append((objective.predictor(state) - target).square().mean())
    z = torch.stack(states)
    penalty = variance_penalty(z) + 0.04 * covariance_penalty(z)
    assert out.tokens == 12
    assert out.loss.item() == pytest.approx((sum(errors) / 12 + penalty).item())


def test_the_latent_target_stays_in_its_document():
    """Documents of 4 and 2 states with spans of 2: after the first two alone both next states are the document's own."""
    objective, model = made("latent")
    batch = packed_batch(rows=3)
    batch["document_ids"] = torch.tensor([0, 0, 0, 0, 1, 1]).expand(3, -1)
    out = objective(model, batch, draw())
    assert out.tokens == 3 * 2
    assert (out.position_nll != 0).nonzero()[:, 1].tolist() == [0, 1] * 3
    batch["document_ids"] = torch.arange(6).expand(3, -1)
    with pytest.raises(UsageError, match=r"module.objective.span=2; type a smaller"):
        objective(model, batch, draw())
    objective.eval()  # a last row of validation may be as short: it counts for nothing
    out = objective(model, batch, draw())
    assert (out.tokens, out.loss.item()) == (0, 0.0)


def norm(state: torch.Tensor) -> torch.Tensor:
    return (state - state.mean()) / (state.var(correction=0) + 1e-5).sqrt()


def test_the_latent_target_follows_slowly_and_alone():
    objective, model = made("latent")
    assert not any(p.requires_grad for p in objective.target.parameters())
    before = objective.target.body.table.weight.clone()
    with torch.no_grad():
        model.body.table.weight += 1.0
    objective.after_step(model)
    torch.testing.assert_close(objective.target.body.table.weight, before + 1 - 1 / 10)
    assert int(objective.steps) == 1
    assert objective.likelihood is None
    assert objective.generation is None


@pytest.mark.parametrize("form", ["pairs", "packed"])
def test_continuous_diffusion_is_the_noisy_mask_denoiser(tiny_llada, form):
    """Loss and gradients of `adapt_to_noise` with the same draws; the embedding table stays where it is."""
    objective, model, batch = ContinuousDiffusion(), tiny_llada(), BATCHES[form]()
    objective.attach(model)
    rows = batch
    if form == "packed":
        everything = torch.ones_like(batch["labels"], dtype=torch.bool)
        rows = {"input_ids": batch["labels"], "attention_mask": everything, "response_mask": everything}
    weights = [p for p in objective.parameters() if p.requires_grad]
    assert not any(p is model.embedding for p in weights)
    out = objective(model, batch, draw())
    terms = adapt_to_noise(objective.student, model, rows, draw(), teacher_weight=0.0, observed_share=0.1)
    torch.testing.assert_close(out.loss, terms.loss)
    ours = torch.autograd.grad(out.loss, weights, allow_unused=True)
    theirs = torch.autograd.grad(terms.loss, weights, allow_unused=True)
    for mine, known in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, known)
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in ours) > len(weights) // 2
    assert objective.trained(model) is objective.student.body


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("name", [*MAKE, "continuous_diffusion"])
def test_a_last_row_may_be_as_short_as_one_token(name, length, tiny_llada):
    """What is left of a corpus is a row of validation: its loss and likelihood are finite, and of nothing the loss is 0."""
    if name == "continuous_diffusion":
        objective, model = ContinuousDiffusion(), tiny_llada()
        objective.attach(model)
    else:
        objective, model = made(name)
    if isinstance(objective, torch.nn.Module):
        objective.eval()
    batch = packed_batch(rows=1, length=length)
    with torch.no_grad():
        for seed in range(6):
            out = objective(model, batch, draw(seed))
            assert torch.isfinite(out.loss)
            assert out.tokens > 0 or out.loss == 0
        if objective.likelihood is not None:
            nll = objective.text_nll(model, batch, draw())
            assert nll.shape == batch["labels"].shape
            assert torch.isfinite(nll).all()
    if length == 1 and isinstance(objective, SpanCorruption):
        with pytest.raises(UsageError, match=r"data.sequence_length=1 leaves no target"):
            objective(model, batch, draw())


@pytest.mark.parametrize("kind", ["short", "long", "prefix"])
def test_a_response_of_one_token_is_asked_for_whole(kind):
    response = torch.tensor([[False, False, True]])
    batch = {
        "input_ids": torch.tensor([[3, 4, 5]]),
        "attention_mask": torch.ones_like(response),
        "response_mask": response,
    }
    objective, model = made(kind)
    out = objective(model, batch, draw())
    assert out.tokens == 1
    torch.testing.assert_close(out.loss.item(), say(model, mean_state(model, [3, 4]), 5))


def test_models_that_do_not_fit_are_refused(tiny_llada):
    looks_both_ways = tiny_llada()
    assert isinstance(looks_both_ways, LladaModel)
    for name in ("next_token", "multi_token", "prefix", "latent"):
        with pytest.raises(UsageError, match="needs a causal model"):
            MAKE[name][0]().attach(looks_both_ways)
    for name in ("masked_lm", "masked_diffusion"):
        with pytest.raises(UsageError, match="needs a bidirectional model"):
            MAKE[name][0]().attach(ToyCausal())
    for mix in ({"middle": 1.0}, {"short": -1.0, "prefix": 2.0}, {"prefix": 0.0}):
        with pytest.raises(UsageError, match=r"module.objective.mix"):
            SpanCorruption(mix)
    with pytest.raises(UsageError, match=r"module.objective.n=0"):
        MultiToken(0)
    with pytest.raises(UsageError, match=r"module.objective.span=0"):
        Latent(0)


@pytest.mark.parametrize(
    ("kind", "option", "values"),
    [
        (MaskedDiffusion, "eps", (0.0, -1.0, 1.5)),
        (BlockDiffusion, "eps", (0.0, -1.0, 1.5)),
        (MaskedDiffusion, "random_length_probability", (-0.1, 1.1)),
        (ContinuousDiffusion, "observed_share", (-0.1, 1.1)),
        (Latent, "decay", (-0.1, 1.0)),
        (Latent, "variance_weight", (-1.0,)),
        (Latent, "covariance_weight", (-1.0,)),
    ],
)
def test_numbers_outside_their_range_are_refused(kind, option, values):
    for value in values:
        with pytest.raises(UsageError, match=f"^module.objective.{option}={value} must"):
            kind(**{option: value})
