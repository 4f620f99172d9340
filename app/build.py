"""From a configuration to what a run needs: data, models (trained first where need be), module, trainer."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from lightning import LightningModule, Trainer, seed_everything
from lightning.fabric.plugins import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from app import run_files
from app.half_precision import say_if_half_is_slow
from app.machines import settle_machines
from app.model_cache import cache_key, partial_folder, train_or_load
from app.run_files import corpus_state, find_checkpoint, models_of, require_same_module
from callbacks.frontier import FrontierReport
from callbacks.interruption import StopOnSignal
from callbacks.resumed_options import ResumedOptions
from datamodules.state import TOKENIZER, CorpusState, absolute_source
from lightning_modules.training.checkpoints import ReplacingCheckpointIO
from lightning_modules.training.compile import compute_layers
from lightning_modules.training.sharding import ShardedStrategy
from models.backbones.abilities import context_of, require_separate_documents, require_steps
from models.backbones.bidirectional import is_block_causal
from models.backbones.causal import build_causal
from models.backbones.causal_lm import load_causal
from models.backbones.llada import LladaModel, build_llada
from models.backbones.masked_from_causal import load_masked
from models.backbones.sizes import STAND_IN
from models.flow.student_files import is_student, teacher_folder
from models.functional.errors import UsageError, require_forward_passes
from models.interfaces.masked_sampling import require_blocks, require_dividing
from models.speculative.scores import require_one_vocabulary
from reporting.console import report_console

console = report_console()
NUMERICS = ("precision", "gradient_clip_val", "accumulate_grad_batches")  # of the trainer: what a step computes
# last parts of names of options that a training does not depend on
NOT_OF_TRAINING = (
    "num_workers", "cache_dir", "eval_batch_size", "val", "test", "forwards", "student_forwards", "ode_forwards",
)  # fmt: skip


def build(cfg: DictConfig) -> tuple[LightningModule, Trainer, Any]:
    """Everything a run needs, from the configuration, with the cheap checks before the expensive work.

    What is read from ckpt_path= or student_path= brings its corpus' state and its teacher with it.
    """
    seed_everything(cfg.seed, verbose=False)
    if cfg.ckpt_path is not None:
        cfg.ckpt_path = str(find_checkpoint(runs_of(cfg), cfg.ckpt_path))
        require_same_module(Path(cfg.ckpt_path), cfg.module._target_)
    weights = Path(cfg.ckpt_path or cfg.student_path) if cfg.ckpt_path or cfg.student_path else None
    settle_models(cfg, weights)
    datamodule = data_of(cfg, weights)
    if cfg.mode == "fit" and cfg.ckpt_path is not None:
        datamodule.require_same_training()
    if cfg.mode == "test" or (cfg.mode == "fit" and cfg.ckpt_path is not None):
        datamodule.require_same_test()
    precision = str(_check_before_work(cfg, datamodule).precision)
    if cfg.pair is not None:
        module = module_of_pair(cfg, datamodule)
    elif cfg.teacher is None:
        module = instantiate(cfg.module, _convert_="all", model=new_model(cfg, datamodule))
    else:
        stand_in = build_llada(**datamodule.special_ids(), **STAND_IN)
        # a wrong option is refused before a teacher is trained
        trial = _with_layer_options(cfg, instantiate(cfg.module, _convert_="all", teacher=stand_in))
        if cfg.mode == "fit":
            trial.require_precision(precision)
        teacher = trained_teacher(cfg, datamodule)
        # the same first weights, whether the teacher was trained now or read from the cache
        seed_everything(cfg.seed, verbose=False)
        module = instantiate(cfg.module, _convert_="all", teacher=teacher)
    module, trainer = _with_layer_options(cfg, module), trainer_of(cfg)
    say_if_half_is_slow(cfg, module, trainer)
    return module, trainer, datamodule


def trainer_of(cfg: DictConfig) -> Trainer:
    """The trainer with the callbacks and loggers of the configuration."""
    return make_trainer(cfg, [*_callbacks(cfg), ResumedOptions(training_options(cfg))], _loggers(cfg, "run"))


def training_options(cfg: DictConfig) -> dict[str, Any]:
    """The options that decide what a training computes, step by step: {name: plain value}. Its length is not among them."""
    found = {name: cfg[name] for name in ("seed", "compile", "recompute")}
    found |= {f"trainer.{name}": cfg.trainer.get(name) for name in NUMERICS}
    ema = cfg.callbacks.get("ema")
    found["callbacks.ema.decay"] = None if ema is None else ema.decay
    for group in ("module", "data", "model"):
        if cfg[group] is not None:
            own: Any = OmegaConf.to_container(cfg[group], resolve=True)
            if own.get("seed") == cfg.seed:  # is named once
                own.pop("seed")
            found |= _flat(own, f"{group}.")
    return {name: value for name, value in found.items() if name.rsplit(".", 1)[-1] not in NOT_OF_TRAINING}


def _flat(options: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def make_trainer(cfg: DictConfig, callbacks: list, logger: Any, **changes: Any) -> Trainer:
    """The trainer of cfg.trainer, with `changes` of its options."""
    interval = cfg.trainer.get("val_check_interval")
    if isinstance(interval, int):  # Lightning counts batches, our option counts optimiser steps
        changes["val_check_interval"] = interval * (cfg.trainer.get("accumulate_grad_batches") or 1)
    if cfg.trainer.get("fast_dev_run"):  # fewer batches than a step may have
        changes["accumulate_grad_batches"] = 1
    trainer = instantiate(cfg.trainer, callbacks=[*callbacks, StopOnSignal()], logger=logger, **changes)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else it is the user's choice
        trainer.strategy.checkpoint_io = ReplacingCheckpointIO()
    return trainer


def untrained(cfg: DictConfig) -> tuple[LightningModule, Any]:
    """The module, on models with fresh weights, and its data: for timing, not for use."""
    datamodule = data_of(cfg)
    needed = cfg.pair or (["model"] if cfg.teacher is None else ["teacher"])
    return instantiate(cfg.module, _convert_="all", **{name: new_model(cfg, datamodule) for name in needed}), datamodule


def settle_models(cfg: DictConfig, weights: Path | None) -> None:
    """teacher.path=null and pair.<name>.path=null become the models that the run of these weights stands on, if still there."""
    noted = {} if weights is None else models_of(weights)
    if weights is not None and cfg.teacher is not None and "teacher" not in noted:  # a run of an earlier version
        student = next((folder for folder in (weights, weights.parent.parent / "student") if is_student(folder)), None)
        teacher = None if student is None else teacher_folder(student)
        noted = {} if teacher is None else {"teacher": teacher}
    recipes = dict(cfg.pair or {}) if cfg.teacher is None else {"teacher": cfg.teacher}
    for name, recipe in recipes.items():
        path = noted.get(name)
        if recipe.path is None and path is not None and (Path(path).is_dir() or cfg.model.get("path") == path):
            recipe.path = path
            if cfg.mode != "generate":
                console.print(f"{name}: reusing the trained one in {path}", highlight=False)


def data_of(cfg: DictConfig, weights: Path | None = None, **more: Any) -> Any:
    """The corpus of cfg.data, set up for what the run does with it.

    weights: a checkpoint, student or model, whose run's state of the corpus is taken where it is known. more: options that
    replace those of cfg.data.
    """
    path = None if cfg.teacher is None else cfg.teacher.path
    if path is not None and cfg.data.get("tokenizer") == path and not Path(path).expanduser().is_dir():
        raise missing_teacher(path)
    datamodule = instantiate(cfg.data, **more)
    state = corpus_state(weights, datamodule)
    if state is not None and cfg.mode == "generate" and cfg.ckpt_path is None and cfg.student_path is None:
        _say_other_rows(cfg, state, datamodule)
    if state is None and cfg.mode != "fit" and cfg.teacher is not None and cfg.teacher.path is not None:
        state = corpus_state(Path(cfg.teacher.path), datamodule)
    if state is not None:
        datamodule.take(state)
    if cfg.mode in ("generate", "export"):
        datamodule.setup("predict")
    else:
        datamodule.prepare_data()
        datamodule.setup("test" if cfg.mode == "test" else "fit")
    return datamodule


def _say_other_rows(cfg: DictConfig, state: CorpusState, datamodule: Any) -> None:
    """Say so where the experiment's newest run was trained on another file than the one that is typed."""
    then, now = state.sources.get("train"), absolute_source(datamodule.sources.get("train"))
    if then and now and then != now and all(os.path.exists(path) for path in now):
        other = (
            "student_path=<its folder>/student"
            if cfg.teacher is not None
            else "ckpt_path=<its folder>/checkpoints/last.ckpt"
        )
        Console(stderr=True).print(
            f"note: this is the model of {state.folder.parent}, the newest run of experiment={cfg.name}, which was trained on "
            f"{', '.join(then)}; for that of another run type {other}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def keep_made_with(cfg: DictConfig, datamodule: Any) -> None:
    """Leave in the run's folder what the run is made with."""
    goes_on = cfg.ckpt_path is not None and datamodule.made_from is not None
    whole = goes_on and datamodule.made_from.kind == type(datamodule).__name__
    state = datamodule.made_from if whole else datamodule.state()
    recipes = dict(cfg.pair or {}) if cfg.teacher is None else {"teacher": cfg.teacher}
    run_files.keep_made_with(run_dir(cfg), runs_of(cfg), state, {name: r.path for name, r in recipes.items()})


def _check_before_work(cfg: DictConfig, datamodule: Any) -> Trainer:
    """The trainer, without callbacks. Errors: UsageError for options that would fail only after a teacher has been trained."""
    objective = cfg.module.get("objective")
    declared: Any = None if objective is None else get_class(objective._target_)
    one_by_one = declared is not None and declared.generation not in ("masked", "flow")
    for name in () if one_by_one else ("forwards", "student_forwards"):
        require_forward_passes(f"module.{name}", list(cfg.module.get(name) or [1]), datamodule.response_length)
    for name in () if one_by_one else ("block_length", "teacher_block_length"):
        forwards = list(cfg.module.get("forwards") or [])
        require_blocks(f"module.{name}", cfg.module.get(name), forwards, datamodule.response_length)
    own_blocks = None if objective is None else objective.get("block_length")
    require_dividing("module.objective.block_length", own_blocks, datamodule.response_length)
    trainer = make_trainer(cfg, [], False)
    if isinstance(trainer.strategy, ShardedStrategy):
        trainer.strategy.require_several()
    if cfg.mode in ("fit", "test"):
        settle_machines(trainer)
    return trainer


def _with_layer_options(cfg: DictConfig, module: LightningModule) -> LightningModule:
    """The module with its decoder layers compiled or recomputed, as compile= and recompute= say."""
    return compute_layers(module, cfg.compile, cfg.recompute)


def new_model(cfg: DictConfig, datamodule: Any) -> LladaModel:
    """The network of cfg.model: read from model.path where there is one, else with fresh weights for this vocabulary."""
    settle_attention(cfg)
    if "path" in cfg.model:
        model = instantiate(cfg.model)
    else:
        seed_everything(cfg.seed, verbose=False)
        model = instantiate(cfg.model, **datamodule.special_ids())
    return checked_network(model, datamodule, "model")


def is_published(cfg: DictConfig) -> bool:
    """Whether a run is about the model of model.path= as it is: there is no teacher, and no run has trained it."""
    given = cfg.teacher is None and cfg.model is not None and "path" in cfg.model
    return given and not run_files.found(runs_of(cfg), "checkpoints/last.ckpt")


def settle_attention(cfg: DictConfig) -> None:
    """model.attention=null becomes what the objective needs: the module's, or that of the teacher which is trained first."""
    module = cfg.module if cfg.teacher is None else cfg.teacher.module
    objective = module.get("objective")
    if objective is not None and "attention" in cfg.model and cfg.model.attention is None:
        declared: Any = get_class(objective._target_)
        cfg.model.attention = declared.attention


def trained_teacher(cfg: DictConfig, datamodule: Any) -> LladaModel:
    """The teacher of teacher.path=, else the pretrained model of model.path=, else one that is trained here and cached."""
    if cfg.teacher.path is not None:
        return load_teacher(cfg.teacher.path, datamodule)
    if "path" in cfg.model:
        cfg.teacher.path = cfg.model.path
        require_vocabulary_of(cfg.model.path, datamodule)
        return new_model(cfg, datamodule)
    return _trained(cfg, cfg.teacher, datamodule, "teacher", load_masked)


def load_teacher(path: str | Path, datamodule: Any) -> LladaModel:
    """The teacher in a folder, or of the hub. Errors: UsageError where it is not there, or is of another vocabulary."""
    try:
        teacher = load_masked(path, option="teacher.path")
    except UsageError as error:
        if Path(path).is_dir():
            raise
        raise missing_teacher(path) from error
    require_bidirectional_teacher(teacher, path)
    require_vocabulary_of(path, datamodule)
    return checked_network(teacher, datamodule, "teacher")


def missing_teacher(path: str | Path) -> UsageError:
    return UsageError(f"the teacher {path} is not there; type teacher.path=<the folder of the teacher>")


def require_bidirectional_teacher(teacher: LladaModel, path: str | Path) -> None:
    """Raise UsageError for a model of block diffusion, whose blocks do not see what comes after them."""
    if is_block_causal(teacher):
        raise UsageError(
            f"the model in {path} was trained by block diffusion, and a student needs a teacher that fills all positions at "
            "once; type teacher.path=<a model of module/objective=masked_diffusion>"
        )


def require_vocabulary_of(folder: str | Path, datamodule: Any) -> None:
    """Raise UsageError where the tokenizer in a teacher's folder numbers other tokens than the corpus'."""
    if not (Path(folder) / TOKENIZER).is_file():
        return
    own = datamodule.tokenizer.get_vocab()
    if own != Tokenizer.from_file(str(Path(folder) / TOKENIZER)).get_vocab():
        raise UsageError(
            f"the teacher in {folder} was trained with another vocabulary than the tokenizer of the corpus, so its token ids "
            f"mean other words; type data.tokenizer={folder}, or another teacher.path"
        )


def module_of_pair(cfg: DictConfig, datamodule: Any) -> LightningModule:
    """The module on theta and target: each read from pair.<name>.path=, or trained here on its own data and cached."""
    stand_ins = {name: build_causal(**datamodule.special_ids(), **STAND_IN) for name in cfg.pair}
    instantiate(cfg.module, _convert_="all", **stand_ins)  # a wrong option is refused before a model is trained
    models = {}
    # a folder that cannot be read is refused before a model is trained
    for name, recipe in sorted(cfg.pair.items(), key=lambda named: named[1].path is None):
        if recipe.path is not None:
            model = load_causal(recipe.path, dtype=recipe.dtype, option=f"pair.{name}.path")
            models[name] = checked_network(model, datamodule, name)
        else:
            models[name] = _trained(cfg, recipe, data_of(cfg, None, **recipe.data), name, load_causal)
    require_one_vocabulary(*(recipe.path for recipe in cfg.pair.values()))
    seed_everything(cfg.seed, verbose=False)
    return instantiate(cfg.module, _convert_="all", **models)


def _trained(cfg: DictConfig, recipe: DictConfig, datamodule: Any, what: str, load: Callable[[Path], Any]) -> Any:
    """The model that `recipe` (such as conf/teacher) trains on datamodule, from the cache if it has been trained before."""
    settle_attention(cfg)  # the key names it
    plain = {"model": cfg.model, "teacher": recipe}
    plain = {name: OmegaConf.to_container(part, resolve=True) for name, part in plain.items()}
    plain["teacher"].pop("cache_dir")
    numerics = {name: cfg.trainer.get(name) for name in NUMERICS}
    made_from = {**plain, **numerics, "batch_size": datamodule.batch_size, "seed": cfg.seed}
    made_from |= {"compile": cfg.compile} if cfg.compile else {}  # compiled layers round differently
    key = cache_key(**made_from, data=datamodule.fingerprint())
    folder = Path(recipe.cache_dir) / f"{datamodule.name}-{key}"
    if cfg.mode != "fit" and not (folder / "config.json").is_file():
        option = what if what == "teacher" else f"pair.{what}"
        raise UsageError(
            f"mode={cfg.mode} trains no {what}, and none of these options is in {recipe.cache_dir}; type the options and the "
            f"seed of its training, or {option}.path=<its folder>, or train one first (mode=fit)"
        )
    recipe.path = None if cfg.trainer.get("fast_dev_run") else str(folder)
    if recipe.callbacks.get("checkpoint") is not None:
        recipe.callbacks.checkpoint.dirpath = str(partial_folder(folder))
    return train_or_load(
        folder,
        what=what,
        option=what if what == "teacher" else f"pair.{what}",
        load=load,
        build_model=lambda: new_model(cfg, datamodule),
        build_module=lambda model: _with_layer_options(cfg, instantiate(recipe.module, _convert_="all", model=model)),
        build_trainer=lambda: make_trainer(
            cfg,
            [instantiate(c) for c in recipe.callbacks.values() if c],
            _loggers(cfg, what),
            max_steps=recipe.max_steps,
        ),
        datamodule=datamodule,
        console=console,
    )


def checked_network(model: LladaModel, datamodule: Any, what: str) -> LladaModel:
    """The model itself. what: its name in messages. Errors: UsageError where the corpus does not fit it."""
    mask_id = getattr(model.config, "mask_token_id", None) or getattr(model, "mask_id", None)
    known = {"vocab_size": model.config.get_text_config().vocab_size, "mask_token_id": mask_id}
    datamodule.check_network(what, **known, context=context_of(model) or sys.maxsize)
    if isinstance(model, PreTrainedModel | PeftModel) and not hasattr(model, "embed"):
        if getattr(datamodule, "document_mask", False):
            require_separate_documents(model)
        if datamodule.prompt_length:
            require_steps(model)
    return model


def _callbacks(cfg: DictConfig) -> list:
    """cfg.callbacks without those set to null, then the report, which records the whole configuration."""
    plain: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), resolve=True
    )
    logging = any(cfg.logger.values())
    wanted = [c for name, c in cfg.callbacks.items() if c and (logging or name != "lr")]
    built = [instantiate(callback) for callback in wanted]
    return [*built, FrontierReport(run_dir(cfg), cfg.name, plain, cfg.samples)]


def _loggers(cfg: DictConfig, stage: str) -> list:
    return [instantiate(logger, version=stage) for logger in cfg.logger.values() if logger]


def run_dir(cfg: DictConfig) -> Path:
    return Path(cfg.paths.run_dir)


def runs_of(cfg: DictConfig) -> Path:
    """The folder of all runs of the experiment."""
    return Path(cfg.paths.output_dir, cfg.name)
