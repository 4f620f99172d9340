"""Scores of a small Llama against its own logits, and q* of two of them."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.functional.errors import UsageError
from models.functional.qstar import mix, solve_alpha
from models.speculative.decode import decode_qstar
from models.speculative.options import DraftOptions
from models.speculative.random_source import TorchRandomSource
from models.speculative.scores import CausalScores, require_same_vocabulary
from models.speculative.state import TextRules


def model(seed, vocabulary=7):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes))
    for weight in network.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.4)
    return network.eval()


def test_scores_are_the_models_own_at_ragged_lengths():
    network = model(0)
    scores = CausalScores(network)
    ids, lengths = torch.randint(0, 7, (3, 9)), torch.tensor([2, 5, 4])
    found = scores(ids, lengths, 3)
    for row, length in enumerate(lengths.tolist()):
        for k in range(3):
            alone = network(input_ids=ids[row : row + 1, : length + k]).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(found[row, k], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("draft", ["theta", "target", "alternate"])
def test_the_figures_of_each_token_are_those_of_the_two_models(draft):
    theta, target = model(0), model(1)
    rng, prompt = TorchRandomSource(torch.Generator().manual_seed(0)), torch.tensor([[1, 2], [3, 4]])
    pair = CausalScores(theta), CausalScores(target)
    out = decode_qstar(*pair, prompt, DraftOptions(draft, gamma=3), TextRules(5), rng=rng)
    ids = torch.cat([prompt, out.tokens], -1)
    for k in range(5):
        a, b = (m(input_ids=ids[:, : 2 + k]).logits[:, -1].log_softmax(-1) for m in (theta, target))
        found = solve_alpha(a, b)
        log_q = mix(a, b, found.alpha)[0].gather(-1, ids[:, 2 + k : 3 + k]).squeeze(-1)
        torch.testing.assert_close(out.log_q[:, k], log_q.double(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.alpha[:, k], found.alpha, atol=1e-4, rtol=1e-4)


def test_with_one_model_twice_it_is_plain_sampling():
    """alpha = 1/2 of equal models, every draft accepted, and the forward passes of the formula at beta = 1."""
    scores = CausalScores(model(0))
    rng = TorchRandomSource(torch.Generator().manual_seed(0))
    prompt = torch.tensor([[1, 2]])
    out = decode_qstar(scores, scores, prompt, DraftOptions("alternate", gamma=3), TextRules(12), rng=rng)
    assert out.acceptance == {"theta": 1.0, "target": 1.0}
    assert out.alpha.eq(0.5).all()
    assert out.forwards == {"theta": 10, "target": 3}  # 3, then 3, 3 and 1 that begin with the proposal


def tokenizer(*words):
    backend = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="-".join(words))


def test_two_vocabularies_are_refused_by_name_even_where_they_are_equally_large():
    assert require_same_vocabulary(tokenizer("u", "a", "b"), tokenizer("u", "a", "b")) == 3
    with pytest.raises(
        UsageError, match="u-a-b and u-b-a have different vocabularies: 'a' is 1 in one and 2 in the other"
    ):
        require_same_vocabulary(tokenizer("u", "a", "b"), tokenizer("u", "b", "a"))
    with pytest.raises(UsageError, match="'c' is None in one and 3"):
        require_same_vocabulary(tokenizer("u", "a", "b"), tokenizer("u", "a", "b", "c"))


@pytest.mark.parametrize("draft", ["theta", "target", "alternate"])
def test_a_request_that_fits_the_context_never_reads_beyond_it(draft):
    small = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_positions=10, n_embd=8, n_layer=1, n_head=1))
    scores, rng = CausalScores(small), TorchRandomSource(torch.Generator().manual_seed(0))
    prompts = torch.ones(5, 3).long()
    out = decode_qstar(scores, scores, prompts, DraftOptions(draft, gamma=4), TextRules(7, (2,)), rng=rng)
    assert out.tokens.shape == (5, 7)


def test_padding_of_the_output_layer_is_cut():
    scores = CausalScores(model(0), vocab_size=5)(torch.ones(1, 2).long(), torch.tensor([2]), 1)
    assert scores.shape[-1] == 5
    assert scores.exp().sum().item() == pytest.approx(1.0)
