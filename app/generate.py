"""`mode=generate`: prints responses to prompts, of the model that the experiment has trained."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from numpy.random import SeedSequence
from omegaconf import DictConfig
from rich.progress import track
from torch import Generator, Tensor

from app.answers import AnswersFile, require_new
from app.build import (
    data_of,
    is_published,
    load_teacher,
    module_of_pair,
    new_model,
    runs_of,
    settle_models,
    trained_teacher,
)
from app.ranks import leads
from app.run_files import find_checkpoint, found, newest, newest_student, require_same_module
from app.students import student_decoder
from app.trained import fill_from_checkpoint, newest_model, trained_decoder
from app.typed import as_plain, as_typed
from datamodules.prompts import has_rows, read_prompt_rows, read_prompts, require_prompts
from lightning_modules.block_draft import BlockDraftModule
from models.diffusion.sampler import MaskedDiffusionDecoder, block_count
from models.flow.student_files import load_student, teacher_folder
from models.functional.errors import UsageError, require_choice
from models.interfaces.decoder import Decoder
from models.interfaces.masked_sampling import TeacherOptions
from models.plans.decoder import PlannedDecoder
from models.plans.files import OPTIONS
from reporting.console import in_brackets, print_answers, report_console
from reporting.stream import TextStream

console = report_console()
BATCH = 64  # prompts
# options on which a response to a prompt does not depend
NOT_OF_RESPONSES = (
    "hydra", "paths", "callbacks", "logger", "trainer", "prompt", "prompt_file", "answers_file", "example_prompt", "stream",
    "samples", "started", "report_dir", "licence", "optimized_metric",
)  # fmt: skip


def generate(cfg: DictConfig) -> None:
    """Print responses of the trained model, or with decoder=teacher of its teacher, to prompt= or to all of prompt_file=.

    With answers_file= they are kept as rows of a file instead.
    """
    if not leads():  # one process is enough, and one alone may write a file
        return
    prompts, given = _asked(cfg)
    if (1 if cfg.forwards is None else cfg.forwards) < 1 or (cfg.temperature or 0) < 0:
        raise UsageError(f"forwards={cfg.forwards} must be at least 1 and temperature={cfg.temperature} at least 0")
    require_choice("decoder", cfg.decoder, ("student", "teacher"))
    weights = find_weights(cfg)
    settle_models(cfg, weights)
    datamodule = data_of(cfg, weights)
    rows = datamodule.encode_prompts(prompts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = find_decoder(cfg, weights, datamodule, device)
    kept = _answers_file(cfg, weights, given)
    streamed = kept is None and (len(prompts) == 1 and console.is_terminal if cfg.stream is None else cfg.stream)
    together = 1 if streamed else BATCH
    starts = range(0 if kept is None else kept.done, len(prompts), together)
    # a bar on a terminal alone: elsewhere the output is the answers, a line each
    shown = console.is_terminal and not streamed and len(starts) > 1
    try:
        for start in track(starts, description="generating", console=console) if shown else starts:
            few = {name: column[start : start + together].to(device) for name, column in rows.items()}
            generator = Generator(device=device).manual_seed(batch_seed(cfg.seed, start))
            if streamed:
                stream_answer(decoder, few, generator, datamodule, prompts[start])
                continue
            texts = datamodule.decode_responses(decoder(few, generator))
            if kept is None:
                print_answers(console, prompts[start : start + together], texts, plans_of(decoder))
            else:
                kept.add(texts)
    finally:
        if kept is not None:
            _close(kept)


def _close(kept: AnswersFile) -> None:
    """Close the file, and print its name, or how many responses it has so far."""
    kept.close()
    done, total = kept.done, len(kept.prompts)
    state = f"{done:,} responses: {kept.path}" if done == total else f"{done:,} of {total:,} responses are kept"
    advice = "" if done == total else "; to go on type the same command"
    console.print(f"{state}{advice}", markup=False, highlight=False, soft_wrap=True)


def batch_seed(seed: int, start: int) -> int:
    """The seed of the batch whose first prompt is number `start`: another one in every batch, and alike in a second attempt."""
    return seed if start == 0 else int(SeedSequence([seed, start]).generate_state(1)[0])


def _asked(cfg: DictConfig) -> tuple[list[str], list[Any]]:
    """The prompts as text, and as their rows have them where prompt_file= has rows; each n times."""
    if cfg.answers_file is not None:
        require_new(Path(cfg.answers_file))
        if cfg.stream:
            raise UsageError(
                f"stream=true shows texts, and answers_file={cfg.answers_file} keeps them; leave one of them out"
            )
    if not has_rows(cfg.prompt_file):
        prompts = read_prompts(as_typed("prompt", cfg.prompt), cfg.prompt_file, cfg.n)
        return prompts, list(prompts)
    if "prompt_field" not in (cfg.data or {}):
        raise UsageError(
            f"prompt_file={cfg.prompt_file} has rows, and the data of experiment={cfg.name} have no field of prompts; give a "
            "text file with one prompt a line"
        )
    require_prompts(cfg.prompt, cfg.prompt_file, cfg.n)
    rows = read_prompt_rows(cfg.prompt_file, cfg.data.prompt_field)
    return [text for text in rows for _ in range(cfg.n)], [value for value in rows.values() for _ in range(cfg.n)]


def _answers_file(cfg: DictConfig, weights: Path | None, given: list[Any]) -> AnswersFile | None:
    """Where the responses go, None for the screen. The same command finds what it has left."""
    if cfg.answers_file is None:
        return None
    fields = (cfg.data.get("prompt_field", "prompt"), cfg.data.get("response_field", "response"))
    options = {str(name): as_plain(cfg[name]) for name in cfg if name not in NOT_OF_RESPONSES}
    made_with = [options, str(weights), None if weights is None else weights.stat().st_mtime_ns]
    kept = AnswersFile(Path(cfg.answers_file), fields, given, made_with, BATCH)
    if kept.done:
        console.print(f"going on after {kept.done:,} of {len(given):,} responses", highlight=False)
    return kept


def stream_answer(decoder: Decoder, row: dict[str, Tensor], generator: Generator, data: Any, prompt: str) -> None:
    """Print the response to one prompt while it is generated."""
    stream = TextStream(
        console,
        prompt,
        lambda ids: data.decode_responses(ids)[0],
        refines=decoder.refines,
        mask=data.tokenizer.mask_token,
    )
    try:
        decoder(row, generator, stream)
    finally:
        stream.finish("".join(map(in_brackets, plans_of(decoder) or [])))


def plans_of(decoder: Decoder) -> list[str] | None:
    """What the last responses were written from; None where there are no plans."""
    return decoder.plans if isinstance(decoder, PlannedDecoder) else None


def find_weights(cfg: DictConfig) -> Path | None:
    """What the experiment's newest run has left: the folder of a student or model, or a checkpoint.

    None for a pair of models, and for a model of model.path= that fills masks and that no run has trained. The teacher of the
    options is asked without a student too. A model's checkpoint counts where there is no folder or its objective decodes
    otherwise.
    """
    runs = runs_of(cfg)
    if cfg.ckpt_path is not None and cfg.student_path is not None:
        raise UsageError(
            f"ckpt_path={cfg.ckpt_path} and student_path={cfg.student_path} each name what is asked; leave one of them out"
        )
    if cfg.ckpt_path is not None:
        return _of_checkpoint(cfg, find_checkpoint(runs, cfg.ckpt_path))
    if _drafts_blocks(cfg):
        return newest(
            runs, "drafter/drafter.json", "no run of it has trained a drafter; type the same command without mode="
        ).parent
    if cfg.pair is not None:
        return None
    if cfg.teacher is not None:
        if cfg.student_path:
            return Path(cfg.student_path)
        without = cfg.decoder == "teacher" and not found(runs, "student/student.json")
        return None if without else newest_student(runs)
    objective = cfg.module.get("objective")
    exported = found(runs, "model/*.json")
    declared: Any = None if objective is None else get_class(objective._target_)
    if declared is not None and declared.generation == "masked" and is_published(cfg):
        return None
    if declared is None or (exported and declared.generation == "autoregressive"):
        return newest_model(runs)
    advice = "it trains no student, and no run of it left a causal model in model/ or a checkpoint; train one first"
    return newest(runs, "checkpoints/last.ckpt", advice)


def _of_checkpoint(cfg: DictConfig, checkpoint: Path) -> Path:
    """What is asked of a checkpoint: itself where its module decodes from it, else what its run has left beside it."""
    require_same_module(checkpoint, cfg.module._target_)
    if cfg.pair is None and cfg.teacher is None and cfg.module.get("objective") is not None:
        return checkpoint
    run = checkpoint.absolute().parent.parent
    kind = "drafter" if _drafts_blocks(cfg) else "student" if cfg.teacher is not None else "model"
    folder = run / kind
    if (cfg.pair is not None and kind == "model") or not any(folder.glob("*.json")):
        raise UsageError(f"ckpt_path={checkpoint}: there is no {kind} to ask beside it; leave ckpt_path out")
    return folder


def find_decoder(cfg: DictConfig, weights: Path | None, datamodule: Any, device: torch.device) -> Decoder:
    """The decoder of what `find_weights` has found. Errors: UsageError for plan= where there are no plans."""
    if cfg.plan is not None and (weights is None or not (weights / OPTIONS).is_file()):
        raise UsageError(f"plan={cfg.plan} fixes concepts, and experiment={cfg.name} leaves no planner; leave it out")
    if _drafts_blocks(cfg):
        assert weights is not None
        return _drafted_decoder(cfg, weights, datamodule, device)
    if cfg.pair is not None:
        return module_of_pair(cfg, datamodule).to(device).decoder(cfg.module.schemes[-1], datamodule)
    if cfg.teacher is None:
        return _model_decoder(cfg, weights, datamodule, device)
    if cfg.decoder == "teacher":
        return _teacher_decoder(cfg, datamodule, device)
    assert weights is not None
    return _student_decoder(cfg, weights, datamodule, device)


def _drafts_blocks(cfg: DictConfig) -> bool:
    return get_class(cfg.module._target_) is BlockDraftModule


def _drafted_decoder(cfg: DictConfig, folder: Path, datamodule: Any, device: torch.device) -> Decoder:
    """Texts of the model, or of q*, drafted by the drafter in a folder."""
    if cfg.temperature is not None:
        cfg.module.temperature = cfg.temperature
    if cfg.pair is not None:
        module = module_of_pair(cfg, datamodule)
    else:
        module = instantiate(cfg.module, _convert_="all", model=new_model(cfg, datamodule))
    return module.to(device).eval().answering(datamodule, folder)


def _model_decoder(cfg: DictConfig, weights: Path | None, datamodule: Any, device: torch.device) -> Decoder:
    plan = as_typed("plan", cfg.plan)
    temperature = cfg.module.temperature if cfg.temperature is None else cfg.temperature
    if weights is not None and weights.is_dir():
        return trained_decoder(weights, datamodule, temperature, device, plan=plan, forwards=cfg.forwards)
    module = instantiate(cfg.module, _convert_="all", model=new_model(cfg, datamodule))
    if weights is not None:
        fill_from_checkpoint(module, weights)
    most = min(max(module.compared_forwards(datamodule)), datamodule.response_length)
    return module.to(device).eval().decoder(datamodule, cfg.forwards or most, temperature, datamodule.end_ids())


def _student_decoder(cfg: DictConfig, folder: Path, datamodule: Any, device: torch.device) -> Decoder:
    base = cfg.teacher.path or teacher_folder(folder)
    if base is None:
        raise UsageError(f"{folder} does not say where its teacher is; type teacher.path=<folder>")
    student = load_student(folder, load_teacher(base, datamodule).to(device))
    named = (("step", "few_step"), ("promote", "promote"))
    more = {name: cfg.module[option] for name, option in named if option in cfg.module}
    options = {"temperature": cfg.module.get("teacher_temperature"), "remasking": cfg.module.get("teacher_remasking")}
    return student_decoder(student, cfg.forwards or 1, cfg.temperature, masked_options=options, **more)


def _teacher_decoder(cfg: DictConfig, datamodule: Any, device: torch.device) -> Decoder:
    known = [part.name for part in fields(TeacherOptions) if part.name in cfg.module]
    how = TeacherOptions(**{name: cfg.module[name] for name in known}).teacher_sampling
    options = how.options | {"ends_last": how.last(datamodule.end_ids())}
    if cfg.temperature is not None:
        options["temperature"] = cfg.temperature
    least = block_count(datamodule.response_length, how.block_length)
    return MaskedDiffusionDecoder(trained_teacher(cfg, datamodule).to(device), cfg.forwards or least, **options)
