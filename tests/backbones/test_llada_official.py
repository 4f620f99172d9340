"""Published LLaDA checkpoints: parity with a forward written from the published names alone, and every refusal."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.backbones import checkpoint_files
from models.backbones.causal import build_body
from models.backbones.llada import LladaModel, build_llada, load_llada
from models.backbones.official_layout import config_from_official, leap_to_official_key, official_to_leap_key
from models.functional.errors import UsageError

CONFIG = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_theta": 5000.0,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "d_model": 24,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": None,
    "mlp_ratio": 4,
    "mlp_hidden_size": 40,
    "vocab_size": 50,
    "embedding_size": 56,
    "max_sequence_length": 64,
    "rms_norm_eps": 1e-4,
    "weight_tying": False,
    "mask_token_id": 49,
    "eos_token_id": 48,
    "pad_token_id": 48,
}
IDS = torch.tensor([[3, 49, 7, 49, 11, 2], [48, 0, 49, 9, 9, 30]])


def make_weights(config: dict, prefix: str = "model.transformer.") -> dict[str, torch.Tensor]:
    """Random tensors under the published names; large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    width, ffn, rows = config["d_model"], config["mlp_hidden_size"], config["embedding_size"] or config["vocab_size"]
    kv_width = (config["n_kv_heads"] or config["n_heads"]) * width // config["n_heads"]
    shapes = {"wte": (rows, width), "ln_f": (width,)}
    if not config["weight_tying"]:
        shapes["ff_out"] = (rows, width)
    for i in range(config["n_layers"]):
        shapes |= {f"blocks.{i}.{norm}": (width,) for norm in ("attn_norm", "ff_norm")}
        shapes |= {f"blocks.{i}.{proj}": (kv_width, width) for proj in ("k_proj", "v_proj")}
        shapes |= {f"blocks.{i}.{proj}": (width, width) for proj in ("q_proj", "attn_out")}
        shapes |= {f"blocks.{i}.{proj}": (ffn, width) for proj in ("ff_proj", "up_proj")}
        shapes |= {f"blocks.{i}.ff_out": (width, ffn)}
    return {
        f"{prefix}{name}.weight": torch.randn(shape, generator=generator)
        * (2 / math.sqrt(shape[-1]) if shape[1:] else 1)
        for name, shape in shapes.items()
    }


def write_official(folder, config=CONFIG, weights=None, shards: int = 1):
    folder.mkdir(parents=True, exist_ok=True)
    weights = make_weights(config) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        part = {name: weights[name] for name in list(weights)[i::shards]}
        save_file(part, folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def reference_logits(config, weights, ids, prefix="model.transformer.", causal=False, interleaved=False):
    """The published architecture in plain torch and float64."""
    w = {name.removeprefix(prefix).removesuffix(".weight"): weight.double() for name, weight in weights.items()}
    heads, kv_heads, length = config["n_heads"], config["n_kv_heads"] or config["n_heads"], ids.shape[1]
    head_width = config["d_model"] // heads

    def norm(x, scale):
        return scale * x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()

    frequency = config["rope_theta"] ** -(torch.arange(0, head_width, 2).double() / head_width)
    angle = torch.arange(length).double()[:, None] * frequency

    def rotate(x):  # (B, H, L, d)
        first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
        return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)

    def split(x, n):
        return x.unflatten(-1, (n, head_width)).transpose(1, 2)

    x = w["wte"][ids]
    for i in range(config["n_layers"]):
        block = {name.removeprefix(f"blocks.{i}."): weight for name, weight in w.items() if f"blocks.{i}." in name}
        h = norm(x, block["attn_norm"])
        q, k = rotate(split(h @ block["q_proj"].T, heads)), rotate(split(h @ block["k_proj"].T, kv_heads))
        k = k.repeat_interleave(heads // kv_heads, dim=1)
        v = split(h @ block["v_proj"].T, kv_heads).repeat_interleave(heads // kv_heads, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(head_width)
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ block["attn_out"].T
        h = norm(x, block["ff_norm"])
        x = x + (F.silu(h @ block["ff_proj"].T) * (h @ block["up_proj"].T)) @ block["ff_out"].T
    return norm(x, w["ln_f"]) @ (w["wte"] if config["weight_tying"] else w["ff_out"]).T


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"include_bias": True}, "include_bias is true"),
        ({"include_qkv_bias": True}, "include_qkv_bias is true"),
        ({"bias_for_layer_norm": True}, "bias_for_layer_norm is true"),
        ({"alibi": True}, "alibi is true"),
        ({"rope": False}, "rope is false"),
        ({"activation_type": "gelu"}, 'activation_type is "gelu"'),
        ({"block_type": "sequential"}, 'block_type is "sequential"'),
        ({"layer_norm_type": "gemma_rms"}, 'layer_norm_type is "gemma_rms"'),
        ({"attention_layer_norm": True}, "attention_layer_norm is true"),
        ({"scale_logits": True}, "scale_logits is true"),
        ({"block_group_size": 3}, "block_group_size is 3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"d_model": 26}, "d_model 26"),
        ({"n_kv_heads": 3}, "n_kv_heads 3"),
        ({"n_layers": "three"}, 'n_layers is "three"'),
        ({"rope_theta": None}, "rope_theta is null; it has to be a number above 0"),
        ({"embedding_size": 10}, "embedding_size 10 is smaller"),
        ({"mask_token_id": 56}, "mask_token_id 56"),
        ({"mask_token_id": None}, 'has no mask_token_id.*add "mask_token_id"'),
        ({"model_type": "olmo"}, "olmo model, not LLaDA"),
    ],
)
def test_config_refusals(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(UsageError, match=message):
        load_llada(tmp_path)


def test_what_config_json_leaves_out():
    with pytest.raises(UsageError, match=r'block_type is "sequential" \(the original\'s default\)'):
        config_from_official({name: value for name, value in CONFIG.items() if name != "block_type"})
    published = CONFIG | {"vocab_size": 126464, "embedding_size": 126464, "mask_token_id": None}
    assert config_from_official(published)["mask_token_id"] == 126336


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", None])
def test_other_architectures_are_refused_by_name(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "hidden_size": 8, "n_embd": 8}))
    with pytest.raises(UsageError, match=rf"{kind or 'nameless'} model, not LLaDA.*look backwards only.*model\.path="):
        load_llada(tmp_path)


def test_tensors_that_do_not_fit(tmp_path):
    weights = make_weights(CONFIG)
    name = "model.transformer.blocks.1.up_proj.weight"
    for i, (change, message) in enumerate(
        [
            ({name: None}, r"asks for 30 tensors: 1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
            ({"model.transformer.wpe.weight": torch.ones(2)}, r"1 unexpected \(model\.transformer\.wpe\.weight\)"),
            ({name: torch.ones(40, 23)}, r"blocks\.1\.up_proj\.weight has shape \(40, 23\).* asks for \(40, 24\)"),
            ({name.removeprefix("model."): torch.ones(40, 24)}, r"1 unexpected"),
            ({name: torch.ones(40, 24, dtype=torch.int8)}, r"up_proj\.weight as I8: a quantised checkpoint"),
            (dict.fromkeys(list(weights)[:5]), r"5 missing \(.*, \.\.\.\)"),
        ]
    ):
        changed = {key: weight for key, weight in (weights | change).items() if weight is not None}
        folder = write_official(tmp_path / str(i), weights=changed)
        with pytest.raises(UsageError, match=message):
            load_llada(folder)


def test_files_that_are_not_whole(tmp_path):
    cut = write_official(tmp_path / "cut", shards=2)
    shard = cut / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    for left in (whole[:-100], whole[:20], b"version https://git-lfs.github.com/spec/v1\n", b""):
        shard.write_bytes(left)
        with pytest.raises(UsageError, match=rf"{shard.name} is not a complete safetensors file.*download it again"):
            load_llada(cut)
    shard.unlink()
    with pytest.raises(UsageError, match=rf"lacks {shard.name}"):
        load_llada(cut)
    (cut / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UsageError, match=r"index\.json has no weight_map"):
        load_llada(cut)
    (cut / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(UsageError, match=r"config\.json is not readable as JSON"):
        load_llada(cut)
    (cut / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json does not exist"):
        load_llada(cut)


def test_pickles_are_refused(tmp_path):
    folder = write_official(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"pytorch_model\.bin, a pickle.*safetensors"):
        load_llada(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match=r"holds no weights; expected model\.safetensors"):
        load_llada(folder)


def test_own_folder_refusals(tmp_path):
    build_small().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"mask_token_id": None}))
    with pytest.raises(UsageError, match="no mask_token_id"):
        load_llada(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"hidden_size": "wide"}))
    with pytest.raises(UsageError, match=r"config\.json: .*hidden_size"):
        load_llada(tmp_path)


def build_small(build=build_llada, **changes) -> LladaModel:
    options = {
        "vocab_size": 20,
        "mask_token_id": 19,
        "eos_token_id": 18,
        "pad_token_id": 18,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "rope_theta": 10_000.0,
    }
    return build(**options | changes)


def test_build_llada():
    model = build_small(num_key_value_heads=2, tie_word_embeddings=True)
    assert model(torch.tensor([[1, 19, 2]])).shape == (1, 3, 20)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads == 2
    assert model.config.rope_parameters["rope_theta"] == 10_000.0
    torch.manual_seed(3)
    first = build_small().state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(weight, first[name]) for name, weight in build_small().state_dict().items())


@pytest.mark.parametrize("spread", [0.02, 0.25])
def test_the_spread_of_fresh_weights(spread):
    """Of a LLaDA, and of a body that an objective turns both ways: 1 / sqrt(16) is what a width of 16 wants."""
    both_ways = partial(build_body, attention="bidirectional")
    for build in (build_llada, both_ways):
        model = build_small(build, initializer_range=spread)
        for weight in (model.embedding, model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight):
            assert weight.std().item() == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 18}, r"model\.hidden_size=18 .*multiple of 8, such as model\.hidden_size=24"),
        ({"hidden_size": 12}, r"model\.hidden_size=12 .*even width"),
        ({"num_key_value_heads": 3}, r"model\.num_key_value_heads=3 does not divide"),
        ({"num_hidden_layers": 0}, r"model\.num_hidden_layers=0 has to be above 0"),
        ({"rope_theta": -1.0}, r"model\.rope_theta=-1\.0"),
        ({"mask_token_id": 20}, r"model\.mask_token_id=20 is outside the vocabulary; type an id from 0 to 19"),
        ({"neighbour_heads": 5}, r"model\.neighbour_heads=5 must lie between 0 and the 4 key-value heads"),
        ({"mask_token_id": 18}, r"model\.mask_token_id=18 is also the end or padding token"),
    ],
)
def test_build_refusals(changes, message):
    with pytest.raises(UsageError, match=message):
        build_small(**changes)
