"""Options that make an experiment small, and what it answers."""

import json
from pathlib import Path

from app import modes
from datamodules.tokenizer import TRAINED, build_tokenizer
from helpers.causal import tiny_causal
from helpers.foreign import foreign_model, foreign_tokenizer, save_foreign
from helpers.gpt2_bytes import gpt2_bytes
from helpers.mdlm import write_mdlm
from helpers.word_pieces import word_pieces
from models.backbones.causal_lm import save_causal
from models.backbones.masked_from_causal import load_from_causal

ROOT = Path(__file__).parents[2]
SMALL = ["trainer.accelerator=cpu", "model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16"]


def pairs_overrides(cfg, folder: Path) -> list[str]:
    """For an experiment on files: small files with its own field names."""
    if cfg.study is not None or "PairsDataModule" not in cfg.data._target_:
        return []
    known = dict.fromkeys(("near", "priceRange", "customer rating", "eatType", "area", "familyFriendly"), "any")
    slots = [{"name": f"Cafe {k % 20}", "food": f"Dish {k // 20}", **known} for k in range(80)]
    prompts = slots if cfg.data.prompt_field == "slots" else [f"jump {k}" for k in range(80)]
    rows = [{cfg.data.prompt_field: p, cfg.data.response_field: f"I_JUMP {k}"} for k, p in enumerate(prompts)]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return [f"data.{split}={path}" for split in ("train", "val", "test")]


def model_overrides(cfg, folder: Path) -> list[str]:
    """For an experiment on Hugging Face models: tiny ones in folders; for others small sizes."""
    if cfg.pair is not None and cfg.pair.theta.path is not None:
        paths = []
        for name in cfg.pair:
            save_causal(tiny_causal(300, architecture="qwen3"), folder / name)
            paths.append(f"pair.{name}.path={folder}/{name}")
        return [*paths, "trainer.accelerator=cpu", "module.lora_rank=2", "data.tokenizer=byte"]
    if cfg.study is not None:
        return []
    if cfg.model is None:  # a student of a teacher that is read
        return [f"teacher.path={masked_teacher(folder)}", "trainer.accelerator=cpu", "module.lora_rank=2"]
    if "load_dit" in cfg.model._target_:
        gpt2_bytes(folder / "mdlm")
        few = ["data.sequence_length=16", "module.forwards=[1,2]", "trainer.accelerator=cpu"]
        (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"A text about {k}."}) for k in range(60)))
        files = [f"data.{split}={folder}/rows.jsonl" for split in ("train", "test")]
        return [f"model.path={write_mdlm(folder / 'mdlm')}", f"data.tokenizer={folder}/mdlm", *few, *files]
    (folder / "text.txt").write_text("".join(f"A paragraph about {k}.\n\n" for k in range(60)))
    text = [f"data.train={folder}/text.txt", "data.cut=blank_line", "data.sequence_length=16"]
    packed = "TextDataModule" in cfg.data._target_
    if packed and "path" not in cfg.model and cfg.data.tokenizer not in ("byte", *TRAINED):
        text.append(f"data.tokenizer={word_pieces(folder / 'pieces')}")
    if "Unprompted" in cfg.data._target_:
        text += ["module.forwards=[1,2]"]
    deep = 3 if "split" in cfg.module else None  # a model that is split in three
    small = [*SMALL, *([f"model.num_hidden_layers={deep}", "module.split=null"] if deep else [])]
    if "path" not in cfg.model:
        return [*small, *text, "model.num_attention_heads=2", "model.num_key_value_heads=2"] if packed else small
    own = ["trainer.accelerator=cpu", f"model.path={tiny_qwen(folder / 'qwen', deep or 2)}", "model.lora_rank=2"]
    return [*own, *text] if packed else own


def tiny_qwen(folder: Path, layers: int = 2) -> Path:
    """A Hugging Face folder with a causal model and its tokenizer (bytes)."""
    model = tiny_causal(264, architecture="qwen3", num_hidden_layers=layers, max_position_embeddings=512)
    return save_causal(model, folder, build_tokenizer("byte", [], 0, folder, packed=True))


def masked_teacher(folder: Path) -> Path:
    """A folder as experiment=masked_from_causal leaves it, untrained."""
    save_foreign(folder / "causal", foreign_model("llama"), foreign_tokenizer())
    load_from_causal(folder / "causal", mask_token="<extra_260>").save_pretrained(folder / "teacher")
    tokenizer = foreign_tokenizer()
    tokenizer.mask_token = "<extra_260>"
    tokenizer.save_pretrained(folder / "teacher")
    return folder / "teacher"


TINY = [
    "experiment=meanflow_llada",
    "data.size=tiny",
    "data.train_rows=64",
    "data.test_rows=32",
    "data.batch_size=16",
    "data.eval_batch_size=16",
    "teacher.max_steps=3",
    "trainer.max_steps=3",
    "trainer.val_check_interval=2",
    "module.forwards=[1,2]",
    *SMALL,
]
FLOWS = {
    "noisy_mask_flow": ["module.student_forwards=[1,2]", "module.ode_forwards=[2]", "module.ode_steps=2"],
    "logit_flow": [],
    "step_halving": ["module.student_forwards=[1,2]", "module.start_forwards=4"],
}


def answer(cfg, capsys) -> str:
    """The last line that mode=generate prints."""
    modes.generate(cfg)
    return capsys.readouterr().out.splitlines()[-1]
