"""Leap's entry: compose a configuration, build what it names, then fit, test, generate or report (run.py --help)."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from lightning import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from callbacks.console import print_answers, quiet_libraries, report_console, say_where_things_are, sentence_for
from callbacks.frontier import FrontierReport
from callbacks.gather import report_frontier
from datamodules.prompts import read_prompts
from lightning_modules.base import require_forwards
from lightning_modules.run_files import find_checkpoint, newest, newest_student
from lightning_modules.teacher_cache import cache_key, partial_folder, train_or_load
from models.backbones.causal import build_causal
from models.backbones.causal_lm import load_causal
from models.backbones.causal_scores import require_one_vocabulary
from models.backbones.llada import LladaModel, build_llada, load_llada
from models.backbones.sizes import STAND_IN
from models.backbones.student_files import load_student, read_student
from models.decoding.decoder import Decoder
from models.decoding.masked_diffusion import MaskedDiffusionDecoder
from models.decoding.students import student_decoder
from models.decoding.trained import load_trained, trained_decoder
from models.functional.errors import UsageError, require_choice

console = report_console()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    try:
        with quiet_libraries():
            return run_mode(cfg)
    except Exception as error:
        sentence = sentence_for(error)
        if sentence is None or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {escape(sentence)}", highlight=False, soft_wrap=True)
        sys.exit(2)


def run_mode(cfg: DictConfig) -> float | None:
    modes = {"fit": fit, "test": test, "generate": generate, "report": report}
    if cfg.mode not in modes:
        raise UsageError(f"mode={cfg.mode} is not known; type mode={', '.join(modes)}")
    if cfg.seed < 0:
        raise UsageError(f"seed={cfg.seed} must be at least 0")
    return modes[cfg.mode](cfg)


# -- modes -----------------------------------------------------------------------------------------------------------


def fit(cfg: DictConfig) -> float | None:
    """Train (the teacher first, where the module needs one), then compare every decoder on the test split.

    student_path= is a student to start from, such as one that only some stages have trained. A study has nothing to train.
    """
    if cfg.study is not None:
        return instantiate(cfg.study)(console)
    module, trainer, datamodule = _build(cfg)
    if cfg.student_path is not None:
        module.start_from(load_student(cfg.student_path, module.teacher))
    try:
        trainer.fit(module, datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
    except SystemExit:  # how Lightning ends after Ctrl-C
        last = f"{_run_dir(cfg)}/checkpoints/last.ckpt"
        console.print(f"interrupted; to go on type the same command with ckpt_path={last}", soft_wrap=True)
        raise
    metric = trainer.callback_metrics.get(cfg.optimized_metric)
    trainer.test(module, datamodule, verbose=False)
    _say_where_things_are(cfg)
    return None if metric is None else float(metric)


def test(cfg: DictConfig) -> None:
    """Compare every decoder again, from ckpt_path= or student_path=; a pair of models as it is, unless ckpt_path= is given."""
    if cfg.ckpt_path is None and cfg.student_path is None and cfg.pair is None:
        if cfg.teacher is None:
            cfg.ckpt_path = "last"
        else:
            cfg.student_path = str(newest_student(_runs(cfg)))
    if cfg.student_path is not None and cfg.teacher is not None:
        cfg.teacher.path = _teacher_of(cfg, cfg.student_path)
    module, trainer, datamodule = _build(cfg)
    if cfg.ckpt_path is not None:
        trainer.test(module, datamodule, ckpt_path=cfg.ckpt_path, verbose=False, weights_only=True)
    else:
        if cfg.student_path is not None:
            module.student = load_student(cfg.student_path, module.teacher.cpu())
        trainer.test(module, datamodule, verbose=False)
    _say_where_things_are(cfg)


def generate(cfg: DictConfig) -> None:
    """Print the response to prompt= (or each line of prompt_file=): of the student, decoder=teacher, or the model trained."""
    prompts = read_prompts(cfg.prompt, cfg.prompt_file, cfg.n)
    forwards = 1 if cfg.forwards is None else cfg.forwards
    if forwards < 1 or (cfg.temperature or 0) < 0:
        raise UsageError(f"forwards={forwards} must be at least 1 and temperature={cfg.temperature} at least 0")
    require_choice("decoder", cfg.decoder, ("student", "teacher"))
    datamodule = instantiate(cfg.data)
    datamodule.setup("predict")
    rows = datamodule.encode_prompts(prompts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"temperature": cfg.module.get("teacher_temperature"), "remasking": cfg.module.get("teacher_remasking")}
    if cfg.pair is not None:
        decoder = _module_of_pair(cfg, datamodule).to(device).decoder(cfg.module.schemes[-1], datamodule)
    elif cfg.teacher is None:
        decoder = _trained_decoder(cfg, datamodule, device)
    elif cfg.decoder == "student":
        folder = Path(cfg.student_path) if cfg.student_path else newest_student(_runs(cfg))
        base = _teacher_of(cfg, folder)
        if base is None:
            raise UsageError(f"{folder} does not say where its teacher is; type teacher.path=<folder>")
        student = load_student(folder, _fitting(load_llada(base), datamodule, "teacher").to(device))
        more = {
            name: cfg.module[key] for name, key in (("step", "few_step"), ("promote", "promote")) if key in cfg.module
        }
        decoder = student_decoder(student, forwards, cfg.temperature, masked_options=options, **more)
    else:
        options["temperature"] = cfg.module.teacher_temperature if cfg.temperature is None else cfg.temperature
        decoder = MaskedDiffusionDecoder(_teacher(cfg, datamodule).to(device), forwards, **options)
    generator = torch.Generator(device=device).manual_seed(cfg.seed)
    for start in track(range(0, len(prompts), 64), description="generating", disable=len(prompts) <= 64):
        few = {name: column[start : start + 64].to(device) for name, column in rows.items()}
        print_answers(console, prompts[start : start + 64], datamodule.decode_responses(decoder(few, generator)))


def _trained_decoder(cfg: DictConfig, datamodule: Any, device: torch.device) -> Decoder:
    """The newest causal model that the experiment itself trained and left in model/."""
    advice = "it trains no student, and no run of it left a causal model in model/; mode=generate needs one of them"
    folder = newest(_runs(cfg), "model/*config.json", advice).parent
    model = _fitting(load_trained(folder), datamodule, "model").to(device)
    temperature = cfg.module.temperature if cfg.temperature is None else cfg.temperature
    return trained_decoder(model, datamodule.response_length, temperature, vocab_size=len(datamodule.tokenizer))


def report(cfg: DictConfig) -> None:
    """Every run below the outputs folder in one table and one figure: quality against cost."""
    report_frontier(cfg.paths.output_dir, console)


# -- building --------------------------------------------------------------------------------------------------------


def _build(cfg: DictConfig) -> tuple[LightningModule, Trainer, Any]:
    """Everything a run needs, from the configuration, with the cheap checks before the expensive work."""
    seed_everything(cfg.seed, verbose=False)
    if cfg.ckpt_path is not None:
        cfg.ckpt_path = str(find_checkpoint(_runs(cfg), cfg.ckpt_path))
    datamodule = instantiate(cfg.data)
    datamodule.prepare_data()
    datamodule.setup("fit")
    _check_before_work(cfg, datamodule)
    if cfg.pair is not None:
        module = _module_of_pair(cfg, datamodule)
    elif cfg.teacher is None:
        module = instantiate(cfg.module, _convert_="all", model=_new_model(cfg, datamodule))
    else:
        stand_in = build_llada(**datamodule.special_ids(), **STAND_IN)
        instantiate(cfg.module, _convert_="all", teacher=stand_in)  # refuses a wrong option before a teacher is trained
        teacher = _teacher(cfg, datamodule)
        # the student starts alike whether the teacher was trained now or before
        seed_everything(cfg.seed, verbose=False)
        module = instantiate(cfg.module, _convert_="all", teacher=teacher)
    trainer = instantiate(cfg.trainer, callbacks=_callbacks(cfg), logger=_loggers(cfg, "run"))
    return module, trainer, datamodule


def _check_before_work(cfg: DictConfig, datamodule: Any) -> None:
    """Refuse now what would otherwise fail after a teacher has been trained."""
    for name in ("forwards", "student_forwards"):
        require_forwards(f"module.{name}", list(cfg.module.get(name) or [1]), datamodule.response_length)
    instantiate(cfg.trainer, callbacks=[], logger=False)


def _new_model(cfg: DictConfig, datamodule: Any) -> LladaModel:
    """The network of cfg.model: read from its path where it has one, else with fresh weights for this vocabulary."""
    if "path" in cfg.model:
        model = instantiate(cfg.model)
    else:
        seed_everything(cfg.seed, verbose=False)
        model = instantiate(cfg.model, **datamodule.special_ids())
    return _fitting(model, datamodule, "model")


def _teacher(cfg: DictConfig, datamodule: Any) -> LladaModel:
    """teacher.path=, or a model that comes trained, or one trained here and kept in the cache."""
    if cfg.teacher.path is not None:
        return _fitting(load_llada(cfg.teacher.path), datamodule, "teacher")
    if "path" in cfg.model:
        cfg.teacher.path = cfg.model.path
        return _new_model(cfg, datamodule)
    return _trained(cfg, cfg.teacher, datamodule, "teacher", load_llada)


def _module_of_pair(cfg: DictConfig, datamodule: Any) -> LightningModule:
    """The module over theta and target: each from pair.<name>.path=, or trained here on its own data and kept in the cache."""
    stand_ins = {name: build_causal(**datamodule.special_ids(), **STAND_IN) for name in cfg.pair}
    instantiate(cfg.module, _convert_="all", **stand_ins)  # refuses a wrong option before a model is trained
    models = {}
    for name, recipe in cfg.pair.items():
        if recipe.path is not None:
            models[name] = _fitting(load_causal(recipe.path, dtype=recipe.dtype), datamodule, name)
        else:
            own = instantiate(cfg.data, **recipe.data)
            own.prepare_data()
            own.setup("fit")
            models[name] = _trained(cfg, recipe, own, name, load_causal)
    require_one_vocabulary(*(recipe.path for recipe in cfg.pair.values()))
    seed_everything(cfg.seed, verbose=False)
    return instantiate(cfg.module, _convert_="all", **models)


def _trained(cfg: DictConfig, recipe: DictConfig, datamodule: Any, what: str, load: Callable[[Path], Any]) -> Any:
    """The model that `recipe` (as conf/teacher) trains on datamodule, or the same one from the cache."""
    plain = {"model": cfg.model, "teacher": recipe}
    plain = {name: OmegaConf.to_container(part, resolve=True) for name, part in plain.items()}
    plain["teacher"].pop("cache_dir")
    numerics = {name: cfg.trainer.get(name) for name in ("precision", "gradient_clip_val", "accumulate_grad_batches")}
    made_from = {**plain, **numerics, "batch_size": datamodule.batch_size, "seed": cfg.seed}
    key = cache_key(**made_from, data=datamodule.fingerprint())
    folder = Path(recipe.cache_dir) / f"{datamodule.name}-{key}"
    recipe.path = None if cfg.trainer.get("fast_dev_run") else str(folder)
    recipe.callbacks.checkpoint.dirpath = str(partial_folder(folder))
    return train_or_load(
        folder,
        what=what,
        option=what if what == "teacher" else f"pair.{what}",
        load=load,
        build_model=lambda: _new_model(cfg, datamodule),
        build_module=lambda model: instantiate(recipe.module, _convert_="all", model=model),
        build_trainer=lambda: instantiate(
            cfg.trainer,
            max_steps=recipe.max_steps,
            callbacks=[instantiate(c) for c in recipe.callbacks.values() if c],
            logger=_loggers(cfg, what),
        ),
        datamodule=datamodule,
        console=console,
    )


def _fitting(model: LladaModel, datamodule: Any, what: str) -> LladaModel:
    """The model, once it is sure that the corpus fits it."""
    known = {name: getattr(model.config, name, None) for name in ("vocab_size", "mask_token_id")}
    datamodule.check_network(what, **known, context=model.config.max_position_embeddings)
    return model


def _callbacks(cfg: DictConfig) -> list:
    """cfg.callbacks without the ones set to null, then the report, which needs to know the whole configuration."""
    plain = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True)
    logging = any(cfg.logger.values())
    wanted = [c for name, c in cfg.callbacks.items() if c and (logging or name != "lr")]
    built = [instantiate(callback) for callback in wanted]
    return [*built, FrontierReport(_run_dir(cfg), cfg.name, plain, cfg.samples)]


def _loggers(cfg: DictConfig, stage: str) -> list:
    return [instantiate(logger, version=stage) for logger in cfg.logger.values() if logger]


# -- finding things --------------------------------------------------------------------------------------------------


def _run_dir(cfg: DictConfig) -> Path:
    return Path(cfg.paths.run_dir)


def _runs(cfg: DictConfig) -> Path:
    """The folder of all runs of the experiment."""
    return Path(cfg.paths.output_dir, cfg.name)


def _teacher_of(cfg: DictConfig, student: str | Path) -> str | None:
    """teacher.path=, or where the student's notes say that its teacher is."""
    return cfg.teacher.path or read_student(student)["notes"].get("teacher")


def _say_where_things_are(cfg: DictConfig) -> None:
    if not cfg.trainer.get("fast_dev_run"):
        teacher = None if cfg.teacher is None else cfg.teacher.path
        say_where_things_are(console, _run_dir(cfg), cfg.name, teacher, cfg.example_prompt)


if __name__ == "__main__":
    main()
