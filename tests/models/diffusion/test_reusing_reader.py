"""Sampling with keys and values of earlier passes: where it is exact, what it reads, and who cannot."""

import pytest
import torch
from helpers.foreign import foreign_model, foreign_tokenizer, save_foreign
from torch.testing import assert_close

from lightning_modules.training.decoder_cost import flops_per_token
from models.backbones.masked_from_causal import load_from_causal
from models.diffusion.block_diffusion import BlockDiffusion
from models.diffusion.commit_rules import ConfidenceThreshold
from models.diffusion.readers import response_reader
from models.diffusion.sampler import (
    MaskedDiffusionDecoder,
    RuleDecoder,
    generate_by_rule,
    generate_masked_diffusion,
    guided_logits,
)
from models.functional.errors import UsageError
from models.interfaces.masked_sampling import ReusedColumns

KINDS = ["prefix", "dual"]
NOTHING = ReusedColumns()


def draw(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(batch: int = 4, prompt: int = 3, response: int = 6) -> dict[str, torch.Tensor]:
    """Rows with prompts of 3, 2, 1 and no tokens."""
    ids = torch.randint(3, 11, (batch, prompt + response), generator=draw(1))
    mask = torch.zeros(batch, prompt + response, dtype=torch.bool)
    mask[:, prompt:] = True
    seen = torch.arange(prompt + response) >= torch.arange(batch).unsqueeze(-1)
    return {"input_ids": ids, "attention_mask": seen, "response_mask": mask}


@pytest.fixture
def sample(monkeypatch):
    """A function that returns texts of both samplers in blocks of 3, and the logits of every pass."""

    def run(model, reused: ReusedColumns, **options):
        passes = []

        def recorded(*arguments):
            read = guided_logits(*arguments)

            def logits(*where):
                passes.append(read(*where))
                return passes[-1].clone()

            return logits

        monkeypatch.setattr("models.diffusion.sampler.guided_logits", recorded)
        common = {"block_length": 3, "reused": reused, **options}
        rule = ConfidenceThreshold(0.3)
        scheduled = generate_masked_diffusion(model, rows_of(), draw(), steps=6, **common)
        by_rule = generate_by_rule(model, rows_of(), draw(), rule=rule, temperature=1.0, **common)
        monkeypatch.setattr("models.diffusion.sampler.guided_logits", guided_logits)
        return (scheduled, by_rule.responses, by_rule.forward_passes), passes

    return run


def same(found, wanted) -> bool:
    """Whether texts and numbers of passes are the same, and the logits of every pass to 1e-10."""
    if not all(map(torch.equal, found[0], wanted[0])):
        return False
    return all(torch.allclose(*two, rtol=0, atol=1e-10) for two in zip(found[1], wanted[1], strict=True))


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_refreshed_in_every_pass_it_is_exact(tiny_llada, sample, kind, guidance):
    model = tiny_llada().double()
    wanted = sample(model, NOTHING, guidance=guidance)
    assert same(sample(model, ReusedColumns(kind, 1), guidance=guidance), wanted)
    # controls: refreshed less often, it is an approximation
    assert not same(sample(model, ReusedColumns(kind, 2), guidance=guidance), wanted)
    assert not same(sample(model, ReusedColumns(kind), guidance=guidance), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_body_of_one_layer_it_is_exact(tiny_llada, sample, kind):
    """Keys and values are then those of the embeddings: only the block's own change while it is filled."""
    model = tiny_llada(num_hidden_layers=1).double()
    for options in ({}, {"guidance": 1.5}, {"block_length": 2}, {"block_length": None}):
        assert same(sample(model, ReusedColumns(kind), **options), sample(model, NOTHING, **options))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_text_that_has_not_changed_is_read_as_before(tiny_llada, kind):
    """In every layer the kept columns stand where they were read; those of a block that changed are taken anew."""
    model, rows = tiny_llada().double(), rows_of()
    masks = rows["input_ids"].masked_fill(rows["response_mask"], model.mask_id)
    settled = torch.where(torch.arange(9) < 6, rows["input_ids"], masks)
    whole = response_reader(model, rows)
    read = response_reader(model, rows, ReusedColumns(kind))
    for text, start in ((masks, 0), (settled, 3)):
        for _ in range(2):
            assert_close(read(text, start, start + 3), whole(text, start, start + 3), rtol=0, atol=1e-10)
    changed = settled.index_fill(1, torch.tensor([7]), 5)
    assert not torch.allclose(read(changed, 3, 6), whole(settled, 3, 6), atol=1e-6)


@pytest.mark.parametrize(
    ("reused", "columns"),
    [
        (NOTHING, [9, 9, 9, 9, 9, 9]),
        (ReusedColumns("prefix"), [9, 6, 6, 9, 3, 3]),
        (ReusedColumns("dual"), [9, 3, 3, 9, 3, 3]),
        (ReusedColumns("prefix", 2), [9, 6, 9, 9, 3, 9]),
        (ReusedColumns("dual", 2), [9, 3, 9, 9, 3, 9]),
    ],
)
def test_what_a_pass_reads(tiny_llada, monkeypatch, reused, columns):
    """3 columns of prompt, two blocks of 3, three passes each; each of them is a forward pass, whatever it reads."""
    model, read = tiny_llada(), []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda ids: read.append(ids.shape[1]) or embed(ids))
    decoder = MaskedDiffusionDecoder(model, 6, block_length=3, reused=reused)
    decoder(rows_of(), draw())
    assert read == columns
    assert decoder.forwards == len(columns)


def test_flops_are_those_of_the_columns_that_are_read(tiny_llada):
    model = tiny_llada()
    none, prefix, dual = (
        flops_per_token(MaskedDiffusionDecoder(model, 6, block_length=3, reused=ReusedColumns(kind)), rows_of())
        for kind in ("none", *KINDS)
    )
    assert none > prefix > dual


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_batch_is_the_row_alone(tiny_llada, kind):
    model, rows = tiny_llada().double(), rows_of()
    decoder = RuleDecoder(model, ConfidenceThreshold(0.4), 6, block_length=3, reused=ReusedColumns(kind, 2))
    together, passes = decoder(rows, draw()), decoder.forward_passes
    assert len(set(passes.tolist())) > 1
    for k in range(4):
        alone = decoder({name: column[k : k + 1] for name, column in rows.items()}, draw())
        assert torch.equal(alone[0], together[k])
        assert decoder.forward_passes.tolist() == [passes[k].item()]


def test_models_that_read_what_is_settled_once_are_refused(tiny_llada, tmp_path):
    blocks = tiny_llada()
    BlockDiffusion(2).attach(blocks)
    save_foreign(tmp_path, foreign_model("llama"), foreign_tokenizer())
    for model in (blocks, load_from_causal(tmp_path, mask_token="<extra_260>")):
        with pytest.raises(
            UsageError, match=r"^module\.cache=dual is for LLaDA's bidirectional body.*module\.cache=none"
        ):
            generate_masked_diffusion(model, rows_of(), draw(), steps=6, reused=ReusedColumns("dual"))
