"""Checkpoint folders of JSON and safetensors: where they are, what is in them, and their tensors one by one.

Nothing here runs code from a checkpoint: no pickles, no remote modules.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.functional.errors import UsageError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class StoredTensor(NamedTuple):
    """What a safetensors header contains about one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`torch.bfloat16`, "bfloat16" or "torch.bfloat16" -> torch.bfloat16. Errors: UsageError for anything else."""
    found = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None or found not in _DTYPES.values():
        raise UsageError(f"model.dtype={dtype} is not a type of weights; type one of {', '.join(_DTYPES)}")
    return found


def parse_device(device: torch.device | str) -> torch.device:
    """Errors: UsageError for a device that does not exist here."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"model.device={device} is not a device; type cpu or cuda") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"model.device={device}: this machine has no such CUDA device; type model.device=cpu")
    return found


def local_folder(path: str | Path, option: str = "model.path") -> Path | None:
    """The folder where it exists here, None for a name that the hub may know. option: what `path` is the value of.

    Errors: UsageError, naming the option, for anything else.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(f"{option}={path} is a file; type the folder that holds config.json and *.safetensors")
    if not _HUB_NAME.fullmatch(str(path)):
        raise UsageError(
            f"{option}={path}: this folder does not exist here; type an existing folder or a hub name OWNER/NAME"
        )
    return None


def find_folder(path: str | Path, option: str = "model.path") -> Path:
    """A local folder as it is; a hub name such as GSAI-ML/LLaDA-8B-Instruct after a download (or from the hub's cache).

    option: what `path` is the value of. Errors: UsageError, naming it, where neither works.
    """
    folder = local_folder(path, option)
    if folder is not None:
        return folder
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{option}={path}: this folder does not exist here, and the Hugging Face hub did not give it ({reason}). "
            f"Without network, run `hf download {path} --local-dir FOLDER` on a machine that has one, copy FOLDER here "
            f"and type {option}=FOLDER"
        ) from error


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which replaces `folder` once everything is in it: a half-written folder never appears."""
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)


def read_json(file: Path) -> dict:
    """Errors: UsageError naming the file where it is missing or does not hold a JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{file} does not exist; type a folder saved as a checkpoint, with config.json in it"
        ) from error
    except ValueError as error:
        raise UsageError(f"{file} is not readable as JSON ({error}); copy or download it again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} holds no JSON object; copy or download it again")
    return found


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, from the files' headers alone.

    Reads model.safetensors, or the shards that model.safetensors.index.json names.
    Errors: UsageError naming the file, for missing, truncated or quantised weights.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                header = opened.get_slice(name)
                if name in tensors:
                    raise UsageError(f"{file} and {tensors[name].file.name} both hold {name}; remove the wrong one")
                if header.get_dtype() not in _STORED_DTYPES:
                    raise UsageError(
                        f"{file} holds {name} as {header.get_dtype()}: a quantised checkpoint. Use the one in "
                        "bfloat16, float16 or float32 that it was made from"
                    )
                tensors[name] = StoredTensor(file, tuple(header.get_shape()), _STORED_DTYPES[header.get_dtype()])
    return tensors


def read_tensors(
    file: Path, names: Iterable[str], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Copies of the named tensors, one at a time.

    The file is mapped, not read at once, and a copy does not depend on it: overwriting it later is harmless.
    """
    with _open(file) as opened:
        for name in names:
            yield name, opened.get_tensor(name).to(device=device, dtype=dtype, copy=True)


def expected_shapes(model: nn.Module, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of `model` holds; a head that is tied to the embedding table is in no file."""
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if tied:
        shapes.pop("lm_head.weight")
    return shapes


def match_names(
    expected: dict[str, tuple[int, ...]],
    stored: dict[str, StoredTensor],
    rename: Callable[[str], str | None],
    folder: Path,
) -> dict[str, str]:
    """Name of each expected tensor -> its name in the files, which is the same or one that `rename` turns into it.

    Errors: UsageError naming the first few that are missing, unexpected or of another shape.
    """
    names: dict[str, str] = {}
    unexpected, complaints = [], []
    for name, tensor in stored.items():
        our_name = name if name in expected else rename(name)
        if our_name not in expected or our_name in names:
            unexpected.append(name)
            continue
        names[our_name] = name
        if tensor.shape != expected[our_name]:
            complaints.append(f"{name} has shape {tensor.shape} where config.json asks for {expected[our_name]}")
    missing = [name for name in expected if name not in names]
    for what, found in (("missing", missing), ("unexpected", unexpected)):
        if found:
            complaints.append(f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})")
    if complaints:
        raise UsageError(
            f"the weights in {folder} do not fit its config.json, which asks for {len(expected)} tensors: "
            f"{'; '.join(complaints[-4:])}. Copy or download the folder again, config.json included"
        )
    return names


def fill_model(
    model: nn.Module, names: dict[str, str], stored: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Put the tensors of the files into a model without memory, file by file. names: of `match_names`."""
    for file in sorted({stored[name].file for name in names.values()}):
        ours = {name: our_name for our_name, name in names.items() if stored[name].file == file}
        weights = {ours[name]: weight for name, weight in read_tensors(file, ours, dtype, device)}
        model.load_state_dict(weights, strict=False, assign=True)


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UsageError(f"{index} has no weight_map; copy or download it again")
        files = [folder / name for name in sorted(set(shards.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise UsageError(
                f"{folder} lacks {', '.join(missing)}, which {index.name} names; copy or download them again"
            )
        return files
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UsageError(
            f"{folder} holds its weights as {pickles[0]}, a pickle, which can run code when it is opened; only "
            "safetensors are read. Type a folder with model.safetensors: save_pretrained of transformers writes one"
        )
    raise UsageError(f"{folder} holds no weights; expected {single.name}, or {index.name} and the shards that it names")


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{file} is not a complete safetensors file ({error}): cut off while it was copied, or a git-lfs pointer; "
            "copy or download it again"
        ) from error
