"""A causal LM as a network that fills masks: against the causal model, and who sees whom."""

import pytest
import torch
from helpers.concept import generator
from helpers.foreign import foreign_model, foreign_tokenizer, save_foreign
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from models.backbones.autoregressive import generate_autoregressive
from models.backbones.bidirectional import any_order_nll, fill_nll
from models.backbones.masked_from_causal import MaskedFromCausal, load_from_causal, load_masked, require_attention
from models.diffusion.sampler import generate_by_rule, generate_masked_diffusion, linear_transfer_counts
from models.functional.attention import response_attention, versions_side_by_side
from models.functional.errors import UsageError
from models.functional.vocabulary import choose_mask_token

MASK = 260
ARCHITECTURES = ["llama", "qwen3", "gpt2", "gemma"]


@pytest.fixture(params=ARCHITECTURES)
def folder(request, tmp_path):
    return save_foreign(tmp_path / "causal", foreign_model(request.param), foreign_tokenizer())


@pytest.fixture
def llama(tmp_path):
    return save_foreign(tmp_path / "causal", foreign_model("llama"), foreign_tokenizer())


def build(folder, **options) -> MaskedFromCausal:
    return load_from_causal(folder, mask_token="<extra_260>", **options).eval()


def make_batch(rows=3, prompt=5, response=6) -> dict[str, torch.Tensor]:
    """Rows with prompts of several lengths, padded on the left."""
    ids = torch.randint(2, 250, (rows, prompt + response), generator=generator())
    seen = torch.ones_like(ids, dtype=torch.bool)
    for row in range(rows):
        seen[row, :row] = False
    mask = torch.arange(prompt + response).expand(rows, -1) >= prompt
    return {"input_ids": ids, "attention_mask": seen, "response_mask": mask}


def states(model, batch):
    """Of each position itself, without the shift: (B, L - 1, D)."""
    ids, seen, response = batch["input_ids"], batch["attention_mask"], batch["response_mask"]
    return model.hidden(model.embed(ids), seen, response_mask=response)[:, 1:]


# -- parity with the causal model ------------------------------------------------------------------------------------


@torch.no_grad()
def test_with_blocks_of_one_logits_are_those_of_transformers(folder):
    model, batch = build(folder), make_batch()
    causal = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.block_length = 1
    logits = model(**{n: batch[n] for n in ("input_ids", "attention_mask", "response_mask")})[:, 1:]
    for row in range(3):
        ids = batch["input_ids"][row : row + 1, row:]
        alone = causal(input_ids=ids).logits[0, :-1]
        words = model.allowed == 0
        assert_close(logits[row, row:, words], alone[:, words], atol=2e-5, rtol=1e-4)
    model.block_length = None
    whole = model(batch["input_ids"], batch["attention_mask"], batch["response_mask"])[:, 1:]
    assert not torch.allclose(whole[:, -3:, 3], logits[:, -3:, 3], atol=1e-3)


@torch.no_grad()
def test_blocks_of_one_write_what_the_causal_model_writes(llama):
    model, batch = build(llama), make_batch()
    causal = AutoModelForCausalLM.from_pretrained(llama).eval()
    causal.get_output_embeddings().weight[MASK] = 0
    greedy = generate_autoregressive(causal, batch, generator(), temperature=0.0)
    written = {}
    for length in (1, None):
        model.block_length = length
        written[length] = generate_masked_diffusion(
            model, batch, generator(), steps=6, block_length=1, temperature=0.0, remasking="random"
        )
    usable = (greedy != MASK).all(-1)
    assert usable.any()
    assert torch.equal(written[1][usable], greedy[usable])
    assert not torch.equal(written[None], written[1])


# -- who sees whom ---------------------------------------------------------------------------------------------------


def test_attention_between_prompt_and_response_by_hand():
    seen, response = torch.tensor([[False, True, True, True, True, True]]), torch.tensor([[False] * 3 + [True] * 3])
    visible = {
        None: ["100000", "010000", "011000", "011111", "011111", "011111"],
        2: ["100000", "010000", "011000", "011110", "011110", "011111"],
        1: ["100000", "010000", "011000", "011100", "011110", "011111"],
    }
    for length, rows in visible.items():
        found = response_attention(seen, response, block_length=length)[0, 0].long().tolist()
        assert ["".join(map(str, row)) for row in found] == rows
    everything = response_attention(seen, response, prompt_sees_response=True)[0, 0].long().tolist()
    assert ["".join(map(str, row)) for row in everything] == ["111111", *["011111"] * 5]


def test_versions_of_the_last_columns_stand_side_by_side_by_hand():
    rows = ["1000", "1100", "1111", "1111"]
    visible = torch.tensor([[[[c == "1" for c in row] for row in rows]]])
    found, column = versions_side_by_side(visible, 2, 2)
    assert column.tolist() == [0, 1, 2, 3, 2, 3]
    written = ["".join(map(str, row)) for row in found[0, 0].long().tolist()]
    assert written == ["100000", "110000", "111100", "111100", "110011", "110011"]


@torch.no_grad()
def test_the_prompt_never_sees_the_response_and_the_response_sees_itself(folder):
    batch = make_batch()
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -1] = 251
    for conversion, apart in (("causal_prompt", True), ("bidirectional", False)):
        model = build(folder, conversion=conversion)
        one, two = states(model, batch), states(model, other)
        prompt = one[:, :4][batch["attention_mask"][:, :4]]
        assert torch.equal(prompt, two[:, :4][batch["attention_mask"][:, :4]]) == apart
        assert not torch.allclose(one[:, 4:], two[:, 4:], atol=1e-3)  # the separator and earlier response positions


@torch.no_grad()
def test_a_separator_of_the_prompt_predicts_the_first_token_as_the_causal_model_does(llama):
    batch = make_batch()
    hidden = {**batch, "input_ids": torch.where(batch["response_mask"], MASK, batch["input_ids"])}
    first = torch.zeros_like(batch["response_mask"])
    first[:, 5] = True
    for separator, same in (("prompt", True), ("response", False)):
        model = build(llama, separator=separator)
        parts = (first, batch["attention_mask"], batch["response_mask"])
        masked = fill_nll(model, hidden["input_ids"], batch["input_ids"], *parts)
        model.block_length = 1
        causal = fill_nll(model, batch["input_ids"], batch["input_ids"], *parts)
        assert torch.allclose(masked, causal, atol=1e-4) == same


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(folder):
    model, batch = build(folder), make_batch()
    together = states(model, batch)
    for row in range(3):
        alone = states(model, {name: column[row : row + 1, row:] for name, column in batch.items()})
        assert_close(together[row : row + 1, row:], alone, atol=1e-4, rtol=1e-3)


def test_rows_without_a_response_mask_are_refused(llama):
    model = build(llama)
    with pytest.raises(UsageError, match=r"data=pairs"):
        model.hidden(model.embed(torch.tensor([[1, 2]])), torch.ones(1, 2).bool())


# -- a prompt that is read once --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"separator": "prompt"}, {"conversion": "bidirectional"}])
def test_a_prompt_is_read_once_and_the_states_are_those_of_whole_rows(folder, options, monkeypatch):
    model, batch = build(folder, **options), make_batch()
    response, inner, columns = batch["response_mask"], model._states, []
    texts = [torch.where(response & (torch.arange(11) >= 11 - k), MASK, batch["input_ids"]) for k in (6, 4, 1)]
    apart = "conversion" not in options
    for model.block_length in (None, 2):
        expected = [
            model.hidden(model.embed(text), batch["attention_mask"], response_mask=response)[:, -6:] for text in texts
        ]
        monkeypatch.setattr(
            model, "_states", lambda embeds, *a, **k: columns.append(embeds.shape[1]) or inner(embeds, *a, **k)
        )
        read = model.response_reader(batch["attention_mask"], response)
        found = [read(text) for text in texts]
        monkeypatch.setattr(model, "_states", inner)
        assert_close(torch.stack(found), torch.stack(expected), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found[0], found[1], atol=1e-3)
        assert columns == ([11, 7, 7] if apart or model.block_length else [11, 11, 11])
        columns.clear()


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_texts_with_a_prompt_that_is_read_once_are_those_of_whole_rows(llama, guidance, monkeypatch):
    """With guidance too, whose second prompt is masked."""
    model, batch = build(llama), make_batch()
    options = {"steps": 6, "guidance": guidance, "temperature": 0.0, "remasking": "random"}
    cached = generate_masked_diffusion(model, batch, generator(), **options)

    def whole(attention_mask, response_mask):
        return lambda ids: model.hidden(model.embed(ids), attention_mask, response_mask=response_mask)[:, -6:]

    monkeypatch.setattr(model, "response_reader", whole)
    assert torch.equal(cached, generate_masked_diffusion(model, batch, generator(), **options))
    without = generate_masked_diffusion(model, batch, generator(), **options | {"guidance": 4.0})
    assert not torch.equal(cached, without)


# -- the mask --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_mask_begins_as_the_mean_row_at_the_median_length(llama):
    model = build(llama)
    table = model.causal.get_input_embeddings().weight
    row = model.embed(torch.tensor([MASK]))[0]
    assert_close(row.norm(), table.norm(dim=-1).median())
    assert_close(torch.cosine_similarity(row, table.mean(0), dim=0), torch.tensor(1.0))
    assert torch.equal(model.embed(torch.tensor([5]))[0], table[5])
    assert_close(model.embedding[MASK], row)
    assert torch.equal(model.embedding[5], table[5])


@torch.no_grad()
def test_neither_the_mask_nor_padding_of_the_vocabulary_is_ever_drawn(tmp_path):
    causal = foreign_model("llama", vocab_size=448)
    causal.get_output_embeddings().weight[[MASK, *range(400, 448)]] *= 50
    model = build(save_foreign(tmp_path, causal, foreign_tokenizer()))
    batch = make_batch(rows=16)
    drawn = generate_masked_diffusion(model, batch, generator(), steps=3)
    by_rule = generate_by_rule(model, batch, generator(), rule=lambda p, h, open_: open_, temperature=1.0).responses
    for tokens in (drawn, by_rule):
        assert (tokens != MASK).all()
        assert (tokens < 400).all()
    assert linear_transfer_counts(6, 3) == [2, 2, 2]
    guided = generate_masked_diffusion(model, batch, generator(), steps=3, guidance=1.5)
    assert (guided < 400).all()
    free = model.causal.get_output_embeddings()(states(model, batch))
    assert bool((free.argmax(-1) == MASK).any() | (free.argmax(-1) >= 400).any())  # they would have been


def test_the_mask_token_is_chosen_among_those_without_a_use():
    tokenizer = foreign_tokenizer(additional_special_tokens=["<spare_1>", "<spare_2>", "<turn>"])
    tokenizer.chat_template = "<turn>{{ messages[0].content }}"
    assert choose_mask_token(tokenizer, "auto") == "<spare_2>"
    assert choose_mask_token(tokenizer, "<extra_270>") == "<extra_270>"
    with pytest.raises(UsageError, match=r"model\.mask_token=<none>.*<spare_1>, <spare_2>"):
        choose_mask_token(tokenizer, "<none>")
    with pytest.raises(UsageError, match="no special token without a use"):
        choose_mask_token(foreign_tokenizer(), "auto")
    tokenizer.mask_token = "<spare_1>"
    assert choose_mask_token(tokenizer, "auto") == "<spare_1>"


# -- files and adapters ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_network_reads_back_with_adapters_merged(folder, tmp_path):
    model, batch = build(folder, lora_rank=2, separator="prompt"), make_batch()
    assert isinstance(model.causal, PeftModel)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.normal_(std=0.1)
            assert "lora_" in name or name == "mask_change"
    model.save_pretrained(tmp_path / "saved")
    again = load_masked(tmp_path / "saved")
    arguments = (batch["input_ids"], batch["attention_mask"], batch["response_mask"])
    hidden = (torch.where(arguments[2], MASK, arguments[0]), *arguments[1:])
    assert_close(again(*hidden), model(*hidden), atol=1e-4, rtol=1e-4)
    assert again.options == model.options
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "causal")
    assert_close(plain(input_ids=arguments[0]).logits, model.causal_logits(arguments[0]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_saved_network_is_trained_further_with_its_own_mask_and_options(llama, tmp_path):
    model, batch = build(llama, separator="prompt", lora_rank=2), make_batch()
    model.mask_change += 0.1
    model.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).write_text((llama / name).read_text())
    again = load_from_causal(tmp_path / "saved", separator="prompt", lora_rank=2)
    assert again.training
    assert_close(again.mask_embedding, model.mask_embedding)
    assert_close(states(again.eval(), batch), states(model, batch), atol=1e-5, rtol=1e-5)
    trained = {name for name, weight in again.named_parameters() if weight.requires_grad}
    assert "mask_change" in trained
    assert all("lora" in name or name == "mask_change" for name in trained)
    for wrong in ({}, {"separator": "prompt", "mask_token": "<extra_260>"}, {"conversion": "bidirectional"}):
        with pytest.raises(
            UsageError, match=r"type model\.conversion=causal_prompt model\.separator=prompt, and leave"
        ):
            load_from_causal(tmp_path / "saved", **wrong)


def test_bfloat16_weights_train_adapters_and_a_mask_in_float32(llama):
    model, batch = build(llama, dtype="bfloat16", lora_rank=2), make_batch()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert next(model.causal.parameters()).dtype == torch.bfloat16
    any_order_nll(model, batch, generator()).sum().backward()
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in trained.values())
    assert model.mask_change.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("gemma2", {}, "layers of sliding_attention"),
        ("starcoder2", {}, "layers of sliding_attention"),
        ("mamba", {}, "."),
        ("bloom", {}, "."),
    ],
)
def test_architectures_that_cannot_attend_so_are_refused_by_name(architecture, options, message, tmp_path):
    folder = save_foreign(tmp_path, foreign_model(architecture, **options), foreign_tokenizer())
    with pytest.raises(UsageError, match=message):
        build(folder)


def test_the_trial_of_attention_works_around_any_mask_token(llama, monkeypatch):
    monkeypatch.setattr(MaskedFromCausal, "mask_id", 4)
    require_attention(build(llama), "model.path=llama")
