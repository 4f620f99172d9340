"""What `mode=` does: fit, test, generate, export, report."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import track

from callbacks.console import print_answers, report_console, say_where_things_are
from callbacks.gather import report_frontier
from datamodules.prompts import read_prompts
from lightning_modules.locks import alone_in
from lightning_modules.run_files import newest_student
from lightning_modules.trained import fill_from_checkpoint, newest_model, trained_decoder
from models.backbones.llada import load_llada
from models.backbones.student_files import load_student
from models.decoding.masked_diffusion import MaskedDiffusionDecoder
from models.decoding.students import student_decoder
from models.functional.errors import UsageError, require_choice
from wiring.build import build, fitting, module_of_pair, run_dir, runs_of, teacher_of, trained_teacher
from wiring.options import check_options

console = report_console()


def run_mode(cfg: DictConfig) -> float | None:
    modes = {"fit": fit, "test": test, "generate": generate, "export": export, "report": report}
    if cfg.mode not in modes:
        raise UsageError(f"mode={cfg.mode} is not known; type mode={', '.join(modes)}")
    check_options(cfg)
    if cfg.mode in ("fit", "test") and cfg.study is None:
        with alone_in(run_dir(cfg)):
            return modes[cfg.mode](cfg)
    return modes[cfg.mode](cfg)


# -- modes -----------------------------------------------------------------------------------------------------------


def fit(cfg: DictConfig) -> float | None:
    """Train (the teacher first, where the module needs one), then compare every decoder on the test split.

    student_path= is a student to start from, such as one that only some stages have trained. A study has nothing to train.
    """
    if cfg.study is not None:
        return instantiate(cfg.study)(console)
    module, trainer, datamodule = build(cfg)
    if cfg.student_path is not None:
        if cfg.teacher is None:
            raise UsageError(f"student_path={cfg.student_path}: experiment={cfg.name} trains no student; leave it out")
        module.start_from(load_student(cfg.student_path, module.teacher))
    try:
        trainer.fit(module, datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
    except SystemExit:  # how Lightning ends after Ctrl-C
        last = f"{run_dir(cfg)}/checkpoints/last.ckpt"
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
            cfg.student_path = str(newest_student(runs_of(cfg)))
    if cfg.student_path is not None and cfg.teacher is not None:
        cfg.teacher.path = teacher_of(cfg, cfg.student_path)
    module, trainer, datamodule = build(cfg)
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
        decoder = module_of_pair(cfg, datamodule).to(device).decoder(cfg.module.schemes[-1], datamodule)
    elif cfg.teacher is None:
        temperature = cfg.module.temperature if cfg.temperature is None else cfg.temperature
        decoder = trained_decoder(newest_model(runs_of(cfg)), datamodule, temperature, device)
    elif cfg.decoder == "student":
        folder = Path(cfg.student_path) if cfg.student_path else newest_student(runs_of(cfg))
        base = teacher_of(cfg, folder)
        if base is None:
            raise UsageError(f"{folder} does not say where its teacher is; type teacher.path=<folder>")
        student = load_student(folder, fitting(load_llada(base), datamodule, "teacher").to(device))
        more = {
            name: cfg.module[key] for name, key in (("step", "few_step"), ("promote", "promote")) if key in cfg.module
        }
        decoder = student_decoder(student, forwards, cfg.temperature, masked_options=options, **more)
    else:
        options["temperature"] = cfg.module.teacher_temperature if cfg.temperature is None else cfg.temperature
        decoder = MaskedDiffusionDecoder(trained_teacher(cfg, datamodule).to(device), forwards, **options)
    generator = torch.Generator(device=device).manual_seed(cfg.seed)
    for start in track(range(0, len(prompts), 64), description="generating", disable=len(prompts) <= 64):
        few = {name: column[start : start + 64].to(device) for name, column in rows.items()}
        print_answers(console, prompts[start : start + 64], datamodule.decode_responses(decoder(few, generator)))


def export(cfg: DictConfig) -> None:
    """Write the model of ckpt_path= (the experiment's newest) as a folder, model/ of this run."""
    cfg.ckpt_path = cfg.ckpt_path or "last"
    module, _, datamodule = build(cfg)
    fill_from_checkpoint(module, cfg.ckpt_path)
    folder = module.export(run_dir(cfg) / "model", datamodule.tokenizer)
    console.print(f"model: {folder}", highlight=False, soft_wrap=True)


def report(cfg: DictConfig) -> None:
    """Every run below the outputs folder in one table and one figure: quality against cost."""
    report_frontier(cfg.paths.output_dir, console)


def _say_where_things_are(cfg: DictConfig) -> None:
    if not cfg.trainer.get("fast_dev_run"):
        teacher = None if cfg.teacher is None else cfg.teacher.path
        say_where_things_are(console, run_dir(cfg), cfg.name, teacher, cfg.example_prompt)
