"""MDLM's published layout: the same logits as the original's, files by key and shape, and what is refused."""

import json

import pytest
import torch
from helpers.gpt2_bytes import gpt2_bytes
from helpers.mdlm import (
    CONFIG,
    OF_DUO,
    OF_MDLM,
    make_weights,
    reference_logits,
    reference_subs,
    write_checkpoint,
    write_mdlm,
)
from safetensors.torch import load_file

from models.backbones.dit import DitConfig, DitModel, load_dit
from models.backbones.dit_checkpoint import main
from models.backbones.llada import Prefix, load_llada
from models.backbones.masked_from_causal import load_masked
from models.backbones.twin import share_weights, with_lora, with_own_weights
from models.diffusion.commit_rules import RULES
from models.diffusion.sampler import generate_by_rule, generate_masked_diffusion
from models.functional.errors import UsageError

MASK = CONFIG["mask_token_id"]
WORDS = [k for k in range(CONFIG["vocab_size"]) if k != MASK]


@pytest.fixture
def folder(tmp_path):
    return write_mdlm(tmp_path / "mdlm")


def texts(rows=3, length=9):
    ids = torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(1))
    return ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5, MASK)


# -- the network --------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_published_network(folder):
    ids, model = texts(), load_dit(folder).double()
    wanted = reference_logits(CONFIG, make_weights(), ids)
    found = model(ids)
    torch.testing.assert_close(found[..., WORDS], wanted[..., WORDS], atol=1e-9, rtol=1e-9)
    subs, masked = reference_subs(wanted, ids, MASK), ids == MASK
    torch.testing.assert_close(found.log_softmax(-1)[masked][:, WORDS], subs[masked][:, WORDS], atol=1e-9, rtol=1e-9)
    assert (found.softmax(-1)[..., MASK] == 0).all()
    torch.testing.assert_close(load_dit(folder)(ids)[..., WORDS], wanted[..., WORDS].float(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", [name for name in make_weights() if not name.endswith("inv_freq")])
def test_every_weight_counts(folder, name):
    """The control of the test above: a weight that is moved changes the logits as it changes the original's."""
    weights, ids, model = make_weights(), texts(), load_dit(folder).double()
    before = model(ids)[..., WORDS]
    weights[name] = weights[name] + 0.5 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.state_dict()[name].copy_(weights[name])
    after = model(ids)[..., WORDS]
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, reference_logits(CONFIG, weights, ids)[..., WORDS], atol=1e-9, rtol=1e-9)


def test_a_time_conditions_the_network_as_it_does_the_original():
    """Duo's network is the same one, with the time given and no mask."""
    weights, ids, sigma = make_weights(), texts(), torch.tensor([0.0, 0.7, 4.2], dtype=torch.float64)
    model = DitModel(
        DitConfig(**{k: CONFIG[k] for k in ("vocab_size", "hidden_dim", "cond_dim", "n_blocks", "n_heads")})
    )
    model.load_state_dict({name: tensor for name, tensor in weights.items() if not name.endswith("inv_freq")})
    found = model.double()(ids, sigma=sigma)
    torch.testing.assert_close(found, reference_logits(CONFIG, weights, ids, sigma), atol=1e-9, rtol=1e-9)
    assert (found[1:] - model(ids)[1:]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@torch.no_grad()
def test_in_half_precision_the_mask_is_never_predicted(folder, dtype):
    model = load_dit(folder, dtype=dtype)
    logits = model(texts())
    assert logits.isfinite().all()
    assert (logits.float().softmax(-1)[..., model.mask_id] == 0).all()


def test_left_padding_changes_nothing(folder):
    ids, model = texts(), load_dit(folder).double()
    padded = torch.cat([torch.full((3, 4), 5), ids], 1)
    seen = torch.arange(padded.shape[1]).expand(3, -1) >= 4
    torch.testing.assert_close(model(padded, seen)[:, 4:], model(ids))
    assert (model(padded)[:, 4:] - model(ids)).abs().max() > 1e-2


def test_a_closed_prefix_changes_nothing_and_an_open_one_is_read(folder):
    ids, model = texts(), load_dit(folder)
    keys = torch.randn(3, 1, 4, 2, 6)
    closed, opened = (Prefix(keys, keys, gate * torch.ones(3, 4)) for gate in (0.0, 1.0))
    seen = torch.ones_like(ids, dtype=torch.bool)
    plain, same, other = (model.hidden(model.embed(ids), seen, prefix) for prefix in (None, closed, opened))
    torch.testing.assert_close(plain, same)
    assert (plain - other).abs().max() > 1e-2


def test_twins_share_or_copy_weights_and_adapters_are_in_the_layers(folder):
    base, ids = load_dit(folder), texts()
    for twin in (share_weights(base), with_own_weights(base), with_lora(base, 2)):
        torch.testing.assert_close(twin(ids), base(ids))
    assert with_own_weights(base).embedding is base.embedding
    adapted = {name.split(".lora_")[0] for name, _ in with_lora(base, 2).named_parameters() if "lora_" in name}
    parts = ("attn_qkv", "attn_out", "mlp.0", "mlp.2")
    assert adapted == {f"backbone.blocks.{i}.{part}" for i in range(3) for part in parts}


def test_texts_are_filled_without_a_mask_left(folder):
    model = load_masked(folder)
    every = torch.ones(4, 8, dtype=torch.bool)
    rows = {"input_ids": torch.full((4, 8), MASK), "attention_mask": every, "response_mask": every}
    found = generate_masked_diffusion(model, rows, torch.Generator().manual_seed(0), steps=4)
    by_rule = generate_by_rule(model, rows, torch.Generator().manual_seed(0), rule=RULES["confidence"](0.5))
    for responses in (found, by_rule.responses):
        assert responses.shape == (4, 8)
        assert (responses != MASK).all()


# -- files --------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read_again_and_has_the_published_names(folder, tmp_path):
    model, ids = load_dit(folder), texts()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_masked(tmp_path / "again")(ids), model(ids))
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    same = (
        "model_type",
        "vocab_size",
        "hidden_dim",
        "cond_dim",
        "n_blocks",
        "n_heads",
        "model_length",
        "mask_token_id",
    )
    assert {name: written[name] for name in same} == {name: CONFIG[name] for name in same}
    names = set(load_file(tmp_path / "again" / "model.safetensors"))
    assert names == {name for name in make_weights() if not name.endswith("inv_freq")}


@pytest.mark.parametrize(("rows", "mask"), [(50_258, 50_257), (30_522, 103)])
def test_the_mask_of_a_published_vocabulary_is_known(tmp_path, rows, mask):
    own = {k: v for k, v in CONFIG.items() if k != "mask_token_id"} | {"vocab_size": rows, "n_blocks": 1}
    assert load_dit(write_mdlm(tmp_path / "mdlm", own)).mask_id == mask


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask_token_id": None}, 'add "mask_token_id": ID to config.json'),
        ({"mask_token_id": 258}, "not one of the 258 rows"),
        ({"time_conditioning": True}, "time_conditioning is true"),
        ({"n_heads": 5}, "does not give n_heads 5 an even width"),
        ({"n_heads": 2}, "correct n_heads"),
        ({"n_blocks": 4}, r"10 missing \(backbone.blocks.3"),
        ({"cond_dim": 7}, "has shape"),
        ({"hidden_dim": None}, "hidden_dim is null"),
        ({"model_type": "DUO"}, "uniform-state diffusion, which has no masks"),
        ({"model_type": "bd3lm"}, "block-causal attention on a DiT"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, change, said):
    own = {k: v for k, v in (CONFIG | change).items() if v is not None or k != "mask_token_id"}
    with pytest.raises(UsageError, match=said):
        load_masked(write_mdlm(tmp_path / "mdlm", own, make_weights()))


def test_another_reader_says_what_to_type(folder):
    with pytest.raises(UsageError, match=r"type teacher\.path="):
        load_llada(folder)


# -- Lightning checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [OF_MDLM, OF_DUO], ids=["mdlm", "duo"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_checkpoint_becomes_a_folder_of_the_published_layout(tmp_path, training, weights):
    path = write_checkpoint(tmp_path / "a.ckpt", training)
    main([str(path), str(tmp_path / "mdlm"), "--weights", weights, "--mask-token-id", str(MASK)])
    wanted = {name: tensor + (weights == "ema") for name, tensor in make_weights().items()}
    wanted["backbone.rotary_emb.inv_freq"] = make_weights()["backbone.rotary_emb.inv_freq"]
    ids, model = texts(), load_masked(tmp_path / "mdlm").double()
    torch.testing.assert_close(model(ids)[..., WORDS], reference_logits(CONFIG, wanted, ids)[..., WORDS])
    assert model.config.model_length == 32


class Anything:
    """An object that a checkpoint must not bring to life."""


def refused(path, capsys, *options):
    with pytest.raises(SystemExit):
        main([str(path), str(path.parent / "mdlm"), "--mask-token-id", str(MASK), *options])
    assert not (path.parent / "mdlm").exists()
    return capsys.readouterr().err


def test_a_checkpoint_of_objects_is_not_opened_and_the_way_without_them_works(tmp_path, capsys):
    from omegaconf import OmegaConf

    own = {"hyper_parameters": {"config": OmegaConf.create(OF_MDLM), "tokenizer": Anything()}}
    path = write_checkpoint(tmp_path / "a.ckpt", more=own)
    said = refused(path, capsys)
    assert "holds objects that could run code, and is not opened" in said
    code = next(line for line in said.splitlines() if line.strip().startswith("python -c")).strip()
    exec(code.removeprefix('python -c "').removesuffix('"'), {})
    main([str(tmp_path / "a.plain.ckpt"), str(tmp_path / "mdlm"), "--mask-token-id", str(MASK)])
    assert load_masked(tmp_path / "mdlm").mask_id == MASK


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (OF_MDLM | {"parameterization": "sedd"}, "parameterization=sedd"),
        (OF_MDLM | {"backbone": "dimamba"}, "backbone=dimamba"),
        (OF_MDLM | {"diffusion": "uniform"}, "diffusion=uniform"),
        (OF_MDLM | {"time_conditioning": True}, "time_conditioning=True"),
        (OF_DUO | {"algo": OF_DUO["algo"] | {"name": "duo_base"}}, "name=duo_base"),
        (OF_DUO | {"algo": OF_DUO["algo"] | {"parameterization": "mean"}}, "parameterization=mean"),
        (OF_DUO | {"algo": OF_DUO["algo"] | {"causal_attention": True}}, "causal_attention=True"),
        (OF_MDLM | {"model": {"n_heads": 4}}, "length is null"),
        (OF_MDLM | {"model": {"n_heads": 3, "length": 32}}, "correct n_heads"),
    ],
)
def test_another_training_is_refused_by_name(tmp_path, capsys, training, said):
    assert said in refused(write_checkpoint(tmp_path / "a.ckpt", training), capsys)


def test_a_file_that_is_no_whole_checkpoint_is_refused(tmp_path, capsys):
    assert "type --weights raw" in refused(write_checkpoint(tmp_path / "a.ckpt", averages=False), capsys)
    few = {"ema": {"shadow_params": [torch.zeros(3)]}}
    assert "1 averages have not the shapes" in refused(write_checkpoint(tmp_path / "b.ckpt", more=few), capsys)
    bare = write_checkpoint(tmp_path / "c.ckpt", more={"hyper_parameters": None})
    assert "does not say how it was trained" in refused(bare, capsys)
    weights = make_weights()
    weights.pop("backbone.blocks.1.mlp.0.bias")
    cut = write_checkpoint(tmp_path / "d.ckpt", more={"state_dict": weights})
    assert "1 missing (backbone.blocks.1.mlp.0.bias)" in refused(cut, capsys, "--weights", "raw")
    (tmp_path / "e.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:-200])
    assert "cannot be read" in refused(tmp_path / "e.ckpt", capsys)
    assert "is not a file" in refused(tmp_path / "f.ckpt", capsys)


def test_a_tokenizer_as_gpt2_s_has_its_mask_where_the_model_has_it(tmp_path):
    from datamodules.tokenizer import build_tokenizer

    folder = gpt2_bytes(tmp_path / "tokenizer")
    assert build_tokenizer(str(folder), [], 0, tmp_path, packed=True).mask_token_id == MASK
