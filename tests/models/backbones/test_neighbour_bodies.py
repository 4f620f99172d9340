"""Bodies whose heads start out looking at their neighbours: what a masked place reads, and their files."""

import pytest
import torch

from models.backbones.causal import build_body, build_causal
from models.backbones.llada import LladaModel, build_llada, load_llada
from models.backbones.twin import with_own_weights
from models.functional.errors import UsageError
from models.functional.neighbour_heads import neighbour_biases

SIZES = {
    "vocab_size": 20,
    "mask_token_id": 19,
    "eos_token_id": 18,
    "pad_token_id": 18,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "rope_theta": 100.0,
    "initializer_range": 0.02,
}


def build(**changes) -> LladaModel:
    torch.manual_seed(0)
    return build_llada(**SIZES | changes)


def read_by_a_mask(model: LladaModel) -> torch.Tensor:
    """How much what stands at each of 16 places moves the state of place 8, which is masked; (16,)."""
    ids = torch.arange(16).masked_fill(torch.arange(16) == 8, 19).unsqueeze(0)
    seen = torch.ones_like(ids, dtype=torch.bool)
    whole = torch.autograd.functional.jacobian(lambda z: model.hidden(z, seen)[0, 8], model.embed(ids))
    return whole.square().sum((0, 1, 3)).sqrt()


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_masked_place_reads_its_neighbours_from_the_start(kv_heads):
    others = torch.ones(16, dtype=torch.bool)
    others[7:10] = False
    read = read_by_a_mask(build(neighbour_heads=2, num_key_value_heads=kv_heads))
    assert read[[7, 9]].min() > 2 * read[others].max()
    plain = read_by_a_mask(build(num_key_value_heads=kv_heads))
    assert plain[[7, 9]].min() < 2 * plain[others].max()


def test_files_and_copies_keep_the_biases(tmp_path):
    model = build(neighbour_heads=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 19, 2, 3]])
    assert torch.equal(load_llada(tmp_path)(ids), model(ids))
    assert torch.equal(with_own_weights(model)(ids), model(ids))
    assert not any(name.endswith("bias") for name, _ in build().named_parameters())


@pytest.mark.parametrize(("kv_heads", "queries"), [(4, 1), (2, 2)])
def test_biases_of_the_first_heads_of_every_layer(kv_heads, queries):
    model = build(neighbour_heads=2, num_key_value_heads=kv_heads, num_hidden_layers=2)
    frequencies = model.model.rotary_emb.inv_freq
    for layer in model.model.layers:
        query_biases = layer.self_attn.q_proj.bias.view(kv_heads, queries, 8)
        key_biases = layer.self_attn.k_proj.bias.view(kv_heads, 8)
        for head, offset in enumerate([-1, 1]):
            query, key = neighbour_biases(frequencies, offset)
            torch.testing.assert_close(query_biases[head], query.expand(queries, -1))
            torch.testing.assert_close(key_biases[head], key)
        assert not query_biases[2:].any()
        assert not key_biases[2:].any()


def test_a_causal_body_has_the_weights_that_the_other_has():
    """Both are drawn alike, so that a plan's two executors may be compared on it."""
    torch.manual_seed(0)
    causal = build_body(attention="causal", neighbour_heads=2, **SIZES)
    own, other = dict(causal.named_parameters()), dict(build(neighbour_heads=2).named_parameters())
    biases = [name for name in own if name.endswith(("q_proj.bias", "k_proj.bias"))]
    assert len(biases) == 2
    assert all(torch.equal(own[name], other[name]) for name in biases)
    assert not any(name.endswith("bias") for name, _ in build_causal(**SIZES).named_parameters())


def test_a_causal_body_reads_the_word_before_from_the_start():
    """How much the embeddings of 16 places move the state of place 8, under the causal mask."""

    def read(heads: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = build_causal(neighbour_heads=heads, **SIZES)
        embeds = model.get_input_embeddings()(torch.arange(16)).unsqueeze(0)
        state = lambda z: model.get_decoder()(inputs_embeds=z).last_hidden_state[0, 8]  # noqa: E731
        return torch.autograd.functional.jacobian(state, embeds).square().sum((0, 1, 3)).sqrt()

    found, plain = read(1), read(0)
    assert found[7] > 2 * found[:7].max()
    assert plain[7] < 2 * plain[:7].max()
    assert not found[9:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbour_heads": 5}, r"model\.neighbour_heads=5 must lie between 0 and the 4 key-value heads"),
        (
            {"neighbour_heads": 2, "architecture": "qwen3"},
            r"normalised after their biases; type model\.architecture=llama",
        ),
    ],
)
def test_a_causal_body_without_such_heads_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        build_causal(**SIZES, **options)
