"""FLOPs of a step: the model's own, at the expected number of predictions."""

import pytest
import torch
from helpers.causal import PackedStream, pair_batch, tiny_causal

from lightning_modules.pretrain import PretrainModule
from lightning_modules.training.compile import compute_layers, decoder_layers
from lightning_modules.training.step_cost import flops_of_step
from models.diffusion.objective import MaskedDiffusion
from models.flow.denoiser_objective import ContinuousDiffusion
from models.functional.masked_diffusion import mask_probability
from models.objectives.masked_lm import MaskedLM
from models.objectives.next_token import NextToken

D, F, LAYERS, HEADS, KEY_VALUE_HEADS = 16, 24, 2, 4, 2  # the sizes of `tiny_causal` and of the LLaDA body below


def body_flops(rows: int, length: int) -> int:
    """Products of two gradients cost twice those of the forward pass. Attention's two products have two gradients each."""
    projections = 2 * D * D + 2 * D * (D * KEY_VALUE_HEADS // HEADS) + 3 * D * F
    return 3 * 2 * rows * length * LAYERS * (projections + 2 * length * D)


def head_flops(predictions: float, vocabulary: int) -> float:
    return 3 * 2 * predictions * D * vocabulary


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_layers_count_once_and_stay_recomputed(recompute):
    module = compute_layers(PretrainModule(tiny_causal(7), NextToken()), None, recompute)
    batch = PackedStream(sizes=(5,)).batches[0]
    rows, length = batch["labels"].shape
    expected = body_flops(rows, length) + head_flops(rows * length, vocabulary=7)
    assert module.flops_of_step(batch) == pytest.approx(expected)
    assert all(p.grad is None for p in module.parameters())
    assert all(("forward" in vars(layer)) == recompute for layer in decoder_layers(module))


FILLERS = [
    # objective, share of the maskable tokens that is predicted
    (MaskedDiffusion("sft"), mask_probability(0.5)),
    (MaskedDiffusion("pretrain"), mask_probability(0.5)),
    (MaskedDiffusion(eps=0.2), mask_probability(0.5, 0.2)),
    (MaskedLM(0.15), 0.15),
    (MaskedLM(1.0), 1.0),
]


@pytest.mark.parametrize(("objective", "share"), FILLERS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_output_layer_counts_at_the_expected_number_of_predictions(tiny_llada, objective, share, packed):
    """A vocabulary that is large beside the body, so that most of the FLOPs are those of the output layer."""
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS}
    model = tiny_llada(400, **sizes, **heads)
    batch = PackedStream(sizes=(4,)).batches[0] if packed else pair_batch()
    rows, length = batch["input_ids"].shape
    everything = getattr(objective, "form", "sft") == "pretrain"
    maskable = rows * length if packed else int(batch["attention_mask" if everything else "response_mask"].sum())
    found = flops_of_step(objective, model, batch)
    assert found == pytest.approx(body_flops(rows, length) + head_flops(share * maskable, 400), rel=1e-9)


def test_of_a_denoiser_too(tiny_llada):
    """Two shares of partly observed rows differ by the output layer's products alone."""
    model, batch, found = tiny_llada(400, hidden_size=D), pair_batch(), []
    for share in (0.2, 0.6):
        torch.manual_seed(0)
        objective = ContinuousDiffusion(observed_share=share)
        objective.attach(model)
        found.append(flops_of_step(objective, model, batch))
    maskable = int(batch["response_mask"].sum())
    trained = objective.student.body.lm_head.weight.requires_grad
    each = 2 * D * 400 * (3 if trained else 2)
    assert found[0] - found[1] == pytest.approx(0.2 * maskable * each)


def test_a_mean_over_draws_where_every_batch_is_cut(tiny_llada):
    objective, model, batch = MaskedDiffusion("pretrain", random_length_probability=1.0), tiny_llada(400), pair_batch()
    whole = flops_of_step(MaskedDiffusion("pretrain"), model, batch)
    assert 0 < flops_of_step(objective, model, batch) < whole
