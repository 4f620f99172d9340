"""What `mode=` does: fit, test, generate, export, report."""

from contextlib import nullcontext
from pathlib import Path

import torch
from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import DictConfig

from app.build import build, is_published, keep_made_with, run_dir, runs_of
from app.command_line import NO_EXPERIMENT
from app.generate import generate
from app.locks import exclusive_run
from app.options import check_options
from app.own_options import require_read
from app.ranks import leads
from app.run_files import newest_student, runs_elsewhere
from app.sweep import in_sweep, typed_again
from app.trained import fill_from_checkpoint
from callbacks.frontier import FrontierReport
from callbacks.interruption import Interrupted
from datamodules.corpus import CorpusDataModule
from models.flow.student_files import load_student
from models.functional.errors import UsageError
from reporting.card import write_card
from reporting.command import option, shell
from reporting.console import report_console, say_where_things_are
from reporting.hparams import headline
from reporting.keys import current_name
from reporting.report import report_frontier
from reporting.sweep import read_sweeps, report_sweep

console = report_console()
EXPORTED = ("model", "model_merged", "theta", "student", "drafter")  # folders that a training may leave


def run_mode(cfg: DictConfig) -> float | None:
    modes = {"fit": fit, "test": test, "generate": generate, "export": export, "report": report}
    if cfg.mode not in modes:
        raise UsageError(f"mode={cfg.mode} is not known; type mode={', '.join(modes)}")
    if cfg.module is None and cfg.study is None and cfg.mode != "report":
        raise UsageError(NO_EXPERIMENT)
    require_read(cfg)
    check_options(cfg)
    _require_use(cfg)
    alone = exclusive_run(run_dir(cfg)) if cfg.mode in ("fit", "test") and cfg.study is None else nullcontext()
    with alone:
        try:
            return modes[cfg.mode](cfg)
        except Interrupted as stop:
            _say_interrupted(cfg, stop)
            raise


def _require_use(cfg: DictConfig) -> None:
    """Raise UsageError for an option that would be passed over without a word."""
    for name in ("prompt", "prompt_file", "answers_file", "plan") if cfg.mode != "generate" else ():
        if cfg[name] is not None:
            raise UsageError(f"{name}= is answered by mode=generate, and this is mode={cfg.mode}; type mode=generate")
    if cfg.student_path is not None and cfg.teacher is None and cfg.mode != "report":
        raise UsageError(f"student_path={cfg.student_path}: experiment={cfg.name} trains no student; leave it out")


def _say_interrupted(cfg: DictConfig, stop: Interrupted) -> None:
    """Where the state is, and what to type to go on: of all ranks the first says it."""
    if not leads():
        return
    if stop.checkpoint is None:
        console.print(f"interrupted at step {stop.step}; no checkpoint was saved")
        return
    # a model that is trained first, such as a teacher, is taken up again without being asked
    own = stop.checkpoint.absolute().is_relative_to(run_dir(cfg).absolute())
    more = f" with {shell(option('ckpt_path', str(stop.checkpoint)))}" if own else " again"
    console.print(
        f"interrupted; step {stop.step} is saved in {stop.checkpoint}; to go on type the same command{more}",
        highlight=False,
        soft_wrap=True,
    )


# -- modes -----------------------------------------------------------------------------------------------------------


def fit(cfg: DictConfig) -> float | None:
    """Train (the teacher first, where the module needs one), then compare every decoder on the test split.

    student_path= is a student to start from, such as one that only some stages have trained. A study has nothing to train.
    """
    if cfg.study is not None:
        instantiate(cfg.study)(console)
        return None
    module, trainer, datamodule = build(cfg)
    if cfg.student_path is not None:
        module.start_from(load_student(cfg.student_path, module.teacher))
    if trainer.is_global_zero and not trainer.fast_dev_run:
        keep_made_with(cfg, datamodule)
    trainer.fit(module, datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
    logged = dict(trainer.callback_metrics)
    trainer.test(module, datamodule, verbose=False)
    if trainer.is_global_zero:
        _write_cards(cfg, datamodule)
    _say_where_things_are(cfg, datamodule)
    return _optimised(cfg.optimized_metric, logged, trainer)


def _optimised(name: str, logged: dict[str, torch.Tensor], trainer: Trainer) -> float | None:
    """What a sweep compares runs by: of what training logged last, or of the final table; None where it is neither."""
    records = [c.record for c in trainer.callbacks if isinstance(c, FrontierReport) and c.record is not None]
    known = {key: float(value) for key, value in logged.items()} | (headline(records[0]) if records else {})
    name = current_name(name)
    if name not in known and records and in_sweep():
        listed = ", ".join(sorted(known))
        console.print(f"optimized_metric={name} is no figure of this run; type one of {listed}", highlight=False)
    return known.get(name)


def test(cfg: DictConfig) -> None:
    """Compare every decoder again, from ckpt_path= or student_path=.

    Without ckpt_path= a pair of models is compared as it is, and so is the model of model.path= that no run has trained.
    """
    if cfg.ckpt_path is None and cfg.student_path is None and cfg.pair is None and not is_published(cfg):
        if cfg.teacher is None:
            cfg.ckpt_path = "last"
        else:
            cfg.student_path = str(newest_student(runs_of(cfg)))
    module, trainer, datamodule = build(cfg)
    if cfg.ckpt_path is not None:
        trainer.test(module, datamodule, ckpt_path=cfg.ckpt_path, verbose=False, weights_only=True)
    else:
        if cfg.student_path is not None:
            module.student = load_student(cfg.student_path, module.teacher.cpu())
        trainer.test(module, datamodule, verbose=False)
    _say_where_things_are(cfg, datamodule)


def export(cfg: DictConfig) -> None:
    """Write the model of ckpt_path= (the experiment's newest) as a folder with a model card, model/ of this run."""
    cfg.ckpt_path = cfg.ckpt_path or "last"
    module, trainer, datamodule = build(cfg)
    module.trainer = trainer  # some modules read a checkpoint by how many ranks there are
    fill_from_checkpoint(module, cfg.ckpt_path)
    folder = module.export(run_dir(cfg) / "model", datamodule.tokenizer)
    keep_made_with(cfg, datamodule)
    trained_in = Path(cfg.ckpt_path).resolve().parent.parent
    card = write_card(folder, trained_in, cfg.licence, cfg.example_prompt or datamodule.example_prompt())
    console.print(f"model: {folder}\ncard:  {card}", highlight=False, soft_wrap=True)


def _write_cards(cfg: DictConfig, datamodule: CorpusDataModule) -> None:
    """README.md beside the weights that training has left."""
    prompt = cfg.example_prompt or datamodule.example_prompt()
    for name in EXPORTED:
        if (run_dir(cfg) / name).is_dir():
            write_card(run_dir(cfg) / name, run_dir(cfg), cfg.licence, prompt)


def report(cfg: DictConfig) -> None:
    """Every run below a folder in one table and one figure, quality against cost; then every sweep.

    Without report_dir= these are all runs of the outputs folder, those with a folder elsewhere (hydra.run.dir) among them.
    """
    folder = Path(cfg.report_dir or cfg.paths.output_dir)
    elsewhere = [] if cfg.report_dir else runs_elsewhere(folder)
    report_frontier(folder, console, elsewhere)
    for name, runs in read_sweeps(folder, *elsewhere).items():
        report_sweep(runs, folder / "report", f"sweep_{name}", console)


def _say_where_things_are(cfg: DictConfig, datamodule: CorpusDataModule) -> None:
    if not cfg.trainer.get("fast_dev_run"):
        teacher = None if cfg.teacher is None else cfg.teacher.path
        prompt = cfg.example_prompt or datamodule.example_prompt()
        say_where_things_are(console, run_dir(cfg), [] if in_sweep() else typed_again(), teacher, prompt)
