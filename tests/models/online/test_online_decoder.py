"""Steps with three caches give what one forward gives, in ragged batches too, and keep no more than they need."""

import pytest
import torch
from helpers.online import VOCABULARY, padded, ragged, texts, tiny_online

from models.online.decoder import IncrementalForward, generate_online
from models.online.growth import GROWTH

NESTED = [1, [1, 1, 1], 1]  # the middle is split again


def stepped(model, ids, start, valid=None):
    """Logits (B, T - start + 1, V) of a prompt of `start` columns and one step a token."""
    forward = IncrementalForward(model)
    logits = [forward.prefill(ids[:, :start], None if valid is None else valid[:, :start])]
    logits += [forward.step(ids[:, t]) for t in range(start, ids.shape[1])]
    return torch.stack(logits, 1), forward


@pytest.mark.parametrize(
    ("growth", "gate", "reads"),
    [
        *((growth, "slot", "shallow") for growth in GROWTH),
        *((growth, "slot", "whole") for growth in ("null", "autoregressive", "accumulate", "entropy", "draft")),
        ("null", "smooth", "shallow"),
    ],
)
def test_forward_is_step(growth, gate, reads):
    model = tiny_online(growth=growth, gate=gate, router_reads=reads)
    ids = texts(rows=4, length=70)  # longer than a chunk of the cache
    with torch.no_grad():
        whole, levels = model.read(ids)
        whole = model.logits(whole)
    steps, forward = stepped(model, ids, 2)
    torch.testing.assert_close(steps, whole[:, 1:], atol=1e-11, rtol=1e-11)
    assert torch.equal(forward.concepts, levels[0].routing.commit.sum(1))


def test_forward_is_step_in_single_precision():
    model, ids = tiny_online().float(), texts(rows=4, length=40)
    steps, _ = stepped(model, ids, 5)
    with torch.no_grad():
        torch.testing.assert_close(steps, model(ids)[:, 4:], atol=1e-5 * float(steps.abs().max()), rtol=1e-5)


@pytest.mark.parametrize(("growth", "reads"), [("null", "shallow"), ("null", "whole"), ("fixed", "shallow")])
def test_concepts_of_concepts_step_too(growth, reads):
    model, ids = tiny_online(NESTED, growth=growth, router_reads=reads), texts(rows=4, length=40)
    steps, forward = stepped(model, ids, 7)
    with torch.no_grad():
        torch.testing.assert_close(steps, model(ids)[:, 6:], atol=1e-11, rtol=1e-11)
    inner = forward.state.middle
    assert (inner.concepts <= forward.concepts).all()
    assert (inner.concepts < forward.concepts).any()


@pytest.mark.parametrize(
    ("split", "growth"),
    [
        ([1, 2, 1], "draft"),
        *((split, way) for split in ([1, 2, 1], NESTED) for way in ("autoregressive", "accumulate", "fixed")),
    ],
)
def test_a_first_position_that_commits_steps_too(split, growth):
    model, ids = tiny_online(split, growth=growth, commit_first=True), texts(rows=4, length=20)
    steps, _ = stepped(model, ids, 2)
    with torch.no_grad():
        torch.testing.assert_close(steps, model(ids)[:, 1:], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("growth", ["null", "autoregressive", "accumulate", "draft"])
def test_a_ragged_batch_is_row_by_row(growth, left):
    model, rows = tiny_online(growth=growth), ragged()
    new = texts(rows=3, length=20, seed=5)
    together = torch.cat([padded(rows, left)[0], new], 1)
    valid = torch.cat([padded(rows, left)[1], torch.ones_like(new, dtype=torch.bool)], 1)
    steps, forward = stepped(model, together, 11, valid)
    moments = set()
    for k, row in enumerate(rows):
        alone, single = stepped(model, torch.cat([row, new[k]])[None], len(row))
        torch.testing.assert_close(steps[k], alone[0], atol=1e-11, rtol=1e-11)
        assert forward.concepts[k] == single.concepts[0]
        with torch.no_grad():
            _, levels = model.read(torch.cat([row, new[k]])[None])
        moments.add(tuple(levels[0].routing.commit[0, -20:].tolist()))
    assert len(moments) == 3  # rows did commit at different times


def test_what_is_kept_is_tokens_concepts_and_tails():
    """By hand: shallow holds T, middle the concepts, deep concepts and tail."""
    model, ids = tiny_online([1, 2, 1], growth="fixed"), texts(rows=2, length=21)
    model.set_inference_settings(4.0, 1.0)
    _, forward = stepped(model, ids, 9)
    shallow, middle, deep = forward.state.caches()
    assert shallow.lengths.tolist() == [21, 21]
    assert middle.lengths.tolist() == [5, 5]
    assert deep.lengths.tolist() == [6, 6]  # five concepts and the one token behind them
    a_slot = 2 * 2 * 4 * 8  # keys and values, two heads of width 4, float64
    assert forward.kv_bytes == 2 * a_slot * (21 + 2 * 5 + 6)


def test_without_compression_it_generates_what_transformers_does():
    model, prompt = tiny_online(), texts(rows=1, length=6)
    model.set_inference_settings(1.0, 0.0)
    ours = generate_online(model, prompt, max_new_tokens=15, temperature=0)
    theirs = model.backbone.generate(prompt, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.sequences, theirs[:, 6:])
    assert ours.concepts.tolist() == [20]


def test_generation_stops_at_the_end_token_and_generates_no_padding():
    model, prompt = tiny_online(), texts(rows=3, length=6)
    free = generate_online(model, prompt, max_new_tokens=12, temperature=0).sequences
    end = int(free[0, 3])
    found = generate_online(model, prompt, max_new_tokens=12, temperature=0, eos_token_id=end).sequences
    for row, ended in zip(free.tolist(), found.tolist(), strict=True):
        stop = row.index(end) if end in row else len(row)
        assert ended == (row[: stop + 1] + [end] * 12)[: len(ended)]
    ends = [end, int(free[1, 0])]
    several = generate_online(model, prompt, max_new_tokens=12, temperature=0, eos_token_id=ends).sequences
    for row, ended in zip(free.tolist(), several.tolist(), strict=True):
        stop = next((n for n, token in enumerate(row) if token in ends), len(row))
        assert ended == (row[: stop + 1] + [end] * 12)[: len(ended)]
    few = generate_online(
        model, prompt, max_new_tokens=30, generator=torch.Generator().manual_seed(0), temperature=5.0, vocab_size=4
    )
    assert few.sequences.max() == 3 < VOCABULARY


def test_generation_stops_where_a_rule_says_so():
    model, prompt = tiny_online(), texts(rows=2, length=6)
    free = generate_online(model, prompt, max_new_tokens=5, temperature=0).sequences

    def stop(tokens):
        return torch.tensor([tokens.shape[1] == 1, tokens.shape[1] == 3])

    found = generate_online(model, prompt, max_new_tokens=5, temperature=0, stop=stop).sequences
    assert torch.equal(found, free[:, :3])
