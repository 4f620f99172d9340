"""Models with online concepts on disk: read as they were, refused where they are damaged."""

import json

import pytest
import torch
from helpers.causal import PackedStream, packed_batch, tiny_causal
from helpers.online_module import build
from helpers.trainer import quiet_trainer
from torch.testing import assert_close

from models.backbones.causal_lm import save_causal
from models.functional.errors import UsageError
from models.online.files import load_online, save_online


@pytest.mark.parametrize(
    ("lora_rank", "split", "sampler"),
    [(None, None, "fsq"), (2, None, "gumbel_st"), (None, [1, [1, 1, 1], 1], "ema_vq")],
)
def test_a_saved_model_is_read_as_it_was(tmp_path, lora_rank, split, sampler):
    layers = 5 if split else 3
    torch.manual_seed(0)
    base = tiny_causal(7, num_hidden_layers=layers)
    save_causal(base, tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    module = build(base, lora_rank=lora_rank, split=split, growth="autoregressive", sampler=sampler)
    quiet_trainer(3).fit(module, PackedStream())
    module.export(tmp_path / "model")
    ids = packed_batch(2, 10)["input_ids"]
    again = load_online(tmp_path / "model")
    with torch.no_grad():
        assert_close(again(ids), module.model.eval()(ids))
    assert again.inference_settings() == module.model.inference_settings()
    description = json.loads((tmp_path / "model" / "online_concepts.json").read_text())
    assert description["options"].keys() >= {"carry", "pool"}
    (tmp_path / "model" / "online_concepts.json").write_text(json.dumps({**description, "format": "other"}))
    with pytest.raises(UsageError, match="is of format 'other'"):
        load_online(tmp_path / "model")


def test_a_folder_without_pool_and_carry_is_read(tmp_path):
    model = build(carry=False, pool=False).model.eval()
    save_online(model, tmp_path / "model")
    path = tmp_path / "model" / "online_concepts.json"
    description = json.loads(path.read_text())
    for name in ("carry", "pool"):
        del description["options"][name]
    path.write_text(json.dumps(description))
    ids = packed_batch(2, 10)["input_ids"]
    with torch.no_grad():
        assert_close(load_online(tmp_path / "model")(ids), model(ids))


def test_a_damaged_file_is_refused(tmp_path):
    model = build().model
    save_online(model, tmp_path / "model")
    (tmp_path / "model" / "online_concepts.safetensors").write_bytes(b"half")
    with pytest.raises(UsageError, match="cannot be read"):
        load_online(tmp_path / "model")
