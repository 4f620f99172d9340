"""What is refused of a LLaDA checkpoint, and in which words."""

import json

import pytest
import torch
from helpers.llada import CONFIG, build_small, make_weights, write_official
from safetensors.torch import load_file

from models.backbones.llada import load_llada
from models.backbones.official_layout import config_from_official
from models.functional.errors import UsageError


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
