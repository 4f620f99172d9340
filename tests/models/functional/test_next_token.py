"""What next-token prediction reads and scores, by hand, for packed rows and for prompts with responses."""

import math

import torch
from helpers.causal import pair_batch

from models.functional.next_token import (
    CausalText,
    align_with_columns,
    before_response,
    bidirectional_text,
    causal_text,
    prefix_mask,
    shifted_targets,
    token_counts,
)
from models.functional.nll import chosen_nll


def test_a_packed_row_scores_every_label_that_counts():
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[6, 7, -100]])}
    text = causal_text(batch)
    assert text.ids.tolist() == [[5, 6, 7]]
    assert text.targets.tolist() == [[6, 7, 0]]
    assert text.weights.tolist() == [[True, True, False]]
    assert text.attention_mask is None
    assert token_counts(batch) == 2
    assert align_with_columns(torch.ones(1, 3), batch).shape == (1, 3)


def test_a_pair_scores_its_response_and_an_empty_prompt_begins_with_padding():
    batch = pair_batch()
    text = causal_text(batch)
    assert text.ids.tolist()[0] == [3, 4, 5, 4, 5, 1]
    assert text.targets.tolist()[0] == [4, 5, 4, 5, 1, 1]
    assert text.weights.tolist() == [[False, False, True, True, True, True]] * 3
    assert text.attention_mask.tolist() == [
        [True] * 6,
        [False, False, True, True, True, True],
        [False, False, True, True, True, True],
    ]
    assert text.position_ids.tolist()[1:] == [[0, 0, 0, 1, 2, 3]] * 2
    assert token_counts(batch) == 12
    assert align_with_columns(torch.ones(3, 6), batch)[:, 0].eq(0).all()


def test_before_response_is_one_place_a_row():
    response = torch.tensor([[False, False, True, True], [False, True, True, False]])
    assert before_response(response).tolist() == [[False, True, False, False], [True, False, False, False]]


def test_chosen_nll_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    nll = chosen_nll(logits, torch.tensor([[1, 1]]), torch.tensor([[True, False]]))
    torch.testing.assert_close(nll, torch.tensor([[math.log(4), 0.0]]))


def test_targets_further_on_stay_inside_row_and_document():
    ids, targets = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[4, 5, 6, 7]])
    text = CausalText(ids, targets, torch.ones(1, 4, dtype=torch.bool), document_ids=torch.tensor([[0, 0, 1, 1]]))
    found, weights = shifted_targets(text, 2)
    assert found[weights].tolist() == [5, 7]  # from 3 and from 5; 4 would look into the next document
    found, weights = shifted_targets(text._replace(document_ids=None), 3)
    assert found[weights].tolist() == [6, 7]


def test_a_prefix_sees_itself_both_ways_and_nobody_sees_padding():
    seen = torch.tensor([[False, True, True, True, True]])
    mask = prefix_mask(seen, 3, torch.float32)[0, 0] == 0
    assert mask.int().tolist() == [
        [1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 1, 1, 1],
    ]


def test_what_a_model_that_looks_both_ways_reads():
    packed = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[6, -100]])}
    ids, attention_mask, maskable = bidirectional_text(packed)
    assert (ids.tolist(), attention_mask.tolist(), maskable.tolist()) == ([[6, 0]], [[True, True]], [[True, False]])
