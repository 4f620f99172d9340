"""What a text costs alone, by a clock that the decoder moves."""

from types import SimpleNamespace

import pytest
import torch

from lightning_modules.training import decoder_cost
from lightning_modules.training.decoder_cost import measure_decoder, single_text


class Streamer:
    """Three tokens a text: the first after `first` seconds, the others after one more each."""

    name, method, forwards = "streamer", "teacher", 3

    def __init__(self, now: list[float], refines: bool, first: list[float]) -> None:
        self.now, self.refines, self.first, self.batches = now, refines, first, []

    def __call__(self, rows, generator, on_tokens=None):
        self.batches.append(len(rows["input_ids"]))
        texts = rows["input_ids"][:, -3:]
        for n in range(1, 4):
            self.now[0] += self.first[(len(self.batches) - 1) % len(self.first)] if n == 1 else 1.0
            if on_tokens is not None:
                on_tokens(texts[:, :n])
        self.forward_passes = torch.full((len(texts),), len(self.batches))
        return texts


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(decoder_cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def batch_of(rows: int) -> dict:
    return {"input_ids": torch.arange(4 * rows).view(rows, 4)}


def test_seconds_of_a_text_alone_and_of_its_first_token(clock):
    streamer = Streamer(clock, False, first=[90.0, 5.0, 1.0, 2.0])
    found = single_text(streamer, batch_of(5))
    assert streamer.batches == [1, 1, 1, 1]  # one that warms up, and three
    assert (found.seconds, found.first_token_seconds) == (4.0, 2.0)  # medians of 7, 3, 4 and of 5, 1, 2
    assert single_text(Streamer(clock, False, first=[9.0]), batch_of(1)).first_token_seconds == 9.0


def test_a_decoder_that_refines_all_positions_has_no_first_token(clock):
    found = single_text(Streamer(clock, True, first=[4.0]), batch_of(2))
    assert (found.seconds, found.first_token_seconds) == (6.0, None)


def test_the_batchs_own_forward_passes_are_kept_and_details_are_taken_once(clock):
    streamer, generator = Streamer(clock, False, first=[1.0]), torch.Generator()
    detailed = measure_decoder(streamer, batch_of(4), generator, in_detail=True)
    assert detailed.forward_passes.tolist() == [1] * 4
    assert streamer.batches == [4, 2, 1, 1, 1, 1]
    plain = measure_decoder(streamer, batch_of(4), generator, in_detail=False)
    assert (plain.single, plain.flops_per_token) == (None, None)
    assert streamer.batches[6:] == [4]


def test_forward_passes_that_a_decoder_does_not_count_are_those_of_its_name():
    def decoder(rows, generator, on_tokens=None):
        return rows["input_ids"]

    decoder.forwards = 3
    measured = measure_decoder(decoder, batch_of(2), torch.Generator(), in_detail=False)
    assert measured.forward_passes.tolist() == [3, 3]
