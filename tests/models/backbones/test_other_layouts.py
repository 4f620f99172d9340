"""Masked diffusion models of layouts that are not read: refused by name, before any weight is looked for."""

import json

import pytest

from models.backbones.llada import load_llada
from models.backbones.masked_from_causal import load_masked
from models.backbones.other_layouts import unsupported_layout
from models.functional.errors import UsageError

# what the published config.json says
PUBLISHED = {
    "llada2_moe": {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "num_experts": 256},
    "LLaDAMoEModelLM": {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "hidden_size": 2048},
    "LLaDAMoEModel": {"model_type": "llada", "architectures": ["LLaDAMoEModel"], "hidden_size": 2048},
    "sdar": {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 4},
    "sdar_moe": {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]},
    "Fast_dLLM_Qwen": {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"]},
    "a2d-llama": {"model_type": "a2d-llama"},
    "a2d-qwen2": {"model_type": "a2d-qwen2"},
    "a2d-qwen3": {"model_type": "a2d-qwen3"},
}


@pytest.mark.parametrize("load", [load_masked, load_llada])
@pytest.mark.parametrize("name", PUBLISHED)
def test_each_is_refused_by_name(tmp_path, name, load):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    with pytest.raises(UsageError) as refused:
        load(tmp_path)
    said = str(refused.value)
    assert f"holds a {name} model (" in said
    assert "GSAI-ML/LLaDA-8B-Instruct" in said
    assert "Dream-org/Dream-v0-Instruct-7B" in said


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llada", "architectures": ["LLaDAModelLM"]},
        {"model_type": "Dream", "architectures": ["DreamModel"]},
        {"model_type": "qwen3", "architectures": None},
        {},
    ],
)
def test_other_models_are_not_named(config):
    assert unsupported_layout(config) is None
