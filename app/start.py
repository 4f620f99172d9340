"""What happens before Hydra makes the folder of a run: its name is claimed, and a folder that cannot be made gets a sentence.

Imported by Hydra at every start, so nothing heavy is imported here.
"""

import os
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from app.ranks import leads

CLAIMS = ".started"  # below the outputs folder: an empty file for each start of the last day
DAY = 24 * 3600
ONE_AT_A_TIME = threading.Lock()  # Hydra has one configuration a process


def claim_start(config: DictConfig, folder_option: str) -> None:
    """Make `${started}` a name that no other start below the outputs folder has, and the folder of the run or the sweep.

    Starts of the same second become 2026-01-31_12-00-00, 2026-01-31_12-00-00_2 and so on. All runs of a sweep share theirs.
    folder_option: hydra.run.dir or hydra.sweep.dir. Ends the process with a sentence where the folder cannot be made.
    """
    folder = Path(config.paths.output_dir)
    try:
        if leads():  # other ranks work where the first one does
            _take_name(config, folder / CLAIMS)
        folder = _folder(config, folder_option)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "no permission to write there")
    except OSError as error:
        reason = error.strerror or str(error)
        print(
            f"error: the folder {folder} cannot be written: {reason}; type paths.output_dir=<a folder> or "
            f"{folder_option}=<a folder>",
            file=sys.stderr,
        )
        sys.exit(2)


def _folder(config: DictConfig, option: str) -> Path:
    """The folder that an option names, which may ask Hydra for choices (`${hydra:runtime.choices...}`)."""
    hydra: Any = HydraConfig.instance()
    with ONE_AT_A_TIME:
        before, hydra.cfg = hydra.cfg, config  # Hydra itself sets it later
        try:
            return Path(OmegaConf.select(config, option))
        finally:
            hydra.cfg = before


def _take_name(config: DictConfig, claims: Path) -> None:
    started = str(config.started)
    # Hydra hands this cache on to every run of a sweep
    cached = OmegaConf.get_cache(config)["now"]
    keys = [key for key, value in cached.items() if value == started]
    if not keys:  # started= was typed
        return
    claims.mkdir(parents=True, exist_ok=True)
    _forget_old(claims)
    for number in count(1):
        name = started if number == 1 else f"{started}_{number}"
        try:
            (claims / name).touch(exist_ok=False)  # one of several processes succeeds
            break
        except FileExistsError:
            continue
    for key in keys:
        cached[key] = name


def _forget_old(claims: Path) -> None:
    for path in claims.iterdir():
        try:
            if path.stat().st_mtime < time.time() - DAY:
                path.unlink()
        except FileNotFoundError:  # another start was faster
            continue
