"""Block drafters on disk: their own weights (safetensors) beside a small JSON file with fingerprints of their verifiers."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from models.backbones.checkpoint_files import staging_folder
from models.functional.errors import UsageError
from models.functional.weights import weights_fingerprint
from models.speculative.block_drafter import BlockDrafter, BlockDrafterOptions

FORMAT = "leap-block-drafter-1"
DESCRIPTION, WEIGHTS = "drafter.json", "drafter.safetensors"
KEYS = ("format", "options", "vocab_size", "state_layers", "verifiers")


def save_drafter(drafter: BlockDrafter, verifiers: dict[str, nn.Module], folder: str | Path) -> Path:
    """Write the drafter that was trained for `verifiers`; a half-written folder never appears."""
    folder = Path(folder)
    description = {
        "format": FORMAT,
        "options": asdict(drafter.options),
        "vocab_size": drafter.vocab_size,
        "state_layers": {name: list(layers) for name, layers in drafter.state_layers.items()},
        "verifiers": {name: weights_fingerprint(model.state_dict()) for name, model in verifiers.items()},
    }
    with staging_folder(folder) as staging:
        weights = {name: value.detach().cpu().contiguous() for name, value in drafter.own_tensors().items()}
        save_file(weights, staging / WEIGHTS)
        (staging / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return folder


def read_drafter(folder: str | Path) -> dict:
    """The description of a saved drafter. Raises UsageError where the folder holds none that this version reads."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no block drafter ({DESCRIPTION} is missing); type the drafter/ of a run's folder"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        known = description["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); copy the folder again, or train the drafter again"
        ) from error
    if not known:
        raise UsageError(
            f"{path} is of format {description['format']!r}; this version reads {FORMAT!r}: train the drafter again"
        )
    if missing := [key for key in KEYS if key not in description]:
        raise UsageError(f"{path} lacks {', '.join(missing)}; copy the folder again, or train the drafter again")
    return description


def load_drafter(folder: str | Path, verifiers: dict[str, nn.Module]) -> BlockDrafter:
    """A saved drafter on the models that it was trained with, {name: model}, ready to draft.

    Raises UsageError where a model is missing or is another one, and where the files cannot be read.
    """
    description = read_drafter(folder)
    named = description["verifiers"]
    if missing := sorted(named.keys() - verifiers.keys()):
        raise UsageError(
            f"the drafter in {folder} was trained with {', '.join(sorted(named))}; {missing[0]} is not given"
        )
    models = {name: verifiers[name] for name in named}
    for name, model in models.items():
        if weights_fingerprint(model.state_dict()) != named[name]:
            raise UsageError(
                f"the drafter in {folder} was trained with another {name} than the one given; give that one, or train a "
                "drafter for this one (experiment=block_draft_causal)"
            )
    layers = {name: tuple(found) for name, found in description["state_layers"].items()}
    weights = Path(folder) / WEIGHTS
    try:
        drafter = BlockDrafter(models, BlockDrafterOptions(**description["options"]), description["vocab_size"], layers)
        held = load_file(weights)
        if held.keys() != drafter.own_tensors().keys():
            raise RuntimeError("its tensors are not those of a block drafter")
        drafter.load_state_dict(held, strict=False)
    except (SafetensorError, FileNotFoundError, RuntimeError, TypeError) as error:
        raise UsageError(f"{weights} cannot be read ({str(error).splitlines()[0]}); train the drafter again") from error
    device = next(drafter.lender.parameters()).device
    for part in (*drafter.own_parameters().values(), *drafter.buffers()):
        part.data = part.data.to(device)
    return drafter.eval()
