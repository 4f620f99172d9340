"""Models of many architectures: each is computed right, or refused in a sentence that names what to type.

The default run has one architecture of each kind; `pytest -m slow` has all of them.
"""

import copy
import inspect

import pytest
import torch
from helpers.foreign import ARCHITECTURES, foreign_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from datamodules.batch import pack_prompt_response
from models.backbones.abilities import (
    limited_layers,
    require_free_attention,
    require_free_layout,
    require_left_to_right,
    require_separate_documents,
    require_steps,
)
from models.backbones.autoregressive import generate_autoregressive
from models.backbones.causal_lm import (
    causal_hidden,
    causal_logits,
    load_causal,
    output_head,
    output_logits,
    require_known_output,
    save_merged,
    with_adapters,
)
from models.backbones.key_value_cache import CACHE_ARGUMENT
from models.functional.errors import UsageError
from models.functional.next_token import CausalText
from models.online.model import OnlineConceptModel
from models.plans.planner import Planner, greedy
from models.plans.unified import UnifiedModel
from models.plans.vocabulary import ConceptVocabulary
from models.speculative.cached_scores import CachedScores
from models.speculative.scores import CausalScores

DAILY = {"llama", "gpt2", "gemma2", "starcoder2", "opt", "mamba"}
KNOWN = 290  # ids of the tokenizer; the output layer has more

WITHOUT_STEPS = {"mamba", "openai-gpt", "bert"}
JOINS_DOCUMENTS = {"opt", "bloom", "mpt", "mamba", "openai-gpt", "bert"}
LIMITED = {"gemma2", "gemma3_text", "starcoder2", "gpt_neo", "mamba"}
SCALED = {"gemma2", "granite", "cohere"}


def architectures(*left_out: str) -> list:
    return [
        pytest.param(name, marks=() if name in DAILY else pytest.mark.slow)
        for name in ARCHITECTURES
        if name not in left_out
    ]


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(2, KNOWN, shape, generator=torch.Generator().manual_seed(0))


def text_of(ids: torch.Tensor, positions: torch.Tensor | None = None) -> CausalText:
    return CausalText(ids, ids, torch.ones_like(ids, dtype=torch.bool), None, positions)


@pytest.mark.parametrize("architecture", architectures(*WITHOUT_STEPS))
def test_padded_prompts_are_answered_as_each_of_them_alone(architecture):
    model, prompts = foreign_model(architecture), [list(range(5, 17)), [20, 21], []]
    rows = pack_prompt_response(prompts, [[]] * 3, prompt_length=12, response_length=6, pad_id=0, eos_id=1)
    require_steps(model)
    answers = generate_autoregressive(model, rows, torch.Generator(), temperature=0.0, vocab_size=KNOWN)
    for prompt, answer in zip(prompts[:2], answers.tolist(), strict=False):
        text = list(prompt)
        for _ in range(6):
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1, :KNOWN].argmax()))
        assert answer == text[len(prompt) :]
    assert int(answers.max()) < KNOWN


@pytest.mark.parametrize("architecture", sorted(WITHOUT_STEPS))
def test_models_that_cannot_be_read_in_steps_are_refused(architecture):
    with pytest.raises(UsageError, match="cannot answer prompts"):
        require_steps(foreign_model(architecture))


@pytest.mark.parametrize("architecture", architectures())
def test_documents_of_a_row_are_kept_apart_or_refused(architecture):
    model, first, second = foreign_model(architecture), list(range(5, 17)), [1, 30, 31, 32]
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    packed = causal_logits(model, text_of(torch.tensor([first + second]), positions))[:, len(first) :]
    alone = model(input_ids=torch.tensor([second])).logits
    if architecture in JOINS_DOCUMENTS:
        assert not torch.allclose(packed, alone, atol=1e-2)
        with pytest.raises(UsageError, match=r"type data\.document_mask=false"):
            require_separate_documents(model)
    else:
        assert torch.allclose(packed, alone, atol=1e-4)
        require_separate_documents(model)


@pytest.mark.parametrize("architecture", architectures())
def test_only_models_that_read_from_left_to_right_are_loaded(architecture, tmp_path):
    foreign_model(architecture).save_pretrained(tmp_path)
    if architecture == "bert":
        with pytest.raises(UsageError, match="reads texts in both directions"):
            load_causal(tmp_path)
    else:
        assert load_causal(tmp_path).training


@pytest.mark.parametrize("architecture", architectures("bert"))
def test_logits_of_hidden_states_are_the_models_own(architecture):
    model, text = foreign_model(architecture), text_of(random_ids(2, 7))
    states = causal_hidden(model, text)
    assert torch.allclose(output_logits(model, states), causal_logits(model, text), atol=1e-4)
    assert torch.allclose(output_head(model)(states), causal_logits(model, text), atol=1e-4) == (
        architecture not in SCALED
    )
    require_known_output(model)


def test_an_output_that_is_not_known_is_refused():
    with pytest.raises(UsageError, match="computes more than a linear layer"):
        require_known_output(foreign_model("bert"))


@pytest.mark.parametrize("architecture", architectures("bert"))
def test_cached_scores_are_those_of_whole_prefixes_or_refused(architecture):
    model, ids, lengths = foreign_model(architecture), random_ids(3, 30), torch.tensor([3, 5, 9])
    if architecture in LIMITED | {"mpt", "openai-gpt"}:
        with pytest.raises(UsageError, match=r"type module\.cache=false"):
            CachedScores(model)
        return
    cached, whole = CachedScores(model, KNOWN), CausalScores(model, KNOWN)
    for _ in range(4):
        assert torch.allclose(cached(ids, lengths, 4), whole(ids, lengths, 4), atol=1e-4)
        lengths = lengths + torch.tensor([1, 4, 2])
        ids[torch.arange(3), lengths - 1] = (ids[torch.arange(3), lengths - 1] + 7) % KNOWN


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", architectures("bert", "mamba"))
def test_merged_adapters_read_back_with_the_same_logits(architecture, tied, tmp_path):
    model, ids = foreign_model(architecture, tie_word_embeddings=tied), random_ids(1, 6)
    before = model(input_ids=ids).logits.detach()
    adapted = with_adapters(model, 2)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.eval()
    save_merged(adapted, tmp_path / "merged")
    read = load_causal(tmp_path / "merged").eval()
    logits = adapted(input_ids=ids).logits
    assert not torch.allclose(logits, before, atol=1e-2)
    assert torch.allclose(read(input_ids=ids).logits, logits, atol=1e-4)
    assert (read.get_input_embeddings().weight is read.get_output_embeddings().weight) == tied


def unified(model: torch.nn.Module) -> UnifiedModel:
    types = {"a": {"codes": 4, "most": 2}, "b": {"codes": 3, "most": 1}}
    return UnifiedModel(model, ConceptVocabulary(types, model.get_input_embeddings().num_embeddings)).eval()


@pytest.mark.parametrize("architecture", architectures("bert"))
def test_plans_are_drawn_as_they_are_scored_or_refused(architecture):
    model, text, mask = foreign_model(architecture), random_ids(2, 14), torch.ones(2, 14, dtype=torch.bool)
    mask[1, :5] = False
    if architecture in LIMITED | {"bloom", "mpt", "openai-gpt"}:
        with pytest.raises(UsageError, match=r"such as model\.path=Qwen/Qwen3-0\.6B"):
            require_free_layout(model, 30, "data.prompt_length")
        return
    require_free_layout(model, 30, "data.prompt_length")
    for planning in ("sequential", "types", "slots"):
        planner = Planner(unified(copy.deepcopy(model)), planning)
        plan = planner.draw(text, mask, greedy)
        scores, some = planner.score(text, mask, plan.choices), plan.open_slots
        assert torch.allclose(scores[some], plan.logits[some], atol=1e-4)
        alone = planner.draw(text[1:, 5:], mask[1:, 5:], greedy)
        assert torch.allclose(alone.logits, plan.logits[1:], atol=1e-4)


def test_plans_need_a_window_that_holds_the_whole_row():
    model = foreign_model("gemma2", sliding_window=40)
    require_free_layout(model, 40, "data.prompt_length")
    with pytest.raises(UsageError, match=r"a window of 40 tokens.* needs 41; shorten data\.prompt_length"):
        require_free_layout(model, 41, "data.prompt_length")


@pytest.mark.parametrize("architecture", architectures("bert"))
def test_online_concepts_without_compression_are_the_model_or_refused(architecture):
    model, ids = foreign_model(architecture), random_ids(2, 20)
    options = {"codes": 8, "compression": 1.0, "quantisation": 0.0}
    if architecture not in ("llama", "qwen3", "qwen2", "mistral", "gemma", "phi3", "cohere"):
        with pytest.raises(UsageError, match=r"such as model\.path=Qwen/Qwen3-0\.6B"):
            OnlineConceptModel(model, **options)
        return
    online = OnlineConceptModel(copy.deepcopy(model), **options).eval()
    assert torch.allclose(online(ids), model(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize("architecture", sorted(LIMITED))
def test_limited_layers_are_found(architecture):
    assert limited_layers(foreign_model(architecture).config)


def test_checks_leave_the_model_as_it_was():
    model = foreign_model("gpt2").train()
    model.transformer.h[0].eval()
    state = torch.get_rng_state()
    for check in (require_steps, require_separate_documents, lambda m: require_left_to_right(m, "model.path", "x")):
        check(model)
    assert model.training
    assert not model.transformer.h[0].mlp.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_every_causal_model_names_its_cache_alike():
    names = set()
    for model in MODEL_FOR_CAUSAL_LM_MAPPING.values():
        names |= {"cache", "past_key_values"} & inspect.signature(model.forward).parameters.keys()
    assert names == {CACHE_ARGUMENT}


@pytest.mark.parametrize("words", [4, 5, 6, 7])
def test_checks_work_with_a_vocabulary_of_few_tokens(words):
    model = foreign_model("llama", vocab_size=words)
    require_left_to_right(model, "model.path", "folder")
    require_steps(model)
    require_free_attention(model, "module.x")
    require_separate_documents(model)
    with pytest.raises(UsageError, match="both directions"):
        require_left_to_right(foreign_model("bert", vocab_size=words), "model.path", "folder")
