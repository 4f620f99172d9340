"""The one-step student: a frozen masked diffusion LM and the soft prompt that tells it which interval to jump over.

The frozen base is the teacher itself, one copy in memory. Only the soft prompt is saved, beside a small JSON file that
says which base it fits.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.backbones.frozen_layers import freeze
from models.backbones.llada import LladaModel
from models.backbones.soft_prompt import SoftPrompt
from models.functional.errors import UsageError
from models.functional.flow_times import check_interval

FORMAT = "leap-prefix-student-1"


class PrefixStudent(nn.Module):
    """u(x_t, r, t): logits averaged over [r, t], from a frozen base with a trainable prefix."""

    def __init__(self, base: LladaModel, *, prompt_length: int = 16, hidden_size: int = 256, rank: int = 32) -> None:
        super().__init__()
        self.base = freeze(base)
        self.soft_prompt = SoftPrompt(base.config, prompt_length=prompt_length, hidden_size=hidden_size, rank=rank)

    def hidden(self, embeds: Tensor, attention_mask: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """(B, L, D), (B, L) bool, (B,), (B,) -> (B, L, D)"""
        return self.base.hidden(embeds, attention_mask, self.soft_prompt(r, t))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """(B, L) ids and their interval -> (B, L, V) logits. Raises UsageError unless 0 <= r <= t <= 1."""
        check_interval(r, t)
        return self.base.lm_head(self.hidden(self.base.embed(input_ids), attention_mask, r, t))

    def train(self, mode: bool = True) -> "PrefixStudent":
        """The base stays in evaluation mode whatever the trainer asks for."""
        super().train(mode)
        self.base.eval()
        return self


def base_fingerprint(base: LladaModel) -> str:
    """sha256 over every weight's name, shape and up to 1024 evenly spaced values: quick at 8B, different after training."""
    digest = hashlib.sha256()
    for name, weight in sorted(base.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)][:1024].float().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def save_student(student: PrefixStudent, folder: str | Path, notes: dict | None = None) -> Path:
    """Write the trained part to `folder` (student.safetensors, student.json); a half-written folder never appears."""
    folder = Path(folder)
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    weights = {name: w.detach().cpu().contiguous() for name, w in student.soft_prompt.state_dict().items()}
    save_file(weights, staging / "student.safetensors")
    prompt = student.soft_prompt
    description = {
        "format": FORMAT,
        "base": base_fingerprint(student.base),
        "soft_prompt": {"prompt_length": prompt.prompt_length, "hidden_size": prompt.hidden_size, "rank": prompt.rank},
        "notes": notes or {},
    }
    (staging / "student.json").write_text(json.dumps(description, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)
    return folder


def read_student(folder: str | Path) -> dict:
    """The student.json of a saved student. Raises UsageError when the folder is not one."""
    path = Path(folder) / "student.json"
    if not path.is_file():
        raise UsageError(f"{folder} holds no student (student.json is missing); type student_path=<run folder>/student")
    description = json.loads(path.read_text())
    if description.get("format") != FORMAT:
        raise UsageError(f"{path} is of format {description.get('format')!r}; this version reads {FORMAT!r}")
    return description


def load_student(folder: str | Path, base: LladaModel) -> PrefixStudent:
    """Put a saved trained part on the base it was trained on. Raises UsageError when the base is another one."""
    description = read_student(folder)
    if description["base"] != base_fingerprint(base):
        raise UsageError(
            f"the student in {folder} was trained on another base model than the one given; "
            f"type teacher.path=<the folder of its teacher>, which its notes say is {description['notes'].get('teacher')}"
        )
    student = PrefixStudent(base, **description["soft_prompt"])
    weights = Path(folder) / "student.safetensors"
    try:
        student.soft_prompt.load_state_dict(load_file(weights))
    except (SafetensorError, FileNotFoundError, RuntimeError) as error:
        raise UsageError(f"{weights} cannot be read ({str(error).splitlines()[0]}); train the student again") from error
    return student.to(torch.device(base.device)).eval()
