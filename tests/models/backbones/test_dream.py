"""Published Dream checkpoints: parity with a forward written from the published names alone, and what is refused."""

import pytest
import torch
from helpers.concept import generator
from helpers.dream import CONFIG, WORDS, make_weights, reference_logits, write_dream
from torch.testing import assert_close

from models.backbones.dream_layout import config_from_dream, dream_mask_id
from models.backbones.llada import load_llada
from models.backbones.masked_from_causal import NEVER, load_from_causal, load_masked
from models.diffusion.sampler import generate_masked_diffusion
from models.functional.errors import UsageError

MASK = CONFIG["mask_token_id"]
TOKENS = torch.arange(MASK)  # ids that can be predicted


def make_batch() -> dict[str, torch.Tensor]:
    """Two rows of 4 prompt and 5 response columns, some masked; the second has two columns of padding."""
    ids = torch.randint(0, 257, (2, 9), generator=generator())
    ids[:, [5, 6, 8]] = MASK
    seen = torch.ones_like(ids, dtype=torch.bool)
    seen[1, :2] = False
    return {"input_ids": ids, "attention_mask": seen, "response_mask": torch.arange(9).expand(2, -1) >= 4}


def shifted(logits: torch.Tensor) -> torch.Tensor:
    """As the original's sampler reads them: the state before a position predicts its token."""
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"attention_bias": False, "use_cache": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    ],
)
def test_parity_with_the_published_architecture(tmp_path, changes):
    config, batch = CONFIG | changes, make_batch()
    weights = make_weights(config)
    logits = load_masked(write_dream(tmp_path, config, weights))(**batch)
    ids, seen = batch["input_ids"], batch["attention_mask"]
    plain = reference_logits(config, weights, ids, seen)
    expected = shifted(plain)
    told = seen.clone()
    told[1, 2] = False  # predicted from a column of padding
    assert_close(logits[told][:, TOKENS].double(), expected[told][:, TOKENS], atol=1e-5, rtol=1e-5)
    for wrong in (plain, shifted(reference_logits(config, weights, ids, seen, causal=True))):
        assert (wrong - expected)[told].abs().max() > 0.1
    alone = shifted(reference_logits(config, weights, ids[1:, 2:], seen[1:, 2:]))
    assert_close(expected[1, 3:], alone[0, 1:])


def test_a_rotary_base_that_config_json_leaves_out_is_the_originals_default():
    left_out = {name: value for name, value in CONFIG.items() if name != "rope_theta"}
    assert config_from_dream(left_out)["rope_parameters"]["rope_theta"] == 10_000.0
    assert config_from_dream(CONFIG)["rope_parameters"]["rope_theta"] == 5000.0
    newer = left_out | {"rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}}
    assert config_from_dream(newer)["rope_parameters"]["rope_theta"] == 7000.0
    assert config_from_dream({**left_out, "num_key_value_heads": None})["num_key_value_heads"] == 4
    assert dream_mask_id({"vocab_size": 152064}) == 151666


@torch.no_grad()
def test_the_mask_and_ids_that_are_no_tokens_are_never_predicted(tmp_path):
    model, batch = load_masked(write_dream(tmp_path / "with")), make_batch()
    assert (model.mask_id, model.options.vocab_size) == (MASK, WORDS)
    logits = model(**batch)
    assert (logits[..., MASK:] < NEVER / 2).all()
    assert (logits[..., :MASK] > NEVER / 2).all()
    without = load_masked(write_dream(tmp_path / "without", tokenizer=False))
    assert without.options.vocab_size == CONFIG["vocab_size"]
    assert torch.equal(without(**batch)[..., :MASK], logits[..., :MASK])


@torch.no_grad()
def test_a_saved_model_is_the_same_again(tmp_path):
    model, batch = load_masked(write_dream(tmp_path / "published")), make_batch()
    model.save_pretrained(tmp_path / "saved")
    again = load_masked(tmp_path / "saved")
    assert torch.equal(again(**batch), model(**batch))
    assert again.options == model.options


@torch.no_grad()
def test_weights_keep_their_type_unless_another_is_typed(tmp_path):
    weights = {name: weight.bfloat16() for name, weight in make_weights(CONFIG).items()}
    write_dream(tmp_path, weights=weights)
    assert load_masked(tmp_path).embedding.dtype == torch.bfloat16
    assert torch.equal(load_masked(tmp_path, dtype="float32").embedding, weights["model.embed_tokens.weight"].float())


@torch.no_grad()
def test_a_response_is_filled_in_and_a_reader_gives_the_states_of_the_whole_row(tmp_path):
    model, batch = load_masked(write_dream(tmp_path)), make_batch()
    text = generate_masked_diffusion(model, batch, generator(), steps=5, temperature=0.0)
    assert text.shape == (2, 5)
    assert (text < MASK).all()
    seen, response = batch["attention_mask"], batch["response_mask"]
    whole = model.hidden(model.embed(batch["input_ids"]), seen, response_mask=response)[:, 4:]
    read = model.response_reader(seen, response)
    for _ in range(2):
        assert_close(read(batch["input_ids"]), whole)


@torch.no_grad()
def test_model_from_causal_reads_it_for_further_training(tmp_path):
    write_dream(tmp_path)
    model = load_from_causal(tmp_path, conversion="bidirectional", lora_rank=2)
    assert model.training
    assert torch.equal(model.eval()(**make_batch()), load_masked(tmp_path)(**make_batch()))
    for options in (
        {},
        {"conversion": "bidirectional", "separator": "prompt"},
        {"conversion": "bidirectional", "mask_token": "he"},
    ):
        with pytest.raises(UsageError, match=r"fills masks already; type model\.conversion=bidirectional"):
            load_from_causal(tmp_path, **options)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["DreamForCausalLM"]}, r'architectures is \["DreamForCausalLM"\].*\["DreamModel"\]'),
        ({"block_size": 32}, "block_size is 32"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, 'rope_type is "yarn"'),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": 26}, "hidden_size 26"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": "three"}, 'num_hidden_layers is "three"'),
        ({"rope_theta": None}, "rope_theta is null; it has to be a number above 0"),
        ({"mask_token_id": 270}, "mask_token_id 270 is not one of the 270 rows"),
        ({"mask_token_id": None}, "mask_token_id null"),
    ],
)
def test_fields_that_are_refused(tmp_path, changes, message):
    write_dream(tmp_path, CONFIG | changes, make_weights(CONFIG))
    with pytest.raises(UsageError, match=message):
        load_masked(tmp_path)


def test_tensors_that_do_not_fit(tmp_path):
    name = "model.layers.1.self_attn.k_proj.bias"
    for i, (change, message) in enumerate(
        [
            ({name: None}, rf"1 missing \({name}\)"),
            ({"model.layers.1.self_attn.q_norm.weight": torch.ones(6)}, r"1 unexpected \(.*q_norm\.weight\)"),
            ({name: torch.ones(11)}, r"k_proj\.bias has shape \(11,\) where config\.json asks for \(12,\)"),
        ]
    ):
        changed = {key: weight for key, weight in (make_weights(CONFIG) | change).items() if weight is not None}
        with pytest.raises(UsageError, match=message):
            load_masked(write_dream(tmp_path / str(i), weights=changed))


def test_a_tokenizer_with_another_mask_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"the id 260 in its tokenizer and 261 in config\.json"):
        load_masked(write_dream(tmp_path, mask=260))


def test_the_reader_of_llada_says_what_to_type(tmp_path):
    write_dream(tmp_path)
    with pytest.raises(UsageError, match=r"holds a Dream model, not LLaDA; type teacher\.path="):
        load_llada(tmp_path)


def test_packed_text_is_refused(tmp_path):
    model = load_masked(write_dream(tmp_path))
    with pytest.raises(UsageError, match=r"data=pairs"):
        model.hidden(model.embed(torch.tensor([[1, 2]])), torch.ones(1, 2).bool())
