"""A Lightning checkpoint of MDLM's or Duo's code as a folder that `teacher.path=`, `model=mdlm` and the harness read.

    python -m models.backbones.dit_checkpoint mdlm.ckpt mdlm-owt

writes config.json and model.safetensors in the layout of kuleshov-group/mdlm-owt, with the averaged weights of the training
(--weights raw: those of its last step). A checkpoint is never unpickled: where it holds more than tensors and plain values, as
the published ones do, the command says how to make one without.
"""

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.backbones import checkpoint_files as files
from models.backbones.dit import DitConfig, DitModel, without_frequencies
from models.backbones.dit_layout import config_from_mdlm, config_from_training
from models.functional.errors import UsageError, require_choice

WEIGHTS = ("ema", "raw")
FREQUENCIES = "rotary_emb.inv_freq"
# what a user types who trusts the checkpoint, in an environment that has the packages it was written with
PLAIN = (
    'python -c "import torch; from omegaconf import OmegaConf as O; '
    "c = torch.load('{path}', map_location='cpu', weights_only=False); "
    "torch.save({{'state_dict': c['state_dict'], 'ema': c.get('ema'), "
    "'config': O.to_container(c['hyper_parameters']['config'])}}, '{plain}')\""
)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's plain values: `state_dict`, `ema` (or None) and `config`, the configuration of its training.

    Errors: UsageError for a file that holds other objects, which says how to write one without them, and for one without
    weights or configuration.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file; type the path of a .ckpt that MDLM's or Duo's code wrote")
    how = f"where you trust it, type\n  {PLAIN.format(path=path, plain=path.with_suffix('.plain.ckpt'))}\nand convert that"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UsageError(f"{path} holds objects that could run code, and is not opened; {how}") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({str(error).splitlines()[0]}); copy or download it again") from error
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise UsageError(f"{path} has no state_dict; type the path of a .ckpt that MDLM's or Duo's code wrote")
    config = found.get("config") or (found.get("hyper_parameters") or {}).get("config")
    if not isinstance(config, dict):
        raise UsageError(f"{path} does not say how it was trained; {how}")
    return {"state_dict": found["state_dict"], "ema": found.get("ema"), "config": config}


def weights_of(checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
    """The network's tensors by name: of the averages, which are a list in the order of the parameters, or of the last step.

    Errors: UsageError where there are no averages, or not one of the shape of every parameter.
    """
    require_choice("--weights", weights, WEIGHTS)
    own = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith("backbone.")}
    if not own:
        raise UsageError("the checkpoint has no weights named backbone.*: it is of another network")
    if weights == "raw":
        return own
    trained = [name for name in own if not name.endswith(FREQUENCIES)]
    averages = (checkpoint["ema"] or {}).get("shadow_params")
    if averages is None:
        raise UsageError("the checkpoint has no averaged weights; type --weights raw for those of its last step")
    shapes = [tuple(own[name].shape) for name in trained]
    if [tuple(tensor.shape) for tensor in averages] != shapes:
        raise UsageError(
            f"the checkpoint's {len(averages)} averages have not the shapes of its {len(shapes)} parameters; type --weights raw"
        )
    return own | dict(zip(trained, averages, strict=True))


def convert(path: Path, folder: Path, *, weights: str = "ema", mask_token_id: int | None = None) -> Path:
    """Write the folder; a half-written one never appears. Errors: UsageError of the functions above, and for other networks."""
    checkpoint = read_checkpoint(path)
    tensors = weights_of(checkpoint, weights)
    fields = config_from_training(checkpoint["config"], {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if mask_token_id is not None:
        fields["mask_token_id"] = mask_token_id
    config = DitConfig(**config_from_mdlm(fields))
    tensors = without_frequencies(tensors, config, str(path))
    with torch.device("meta"):
        expected = files.expected_shapes(DitModel(config), tied=False)
    stored = {name: files.StoredTensor(path, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    files.match_names(expected, stored, lambda name: None, path)
    with files.staging_folder(folder) as staging:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging / "model.safetensors")
        (staging / "config.json").write_text(
            json.dumps(fields | {"mask_token_id": config.mask_token_id}, indent=2) + "\n"
        )
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a .ckpt of tensors and plain values")
    parser.add_argument("folder", type=Path, help="what is written")
    parser.add_argument("--weights", default="ema", help="ema (the averages) or raw (of the last step)")
    parser.add_argument("--mask-token-id", type=int, help="where the vocabulary is not GPT-2's with a mask, or BERT's")
    args = parser.parse_args(arguments)
    try:
        print(convert(args.checkpoint, args.folder, weights=args.weights, mask_token_id=args.mask_token_id))
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
