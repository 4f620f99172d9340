"""How texts begin and how long they are, as numbers, by hand."""

import torch

from datamodules.text_signals import TextSignals

END = 0


def texts(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([row + [END] * (8 - len(row)) for row in rows])


def test_openings_by_frequency_and_lengths_by_eighths():
    """7 opens three texts, 5 two, 3 one; lengths 1 to 8, once each, are the eighths."""
    openings = [7, 5, 3, 7, 5, 7, 5, 7]
    training = texts(*([first] + [9] * n for n, first in enumerate(openings)))
    signals = TextSignals(training, END)
    assert signals.sizes == {"text opening": 4, "text length": 8}
    found = signals(training)
    assert found["text opening"].tolist() == [1, 2, 3, 1, 2, 1, 2, 1]
    assert found["text length"].tolist() == list(range(8))
    new = signals(texts([9, 7, 7], [5, END, 5], []))  # an opening that is new, an end within the text, an empty text
    assert new["text opening"].tolist() == [0, 2, 0]
    assert new["text length"].tolist() == [2, 2, 0]


def test_rare_openings_share_a_number():
    training = texts(*([first] for first in range(1, 200)), *([first] for first in range(1, 128)))
    found = TextSignals(training, END)(training)["text opening"]
    assert found[:127].tolist() == list(range(1, 128))
    assert not found[127:199].any()


def test_training_texts_of_one_length_are_told_from_longer_ones():
    signals = TextSignals(texts(*[[4, 4]] * 5), END)
    assert signals(texts([4, 4], [4, 4, 4]))["text length"].tolist() == [0, 7]
