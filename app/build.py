"""From a configuration to what a run needs: data, models (trained first where need be), module, trainer."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from lightning import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedModel

from app.model_cache import cache_key, partial_folder, train_or_load
from app.run_files import find_checkpoint
from callbacks.frontier import FrontierReport
from lightning_modules.training.compile import compute_layers
from lightning_modules.training.sharding import ShardedStrategy
from models.backbones.abilities import context_of, require_separate_documents, require_steps
from models.backbones.causal import build_causal
from models.backbones.causal_lm import load_causal
from models.backbones.llada import LladaModel, build_llada, load_llada
from models.backbones.sizes import STAND_IN
from models.flow.student_files import read_student
from models.functional.errors import require_forward_passes
from models.speculative.scores import require_one_vocabulary
from reporting.console import report_console

console = report_console()


def build(cfg: DictConfig) -> tuple[LightningModule, Trainer, Any]:
    """Everything a run needs, from the configuration, with the cheap checks before the expensive work."""
    seed_everything(cfg.seed, verbose=False)
    if cfg.ckpt_path is not None:
        cfg.ckpt_path = str(find_checkpoint(runs_of(cfg), cfg.ckpt_path))
    datamodule = _data(cfg)
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
    module = _with_layer_options(cfg, module)
    return module, trainer_of(cfg), datamodule


def trainer_of(cfg: DictConfig) -> Trainer:
    """The trainer with the callbacks and loggers of the configuration."""
    return instantiate(cfg.trainer, callbacks=_callbacks(cfg), logger=_loggers(cfg, "run"))


def untrained(cfg: DictConfig) -> tuple[LightningModule, Any]:
    """The module, on models with fresh weights, and its data: for timing, not for use."""
    datamodule = _data(cfg)
    needed = cfg.pair or (["model"] if cfg.teacher is None else ["teacher"])
    return instantiate(cfg.module, _convert_="all", **{name: new_model(cfg, datamodule) for name in needed}), datamodule


def _data(cfg: DictConfig, **more: Any) -> Any:
    """The corpus of cfg.data, set up for training. more: options that replace those of cfg.data."""
    datamodule = instantiate(cfg.data, **more)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def _check_before_work(cfg: DictConfig, datamodule: Any) -> Trainer:
    """The trainer, without callbacks. Errors: UsageError for options that would fail only after a teacher has been trained."""
    objective = cfg.module.get("objective")
    one_by_one = objective is not None and get_class(objective._target_).generation not in ("masked", "flow")
    for name in () if one_by_one else ("forwards", "student_forwards"):
        require_forward_passes(f"module.{name}", list(cfg.module.get(name) or [1]), datamodule.response_length)
    trainer = instantiate(cfg.trainer, callbacks=[], logger=False)
    if isinstance(trainer.strategy, ShardedStrategy):
        trainer.strategy.require_several()
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


def settle_attention(cfg: DictConfig) -> None:
    """model.attention=null becomes what the objective needs: the module's, or that of the teacher which is trained first."""
    module = cfg.module if cfg.teacher is None else cfg.teacher.module
    objective = module.get("objective")
    if objective is not None and "attention" in cfg.model and cfg.model.attention is None:
        cfg.model.attention = get_class(objective._target_).attention


def trained_teacher(cfg: DictConfig, datamodule: Any) -> LladaModel:
    """The teacher of teacher.path=, else the pretrained model of model.path=, else one that is trained here and cached."""
    if cfg.teacher.path is not None:
        return checked_network(load_llada(cfg.teacher.path), datamodule, "teacher")
    if "path" in cfg.model:
        cfg.teacher.path = cfg.model.path
        return new_model(cfg, datamodule)
    return _trained(cfg, cfg.teacher, datamodule, "teacher", load_llada)


def module_of_pair(cfg: DictConfig, datamodule: Any) -> LightningModule:
    """The module on theta and target: each read from pair.<name>.path=, or trained here on its own data and cached."""
    stand_ins = {name: build_causal(**datamodule.special_ids(), **STAND_IN) for name in cfg.pair}
    instantiate(cfg.module, _convert_="all", **stand_ins)  # a wrong option is refused before a model is trained
    models = {}
    for name, recipe in cfg.pair.items():
        if recipe.path is not None:
            models[name] = checked_network(load_causal(recipe.path, dtype=recipe.dtype), datamodule, name)
        else:
            models[name] = _trained(cfg, recipe, _data(cfg, **recipe.data), name, load_causal)
    require_one_vocabulary(*(recipe.path for recipe in cfg.pair.values()))
    seed_everything(cfg.seed, verbose=False)
    return instantiate(cfg.module, _convert_="all", **models)


def _trained(cfg: DictConfig, recipe: DictConfig, datamodule: Any, what: str, load: Callable[[Path], Any]) -> Any:
    """The model that `recipe` (such as conf/teacher) trains on datamodule, from the cache if it has been trained before."""
    settle_attention(cfg)  # the key names it
    plain = {"model": cfg.model, "teacher": recipe}
    plain = {name: OmegaConf.to_container(part, resolve=True) for name, part in plain.items()}
    plain["teacher"].pop("cache_dir")
    numerics = {name: cfg.trainer.get(name) for name in ("precision", "gradient_clip_val", "accumulate_grad_batches")}
    made_from = {**plain, **numerics, "batch_size": datamodule.batch_size, "seed": cfg.seed}
    made_from |= {"compile": cfg.compile} if cfg.compile else {}  # compiled layers round differently
    key = cache_key(**made_from, data=datamodule.fingerprint())
    folder = Path(recipe.cache_dir) / f"{datamodule.name}-{key}"
    recipe.path = None if cfg.trainer.get("fast_dev_run") else str(folder)
    recipe.callbacks.checkpoint.dirpath = str(partial_folder(folder))
    return train_or_load(
        folder,
        what=what,
        option=what if what == "teacher" else f"pair.{what}",
        load=load,
        build_model=lambda: new_model(cfg, datamodule),
        build_module=lambda model: _with_layer_options(cfg, instantiate(recipe.module, _convert_="all", model=model)),
        build_trainer=lambda: instantiate(
            cfg.trainer,
            max_steps=recipe.max_steps,
            callbacks=[instantiate(c) for c in recipe.callbacks.values() if c],
            logger=_loggers(cfg, what),
        ),
        datamodule=datamodule,
        console=console,
    )


def checked_network(model: LladaModel, datamodule: Any, what: str) -> LladaModel:
    """The model itself. what: its name in messages. Errors: UsageError where the corpus does not fit it."""
    known = {name: getattr(model.config, name, None) for name in ("vocab_size", "mask_token_id")}
    datamodule.check_network(what, **known, context=context_of(model) or sys.maxsize)
    if isinstance(model, PreTrainedModel | PeftModel) and not isinstance(model, LladaModel):
        if getattr(datamodule, "document_mask", False):
            require_separate_documents(model)
        if datamodule.prompt_length:
            require_steps(model)
    return model


def _callbacks(cfg: DictConfig) -> list:
    """cfg.callbacks without those set to null, then the report, which records the whole configuration."""
    plain = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True)
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


def teacher_of(cfg: DictConfig, student: str | Path) -> str | None:
    """The folder of a student's teacher: teacher.path=, else the one noted in student.json."""
    return cfg.teacher.path or read_student(student)["notes"].get("teacher")
