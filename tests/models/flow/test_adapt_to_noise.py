"""What adapt minimises: cross entropy of the denoiser, the distance from the teacher, targets shared with other texts."""

import pytest
import torch
from helpers.noisy_mask import build, perturb

from datamodules.oracle.datamodule import OracleDataModule
from models.flow.losses import adapt_to_noise
from models.flow.path import PathSample, hide_response


def drawn_again(student, batch):
    """What `adapt_to_noise` draws first for 8 rows from seed 5: (generator, samples)."""
    draw = torch.Generator().manual_seed(5)
    masked = hide_response(batch, 0.5, draw)
    s = (torch.arange(8) / 8 + torch.rand(1, generator=draw)) % 1
    return draw, student.path.sample(batch, masked, s, draw)


def test_adapting_by_hand(tiny_llada, tiny_oracle):
    """CE at every masked position of the line, plus the weighted divergence from the masked teacher at s = 0."""
    module = build(tiny_llada, tiny_oracle, adapter="prefix+mask_noise")
    perturb(module)
    student, teacher, batch = module.student, module.teacher, next(iter(tiny_oracle.train_dataloader()))
    options = {"teacher_weight": 0.5, "observed_share": 0.5}
    terms = adapt_to_noise(student, teacher, batch, torch.Generator().manual_seed(5), **options)

    draw, sample = drawn_again(student, batch)
    masked = sample.masked
    start = student.path.start(batch["input_ids"][::8], masked[::8], draw)
    nll, gap = [], []
    for row in range(8):
        one = slice(row, row + 1)
        logits = student(sample.rows(one), sample.s[one])
        nll.append(-logits.log_softmax(-1)[range(len(logits)), batch["input_ids"][row][masked[row]]])
        if row % 8 == 0:
            xt = batch["input_ids"][one].masked_fill(masked[one], teacher.mask_id)
            p = teacher(xt)[masked[one]].softmax(-1)
            zero, mine = torch.zeros(1), start[row // 8 : row // 8 + 1]
            seen, text, response = (batch[n][one] for n in ("attention_mask", "input_ids", "response_mask"))
            noise = PathSample(mine, masked[one], seen, zero, text, response)
            q = student(noise, zero).log_softmax(-1)
            gap.append((p * (p.log() - q)).sum(-1))
    expected = torch.cat(nll).mean() + 0.5 * torch.cat(gap).mean()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0 < int(masked.sum()) < int(batch["response_mask"].sum())


def test_adapting_to_texts_that_could_lie_behind_a_point_by_hand(tiny_llada, tiny_oracle):
    """Each text of the prompt counts by the density of the point on its line, position by position."""
    module = build(tiny_llada, tiny_oracle)
    perturb(module)
    student, batch = module.student, next(iter(tiny_oracle.train_dataloader()))
    texts = torch.cat([batch["input_ids"], tiny_oracle.rows["train"].columns["input_ids"][:40]])
    options = {"teacher_weight": 0.0, "observed_share": 0.5}

    def loss(rows, **more):
        return adapt_to_noise(
            student, module.teacher, rows, torch.Generator().manual_seed(5), **options, **more
        ).loss.item()

    _, sample = drawn_again(student, batch)
    z, masked, s = sample.z, sample.masked, sample.s
    nll, shared = [], 0
    for row in range(8):
        one, hidden = slice(row, row + 1), masked[row]
        logits = student(sample.rows(one), sample.s[one])
        allowed = texts[(texts == batch["input_ids"][row])[:, ~hidden].all(1)]
        means = (1 - s[row]) * student.path.mask_embedding + s[row] * student.base.embed(allowed[:, hidden])
        spread = (1 - s[row]).double() * student.path.noise_scale
        density = torch.distributions.Normal(means.double(), spread).log_prob(z[row, hidden].double()).sum((1, 2))
        share, words = density.softmax(0), allowed[:, hidden]
        nll += [-(share * logits.log_softmax(-1)[k, words[:, k]]).sum() for k in range(len(logits))]
        shared += len(allowed) > 1 and share.max() < 0.99
    assert shared > 0
    assert loss(batch, texts=texts) == pytest.approx(torch.stack(nll).mean().item(), rel=1e-5)
    # control: cross entropy against the row's own text is another loss; where nobody else has the prompt it is the same
    assert abs(loss(batch) - loss(batch, texts=texts)) > 1e-3
    alone = {name: column[:1] for name, column in batch.items()}
    assert loss(alone, texts=alone["input_ids"]) == pytest.approx(loss(alone), rel=1e-6)


def test_targets_averaged_over_texts_have_the_same_gradient_on_average_and_less_noise(tiny_llada):
    data = OracleDataModule(size="tiny", train_rows=4096, val_rows=16, test_rows=16, reveal_all=0, reveal_part=0)
    data.setup()
    module = build(tiny_llada, data)
    perturb(module)
    student, corpus = module.student, data.rows["train"].columns
    weight = student.body.lm_head.weight
    varied = next(
        c
        for c in range(data.prompt_length, corpus["input_ids"].shape[1])
        if corpus["input_ids"][:, c].unique().numel() > 1
    )
    own, shared, strange = [], [], []
    for step in range(64):
        rows = {name: column[64 * step : 64 * step + 64] for name, column in corpus.items()}
        others = corpus["input_ids"].roll(-64 * (step + 1), 0)[:512]  # drawn like the rows, and none of them
        of_one_kind = others[others[:, varied] == corpus["input_ids"][0, varied]]
        for gradients, texts in (
            (own, None),
            (shared, torch.cat([rows["input_ids"], others])),
            (strange, torch.cat([rows["input_ids"], of_one_kind])),
        ):
            draw = torch.Generator().manual_seed(step)
            terms = adapt_to_noise(
                student, module.teacher, rows, draw, teacher_weight=0.0, observed_share=0.0, texts=texts
            )
            gradients.append(torch.autograd.grad(terms.loss, weight)[0].flatten())
    own, shared, strange = (torch.stack(gradients) for gradients in (own, shared, strange))
    assert shared.var(0).sum() < 0.85 * own.var(0).sum(), (shared.var(0).sum(), own.var(0).sum())

    def largest_z(gradients):
        apart = gradients - own
        return (apart.mean(0) / (apart.std(0) / 64**0.5).clamp(min=1e-6)).abs().max().item()

    assert largest_z(shared) < 5  # of many hundred weights
    # control: with texts of another law it is another gradient
    assert largest_z(strange) > 8
