"""README.md of an exported model: how it was made, its results, and how to load it."""

import json
import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from reporting.record import read_record, write_whole
from reporting.table import NFE, markdown_table, split_rows

README = "README.md"
CAUSAL = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
EXAMPLE = """
prompt = tokenizer({prompt!r}, return_tensors="pt")
text = model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=16)
print(tokenizer.decode(text[0]))
"""
# a file of the folder -> (library, code that loads the folder); the first file that exists counts
READERS: dict[str, tuple[str, str]] = {
    "online_concepts.json": (
        "leap",
        "from models.online.files import load_online\n\nmodel = load_online(folder)\n",
    ),
    "concepts.json": (
        "leap",
        "from app.trained import load_planned\n\nmodel = load_planned(folder)\n",
    ),
    "drafter.json": (
        "leap",
        "from models.backbones.causal_lm import load_trained\n"
        "from models.speculative.drafter_files import load_drafter, read_drafter\n\n"
        'names = read_drafter(folder)["verifiers"]  # of the models that it drafts for\n'
        'model = load_drafter(folder, {name: load_trained(f"FOLDER_OF_{name}") for name in names})\n',
    ),
    "student.json": (
        "leap",
        "from models.flow.student_files import load_whole_student\n\nmodel = load_whole_student(folder)\n",
    ),
    "adapter_config.json": (
        "peft",
        CAUSAL.replace("AutoModelForCausalLM, ", "").replace("AutoModelForCausalLM", "AutoPeftModelForCausalLM"),
    ),
    "config.json": ("transformers", CAUSAL),
}
LLADA = "from models.backbones.llada import load_llada\n\nmodel = load_llada(folder)\n"
SIZE = 'print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters")\n'


def write_card(folder: str | Path, run: str | Path, licence: str | None, prompt: str | None = None) -> Path:
    """Put README.md into a folder of exported weights, in one step. run: the folder of the run that trained them.

    licence: an SPDX name, or None where none is stated. prompt: an example.
    """
    return write_whole(Path(folder) / README, model_card(Path(folder), Path(run), licence, prompt))


def model_card(folder: Path, run: Path, licence: str | None, prompt: str | None) -> str:
    record = read_record(run / "record.json") if (run / "record.json").is_file() else None
    library, code = _reader(folder, prompt)
    name = run.parent.name if record is None else record["experiment"]
    parts = [
        _metadata(folder, library, licence),
        f"# {name}",
        _made(record, run, licence),
        "## Results",
        _reached(record),
        "## How to load it",
        _where(library),
        f'```python\nfolder = "."  # the folder of this file\n\n{code}{SIZE}```',
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(folder: Path, library: str, licence: str | None) -> str:
    """The head that the Hugging Face hub reads."""
    lines = [f"library_name: {library}", "tags: [leap]"]
    if licence is not None:
        lines.insert(0, f"license: {licence.lower()}")
    if library == "peft":
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "---"])


def _made(record: dict[str, Any] | None, run: Path, licence: str | None) -> str:
    overrides = run / ".hydra" / "overrides.yaml"
    typed = OmegaConf.to_container(OmegaConf.load(overrides)) if overrides.is_file() else []
    known = {"command": f"`{shlex.join(['python', 'run.py', *typed])}`" if typed else None}
    if record is not None:
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
        known["experiment"] = record["experiment"]
        known["data"] = record["data"]["name"]
        known["seed"] = record["seed"]
        known["commit"] = record["commit"]
        known["device"] = record["device"]
        known["versions"] = versions
    known["licence"] = licence or "not stated; type `licence=<SPDX name>` with `mode=export`"
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {k} | {v} |" for k, v in known.items() if v is not None)


def _reached(record: dict[str, Any] | None) -> str:
    if record is None:
        return "Not measured yet: `mode=test` with the options of its run does that."
    tables = "\n\n".join(markdown_table(part) for part in split_rows(record))
    return f"{tables}\n\n{NFE}.\n\nAll figures, their intervals and every option are in the run's `record.json`."


def _where(library: str) -> str:
    if library == "leap":
        return "In a checkout of Leap:"
    return f"With `{library}` alone; Leap is not needed:"


def _reader(folder: Path, prompt: str | None) -> tuple[str, str]:
    """(library, code) that load the folder."""
    library, code = next(reader for name, reader in READERS.items() if (folder / name).is_file())
    if library == "transformers" and json.loads((folder / "config.json").read_text())["model_type"] == "leap_llada":
        return "leap", LLADA
    if library == "peft":
        code = "from peft import AutoPeftModelForCausalLM\n" + code
    if library in ("transformers", "peft") and prompt:
        code += EXAMPLE.format(prompt=prompt)
    return library, code
