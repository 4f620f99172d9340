"""The cache of trained models, such as teachers: a model with the same ingredients is read, or trained and kept."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from rich.console import Console
from transformers import PreTrainedModel

from app.locks import build_once
from lightning_modules.base import LeapModule
from models.backbones.llada import load_llada
from models.functional.errors import UsageError


def cache_key(**ingredients: Any) -> str:
    """Twelve hex digits that change when any ingredient (plain types) of the training does."""
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def partial_folder(folder: Path) -> Path:
    """Where the checkpoints of an unfinished training of this teacher lie."""
    return folder.with_name(folder.name + ".partial")


def train_or_load(
    folder: Path,
    *,
    what: str = "teacher",
    option: str = "teacher",
    load: Callable[[Path], PreTrainedModel] = load_llada,
    build_model: Callable[[], PreTrainedModel],
    build_module: Callable[[PreTrainedModel], LeapModule],
    build_trainer: Callable[[], Trainer],
    datamodule: LightningDataModule,
    console: Console,
) -> PreTrainedModel:
    """The model kept in `folder`, trained first if it is not there. what: its name in messages; option: where its recipe
    stands in the configuration; load: reads the folder.

    Training checkpoints go to `<folder>.partial`, where an interrupted training is taken up again; the finished model is
    put in place in one step, so `folder` is either absent or whole. Runs that need the same model wait for the one that trains
    it. A fast_dev_run trains one step and keeps nothing.
    """
    waiting = f"{what}: another run is training the same one; waiting for it"
    with build_once(folder, lambda: console.print(waiting, highlight=False)):
        if (folder / "config.json").is_file():
            console.print(f"{what}: reusing the trained one in {folder}", highlight=False)
            return load(folder)
        model = _train(folder, what, option, build_model, build_module, build_trainer, datamodule, console)
        # read back, so that a run that trained it and one that found it go on alike, to the last bit
        return load(folder) if (folder / "config.json").is_file() else model


def _train(
    folder: Path,
    what: str,
    option: str,
    build_model: Callable[[], PreTrainedModel],
    build_module: Callable[[PreTrainedModel], LeapModule],
    build_trainer: Callable[[], Trainer],
    datamodule: LightningDataModule,
    console: Console,
) -> PreTrainedModel:
    """The model, trained or taken up again, and put into `folder` when it is whole."""
    partial = partial_folder(folder)
    last = partial / "last.ckpt"
    if last.is_file() and not _readable(last):
        console.print(f"{what}: {last} is damaged, starting its training again", highlight=False)
        last.unlink()
    trainer = build_trainer()
    console.print(
        f"{what}: no matching one is cached, training it now (kept in {folder} for the next time)"
        if not last.is_file()
        else f"{what}: taking up the interrupted training in {partial}",
        highlight=False,
    )
    model = build_model()
    trainer.fit(build_module(model), datamodule, ckpt_path=last if last.is_file() else None, weights_only=True)
    whole = trainer.global_step == trainer.max_steps
    if not whole and not trainer.fast_dev_run:
        console.print(
            f"{what}: stopped after {trainer.global_step} of {trainer.max_steps} steps, so it is used but not kept; "
            f"set its length with {option}.max_steps",
            highlight=False,
        )
    if whole and not trainer.fast_dev_run and trainer.is_global_zero:
        staging = partial / "whole"  # a run that is killed here leaves nothing but what the next one takes up
        model.save_pretrained(staging)
        datamodule.tokenizer.save_pretrained(staging)
        if not folder.exists():  # a run on another machine, whose lock was not seen here, may have trained the same one
            os.replace(staging, folder)
        shutil.rmtree(partial, ignore_errors=True)
    trainer.strategy.barrier()
    return model.cpu()


def require_readable(checkpoint: Path) -> Path:
    """The path of a whole checkpoint. Raises UsageError for a damaged file or one that would run code."""
    if not _readable(checkpoint):
        raise UsageError(f"ckpt_path={checkpoint} is damaged or no checkpoint of plain tensors; give another one")
    return checkpoint


def _readable(checkpoint: Path) -> bool:
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception:  # damaged bytes fail in every way that an unpickler knows
        return False
    return True
