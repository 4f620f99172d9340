"""Exported models as they are evaluated: how each kind gives likelihoods and texts, and what it cannot give.

Legend: B batch, T positions, M scored positions, R response columns, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from hydra.utils import get_class
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from app.options import LARGEST, check_value, require_within
from app.run_files import DATA, models_of, run_of
from app.students import student_decoder
from app.trained import load_model, load_planned
from datamodules.state import CorpusState
from datamodules.tokenizer import TOKENIZER_FILES, build_tokenizer, end_ids
from models.backbones import checkpoint_files as files
from models.backbones.abilities import context_of, require_steps
from models.backbones.autoregressive import AutoregressiveDecoder
from models.backbones.bidirectional import is_block_causal
from models.backbones.causal_lm import causal_logits, load_trained
from models.backbones.dit_layout import is_mdlm_config
from models.backbones.dream_layout import is_dream_config
from models.backbones.llada import LladaConfig
from models.backbones.masked_from_causal import MODEL_TYPE, load_masked
from models.backbones.official_layout import is_official_config
from models.backbones.other_layouts import unsupported_layout
from models.diffusion.commit_rules import RULES, CommitRule
from models.diffusion.sampler import MaskedDiffusionDecoder, RuleDecoder, block_count, sampling_blocks
from models.flow.masked_student import MaskedStudent
from models.flow.noisy_mask_student import NoisyMaskStudent
from models.flow.solver import Step
from models.flow.student_files import is_student, load_student, teacher_folder
from models.functional.errors import UsageError, require_at_least, require_choice, require_share
from models.functional.next_token import CausalText
from models.functional.vocabulary import vocabulary_size
from models.interfaces.decoder import Decoder, StopRule
from models.interfaces.masked_sampling import Remasking
from models.online.decoder import OnlineConceptDecoder
from models.online.files import DESCRIPTION, is_online
from models.online.model import OnlineConceptModel
from models.plans.decoder import PlannedDecoder
from models.plans.files import BACKBONE, OPTIONS
from models.speculative.decoder import QStarDecoder
from models.speculative.distribution import MixtureDist
from models.speculative.likelihood import qstar_log_probabilities
from models.speculative.options import DecodingOptions, Scheme
from models.speculative.scores import require_one_vocabulary
from reporting.record import read_record

Layout = Literal["run", "plain"]
# logits or log-probabilities (M, V) of the token after each scored position
NextToken = Callable[[CausalText], Tensor]
OF_MASKS = ("block_length", "remasking", "guidance", "ends_last")  # options of models that fill masks
MODEL_FILES = ("student.json", OPTIONS, DESCRIPTION, "adapter_config.json", "config.json")
RECORD = "record.json"  # of a run
NO_CONTEXT = 2048  # context of a model whose configuration sets no limit, as lm-evaluation-harness assumes
NO_LENGTH = 256  # tokens of a response where neither the task nor the model's run names a number, as there


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated and how.

    path: an exported folder, or a causal or masked model of the hub. teacher: a student's, where the student names none.
    target: folder of π_t, or auto for that of the run of path, which is π_θ; the pair is evaluated as q*.
    decoder: how texts are generated. A number of forward passes for models that fill masks and their students;
        confidence:0.9, entropy:0.1 or factor:1 (commit rules) for models that fill masks; chain:4, renoise:4 or ode:32 for
        noisy-mask students; naive, theta, target, alternate or ngram for q*. None: one forward pass a token, one in all for
        students, alternate for q*.
    mc: draws of the bound on the likelihood of a model that fills masks. greedy: whether such a model is asked if it would
        fill in a continuation itself, which takes one forward pass for each token of it.
    block_length, remasking, guidance, ends_last: of generation by filling masks; guidance of its likelihood, too.
    theta_weight: α of q*; None is equally far from both models.
    layout: prompts end as the run of the model ended them (`run`), or are text alone (`plain`).
    add_bos_token: whether a text begins with the tokenizer's BOS; None as the tokenizer does.
    max_length: positions that are read at most. max_gen_toks: tokens of a response where a task names no number.
    """

    path: str
    target: str | None = None
    teacher: str | None = None
    decoder: str | int | None = None
    mc: int = 128
    greedy: bool = True
    block_length: int | None = None
    remasking: Remasking = "low_confidence"
    guidance: float = 0.0
    ends_last: bool = False
    theta_weight: float | None = None
    layout: Layout = "run"
    add_bos_token: bool | None = None
    enable_thinking: bool = False
    max_length: int | None = None
    max_gen_toks: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(EvaluationOptions).items():
            check_value(name, getattr(self, name), kind)
        require_within("seed", self.seed, 0, LARGEST)
        if self.theta_weight is not None:
            require_share(theta_weight=self.theta_weight)
        numbers = {"block_length": self.block_length, "max_length": self.max_length, "max_gen_toks": self.max_gen_toks}
        given = {name: value for name, value in numbers.items() if value is not None}
        require_at_least(1, mc=self.mc, **given)


@dataclass(frozen=True)
class TextRequest:
    """length: R, the most tokens. temperature: 0 takes the most probable. stop: which texts have ended."""

    length: int
    temperature: float = 0.0
    stop: StopRule | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A model, its tokenizer and what it answers.

    kind: as it stands in messages. context: positions that it reads at most. network: what is moved to a device.
    decoder: from a request to a `Decoder`. next_token: exact likelihoods; fills_masks: the model whose likelihood is bounded.
    Where there is neither, no_likelihood says why and what works instead. run: what the model's run kept of its corpus.
    """

    kind: str
    tokenizer: PreTrainedTokenizerFast
    context: int
    network: nn.Module
    decoder: Callable[[TextRequest], Decoder]
    next_token: NextToken | None = None
    fills_masks: Any = None
    no_likelihood: str = ""
    run: CorpusState | None = None

    @property
    def likelihood(self) -> Literal["exact", "bound", "none"]:
        if self.next_token is not None:
            return "exact"
        return "none" if self.fills_masks is None else "bound"

    @property
    def usual_length(self) -> int:
        """Tokens of a response where a task names no number: as many as in the model's run."""
        return (None if self.run is None else self.run.response_length) or NO_LENGTH


def read_evaluated(options: EvaluationOptions, device: torch.device) -> Evaluated:
    """The model of a folder, whatever its kind. Errors: UsageError for a folder without one, and options of another kind."""
    folder = files.find_folder(options.path, "path")
    found = _read(folder, options)
    found.network.to(device).eval()
    run = run_of(folder)
    state = None if run is None or options.layout == "plain" else CorpusState.read(run / DATA)
    return replace(found, run=state, context=min(found.context, options.max_length or found.context))


def _read(folder: Path, options: EvaluationOptions) -> Evaluated:
    if not any((folder / name).is_file() for name in MODEL_FILES):
        inside = next((name for name in ("model", "student", "theta") if (folder / name).is_dir()), None)
        advice = f"path={options.path}/{inside}" if inside else "the folder that a run or mode=export left"
        raise UsageError(
            f"path={options.path} holds no exported model (none of {', '.join(MODEL_FILES)}); type {advice}"
        )
    if options.target is not None:
        return _pair(folder, options)
    if is_student(folder):
        return _student(folder, options)
    if (folder / OPTIONS).is_file():
        return _planned(folder, options)
    if is_online(folder) or not _fills_masks(folder):
        return _left_to_right(folder, options)
    _refuse(options, "masked diffusion model", "teacher", "theta_weight")
    return _masked("masked diffusion model", load_masked(folder, option="path"), _tokenizer(folder), options)


def _fills_masks(folder: Path) -> bool:
    """Whether config.json is of a model that fills masks, also of one whose layout is then refused by name."""
    if not (folder / "config.json").is_file():
        return False
    config = files.read_json(folder / "config.json")
    own = config.get("model_type") in (MODEL_TYPE, LladaConfig.model_type)
    published = is_official_config(config) or is_dream_config(config) or is_mdlm_config(config)
    return own or published or unsupported_layout(config) is not None


def _tokenizer(*folders: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the first folder that has one, or of the run that the first folder belongs to."""
    run = run_of(Path(folders[0]))
    for place in map(Path, [*folders, *([] if run is None else [run / DATA])]):
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return build_tokenizer(str(place), [], 0, place, option="the tokenizer of path")
    raise UsageError(
        f"path={folders[0]} holds no tokenizer; write it there with tokenizer.save_pretrained(FOLDER), or export the model "
        "again"
    )


def _context(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> int:
    """Positions that a model reads. Errors: UsageError where its vocabulary is smaller than the tokenizer's."""
    words, rows = vocabulary_size(tokenizer), model.config.get_text_config().vocab_size
    if words > rows:
        raise UsageError(
            f"the tokenizer of this model has {words} tokens, its embedding table {rows}; put the tokenizer that it was "
            "trained with into its folder"
        )
    return context_of(model) or NO_CONTEXT


def _refuse(options: EvaluationOptions, kind: str, *names: str) -> None:
    """Raise UsageError for the first of the options that is given although this kind of model does not have it."""
    for name in names:
        value = getattr(options, name)
        if value != getattr(EvaluationOptions, name):
            raise UsageError(f"{name}={value}: a {kind} has no such option; leave {name} out")


# -- from left to right ----------------------------------------------------------------------------------------------


def _left_to_right(folder: Path, options: EvaluationOptions) -> Evaluated:
    online = is_online(folder)
    kind = "online concept model" if online else "causal model"
    _refuse(options, kind, "decoder", *OF_MASKS, "teacher", "theta_weight")
    _require_next_token(folder, options)
    model, tokenizer = load_model(folder, "path"), _tokenizer(folder)
    fixed: dict[str, Any] = {"vocab_size": vocabulary_size(tokenizer), "end_ids": end_ids(tokenizer)}

    def decoder(request: TextRequest) -> Decoder:
        how = fixed | {"temperature": request.temperature, "stop": request.stop}
        if isinstance(model, OnlineConceptModel):
            return OnlineConceptDecoder(model, request.length, **how)
        require_steps(model)
        return AutoregressiveDecoder(model, request.length, **how)

    def next_token(text: CausalText) -> Tensor:
        return (model(text.ids) if online else causal_logits(model, text))[text.weights]

    return Evaluated(
        kind=kind,
        tokenizer=tokenizer,
        context=_context(model, tokenizer),
        network=model,
        decoder=decoder,
        next_token=next_token,
    )


def _objective_of(folder: Path) -> Any:
    """The objective that the record of the model's run names, as a class; None where there is no record, or no objective."""
    run = run_of(folder)
    if run is None or not (run / RECORD).is_file():
        return None
    objective = (read_record(run / RECORD)["config"].get("module") or {}).get("objective") or {}
    return get_class(objective["_target_"]) if "_target_" in objective else None


def _require_next_token(folder: Path, options: EvaluationOptions) -> None:
    """Raise UsageError where the model's run says that it was trained for something else than the next token."""
    objective = _objective_of(folder)
    if getattr(objective, "generation", "autoregressive") in ("prefix", None):
        raise UsageError(
            f"path={options.path} was trained with {objective.__name__}, whose model does not read texts from left to right "
            "alone; mode=test measures it"
        )


def _pair(folder: Path, options: EvaluationOptions) -> Evaluated:
    _refuse(options, "q* pair", *OF_MASKS, "teacher")
    assert options.target is not None
    target = models_of(folder).get("target") if options.target == "auto" else options.target
    if target is None:
        raise UsageError(
            f"target=auto: no run says which π_t path={options.path} was trained beside; type target=<folder>"
        )
    other = files.find_folder(target, "target")
    require_one_vocabulary(folder, other)
    theta, target = load_trained(folder, "path"), load_trained(other, "target")
    tokenizer = _tokenizer(folder, other)
    scheme: Any = "alternate" if options.decoder is None else str(options.decoder)
    require_choice("decoder", scheme, [name for name in get_args(Scheme) if name not in ("assistant", "block_drafter")])
    words, ends = vocabulary_size(tokenizer), end_ids(tokenizer)
    mixture = MixtureDist(options.theta_weight)

    def decoder(request: TextRequest) -> Decoder:
        greedy: Any = {"top_k": 1} if request.temperature == 0 else {"temperature": request.temperature}
        how = DecodingOptions(replace(mixture, **greedy))
        return QStarDecoder(
            theta,
            target,
            scheme,
            how,
            response_length=request.length,
            vocab_size=words,
            end_ids=ends,
        )

    def next_token(text: CausalText) -> Tensor:
        return qstar_log_probabilities(theta, target, mixture, text, words)

    return Evaluated(
        kind="q* pair",
        tokenizer=tokenizer,
        context=min(_context(model, tokenizer) for model in (theta, target)),
        network=nn.ModuleList([theta, target]),
        decoder=decoder,
        next_token=next_token,
    )


def _planned(folder: Path, options: EvaluationOptions) -> Evaluated:
    kind = "planner-executor"
    _refuse(options, kind, "decoder", *OF_MASKS, "teacher", "theta_weight")
    module = load_planned(folder)
    tokenizer = _tokenizer(folder, folder / BACKBONE)
    fixed: dict[str, Any] = {"vocab_size": vocabulary_size(tokenizer), "end_ids": end_ids(tokenizer)}

    def decoder(request: TextRequest) -> Decoder:
        heat = {"plan_temperature": min(module.options.plan_temperature, request.temperature)}
        how = fixed | heat | {"temperature": request.temperature}
        return PlannedDecoder(module.planner, module.executor, request.length, **how)

    return Evaluated(
        kind=kind,
        tokenizer=tokenizer,
        context=_context(module.model.backbone, tokenizer) - module.model.layout.columns,
        network=module,
        decoder=decoder,
        no_likelihood="its likelihood is a sum over all plans; generate_until tasks work",
    )


# -- filling masks ---------------------------------------------------------------------------------------------------


def _masked(kind: str, model: Any, tokenizer: PreTrainedTokenizerFast, options: EvaluationOptions) -> Evaluated:
    """decoder: a number of forward passes, or a commit rule and its value."""
    name, value = chosen_decoder(options.decoder, ("forwards", *RULES))
    rule = None if name == "forwards" or value is None else _rule(name, value)

    def decoder(request: TextRequest) -> Decoder:
        how: dict[str, Any] = {"temperature": request.temperature, "guidance": options.guidance}
        how |= {"block_length": options.block_length}
        ends = end_ids(tokenizer)
        if rule is not None:
            return RuleDecoder(model, rule, request.length, end_ids=ends, ends_last=options.ends_last, **how)
        blocks = block_count(request.length, sampling_blocks(model, options.block_length))
        forwards = request.length if value is None else int(value)
        if forwards % blocks or forwards > request.length:
            raise UsageError(
                f"decoder={forwards} must be a multiple of the {blocks} blocks and at most the {request.length} tokens of a "
                f"response; type decoder={blocks} or decoder={request.length}"
            )
        last = ends if options.ends_last else None
        return MaskedDiffusionDecoder(model, forwards, remasking=options.remasking, ends_last=last, **how)

    return Evaluated(
        kind=kind,
        tokenizer=tokenizer,
        context=_context(model, tokenizer),
        network=model,
        decoder=decoder,
        fills_masks=None if is_block_causal(model) else model,
        no_likelihood="its bound, block by block, is what mode=test of its run measures; generate_until works",
    )


def _rule(name: str, value: float) -> CommitRule:
    try:
        return RULES[name](value)
    except UsageError as error:
        raise UsageError(str(error).replace(f"module.commit_rules.{name}=", f"decoder={name}:")) from None


def _student(folder: Path, options: EvaluationOptions) -> Evaluated:
    _refuse(options, "student", "theta_weight")
    base = options.teacher or teacher_folder(folder)
    if base is None:
        raise UsageError(f"{folder} does not say where its teacher is; type teacher=<folder>")
    student, tokenizer = load_student(folder, load_masked(base, option="teacher"), "teacher"), _tokenizer(folder, base)
    if isinstance(student, MaskedStudent):
        few = replace(options, decoder=1 if options.decoder is None else options.decoder)
        return _masked("step-halving student", student.body, tokenizer, few)
    noisy = isinstance(student, NoisyMaskStudent)
    kind = "noisy-mask student" if noisy else "one-step student"
    _refuse(options, kind, *OF_MASKS)
    if options.decoder is None and getattr(_objective_of(folder), "generation", None) == "flow":
        raise UsageError(
            f"path={options.path} is a denoiser that no student was made of; type decoder=ode:32, or fewer steps"
        )
    name, value = chosen_decoder(options.decoder, ("forwards", *(get_args(Step) if noisy else ())))
    forwards = 1 if value is None else int(value)
    if not noisy and forwards != 1:
        raise UsageError(f"decoder={options.decoder}: this student takes one forward pass; type decoder=1")

    def decoder(request: TextRequest) -> Decoder:
        if noisy:
            # it samples by the noise of its masks, whatever temperature a task asks for
            step: Any = "chain" if name == "forwards" else name
            return student_decoder(student, forwards, None, step=step)
        return student_decoder(student, forwards, request.temperature)

    return Evaluated(
        kind=kind,
        tokenizer=tokenizer,
        context=_context(student.base, tokenizer),
        network=student,
        decoder=decoder,
        no_likelihood=f"it defines no likelihood of a text; generate_until tasks work, and path={base} bounds its teacher's",
    )


def chosen_decoder(text: str | int | None, names: tuple[str, ...]) -> tuple[str, float | None]:
    """`decoder=4` is ("forwards", 4), `decoder=confidence:0.9` is ("confidence", 0.9), None is ("forwards", None).

    Errors: UsageError for other names than these, and values that are no numbers.
    """
    if text is None:
        return "forwards", None
    name, _, value = str(text).rpartition(":")
    name = name or "forwards"
    try:
        number = float(value) if name in RULES else int(value)
    except ValueError:
        number = -1
    if name not in names or number < 0 or (name not in RULES and number == 0):
        examples = {"confidence": "0.9", "entropy": "0.1", "factor": "1", "ode": "32"}
        choice = [f"decoder={one}:{examples.get(one, 4)}" for one in names if one != "forwards"]
        raise UsageError(
            f"decoder={text} is not known for this model; type decoder=<number of forward passes>"
            + (f", or one like {', '.join(choice)}" if choice else "")
        )
    return name, number
