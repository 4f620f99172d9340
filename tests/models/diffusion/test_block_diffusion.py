"""Block diffusion: its one pass over two copies, its likelihoods, and sampling with the keys and values of finished blocks."""

import itertools
import math

import pytest
import torch
from helpers.causal import MASK, ToyFiller, packed_batch, pair_batch
from torch.testing import assert_close

from models.backbones.llada import LladaModel, load_llada
from models.diffusion.block_diffusion import BlockDiffusion, masked_states
from models.diffusion.commit_rules import ConfidenceThreshold
from models.diffusion.objective import MaskedDiffusion
from models.diffusion.readers import BlockReader
from models.diffusion.sampler import generate_by_rule, generate_masked_diffusion, guided_logits
from models.functional.block_diffusion import block_numbers
from models.functional.errors import UsageError
from models.functional.masked_diffusion import mask_probability
from models.objectives.masked_lm import MaskedLM

LENGTHS = [1, 2, 3, None]  # of blocks; 3 leaves a shorter last block
BATCHES = {"packed": packed_batch, "pairs": pair_batch}


def draw(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def made(tiny_llada):
    """A function that makes the objective and its network, in float64."""

    def make(block_length: int | None, **options) -> tuple[BlockDiffusion, LladaModel]:
        torch.manual_seed(0)
        model, objective = tiny_llada().double(), BlockDiffusion(block_length, **options)
        objective.attach(model)
        return objective, model

    return make


def text_of(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, which of them are real, which of them are the response."""
    if "labels" in batch:
        everywhere = torch.ones_like(batch["labels"], dtype=torch.bool)
        return batch["labels"], everywhere, everywhere
    return batch["input_ids"], batch["attention_mask"], batch["response_mask"]


def blocks_of(response: torch.Tensor, block_length: int | None) -> list[range]:
    """The columns of each block of a row."""
    columns = response.nonzero().flatten().tolist()
    length = block_length or len(columns)
    return [range(columns[k], min(columns[k] + length, columns[-1] + 1)) for k in range(0, len(columns), length)]


def nll_of_block(model, ids, seen, response, columns: range, noised: list[int], block_length) -> torch.Tensor:
    """-log p of every column of one block of one row, from a forward pass over the text up to the block's end."""
    end = columns.stop
    number = [0] * len(ids)
    for k, own in enumerate(blocks_of(response, block_length), start=1):
        for column in own:
            number[column] = k
    visible = torch.zeros(end, end, dtype=torch.bool)
    for q, k in itertools.product(range(end), repeat=2):
        visible[q, k] = (number[k] <= number[q] and bool(seen[k])) or q == k
    text = ids[:end].clone()
    text[noised] = MASK
    positions = (seen.long().cumsum(0) - 1).clamp(min=0)[:end]
    states = model.states(model.embed(text.unsqueeze(0)), visible[None, None], positions.unsqueeze(0))[0]
    log_p = model.lm_head(states).log_softmax(-1)
    return -log_p.gather(-1, ids[:end].unsqueeze(-1)).squeeze(-1)[columns.start :]


def nll_block_by_block(model, batch, masked, block_length) -> torch.Tensor:
    """The cross entropy of the masked tokens, one forward pass for each block of each row."""
    ids, seen, response = text_of(batch)
    nll = torch.zeros(ids.shape, dtype=torch.float64)
    for row in range(len(ids)):
        for columns in blocks_of(response[row], block_length):
            noised = [k for k in columns if masked[row, k]]
            found = nll_of_block(model, ids[row], seen[row], response[row], columns, noised, block_length)
            nll[row, columns.start : columns.stop] = found
    return nll * masked


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("block_length", LENGTHS)
@torch.no_grad()
def test_one_pass_over_two_copies_is_a_pass_for_each_block(made, form, block_length):
    _, model = made(block_length)
    batch = BATCHES[form]()
    ids, seen, response = text_of(batch)
    masked = response & (torch.rand(ids.shape, generator=draw()) < 0.6)
    block = block_numbers(response, block_length)
    xt = torch.where(masked, MASK, ids)
    log_p = model.lm_head(masked_states(model, xt, ids, masked, block, seen)).log_softmax(-1)
    found = -log_p.gather(-1, ids[masked].unsqueeze(-1)).squeeze(-1)
    wanted = nll_block_by_block(model, batch, masked, block_length)[masked]
    assert_close(found, wanted, rtol=0, atol=1e-10)
    # control: blocks of another length are seen
    other = nll_block_by_block(model, batch, masked, 4 if block_length is None else None)[masked]
    if not (form == "pairs" and block_length is None):  # where four tokens are the whole response
        assert not torch.allclose(found, other, atol=1e-3)


@pytest.mark.parametrize("form", BATCHES)
def test_all_tokens_are_predicted_in_blocks_of_one_and_half_of_them_in_others(made, form):
    tokens = int(text_of(BATCHES[form]())[2].sum())
    assert made(1)[0].expected_predictions(BATCHES[form]()) == tokens
    assert made(2)[0].expected_predictions(BATCHES[form]()) == pytest.approx(tokens / 2, rel=1e-2)


@pytest.mark.parametrize("form", BATCHES)
@torch.no_grad()
def test_the_loss_is_the_cross_entropy_over_the_probability_of_its_block(made, form, monkeypatch):
    objective, model = made(2)
    batch, drawn = BATCHES[form](), []
    ids, _, response = text_of(batch)
    monkeypatch.setattr(
        "models.diffusion.block_diffusion.antithetic_times",
        lambda n, generator, device: drawn.append(torch.rand(n, generator=generator)) or drawn[-1],
    )
    out = objective(model, batch, draw())
    (t,) = drawn
    masked = out.position_nll > 0
    p = torch.zeros(ids.shape)
    for row in range(len(ids)):
        blocks = blocks_of(response[row], 2)
        for k, columns in enumerate(blocks):
            p[row, columns.start : columns.stop] = mask_probability(float(t[row * len(blocks) + k]), objective.eps)
    wanted = nll_block_by_block(model, batch, masked, 2)[masked] / p[masked]
    assert_close(out.position_nll[masked], wanted, rtol=1e-6, atol=0)
    assert out.tokens == int(response.sum())
    assert out.loss.item() == pytest.approx(wanted.sum().item() / out.tokens)
    assert out.raw["predictions"] == masked.sum()


def test_a_whole_response_is_masked_diffusion_where_there_is_no_prompt(made):
    """The same draws, the same masks, the same loss and gradients."""
    objective, model = made(None)
    batch = packed_batch(rows=5)
    out = objective(model, batch, draw())
    (gradient,) = torch.autograd.grad(out.loss, [model.embedding])
    model.config.block_causal = False
    wanted = MaskedDiffusion()(model, batch, draw())
    assert out.tokens == wanted.tokens
    assert_close(out.position_nll, wanted.position_nll, rtol=0, atol=1e-12)
    assert_close(gradient, torch.autograd.grad(wanted.loss, [model.embedding])[0], rtol=0, atol=1e-12)
    # controls: in blocks, and with a prompt that masked diffusion lets see the response, it is another loss
    assert not torch.allclose(made(2)[0](model, batch, draw()).position_nll, wanted.position_nll)
    two = (objective(model, pair_batch(), draw()), MaskedDiffusion()(model, pair_batch(), draw()))
    assert torch.equal(*(terms.position_nll > 0 for terms in two))
    assert not torch.allclose(*(terms.position_nll for terms in two), atol=1e-3)


@torch.no_grad()
def causal_nll(model, batch) -> torch.Tensor:
    """-log p of each response token: one forward pass a token, over the clean text before it and one mask in its place."""
    ids, seen, response = text_of(batch)
    nll = torch.zeros(ids.shape, dtype=torch.float64)
    for row, column in response.nonzero().tolist():
        text = torch.cat([ids[row, :column], torch.tensor([MASK])]).unsqueeze(0)
        real = torch.cat([seen[row, :column], torch.tensor([True])])
        prompt = int((~response[row]).sum())
        visible = torch.ones(column + 1, column + 1).tril().bool()
        visible[:prompt, :prompt] = True  # the prompt is one block
        visible = (visible & real) | torch.eye(column + 1, dtype=torch.bool)
        positions = (real.long().cumsum(0) - 1).clamp(min=0).unsqueeze(0)
        states = model.states(model.embed(text), visible[None, None], positions)
        nll[row, column] = -model.lm_head(states[0, -1]).log_softmax(-1)[ids[row, column]]
    return nll


@pytest.mark.parametrize("form", BATCHES)
@torch.no_grad()
def test_blocks_of_one_token_are_the_causal_model(made, form):
    """Its NLL in every draw, of the bound and of the loss."""
    objective, model = made(1)
    batch = BATCHES[form]()
    wanted = causal_nll(model, batch)
    assert objective.likelihood == "exact"
    for seed in range(3):
        assert_close(objective.text_nll(model, batch, draw(seed)), wanted, rtol=0, atol=1e-10)
        assert_close(objective(model, batch, draw(seed)).position_nll, wanted, rtol=0, atol=1e-10)
    other, model = made(2)  # control: longer blocks are another model
    assert other.likelihood == "bound"
    assert not torch.allclose(other(model, batch, draw()).position_nll, wanted, atol=1e-3)


@torch.no_grad()
def test_the_bound_is_that_of_every_order_within_blocks(made):
    """Enumerated: blocks of 2 from left to right, each filled in both orders. The loss has the same mean."""
    objective, model = made(2, eps=1e-6)
    row = {name: column[1:2] for name, column in pair_batch().items()}
    ids, seen, response = text_of(row)
    bound = 0.0
    for columns in blocks_of(response[0], 2):
        orders = []
        for order in itertools.permutations(columns):
            nll = 0.0
            for k, place in enumerate(order):
                found = nll_of_block(model, ids[0], seen[0], response[0], columns, list(order[k:]), 2)
                nll += found[place - columns.start].item()
            orders.append(nll)
        bound += sum(orders) / len(orders)
    many = {name: column.expand(2500, -1) for name, column in row.items()}
    independent = BlockDiffusion(2, eps=1e-6, antithetic=False)
    for found in (objective.text_nll(model, many, draw()), independent(model, many, draw()).position_nll):
        rows = found.sum(-1)
        near = 4 * rows.std().item() / math.sqrt(len(rows))
        assert abs(rows.mean().item() - bound) < near
    # control: the bound of the whole response as one block is another number
    rows = objective.text_nll(model, many, draw()).sum(-1)
    whole = made(None)[0].text_nll(model, many, draw()).sum(-1)
    assert abs(whole.mean().item() - bound) > 4 * (rows.std() + whole.std()).item() / math.sqrt(len(rows))


def test_a_block_reads_its_own_masked_copy_and_the_clean_text_before_it_and_nothing_else(made, monkeypatch):
    """Gradients of what predicts one block, in the embedding of every column of both copies."""
    _, model = made(2)
    batch = pair_batch()  # 3 columns of prompt, 2 blocks of 2
    ids, seen, response = text_of(batch)
    block, embed, read = block_numbers(response, 2), model.embed, []

    def watched(tokens: torch.Tensor) -> torch.Tensor:
        read.append(embed(tokens).detach().requires_grad_())
        return read[-1]

    monkeypatch.setattr(model, "embed", watched)
    states = masked_states(model, torch.where(response, MASK, ids), ids, response, block, seen).view(3, 4, -1)
    (columns,) = read
    assert columns.shape[1] == 5 + 4  # clean prompt and first block, then both noised blocks
    for columns_of_block, wanted in (((0, 1), [0, 1, 2, 5, 6]), ((2, 3), [0, 1, 2, 3, 4, 7, 8])):
        outcome = states[0, list(columns_of_block)].square().sum()
        (gradient,) = torch.autograd.grad(outcome, [columns], retain_graph=True)
        assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("kind", [MaskedDiffusion, MaskedLM])
def test_models_that_do_not_fit_are_refused(made, kind):
    with pytest.raises(UsageError, match=r"module/objective=block_diffusion needs .* type model=small"):
        BlockDiffusion().attach(ToyFiller())
    with pytest.raises(UsageError, match=r"module\.objective\.block_length=0"):
        BlockDiffusion(0)
    with pytest.raises(UsageError, match=r"trained by block diffusion; type module/objective=block_diffusion"):
        kind().attach(made(2)[1])


# -- sampling --------------------------------------------------------------------------------------------------------


def sampling_rows(batch: int = 3, prompt: int = 3, response: int = 6) -> dict[str, torch.Tensor]:
    """Rows with prompts of different lengths, one of them empty."""
    ids = torch.randint(3, 11, (batch, prompt + response), generator=draw(1))
    mask = torch.zeros(batch, prompt + response, dtype=torch.bool)
    mask[:, prompt:] = True
    seen = torch.ones_like(mask)
    for row in range(batch):
        seen[row, :row] = False
    seen[-1, :prompt] = False
    return {"input_ids": ids, "attention_mask": seen, "response_mask": mask}


def read_everything(model, rows):
    """Stands for `BlockReader`: every pass reads all columns, the masks of later blocks included."""
    prompt = rows["input_ids"].shape[1] - int(rows["response_mask"][0].sum())

    def read(ids, start, end):
        states = model.hidden(model.embed(ids), rows["attention_mask"], response_mask=rows["response_mask"])
        return states[:, prompt + start : prompt + end]

    return read


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("block_length", LENGTHS)
def test_sampling_with_kept_keys_and_values_is_sampling_without(made, monkeypatch, block_length, guidance):
    """The same tokens, and in every pass the same logits to 1e-10."""
    _, model = made(block_length)
    rows, passes = sampling_rows(), []

    def sample(what: str):
        def kept(*arguments):
            read = guided_logits(*arguments)

            def logits(*where):
                passes.append((what, read(*where)))
                return passes[-1][1].clone()

            return logits

        monkeypatch.setattr("models.diffusion.sampler.guided_logits", kept)
        scheduled = generate_masked_diffusion(model, rows, draw(), steps=6, guidance=guidance)
        by_rule = generate_by_rule(model, rows, draw(), rule=ConfidenceThreshold(0.3), temperature=1.0)
        return scheduled, by_rule.responses, by_rule.forward_passes

    cached = sample("kept")
    monkeypatch.setattr("models.diffusion.readers.BlockReader", read_everything)
    for mine, theirs in zip(cached, sample("whole"), strict=True):
        assert torch.equal(mine, theirs)
    mine, theirs = ([logits for what, logits in passes if what == which] for which in ("kept", "whole"))
    assert len(mine) == len(theirs) > 6
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one, other, rtol=0, atol=1e-10)


@torch.no_grad()
def test_keys_and_values_of_unfinished_tokens_would_be_seen(made, monkeypatch):
    """Control of the test above: a block kept as it was read in its own last pass still has a mask among its tokens."""

    class Hasty(BlockReader):
        def __call__(self, ids, start, end):
            states = super().__call__(ids, start, end)
            self.known = self.columns.prompt + end
            return states

    _, model = made(2)
    rows = sampling_rows()
    ids = rows["input_ids"].masked_fill(rows["response_mask"], MASK)
    settled = torch.where(torch.arange(9) < 5, rows["input_ids"], ids)
    wanted = read_everything(model, rows)(settled, 2, 4)
    for kind, same in ((BlockReader, True), (Hasty, False)):
        read = kind(model, rows)
        read(ids, 0, 2)
        assert torch.allclose(read(settled, 2, 4), wanted, rtol=0, atol=1e-10) == same


def test_a_pass_reads_its_block_and_the_first_one_what_was_finished_before(made, monkeypatch):
    """3 columns of prompt and 3 blocks of 2, two passes each: no column is read more often than that."""
    _, model = made(2)
    read, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda ids: read.append(ids.shape[1]) or embed(ids))
    generate_masked_diffusion(model, sampling_rows(), draw(), steps=6)
    assert read == [5, 2, 4, 2, 4, 2]


def test_a_models_own_blocks_are_those_of_its_sampling(made):
    _, model = made(2)
    own, given = (generate_masked_diffusion(model, sampling_rows(), draw(), steps=3, block_length=n) for n in (None, 2))
    assert torch.equal(own, given)
    with pytest.raises(UsageError, match=r"block_length=3: .* blocks of 2; type module.block_length=null"):
        generate_masked_diffusion(model, sampling_rows(), draw(), steps=2, block_length=3)
    with pytest.raises(UsageError, match="multiple of the 3 blocks"):
        generate_masked_diffusion(model, sampling_rows(), draw(), steps=4)


@torch.no_grad()
def test_a_saved_model_keeps_its_blocks(made, tmp_path):
    _, model = made(2)
    model.save_pretrained(tmp_path)
    again, rows = load_llada(tmp_path), sampling_rows()
    assert (again.config.block_causal, again.config.block_length) == (True, 2)
    wanted = generate_masked_diffusion(model, rows, draw(), steps=6)
    assert torch.equal(generate_masked_diffusion(again, rows, draw(), steps=6), wanted)
    model.config.block_causal = False
    assert not torch.equal(generate_masked_diffusion(model, rows, draw(), steps=6, block_length=2), wanted)
