"""The footprint: an exact count of parameters, an estimate of bytes close to what torch allocates, and its check."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from models.backbones import memory
from models.backbones.llada import LladaConfig, build_llada
from models.flow.prefix_student import PrefixStudent
from models.functional.errors import UsageError
from models.functional.jvp import value_and_jvp
from models.functional.meanflow import flow_loss, meanflow_target

YAML = Path(__file__).parents[3] / "conf" / "model" / "llada_8b.yaml"


def small_model(**changes):
    options = {
        "vocab_size": 40,
        "mask_token_id": 39,
        "eos_token_id": 38,
        "pad_token_id": 38,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "max_position_embeddings": 64,
        "rope_theta": 10_000.0,
    }
    return build_llada(**options | changes)


def test_llada_8b_has_the_published_size():
    options = yaml.safe_load(YAML.read_text())
    footprint = memory.describe_footprint(LladaConfig(**options["shape"]), options["dtype"])
    width, ffn, vocabulary, layers = 4096, 12288, 126464, 32
    per_layer = 4 * width**2 + 3 * width * ffn + 2 * width
    assert footprint.parameters == 2 * vocabulary * width + layers * per_layer + width == 8_015_581_184
    assert footprint.weights == 16_031_162_368  # `total_size` in the published model.safetensors.index.json
    assert footprint.weights < footprint.inference < footprint.distillation
    table = str(footprint)
    assert "8,015,581,184 parameters in bfloat16; batch 1, length 512" in table
    assert "14.93 GiB" in table
    assert "one distillation step" in table


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 2}])
def test_count_equals_a_real_model(changes):
    model = small_model(**changes)
    footprint = memory.describe_footprint(model.config, torch.float32)
    assert footprint.parameters == sum(weight.numel() for weight in model.parameters())
    assert footprint.weights == 4 * footprint.parameters


def peak_bytes(run) -> int:
    """Most bytes that torch held at once above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 4000, "num_hidden_layers": 1}])
def test_estimate_is_close_to_what_torch_allocates(changes):
    model = small_model(**changes)
    student = PrefixStudent(model, prompt_length=16, hidden_size=8, rank=2)
    ids, mask = torch.zeros(2, 64, dtype=torch.long), torch.ones(2, 64).bool()
    r, t = torch.zeros(2), torch.ones(2)

    def inference():
        with torch.no_grad():
            torch.softmax(model(ids, mask).float(), dim=-1)

    def distillation():
        embeds = model.embed(ids)
        with torch.no_grad():
            v = model(ids, mask)
        tangents = (torch.ones_like(embeds), torch.ones_like(t))
        u, du_dt = value_and_jvp(lambda z, t: model.lm_head(student.hidden(z, mask, r, t)), (embeds, t), tangents)
        target = meanflow_target(v, du_dt, r[:, None], t[:, None])
        flow_loss(u, target, "kl").mean().backward()

    footprint = memory.describe_footprint(model.config, "float32", batch_size=2, length=64)
    for run, estimate in ((inference, footprint.inference), (distillation, footprint.distillation)):
        assert 0.75 < (estimate - footprint.weights) / peak_bytes(run) < 1.33


def test_require_memory(monkeypatch):
    footprint = memory.describe_footprint(small_model().config, "float32")
    memory.require_memory(footprint, "cpu")
    assert memory.available_memory("cpu") > 2**20
    monkeypatch.setattr(memory, "available_memory", lambda device: footprint.inference)
    memory.require_memory(footprint, "cpu", "inference")
    with pytest.raises(UsageError, match=r"distillation .* needs about .* GiB on cpu .*at least \d+ GiB free"):
        memory.require_memory(footprint, "cpu", "distillation")
    with pytest.raises(UsageError, match=r"model\.purpose=training is not known"):
        memory.require_memory(footprint, "cpu", "training")


def test_available_memory_without_psutil(monkeypatch):
    with_psutil = memory.available_memory("cpu")
    monkeypatch.setattr(memory, "psutil", None)
    assert 0 < memory.available_memory("cpu") < 4 * with_psutil


def test_nothing_is_read_before_the_check(tmp_path, monkeypatch, capsys):
    options = yaml.safe_load(YAML.read_text())
    options.pop("_target_")
    monkeypatch.setattr(memory, "available_memory", lambda device: 2**30)
    for name in ("load_llada", "find_folder", "read_config"):
        monkeypatch.setattr(memory, name, lambda *_, **__: pytest.fail("too early"))
    with pytest.raises(UsageError, match=r"needs about 15\.46 GiB on cpu .*1\.00 GiB are free.*at least 16 GiB free"):
        memory.load_llada_checked(**options)
    assert "8,015,581,184 parameters" in capsys.readouterr().out


def test_a_local_folder_says_its_own_size(tmp_path, capsys):
    options = yaml.safe_load(YAML.read_text())
    model = small_model()
    model.save_pretrained(tmp_path)
    options |= {"path": str(tmp_path), "dtype": "float32"}
    options.pop("_target_")
    loaded = memory.load_llada_checked(**options)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    printed = capsys.readouterr().out
    assert f"{sum(weight.numel() for weight in model.parameters()):,} parameters in float32" in printed
    assert "8,015,581,184" not in printed
    with pytest.raises(UsageError, match="this folder does not exist here"):
        memory.load_llada_checked(**options | {"path": str(tmp_path / "nothing")})


def test_the_downloaded_config_has_the_last_word(tmp_path, monkeypatch, capsys):
    small_model().save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "find_folder", lambda path: tmp_path)
    shape = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    memory.load_llada_checked("someone/LLaDA-tiny", shape=shape, dtype="float32")
    assert capsys.readouterr().out.count("parameters in float32") == 2
