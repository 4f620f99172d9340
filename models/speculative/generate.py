"""q* for users of Hugging Face models: `model.generate(..., custom_generate=qstar_generate, target_model=other)`.

And speculative sampling of one model: `model.generate(..., custom_generate=speculative_generate, draft_model=drafter)`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput

from models.functional.errors import UsageError
from models.interfaces.scores import ProposesBlocks
from models.speculative.cached_scores import CachedScores
from models.speculative.costs import parameter_cost
from models.speculative.decode import decode_qstar
from models.speculative.decoder import right_padded
from models.speculative.distribution import MixtureDist, Weight
from models.speculative.options import Draft, DraftOptions, Verify
from models.speculative.random_source import TorchRandomSource
from models.speculative.scores import CausalScores, require_same_vocabulary
from models.speculative.state import QStarOutput, Scores, TextRules

# processors that look at the index of a row in its batch
ONE_ROW_PROCESSORS = (PrefixConstrainedLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor)


@dataclass
class QStarGenerateOutput(ModelOutput):
    """sequences (B, L + N): prompts as given, then new tokens, padded. details: weights, log-probabilities, acceptance."""

    sequences: Tensor | None = None
    details: QStarOutput | None = None


def qstar_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel | Scores | ProposesBlocks | None = None,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
    theta_weight: Literal["kl_symmetry"] | float | Weight = "kl_symmetry",
    draft: Draft | Literal["auto"] = "auto",
    gamma: int | Literal["auto"] = "auto",
    verify: Verify = "token",
    cost: float | None = None,
    position_cost: float = 0.0,
    generator: Generator | None = None,
    stream: Callable[[Tensor], None] | None = None,
    **model_kwargs: Any,
) -> Tensor | QStarGenerateOutput:
    """Texts with distribution q* ∝ model^α target_model^(1-α); arguments of `generate` keep their meaning.

    model, target_model: π_θ and π_t, of one vocabulary. tokenizers: theirs, where the sizes of their output layers differ.
    draft_model: a third model, any scores such as `NgramScores`, or a block drafter (`load_drafter`). With a block drafter,
        ids from its vocabulary's end on are never generated: padding of the output layer, unless tokens were added since.
    theta_weight: α; `kl_symmetry` is equally far from both.
    draft: see `DraftOptions`; `auto` is what the third model does where there is one, else `alternate`. gamma, verify, cost,
    position_cost: see `DraftOptions`. cost=None is the ratio of parameters;
    `**forward_costs(model, target_model, input_ids, draft_model)._asdict()` measures both costs; for a block drafter with the
    mixture= and verify= of the rounds that are decoded.
    stream: called with the new tokens (n,) of a single text after every round. generator: of all draws; torch's own seed
    where none is given.
    Temperature acts on both models, other processors, top-k and top-p on q*. do_sample=False takes q*'s most probable token.
    """
    if len(input_ids) > 1 and any(isinstance(p, ONE_ROW_PROCESSORS) for p in logits_processor):
        raise UsageError("prefix_allowed_tokens_fn and encoder_repetition_penalty need a batch of one text with q*")
    if generation_config.num_beams > 1:
        raise UsageError(f"num_beams={generation_config.num_beams}: q* is sampled, not searched; leave num_beams out")
    # 1. q* and the models
    vocabulary = _shared_vocabulary(model, target_model, tokenizers)
    in_blocks = isinstance(draft_model, ProposesBlocks)
    if in_blocks:  # it knows which ids are tokens, and which ones padding of the output layer
        vocabulary = min(vocabulary, getattr(draft_model, "vocab_size", vocabulary))
    mixture, processors = _mixture_and_processors(generation_config, logits_processor, theta_weight)
    if draft_model is not None:
        _require_vocabulary(draft_model, vocabulary)
    # 2. how texts are drafted, and what ends them
    if draft == "auto":
        draft = "alternate" if draft_model is None else "block_drafter" if in_blocks else "assistant"
    cost = parameter_cost(model, target_model, draft, draft_model) if cost is None else cost
    eos_ids = _eos_ids(generation_config)
    drafting = DraftOptions(draft, gamma, verify, cost, position_cost)
    rules = TextRules(
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        eos_ids=eos_ids,
        stop=_stop(stopping_criteria),
        processors=processors,
        padded_prompts=input_ids,
    )
    # 3. texts
    prompts, lengths = right_padded(input_ids, model_kwargs.get("attention_mask"))
    if generator is None:
        generator = Generator(device=input_ids.device).manual_seed(int(torch.randint(2**62, ())))
    with _in_eval_mode(model, target_model, draft_model):
        scores = CachedScores if generation_config.use_cache else CausalScores
        theta = scores(model, vocabulary)
        out = decode_qstar(
            theta,
            theta if target_model is model else scores(target_model, vocabulary),
            prompts,
            drafting,
            rules,
            rng=TorchRandomSource(generator),
            lengths=lengths,
            assistant=scores(draft_model, vocabulary)
            if isinstance(draft_model, nn.Module) and not in_blocks
            else draft_model,
            mixture=mixture,
            on_tokens=None if stream is None else _NewTokens(stream),
        )
    # 4. padded as `generate` pads
    pad = generation_config.pad_token_id
    pad = eos_ids[0] if pad is None and eos_ids else pad or 0
    longest = int(out.lengths.max())
    beyond = torch.arange(longest, device=input_ids.device) >= out.lengths.unsqueeze(-1)
    sequences = torch.cat([input_ids, out.tokens[:, :longest].masked_fill(beyond, pad)], -1)
    return QStarGenerateOutput(sequences, out) if generation_config.return_dict_in_generate else sequences


def speculative_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    draft_model: PreTrainedModel | Scores | ProposesBlocks,
    gamma: int | Literal["auto"] = "auto",
    verify: Verify = "token",
    cost: float | None = None,
    position_cost: float = 0.0,
    generator: Generator | None = None,
    stream: Callable[[Tensor], None] | None = None,
    **model_kwargs: Any,
) -> Tensor | QStarGenerateOutput:
    """Texts with the distribution of `model` itself, drafted by another; arguments of `generate` keep their meaning.

    draft_model and what follows it: see `qstar_generate`.
    """
    return qstar_generate(
        model, input_ids, logits_processor, stopping_criteria, generation_config,
        target_model=model, draft_model=draft_model, theta_weight=1.0, gamma=gamma, verify=verify, cost=cost,
        position_cost=position_cost, generator=generator, stream=stream, **model_kwargs,
    )  # fmt: skip


class _NewTokens:
    """A `TokenCallback` that passes on only what is new, (n,)."""

    def __init__(self, stream: Callable[[Tensor], None]) -> None:
        self.stream, self.sent = stream, 0

    def __call__(self, tokens: Tensor) -> None:
        self.stream(tokens[0, self.sent :])
        self.sent = tokens.shape[1]


class QStarLogitsProcessor(LogitsProcessor):
    """The plain reference: `model.generate(logits_processor=[QStarLogitsProcessor(target)])` runs both models for every token.

    The target reads whole prefixes each time. Prompts must not be padded.
    """

    def __init__(self, target_model: PreTrainedModel, mixture: MixtureDist | None = None) -> None:
        self.target, self.mixture = CausalScores(target_model), mixture or MixtureDist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        theta, target = scores.log_softmax(-1), self.target(input_ids, lengths, 1)[:, 0]
        return self.mixture(self.mixture.tempered(theta), self.mixture.tempered(target)).log_q


@contextmanager
def _in_eval_mode(*models: Any) -> Iterator[None]:
    """Without dropout; afterwards every network is in its former mode."""
    networks = [model for model in models if isinstance(model, nn.Module)]
    before = {part: part.training for network in networks for part in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


def _mixture_and_processors(
    config: GenerationConfig, processors: LogitsProcessorList, theta_weight: Any
) -> tuple[MixtureDist, tuple[LogitsProcessor, ...]]:
    """q* as the options of `generate` define it, and the processors that act on it."""
    weight = None if isinstance(theta_weight, str) and theta_weight == "kl_symmetry" else theta_weight
    if isinstance(weight, str):
        raise UsageError(f"theta_weight={weight} is not known; type kl_symmetry, a number from 0 to 1, or a function")
    warpers = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    left = tuple(process for process in processors if not isinstance(process, warpers))
    if not config.do_sample:
        return MixtureDist(weight, top_k=1), left
    temperature = 1.0 if config.temperature is None else config.temperature
    return MixtureDist(weight, temperature, config.top_k or None, config.top_p), left


def _stop(criteria: StoppingCriteriaList) -> Callable[[Tensor], bool] | None:
    """The criteria beside length and end token, as a function of the ids (n,) of one text."""
    own = [rule for rule in criteria if not isinstance(rule, MaxLengthCriteria | EosTokenCriteria)]
    if not own:
        return None
    return lambda ids: any(bool(torch.as_tensor(rule(ids.unsqueeze(0), None)).any()) for rule in own)


def _eos_ids(config: GenerationConfig) -> tuple[int, ...]:
    ids = config.eos_token_id
    return () if ids is None else tuple(torch.as_tensor(ids).flatten().tolist())


def _shared_vocabulary(model: PreTrainedModel, target: PreTrainedModel, tokenizers: Any) -> int:
    if tokenizers is not None:
        return require_same_vocabulary(*tokenizers)
    sizes = [m.config.get_text_config().vocab_size for m in (model, target)]
    if sizes[0] != sizes[1]:
        names = [m.config.name_or_path or m.config.model_type for m in (model, target)]
        raise UsageError(
            f"{names[0]} has {sizes[0]} tokens and {names[1]} has {sizes[1]}; where only the padding of their output layers "
            "differs, give tokenizers=(its tokenizer, the target's tokenizer); q* needs two models of one vocabulary"
        )
    return sizes[0]


def _require_vocabulary(draft_model: Any, vocabulary: int) -> None:
    """Raise UsageError for a third model of fewer tokens than the other two have."""
    config = getattr(draft_model, "config", None)
    size = getattr(draft_model, "vocab_size", None) if config is None else config.get_text_config().vocab_size
    if size is not None and size < vocabulary:
        raise UsageError(f"draft_model has {size} tokens and the other two have {vocabulary}; q* needs one vocabulary")
