"""The network that drafts blocks: exactness, what it reads, and that training sees what decoding serves."""

import json
from dataclasses import asdict

import pytest
import torch
from helpers.qwen import tiny_qwen

from models.functional.errors import UsageError
from models.functional.next_token import CausalText
from models.interfaces.scores import ProposesBlocks, StateScores
from models.speculative.block_drafter import BlockDrafter, BlockDrafterOptions, early_middle_late
from models.speculative.block_training import block_terms, blocks_at, drafted_log_probs, draw_anchors, read_texts
from models.speculative.cached_scores import CachedScores
from models.speculative.decode import decode_qstar
from models.speculative.decoder import QStarDecoder
from models.speculative.distribution import MixtureDist
from models.speculative.drafter_files import load_drafter, save_drafter
from models.speculative.exactness import enumeration_error, g_test_of
from models.speculative.options import DecodingOptions, DraftOptions
from models.speculative.random_source import TorchRandomSource, enumerate_outcomes
from models.speculative.scores import CausalScores
from models.speculative.state import TextRules

V = 7
NO_ENDS = {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}
PROMPT = torch.tensor([1, 4, 2, 6])
DEPENDENCES = ("none", "markov", "noise")


def models(dtype=torch.float32):
    return {
        name: tiny_qwen(seed, vocabulary=V, scale=2.0, dtype=dtype, **NO_ENDS)
        for name, seed in (("theta", 5), ("target", 6))
    }


def drafter_of(verifiers, dependence, seed=0, **options):
    """A drafter whose proposals depend on all that they may depend on."""
    torch.manual_seed(seed)
    options = {"draft_length": 3, "window": 5, "rank": 4} | options
    drafter = BlockDrafter(verifiers, BlockDrafterOptions(dependence=dependence, **options), V)
    with torch.no_grad():
        for weight in drafter.own_parameters().values():
            if weight.ndim >= 2:
                weight.normal_(std=0.5)
    dtype = next(drafter.lender.parameters()).dtype
    return drafter.to(dtype).eval()


def decoder(dependence, verify="token", alone=False, scheme="block_drafter"):
    own = models()
    if alone:
        own = {"theta": own["theta"]}
    sizes = {"response_length": 3, "vocab_size": V, "end_ids": None}
    options = DecodingOptions(verify=verify, gamma=2)
    third = drafter_of(own, dependence) if scheme == "block_drafter" else None
    pair = (own["theta"], own.get("target", own["theta"]))
    return QStarDecoder(*pair, scheme, options, assistant=third, **sizes)


@pytest.mark.parametrize(
    ("dependence", "verify", "alone"), [("none", "token", True), ("markov", "block", False), ("markov", "token", True)]
)
def test_the_network_keeps_the_distribution(dependence, verify, alone):
    """Every outcome of the decoder's own draws, with key-value caches, in float64."""
    assert enumeration_error(decoder(dependence, verify, alone), PROMPT) < 1e-12


def quantised(logp, tokens, grid):
    """The nearest distribution over the tokens whose probabilities are multiples of 1 / grid."""
    p = logp[..., tokens].softmax(-1)
    low = (p * grid).round().clamp(min=0)
    low[..., -1] = grid - low[..., :-1].sum(-1)
    out = torch.full_like(logp, -torch.inf)
    out[..., tokens] = (low / grid).log()
    return out


@pytest.mark.parametrize("verify", ["token", "block"])
@pytest.mark.parametrize("peeking", [False, True], ids=["causal", "peeking"])
def test_noise_keeps_the_distribution_on_a_grid(verify, peeking, monkeypatch):
    """The network's own code on a grid of noise. The control reads the noise that draws the very token."""
    own, grid = {"theta": models(torch.float64)["theta"]}, 3
    drafter, tokens = drafter_of(own, "noise"), torch.tensor([2, 5])
    if peeking:
        logits = drafter.logits
        monkeypatch.setattr(
            drafter, "logits", lambda memory, read, last, noise: logits(memory, read, last, noise.roll(-1, 1))
        )

    class Two(CausalScores):
        def __call__(self, ids, lengths, count):
            logp = super().__call__(ids, lengths, count)
            return torch.full_like(logp, -torch.inf).index_copy(-1, tokens, logp[..., tokens]).log_softmax(-1)

    mixture = MixtureDist(1.0)
    monkeypatch.setattr(MixtureDist, "proposal", lambda self, logp: quantised(logp, tokens, grid))

    def run(rng):
        scores = Two(own["theta"], V)
        drafting = DraftOptions("block_drafter", 2, verify)
        return decode_qstar(
            scores, scores, PROMPT[None], drafting, TextRules(3), rng=rng, assistant=drafter, mixture=mixture
        )

    found = {}
    for probability, out in enumerate_outcomes(run, grid):
        text = tuple(out.tokens[0].tolist())
        found[text] = found.get(text, 0.0) + probability
    worst, scores = 0.0, Two(own["theta"], V)
    for text, probability in found.items():
        ids = torch.cat([PROMPT, torch.tensor(text)])[None]
        logp = scores(ids, torch.tensor([len(PROMPT)]), 3)[0]
        worst = max(worst, abs(probability - logp.gather(-1, torch.tensor(text)[:, None]).sum().exp().item()))
    assert (worst > 1e-3) if peeking else (worst < 1e-12)


def test_texts_with_noise_pass_a_g_test():
    texts = torch.cartesian_prod(*[torch.arange(V)] * 2)
    p = g_test_of(decoder("noise"), PROMPT, texts, 3000, torch.Generator().manual_seed(0))
    assert p > 1e-3


@pytest.mark.parametrize("dependence", DEPENDENCES)
def test_a_position_reads_what_its_dependence_allows(dependence):
    """Noise: none of its own and of later positions. The block before it: by the noise alone."""
    own = models()
    drafter = drafter_of(own, dependence)
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, sum(drafter.widths), generator=draw)
    read, last = torch.ones(2, 5, dtype=torch.bool), torch.tensor([1, 3])
    memory = drafter.read_context(drafter.project(drafter.mix_states(states)))
    noise = torch.rand(2, 3, generator=draw).double()
    before = drafter.logits(memory, read, last, noise)
    for k in range(3):
        other = noise.clone()
        other[:, k] = (other[:, k] + 0.5) % 1
        change = (drafter.logits(memory, read, last, other) - before).abs().amax((0, 2)) > 1e-6
        assert change.tolist() == [dependence == "noise" and n > k for n in range(3)]
    assert not torch.allclose(drafter.logits(memory, read, last.flip(0), noise), before)


def test_positions_that_were_not_read_change_nothing():
    own = models()
    drafter = drafter_of(own, "none")
    states = torch.randn(1, 5, sum(drafter.widths))
    read = torch.tensor([[False, False, True, True, True]])
    other = states.clone()
    other[:, :2] = 100.0
    first, second = (
        drafter.logits(drafter.read_context(drafter.project(drafter.mix_states(s))), read, torch.tensor([1]))
        for s in (states, other)
    )
    torch.testing.assert_close(first, second)
    other[:, 2] += 1.0
    assert not torch.allclose(
        drafter.logits(drafter.read_context(drafter.project(drafter.mix_states(other))), read, torch.tensor([1])), first
    )


def test_a_longer_window_changes_nothing_where_it_was_not_read():
    """Positions are relative: the block follows its window, whatever the window's length."""
    own = models()
    long, short = drafter_of(own, "none", window=5), drafter_of(own, "none", window=3)
    states, last = torch.randn(2, 3, sum(long.widths)), torch.tensor([1, 3])
    padded = torch.cat([torch.zeros(2, 2, states.shape[-1]), states], 1)
    read = torch.tensor([[False, False, True, True, True]] * 2)
    found = long.logits(long.read_context(long.project(long.mix_states(padded))), read, last)
    same = short.logits(short.read_context(short.project(short.mix_states(states))), read[:, 2:], last)
    torch.testing.assert_close(found, same, atol=1e-5, rtol=1e-5)
    moved = torch.cat([states, torch.zeros(2, 2, states.shape[-1])], 1)  # the control: the same states further away
    assert not torch.allclose(
        long.logits(long.read_context(long.project(long.mix_states(moved))), read.flip(1), last), found, atol=1e-4
    )


@pytest.mark.parametrize("kind", [CachedScores, CausalScores])
def test_states_after_rejections_are_those_of_the_text_read_afresh(kind):
    """Ragged rows, replaced tokens and removed slots; rows leave the batch."""
    model = tiny_qwen(0)
    scores, draw = kind(model), torch.Generator().manual_seed(0)
    assert isinstance(scores, StateScores)
    scores.keep_states((1, 2))
    ids, lengths = torch.randint(0, 50, (4, 90), generator=draw), torch.randint(2, 9, (4,), generator=draw)
    checked = 0
    for step in range(16):
        scores(ids, lengths, 3)
        # up to two drafted tokens are accepted; the token after them is replaced
        lengths = lengths + torch.randint(1, 4, (len(ids),), generator=draw)
        ids[torch.arange(len(ids)), lengths - 1] = torch.randint(0, 50, (len(ids),), generator=draw)
        states, read = scores.states_before(ids, lengths - 1, 6)
        hidden = model(input_ids=ids[:, : int(lengths.max())], output_hidden_states=True).hidden_states
        whole = torch.cat([hidden[1], hidden[2]], -1)
        for row, end in enumerate((lengths - 1).tolist()):
            assert read[row].tolist() == [end - 6 + k >= 0 for k in range(6)]
            have = min(6, end)
            torch.testing.assert_close(states[row, 6 - have :], whole[row, end - have : end], atol=2e-5, rtol=1e-4)
            checked += have
        if step == 9:
            stay = torch.tensor([True, False, True, True])
            scores.keep_rows(stay)
            ids, lengths = ids[stay], lengths[stay]
    assert checked > 300
    ids[:, int(lengths.min()) - 2] += 1  # a token that was not read
    _, read = scores.states_before(ids % 50, lengths - 1, 6)
    assert not read.all()


@pytest.mark.parametrize("dependence", DEPENDENCES)
def test_training_sees_what_decoding_serves(dependence):
    """log ψ of a served draft, with caches and after rejections, is that of the training code on the final text."""
    own = models(torch.float64)
    drafter, mixture = drafter_of(own, dependence), MixtureDist(temperature=1.3)
    served = []

    class Recorded:
        block_length, window, state_layers = drafter.block_length, drafter.window, drafter.state_layers

        def propose(self, states, read, last, size, draws, shape):
            noise = []

            class Kept(TorchRandomSource):
                def uniform(self, *shape):
                    noise.append(super().uniform(*shape))
                    return noise[-1]

            found = drafter.propose(states, read, last, size, Kept(draws.generator), shape)
            served.append((found, noise))
            return found

    rng = TorchRandomSource(torch.Generator().manual_seed(3))
    out = decode_qstar(
        *(CachedScores(model) for model in own.values()), PROMPT[None], DraftOptions("block_drafter", 3), TextRules(40),
        rng=rng, assistant=Recorded(), mixture=mixture,
    )  # fmt: skip
    assert 0 < out.acceptance["block_drafter"] < 1
    checked = 0
    for (found, noise), (_, start) in zip(served, out.draft_starts.tolist(), strict=True):
        size = found.tokens.shape[1]
        if size < drafter.block_length:
            continue
        # the text with the drafted tokens, accepted or not
        ids = torch.cat([PROMPT, out.tokens[0, :start], found.tokens[0]])[None]
        text = CausalText(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))
        blocks = blocks_at(text, torch.tensor([0]), torch.tensor([len(PROMPT) + start - 1]), size)
        assert torch.equal(blocks.tokens, found.tokens)
        read = read_texts(own, drafter, mixture, text)
        if noise:
            drafter._noise_of = lambda *given, noise=noise: noise[0]
        logp = drafted_log_probs(drafter, read, text, blocks, mixture, torch.Generator())
        # a text has its positions from 0 on and a window has its own; their rotary embeddings are of float32
        torch.testing.assert_close(logp, found.logp, atol=1e-6, rtol=0)
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("dependence", DEPENDENCES)
def test_blocks_of_one_text_are_what_each_is_alone(dependence, monkeypatch):
    """They share keys and values, in any order and with different numbers for each text; every window begins in the text."""
    own = models(torch.float64)
    drafter, mixture = drafter_of(own, dependence), MixtureDist()
    ids = torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.ones(3, 11, dtype=torch.bool)
    seen[1, :4] = False  # left padding
    text = CausalText(ids[:, :-1], ids[:, 1:], seen, seen)
    read = read_texts(own, drafter, mixture, text)
    row, anchor = torch.tensor([2, 0, 2, 1, 0, 2]), torch.tensor([7, 0, 2, 6, 10, 9])
    together = blocks_at(text, row, anchor, 3)
    # where in its interval the noise of a token lies, so that it is the same in every company
    monkeypatch.setattr("models.speculative.block_training.uniform", lambda *shape, generator: torch.full(shape, 0.5))
    found = drafted_log_probs(drafter, read, text, together, mixture, torch.Generator())
    for k in range(6):
        one = blocks_at(text, row[k : k + 1], anchor[k : k + 1], 3)
        alone = drafted_log_probs(drafter, read, text, one, mixture, torch.Generator())
        torch.testing.assert_close(found[k : k + 1], alone, atol=1e-12, rtol=0)
    # padding is not read: the same text without it
    cut = CausalText(ids[1:2, 4:-1], ids[1:2, 5:], seen[1:2, 4:], seen[1:2, 4:])
    at = blocks_at(cut, torch.tensor([0]), torch.tensor([2]), 3)
    short = drafted_log_probs(drafter, read_texts(own, drafter, mixture, cut), cut, at, mixture, torch.Generator())
    torch.testing.assert_close(found[3:4], short, atol=1e-5, rtol=0)
    # the control: another window
    drafter.window = 3
    assert not torch.allclose(drafted_log_probs(drafter, read, text, together, mixture, torch.Generator()), found)


def test_texts_longer_than_a_window_train_in_half_precision():
    own = models(torch.bfloat16)
    drafter = drafter_of(own, "markov").bfloat16()
    drafter.window = 3
    ids = torch.randint(V, (2, 40), generator=torch.Generator().manual_seed(0))
    seen = torch.ones(2, 39, dtype=torch.bool)
    text = CausalText(ids[:, :-1], ids[:, 1:], seen, seen)
    blocks = blocks_at(text, torch.tensor([0, 1, 1]), torch.tensor([30, 5, 35]), 3)
    read = read_texts(own, drafter, MixtureDist(), text)
    assert drafted_log_probs(drafter, read, text, blocks, MixtureDist(), torch.Generator()).isfinite().all()


@pytest.mark.parametrize("dependence", DEPENDENCES)
def test_the_training_figure_is_what_decoding_accepts(dependence):
    """Behind the anchors that decoding had, on the texts that it wrote: expected against counted acceptance."""
    own = models()
    drafter, mixture = drafter_of(own, dependence), MixtureDist()
    rows, length = 300, 9
    out = decode_qstar(
        *(CachedScores(model) for model in own.values()), PROMPT.expand(rows, -1), DraftOptions("block_drafter", 3),
        TextRules(length), rng=TorchRandomSource(torch.Generator().manual_seed(0)), assistant=drafter, mixture=mixture,
    )  # fmt: skip
    ids = torch.cat([PROMPT.expand(rows, -1), out.tokens], 1)
    scored = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    scored[:, : len(PROMPT) - 1] = False
    text = CausalText(ids[:, :-1], ids[:, 1:], scored)
    row, start = out.draft_starts.unbind(-1)
    blocks = blocks_at(text, row, len(PROMPT) - 1 + start, 3)
    read = read_texts(own, drafter, mixture, text)
    terms = block_terms(
        drafter, read, text, blocks, mixture, torch.Generator().manual_seed(1), ce=0.1, tv=0.9, decay=4.0
    )
    expected, counted = terms.survival.accepted / len(row), torch.tensor(out.accepted_at[:3]) / len(row)
    sd = (counted * (1 - counted) / len(row)).sqrt()
    assert ((expected - counted).abs() < 4 * sd + 1e-3).all()
    # the control: the figure of a sharper drafter
    sharp = MixtureDist(temperature=0.2)
    other = block_terms(drafter, read, text, blocks, sharp, torch.Generator().manual_seed(1), ce=0.1, tv=0.9, decay=4.0)
    assert ((other.survival.accepted / len(row) - counted).abs() > 4 * sd).any()


def test_blocks_end_with_their_text_and_anchors_are_scored_positions():
    ids = torch.arange(10, 22).view(2, 6)
    scored = torch.tensor([[False, True, True, True, True], [False, True, True, False, False]])
    text = CausalText(ids[:, :-1], ids[:, 1:], scored)
    blocks = blocks_at(text, torch.tensor([0, 0, 1]), torch.tensor([1, 3, 1]), 3)
    assert blocks.last.tolist() == [11, 13, 17]
    assert blocks.tokens[:, 0].tolist() == [12, 14, 18]
    assert blocks.counts.tolist() == [[True, True, True], [True, True, False], [True, True, False]]
    assert blocks.at[:, 0].tolist() == [0, 2, 4]
    short = blocks_at(text, torch.tensor([0, 0, 1]), torch.tensor([1, 3, 1]), 3, torch.tensor([1, 3, 0]))
    assert short.counts.tolist() == [[True, False, False], [True, True, False], [False] * 3]
    gap = text._replace(weights=torch.tensor([[True, False, True, True, True]] * 2))
    assert blocks_at(gap, torch.tensor([0]), torch.tensor([0]), 3).counts.tolist() == [[True, False, False]]
    row, anchor = draw_anchors(text, 3, torch.Generator().manual_seed(0))
    assert scored[row, anchor].all()
    assert len(set(zip(row.tolist(), anchor.tolist(), strict=True))) == len(row) == 5


def test_ids_that_are_padding_of_the_output_layer_are_never_proposed(tmp_path):
    own = models()
    drafter = drafter_of(own, "markov")
    drafter.vocab_size = V - 2
    states, read, last = torch.randn(200, 5, sum(drafter.widths)), torch.ones(200, 5, dtype=torch.bool), torch.ones(200)
    for kept in (drafter, load_drafter(save_drafter(drafter, own, tmp_path / "drafter"), own)):
        draws = TorchRandomSource(torch.Generator().manual_seed(0))
        found = kept.propose(states, read, last.long(), 3, draws, lambda logp: logp)
        assert found.logp.shape == (200, 3, V - 2)
        assert set(found.tokens.flatten().tolist()) == set(range(V - 2))


@pytest.mark.parametrize("words", [V, V - 2])
def test_a_vocabulary_that_shrinks_to_the_proposed_tokens_reads_back(tmp_path, words):
    """The corpus decides the vocabulary after the network is built, and a file has the smaller one."""
    own = models()
    drafter = drafter_of(own, "markov", vocabulary=V - 2)
    drafter.vocab_size = words
    again = load_drafter(save_drafter(drafter, own, tmp_path / "drafter"), own)
    assert torch.equal(again.proposed, drafter.proposed)


def test_layers_are_early_middle_and_late():
    assert early_middle_late(30) == (8, 15, 30)
    assert early_middle_late(2) == (1, 2)
    assert early_middle_late(1) == (1,)


def test_only_its_own_weights_are_saved_and_it_reads_back(tmp_path):
    own = models()
    drafter = drafter_of(own, "markov")
    assert isinstance(drafter, ProposesBlocks)
    folder = save_drafter(drafter, own, tmp_path / "drafter")
    assert (folder / "drafter.safetensors").stat().st_size < 4 * 1.1 * sum(
        p.numel() for p in drafter.own_parameters().values()
    ) + 4096
    again = load_drafter(folder, own)
    assert asdict(again.options) == asdict(drafter.options)
    for name, weight in drafter.own_parameters().items():
        assert torch.equal(again.own_parameters()[name], weight)
    states, read, last = torch.randn(1, 5, sum(drafter.widths)), torch.ones(1, 5, dtype=torch.bool), torch.tensor([2])
    texts = [
        d.propose(states, read, last, 3, TorchRandomSource(torch.Generator().manual_seed(0)), lambda p: p)
        for d in (drafter, again)
    ]
    assert torch.equal(texts[0].logp, texts[1].logp)


def test_files_that_do_not_fit_are_refused(tmp_path):
    own = models()
    folder = save_drafter(drafter_of(own, "none"), own, tmp_path / "drafter")
    with pytest.raises(UsageError, match="holds no block drafter"):
        load_drafter(tmp_path, own)
    with pytest.raises(UsageError, match="target is not given"):
        load_drafter(folder, {"theta": own["theta"]})
    with pytest.raises(UsageError, match="another theta than the one given"):
        load_drafter(folder, own | {"theta": tiny_qwen(8, vocabulary=V, **NO_ENDS)})
    description = json.loads((folder / "drafter.json").read_text())
    (folder / "drafter.json").write_text(json.dumps(description | {"format": "leap-block-drafter-9"}))
    with pytest.raises(UsageError, match="train the drafter again"):
        load_drafter(folder, own)
    (folder / "drafter.json").write_text(json.dumps(description))
    weights = folder / "drafter.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot be read"):
        load_drafter(folder, own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dependence": "order"}, "module.dependence=order"),
        ({"draft_length": 0}, "module.draft_length=0"),
        ({"window": 0}, "module.window=0"),
        ({"num_layers": 0}, "module.num_layers=0"),
        ({"rank": 0}, "module.rank=0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        BlockDrafterOptions(**options)


def some_tokens(verifiers, dependence):
    """A drafter that proposes three of the seven tokens."""
    drafter = drafter_of(verifiers, dependence, vocabulary=3)
    drafter.propose_only(torch.tensor([5, 1, 4]))
    return drafter


@pytest.mark.parametrize(("dependence", "verify"), [("none", "token"), ("markov", "block")])
def test_proposing_some_tokens_alone_keeps_the_distribution(dependence, verify):
    """Every outcome, in float64, over three words of which two are proposed."""
    own, words = {"theta": models(torch.float64)["theta"]}, torch.tensor([1, 4, 2])
    drafter = some_tokens(own, dependence)

    class Three(CausalScores):
        def __call__(self, ids, lengths, count):
            logp = super().__call__(ids, lengths, count)
            return torch.full_like(logp, -torch.inf).index_copy(-1, words, logp[..., words]).log_softmax(-1)

    def among(logp):  # of the drafter's columns
        if logp.shape[-1] == V:
            return logp
        return logp.masked_fill(torch.tensor([True, False, False, False]), -torch.inf).log_softmax(-1)

    class Cut(MixtureDist):
        def proposal(self, logp):
            return among(logp)

    scores, found = Three(own["theta"], V), {}

    def run(rng):
        drafting = DraftOptions("block_drafter", 2, verify)
        return decode_qstar(
            scores, scores, PROMPT[None], drafting, TextRules(3), rng=rng, assistant=drafter, mixture=Cut(1.0)
        )

    for probability, out in enumerate_outcomes(run):
        text = tuple(out.tokens[0].tolist())
        found[text] = found.get(text, 0.0) + probability
    assert len(found) == 27
    for text, probability in found.items():
        ids = torch.cat([PROMPT, torch.tensor(text)])[None]
        logp = scores(ids, torch.tensor([len(PROMPT)]), 3)[0]
        wanted = logp.gather(-1, torch.tensor(text)[:, None]).sum().exp().item()
        assert abs(probability - wanted) < 1e-12


def test_columns_of_some_tokens_hold_what_the_vocabulary_held():
    own = models(torch.float64)
    drafter, logp = some_tokens(own, "none"), torch.randn(4, V, dtype=torch.float64).log_softmax(-1)
    assert drafter.columns_of(torch.tensor([[5, 1], [4, 0], [6, 2]])).tolist() == [[0, 1], [2, 3], [3, 3]]
    columns = drafter.in_columns(logp)
    torch.testing.assert_close(columns[:, :3], logp[:, [5, 1, 4]])
    torch.testing.assert_close(columns[:, 3].exp(), logp.exp()[:, [0, 2, 3, 6]].sum(-1))
    whole = drafter.in_vocabulary(columns)
    assert whole.isfinite().sum(-1).tolist() == [3] * 4
    torch.testing.assert_close(whole[:, [5, 1, 4]], columns[:, :3])
    every = drafter_of(own, "none")
    assert every.in_columns(logp) is logp
    assert every.in_vocabulary(logp) is logp


@pytest.mark.parametrize("dependence", DEPENDENCES)
def test_some_tokens_have_the_probabilities_that_all_would_give_them(dependence):
    """The same weights over all tokens, conditioned on the three; what training sees is what is proposed."""
    own = models(torch.float64)
    few, every = some_tokens(own, dependence), drafter_of(own, dependence)
    held = {name: value for name, value in few.own_parameters().items() if name != "bias.weight"}
    every.load_state_dict(held, strict=False)
    if dependence == "markov":
        with torch.no_grad():
            every.bias.weight[few.proposed] = few.bias.weight
    states, read = torch.randn(6, 5, sum(few.widths), dtype=torch.float64), torch.ones(6, 5, dtype=torch.bool)
    last = torch.arange(6)
    found = few.propose(states, read, last, 3, TorchRandomSource(torch.Generator().manual_seed(0)), lambda logp: logp)
    assert set(found.tokens.flatten().tolist()) <= {5, 1, 4}
    fractions = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    memories = [d.project(d.mix_states(states)) for d in (few, every)]
    if dependence == "noise":
        noise = torch.rand(6, 3, dtype=torch.float64)
        few._noise_of = every._noise_of = lambda *given: noise
    seen = few.log_probs(memories[0], read, last, found.tokens, fractions)
    whole = every.log_probs(memories[1], read, last, found.tokens, fractions)
    torch.testing.assert_close(seen[..., :3], whole[..., few.proposed].log_softmax(-1))
    assert (seen[..., 3] == -torch.inf).all()
    if dependence != "noise":
        torch.testing.assert_close(few.in_vocabulary(seen), found.logp)


def test_tokens_that_are_never_proposed_count_as_rejected_and_leave_the_loss_finite():
    own = models(torch.float64)
    drafter, mixture = some_tokens(own, "markov"), MixtureDist()
    ids = torch.tensor([[1, 4, 2, 5, 1, 0, 4, 5]])
    text = CausalText(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))
    blocks = blocks_at(text, torch.tensor([0]), torch.tensor([2]), 3)  # 5 1 0
    read = read_texts(own, drafter, mixture, text)
    assert read.log_q.shape == (7, 4)
    torch.testing.assert_close(read.log_q.logsumexp(-1), torch.zeros(7, dtype=torch.float64))
    terms = block_terms(drafter, read, text, blocks, mixture, torch.Generator(), ce=0.1, tv=0.9, decay=4.0)
    assert terms.survival.accepted[2] == 0
    assert terms.survival.accepted[1] > 0
    assert terms.loss.loss.isfinite()
    terms.loss.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in drafter.own_parameters().values())


def test_the_noise_of_a_text_draws_its_proposed_tokens():
    """What training finds is what `propose` would have drawn the tokens with; they are no columns of their own number."""
    own = models(torch.float64)
    drafter = some_tokens(own, "noise")
    states, read = torch.randn(6, 5, sum(drafter.widths), dtype=torch.float64), torch.ones(6, 5, dtype=torch.bool)
    memory, last = drafter.read_context(drafter.project(drafter.mix_states(states))), torch.arange(6)
    tokens = drafter.proposed[torch.randint(3, (6, 3), generator=torch.Generator().manual_seed(0))]
    noise = drafter._noise_of(memory, read, last, tokens, torch.full((6, 3), 0.5).double(), lambda logp: logp)

    class Same:
        def uniform(self, *shape):
            return noise

    # the noise of the last position is read by none, and was not searched for
    drawn = drafter.propose(states, read, last, 3, Same(), lambda logp: logp).tokens
    assert torch.equal(drawn[:, :2], tokens[:, :2])


@pytest.mark.parametrize("dependence", ["none", "markov"])
def test_some_tokens_are_drawn_with_the_noise_that_they_have_among_all(dependence):
    drafter = some_tokens(models(torch.float64), dependence)
    states, read = torch.randn(6, 5, sum(drafter.widths), dtype=torch.float64), torch.ones(6, 5, dtype=torch.bool)
    noise = torch.randn(3, 6, V, dtype=torch.float64)

    class Gumbel:
        drawn = 0

        def choose(self, p):
            self.drawn += 1
            return (p.log() + noise[self.drawn - 1]).argmax(-1)

    found = drafter.propose(states, read, torch.arange(6), 3, Gumbel(), lambda logp: logp)
    assert torch.equal(found.tokens, (found.logp + noise.transpose(0, 1)).argmax(-1))
    assert len(found.tokens.unique()) == 3


def test_parameters_that_are_read_are_its_own_and_the_rows_of_the_head_that_it_needs():
    own = models()
    width = own["target"].config.hidden_size
    for drafter, rows in ((some_tokens(own, "markov"), 3), (drafter_of(own, "markov"), V)):
        table = drafter.previous.weight.numel()  # of which a row is looked up
        held = sum(p.numel() for p in drafter.own_parameters().values())
        assert drafter.parameters_read == held - table + rows * width


def test_the_chosen_tokens_are_kept_in_files(tmp_path):
    own = models()
    drafter = some_tokens(own, "markov")
    again = load_drafter(save_drafter(drafter, own, tmp_path / "drafter"), own)
    assert again.proposed.tolist() == [5, 1, 4]
    assert again.parameters_read == drafter.parameters_read < drafter_of(own, "markov").parameters_read
