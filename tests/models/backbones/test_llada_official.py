"""Published LLaDA checkpoints: parity with a forward written from the published names alone, and saving."""

import pytest
import torch
import torch.nn.functional as F
from helpers.llada import CONFIG, IDS, build_small, make_weights, reference_logits, write_official

from models.backbones import checkpoint_files
from models.backbones.llada import load_llada
from models.backbones.official_layout import config_from_official, leap_to_official_key, official_to_leap_key
from models.functional.errors import UsageError


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({}, "model.transformer."),
        ({}, "transformer."),
        ({"n_kv_heads": 2}, "model.transformer."),
        ({"n_kv_heads": 1, "weight_tying": True}, "model.transformer."),
        ({"embedding_size": None}, "model.transformer."),
    ],
)
def test_parity_with_the_published_architecture(tmp_path, changes, prefix):
    config = CONFIG | changes
    weights = make_weights(config, prefix)
    model = load_llada(write_official(tmp_path, config, weights))
    expected = reference_logits(config, weights, IDS, prefix)
    assert model(IDS).shape == (2, 6, config["embedding_size"] or config["vocab_size"])
    torch.testing.assert_close(model(IDS).double(), expected, atol=2e-5, rtol=0)
    for wrong in ({"causal": True}, {"interleaved": True}):
        assert (reference_logits(config, weights, IDS, prefix, **wrong) - expected).abs().max() > 0.1


def test_every_name_maps_to_one_place_and_back(tmp_path):
    weights = make_weights(CONFIG)
    model = load_llada(write_official(tmp_path, CONFIG, weights))
    ours = model.state_dict()
    assert {official_to_leap_key(name) for name in weights} == set(ours)
    assert len(weights) == len(ours)
    for name, weight in weights.items():
        our_name = official_to_leap_key(name)
        assert leap_to_official_key(our_name) == name
        assert official_to_leap_key(name.removeprefix("model.")) == our_name
        assert torch.equal(ours[our_name], weight)
    for stranger in ("model.transformer.wpe.weight", "model.transformer.blocks.0.att_proj.weight", "lm_head.weight"):
        assert official_to_leap_key(stranger) is None
    for stranger in ("model.layers.0.self_attn.q_norm.weight", "score.weight", "model.norm.bias"):
        assert leap_to_official_key(stranger) is None


def test_config_fields(tmp_path):
    config = load_llada(write_official(tmp_path)).config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (56, 24, 40)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3, 4, 4)
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id, config.bos_token_id) == (49, 48, 48, None)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert (config.max_position_embeddings, config.rms_norm_eps, config.tie_word_embeddings) == (64, 1e-4, False)
    assert config_from_official(CONFIG | {"mlp_hidden_size": None})["intermediate_size"] == 96


def test_shards_equal_one_file(tmp_path):
    one = load_llada(write_official(tmp_path / "one")).state_dict()
    three = load_llada(write_official(tmp_path / "three", shards=3)).state_dict()
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
def test_saved_folder_comes_back_bit_equal(tmp_path, tied, dtype):
    weights = make_weights(CONFIG | {"weight_tying": tied})
    model = load_llada(write_official(tmp_path / "official", CONFIG | {"weight_tying": tied}, weights), dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    again = load_llada(tmp_path / "saved")
    assert again.dtype == dtype
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(IDS), again(IDS))
    sizes = ("hidden_size", "rope_parameters", "rms_norm_eps", "mask_token_id", "pad_token_id", "tie_word_embeddings")
    assert all(getattr(model.config, name) == getattr(again.config, name) for name in sizes)


def test_loaded_weights_outlive_their_file(tmp_path):
    model = load_llada(write_official(tmp_path))
    before = model(IDS)
    write_official(tmp_path, weights={name: torch.zeros_like(weight) for name, weight in make_weights(CONFIG).items()})
    assert torch.equal(model(IDS), before)


def test_left_padding_changes_nothing(tmp_path):
    model = load_llada(write_official(tmp_path))
    padded = F.pad(IDS, (3, 0), value=model.config.pad_token_id)
    mask = F.pad(torch.ones_like(IDS).bool(), (3, 0), value=False)
    torch.testing.assert_close(model(padded, mask)[:, 3:], model(IDS), atol=1e-5, rtol=0)


def test_attention_looks_ahead(tmp_path):
    model = load_llada(write_official(tmp_path))
    changed = IDS.clone()
    changed[:, -1] = 5
    assert (model(changed)[:, 0] - model(IDS)[:, 0]).abs().max() > 1e-2


def test_dtype(tmp_path):
    weights = {name: weight.bfloat16() for name, weight in make_weights(CONFIG).items()}
    folder = write_official(tmp_path, weights=weights)
    assert load_llada(folder).dtype == torch.bfloat16
    for dtype in ("float32", torch.float32, "torch.float32"):
        model = load_llada(folder, dtype=dtype)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert torch.equal(model.embedding, weights["model.transformer.wte.weight"].float())
    with pytest.raises(UsageError, match=r"model\.dtype=int8 .*bfloat16, float16"):
        load_llada(folder, dtype="int8")
    with pytest.raises(UsageError, match=r"model\.device=nowhere"):
        load_llada(folder, device="nowhere")


def test_rotary_frequencies_survive_a_cast(tmp_path):
    config = CONFIG | {"max_sequence_length": 1024}
    weights = {name: weight.bfloat16() for name, weight in make_weights(config).items()}
    model = load_llada(write_official(tmp_path, config, weights))
    for cast in (model, model.to(torch.bfloat16), model.float(), build_small().bfloat16()):
        assert cast.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = torch.arange(1000).remainder(50)[None]
    torch.testing.assert_close(model(ids).double(), reference_logits(config, weights, ids), atol=1e-3, rtol=0)


def test_the_padding_row_trains(tmp_path):
    for model in (load_llada(write_official(tmp_path)), build_small()):
        pad = model.config.pad_token_id
        model(torch.full((1, 4), pad)).square().sum().backward()
        assert model.embedding[pad].abs().max() > 0
        assert model.embedding.grad[pad].abs().max() > 0


def test_hub_name(tmp_path, monkeypatch):
    folder, asked = write_official(tmp_path), {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(checkpoint_files.huggingface_hub, "snapshot_download", download)
    load_llada("someone/LLaDA-tiny")
    assert asked["name"] == "someone/LLaDA-tiny"
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["patterns"])

    def fail(name, allow_patterns):
        raise FileNotFoundError("Got: ConnectError\nand so on")

    monkeypatch.setattr(checkpoint_files.huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UsageError, match=r"someone/LLaDA-tiny: this folder does not exist here.*model\.path=FOLDER"):
        load_llada("someone/LLaDA-tiny")
    with pytest.raises(UsageError, match=r"does not exist here; type an existing folder"):
        load_llada(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"is a file; type the folder"):
        load_llada(folder / "model.safetensors")
