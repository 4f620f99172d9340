"""q* through `model.generate`, as users of Hugging Face models call it."""

import itertools
import math

import pytest
import torch
from helpers.qwen import tiny_qwen
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import StoppingCriteria, set_seed

from models.functional.errors import UsageError
from models.speculative.distribution import MixtureDist
from models.speculative.generate import QStarLogitsProcessor, _in_eval_mode, qstar_generate
from models.speculative.ngram import NgramScores
from models.speculative.scores import CausalScores

THETA, TARGET, THIRD = (tiny_qwen(seed) for seed in range(3))
PROMPTS = torch.randint(4, 50, (3, 6), generator=torch.Generator().manual_seed(0))


def generate(prompts=PROMPTS, model=THETA, target=TARGET, **options):
    options = {"max_new_tokens": 16, "do_sample": True, "top_k": 0} | options
    return model.generate(prompts, custom_generate=qstar_generate, target_model=target, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"draft": "theta", "gamma": 3, "verify": "block"},
        {"draft": "target", "use_cache": False},
        {"draft_model": THIRD},
        {"draft_model": NgramScores(50)},
    ],
    ids=["defaults", "theta drafts blocks", "without caches", "a third model drafts", "n-grams draft"],
)
def test_greedy_texts_are_those_of_the_plain_reference(options):
    """transformers' own loop with `QStarLogitsProcessor`, which runs both models for every token."""
    plain = THETA.generate(PROMPTS, logits_processor=[QStarLogitsProcessor(TARGET)], do_sample=False, max_new_tokens=16)
    assert torch.equal(generate(do_sample=False, **options), plain)


def exact_dist(mixture, prompt, words, steps):
    """Probabilities of all texts of `steps` tokens from the models' own log-probabilities."""
    found = {}
    for text in itertools.product(range(words), repeat=steps):
        ids, total = prompt.tolist(), 0.0
        for token in text:
            here = torch.tensor([ids])
            a, b = (CausalScores(m)(here, torch.tensor([len(ids)]), 1)[0] for m in SMALL)
            total += mixture(mixture.tempered(a), mixture.tempered(b)).log_q[0, token].item()
            ids.append(token)
        found[text] = math.exp(total)
    return found


SMALL = [tiny_qwen(seed, vocabulary=5, eos_token_id=None, pad_token_id=None, bos_token_id=None) for seed in (5, 6)]


@pytest.mark.parametrize(
    ("options", "mixture"),
    [
        ({"draft": "alternate"}, MixtureDist()),
        ({"draft_model": NgramScores(5), "temperature": 1.7}, MixtureDist(temperature=1.7)),
        ({"top_k": 3, "theta_weight": 0.25, "verify": "block", "draft": "target"}, MixtureDist(0.25, top_k=3)),
    ],
    ids=["alternate", "n-gram, temperature", "top-k, fixed weight"],
)
def test_samples_have_the_distribution_q_star_and_not_another(options, mixture):
    prompt, n = torch.tensor([0, 4, 2]), 4000
    set_seed(0)
    out = generate(prompt.expand(n, -1), *SMALL, max_new_tokens=2, gamma=2, **options)
    counts = torch.bincount(out[:, 3] * 5 + out[:, 4], minlength=25).double().numpy()

    def p_value(mixture):
        expected = n * torch.tensor(list(exact_dist(mixture, prompt, 5, 2).values())).double().numpy()
        some = expected > 0
        if counts[~some].sum() > 0:  # a text of probability 0 was generated
            return 0.0
        return chisquare(counts[some], expected[some] * counts.sum() / expected[some].sum()).pvalue

    assert p_value(mixture) > 1e-3
    assert p_value(MixtureDist(0.9, mixture.temperature, mixture.top_k)) < 1e-6


def test_padded_prompts_are_the_prompts_without_padding():
    padded = torch.cat([torch.zeros(3, 2).long(), PROMPTS], -1)
    mask = torch.cat([torch.zeros(3, 2).long(), torch.ones_like(PROMPTS)], -1)
    mask[1, :4], padded[1, :4] = 0, 0
    out = generate(padded, attention_mask=mask, do_sample=False)
    assert torch.equal(out[:, :8], padded)
    assert torch.equal(out[[0, 2], 8:], generate(do_sample=False)[[0, 2], 6:])
    assert torch.equal(out[1, 8:], generate(PROMPTS[1:2, 2:], do_sample=False)[0, 4:])


def test_details_seeds_and_several_texts_of_a_prompt():
    set_seed(3)
    first = generate(num_return_sequences=4, return_dict_in_generate=True)
    set_seed(3)
    again = generate(num_return_sequences=4)
    assert torch.equal(first.sequences, again)
    assert first.sequences.shape[0] == first.details.alpha.shape[0] == 12
    assert 0 < first.details.acceptance["theta"] <= 1
    assert first.details.forwards["target"] < int(first.details.lengths.max())
    assert not torch.equal(again, generate(num_return_sequences=4, generator=torch.Generator().manual_seed(4)))


def test_a_text_ends_at_its_end_tokens_and_at_any_other_criterion():
    class Seven(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), bool((input_ids[:, -1] == 7).any()))

    free = generate(do_sample=False, eos_token_id=None, max_new_tokens=30)[0, 6:].tolist()
    stop = free[4]
    first = free.index(stop)
    ended = generate(do_sample=False, eos_token_id=[49, stop], max_new_tokens=30)
    assert ended[0, 6 : 7 + first].tolist() == free[: first + 1]
    assert (ended[0, 7 + first :] == 0).all()
    set_seed(0)
    for text in generate(PROMPTS.repeat(20, 1), stopping_criteria=[Seven()], eos_token_id=None)[:, 6:].tolist():
        assert 7 not in text[:-1] or set(text[text.index(7) + 1 :]) == {0}


def test_tokens_arrive_as_they_are_committed():
    pieces = []
    set_seed(0)
    out = generate(PROMPTS[:1], stream=lambda new: pieces.append(new.tolist()))
    assert len(pieces) > 2
    assert [token for piece in pieces for token in piece] == out[0, 6:].tolist()
    with pytest.raises(UsageError, match="one text at a time"):
        generate(stream=print)


def test_a_penalty_acts_on_q_star():
    """Without a draft (gamma=0) and with one: the same text, none of its tokens twice."""
    options = {"do_sample": False, "repetition_penalty": 1e6, "eos_token_id": None}
    plain = generate(gamma=0, **options)
    assert all(len(set(text)) == len(text) for text in plain[:, 6:].tolist())
    for scheme in (
        {"draft": "theta", "gamma": 3},
        {"draft": "alternate", "gamma": 2},
        {"draft_model": THIRD, "gamma": 2},
    ):
        assert torch.equal(generate(**scheme, **options), plain)
    assert not torch.equal(plain, generate(do_sample=False, eos_token_id=None))


def test_wrong_requests_are_sentences():
    with pytest.raises(UsageError, match=r"qwen3 has 50 tokens and qwen3 has 5"):
        generate(target=SMALL[0])
    with pytest.raises(UsageError, match="theta_weight=symmetric"):
        generate(theta_weight="symmetric")
    for small in (SMALL[0], NgramScores(5)):
        with pytest.raises(UsageError, match="draft_model has 5 tokens and the other two have 50"):
            generate(draft_model=small)
    with pytest.raises(UsageError, match="num_beams=2"):
        generate(num_beams=2, do_sample=False)


def test_the_n_gram_drafter_repeats_what_followed():
    scores = NgramScores(9, longest=2)
    ids = torch.tensor(
        [[1, 2, 3, 4, 1, 2, 0, 0], [5, 6, 5, 7, 5, 8, 0, 0], [5, 6, 7, 6, 8, 5, 6, 0], [1, 1, 2, 3, 0, 0, 0, 0]]
    )
    out = scores(ids, torch.tensor([6, 5, 7, 4]), 1)
    assert out.argmax(-1).flatten().tolist() == [3, 7, 7, 3]
    assert (out.exp().sum(-1) == 1).all()


def test_a_request_beyond_the_context_is_the_models_to_judge():
    """Rotary models go on, as they do in transformers' own loop."""
    pair = [tiny_qwen(seed, max_position_embeddings=10, eos_token_id=None) for seed in range(2)]
    plain = generate(model=pair[0], target=pair[1], do_sample=False, gamma=0)
    for scheme in ({"draft": "theta", "gamma": 3}, {"draft": "alternate"}, {"verify": "block", "draft": "target"}):
        assert torch.equal(generate(model=pair[0], target=pair[1], do_sample=False, **scheme), plain)


def test_the_most_probable_token_is_the_first_of_those_that_tie():
    tied = tiny_qwen(0, eos_token_id=None)
    with torch.no_grad():
        tied.lm_head.weight[20:] = tied.lm_head.weight[20]
    plain = tied.generate(PROMPTS, do_sample=False, max_new_tokens=16)
    assert (plain[:, 6:] == 20).any()
    assert torch.equal(generate(model=tied, theta_weight=1.0, do_sample=False), plain)


@pytest.mark.parametrize("draft", ["theta", "alternate"])
def test_rules_that_count_tokens_count_padding_as_generate_does(draft):
    """All tokens but one end a text, so it ends as soon as it may: at min_new_tokens, whatever padding precedes it."""
    padded, mask = torch.cat([torch.zeros(3, 4).long(), PROMPTS], -1), torch.ones(3, 10).long()
    mask[:, :4] = 0
    seen = []

    class Recorder(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            seen.append(input_ids.shape[1])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {"eos_token_id": list(range(1, 50)), "min_new_tokens": 3, "draft": draft, "do_sample": False}
    out = generate(padded, attention_mask=mask, return_dict_in_generate=True, stopping_criteria=[Recorder()], **options)
    bare = generate(return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences[:, 10:], bare.sequences[:, 6:])
    assert (out.details.lengths >= 3).all()
    assert int(out.details.lengths.min()) <= 4
    assert min(seen) == 11


def test_an_adapted_model_drafts_and_end_tokens_may_be_a_tensor():
    third = get_peft_model(tiny_qwen(4), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(generate(draft_model=third, do_sample=False), generate(do_sample=False))
    ends = generate(do_sample=False, eos_token_id=torch.tensor([3, 7]))
    assert torch.equal(ends, generate(do_sample=False, eos_token_id=[3, 7]))


def test_models_in_training_are_in_training_again_afterwards():
    model, third = tiny_qwen(0).train(), tiny_qwen(1).train()
    generate(model=model, draft_model=third, max_new_tokens=2)
    assert model.training
    assert third.training
    assert not TARGET.training


def test_a_part_that_is_in_training_changes_no_other_part_afterwards():
    drafter = torch.nn.ModuleDict({"lender": THETA, "own": torch.nn.Linear(1, 1)}).train()
    THETA.eval()
    before = [part.training for part in drafter.modules()]
    assert before.count(True) == 2
    with _in_eval_mode(THETA, drafter):
        assert not any(part.training for part in drafter.modules())
    assert [part.training for part in drafter.modules()] == before


def test_processors_that_depend_on_the_row_need_one_text():
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: [4, 5]}
    assert set(generate(PROMPTS[:1], **allowed)[0, 6:].tolist()) <= {4, 5}
    with pytest.raises(UsageError, match="batch of one text"):
        generate(**allowed)
