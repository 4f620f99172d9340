"""Lattices, moving codes and their gradients: by hand, and against controls that must fail."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from models.functional.errors import UsageError
from models.functional.fsq import fsq_bound, fsq_lattice, fsq_levels
from models.functional.vector_quantisation import (
    Codebook,
    assignment_sums,
    code_logits,
    ema_update,
    k_means,
    quantised,
    reset_dead,
    residuals,
    squared_distances,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_levels_multiply_to_the_codes():
    expected = {
        2: [2],
        7: [7],
        4: [2, 2],
        8: [2, 2, 2],
        24: [4, 3, 2],
        64: [4, 4, 4],
        1000: [8, 5, 5, 5],
        4096: [8, 8, 8, 8],
    }
    assert {codes: fsq_levels(codes, "codes") for codes in expected} == expected
    with pytest.raises(UsageError, match=r"module\.types\.a\.codes=22 cannot .* type module\.types\.a\.codes=16"):
        fsq_levels(22, "module.types.a.codes")


def test_a_lattice_by_hand():
    assert_close(fsq_lattice([3]), torch.tensor([[-1.0], [0.0], [1.0]]))
    assert fsq_lattice([2, 3]).tolist() == [[a, b] for a in (-1.0, 1.0) for b in (-1.0, 0.0, 1.0)]


@pytest.mark.parametrize("levels", [2, 3, 8])
def test_levels_share_out_the_range_of_tanh_evenly(levels):
    inside = torch.linspace(-1, 1, 2401, dtype=torch.float64)[1:-1]
    points = fsq_bound(inside.atanh().unsqueeze(-1), torch.tensor([levels], dtype=torch.float64))
    counts, _ = assignment_sums(points, fsq_lattice([levels]).double())
    assert (counts / len(inside) - 1 / levels).abs().max() < 2e-3
    unbounded, _ = assignment_sums(inside.atanh().unsqueeze(-1), fsq_lattice([levels]).double())
    assert levels == 2 or (unbounded / len(inside) - 1 / levels).abs().max() > 0.02  # the control


def test_the_gradient_of_a_lattice_point_is_that_of_the_bound_point_by_hand():
    """d/dz of the code is d/dz L/(L-1) tanh z, although the code itself is a step."""
    z = torch.tensor([[0.3, -1.2]], dtype=torch.float64, requires_grad=True)
    levels = torch.tensor([3.0, 4.0], dtype=torch.float64)
    point = fsq_bound(z, levels)
    codes = fsq_lattice([3, 4]).double()
    code = codes[squared_distances(point, codes).argmin(-1)]
    value = quantised(point, code)
    assert_close(value, torch.tensor([[0.0, -1.0]], dtype=torch.float64))
    value.sum().backward()
    by_hand = [1.5 / math.cosh(0.3) ** 2, 4 / 3 / math.cosh(-1.2) ** 2]
    assert z.grad[0].tolist() == pytest.approx(by_hand)


def test_on_the_way_from_point_to_code():
    point = torch.tensor([[1.0, 2.0]], requires_grad=True)
    code = torch.tensor([[3.0, 0.0]], requires_grad=True)
    for share, expected in ((0.0, [1.0, 2.0]), (0.25, [1.5, 1.5]), (1.0, [3.0, 0.0])):
        value = quantised(point, code, share)
        assert value[0].tolist() == expected
        (slope,) = torch.autograd.grad(value.square().sum() / 2, point)
        assert slope[0].tolist() == expected  # the loss's gradient at the value, handed to the point unchanged
    assert torch.autograd.grad(quantised(point, code).sum(), code, allow_unused=True) == (None,)


def test_logits_by_hand():
    codes = torch.tensor([[0.0], [2.0], [4.0]])
    assert code_logits(torch.tensor([[0.0], [1.0]]), codes).tolist() == [[0.0, -4.0, -16.0], [-1.0, -1.0, -9.0]]


BOOK = Codebook(torch.tensor([[0.0], [4.0]]), torch.tensor([2.0, 2.0]), torch.tensor([[0.0], [8.0]]))


def test_running_means_by_hand():
    """Points 1 and 1 at the first code, 6 at the second: counts and sums move a tenth of the way."""
    count, total = assignment_sums(torch.tensor([[1.0], [1.0], [6.0]]), BOOK.codes)
    assert (count.tolist(), total.tolist()) == ([2.0, 1.0], [[2.0], [6.0]])
    book = ema_update(BOOK, count, total, 0.9)
    assert_close(book.counts, torch.tensor([2.0, 1.9]))
    assert_close(book.sums, torch.tensor([[0.2], [7.8]]))
    assert_close(book.codes, torch.tensor([[0.1], [7.8 / 1.9]]), rtol=1e-4, atol=1e-4)


def test_codes_settle_at_the_means_of_their_points():
    points = torch.cat([torch.randn(50, 1, generator=generator()) * 0.1 + c for c in (1.0, 5.0)])
    book = BOOK
    for _ in range(200):
        book = ema_update(book, *assignment_sums(points, book.codes), 0.9)
    assert_close(book.codes, torch.stack([points[:50].mean(0), points[50:].mean(0)]), rtol=1e-3, atol=1e-3)


def test_the_sums_of_two_halves_are_those_of_the_whole():
    points = torch.randn(9, 3, generator=generator())
    codes = torch.randn(4, 3, generator=generator(1))
    halves = [assignment_sums(part, codes) for part in (points[:4], points[4:])]
    for whole, *parts in zip(assignment_sums(points, codes), *halves, strict=True):
        assert_close(sum(parts), whole)


def test_only_dead_codes_are_set_anew():
    points = torch.tensor([[7.0], [9.0]])
    book, dead = reset_dead(BOOK._replace(counts=torch.tensor([2.0, 0.01])), points, 0.5, generator())
    assert dead == 1
    assert book.codes[0] == 0
    assert book.codes[1] in points
    assert_close(book.sums[1], book.codes[1] * book.counts[1])
    same, none = reset_dead(BOOK, points, 0.5, generator())
    assert none == 0
    assert torch.equal(same.codes, BOOK.codes)


def test_a_start_at_the_centres_of_clusters():
    means = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]])
    points = (means.repeat(25, 1) + 0.1 * torch.randn(100, 2, generator=generator())).contiguous()
    centres = k_means(points, 4, generator())
    assert squared_distances(means, centres).amin(-1).max() < 0.01
    alike = squared_distances(points, points[:16:4]).amin(-1)  # the control: all from one cluster
    assert alike.mean() > 100 * squared_distances(points, centres).amin(-1).mean()


def test_every_centre_is_the_mean_of_its_points_or_a_point_where_it_has_none():
    """Few points for many codes: some centres have one point or none."""
    for seed in range(5):
        points = torch.randn(7, 2, generator=generator(seed))
        centres = k_means(points, 4, generator(seed))
        own = squared_distances(points, centres).argmin(-1)
        for k in own.unique().tolist():
            assert_close(centres[k], points[own == k].mean(0))
    twice = torch.tensor([[3.0, 4.0], [5.0, 6.0]]).repeat(2, 1)
    assert squared_distances(k_means(twice, 3, generator()), twice).amin(-1).max() == 0


# -- residual quantisation ---------------------------------------------------------------------------------------------


def books_and_points(levels: int = 3) -> tuple[list[torch.Tensor], torch.Tensor]:
    source = generator(5)
    books = [torch.randn(4, 3, generator=source, dtype=torch.float64) / 2**level for level in range(levels)]
    return books, torch.randn(50, 3, generator=source, dtype=torch.float64)


def test_residuals_are_those_of_a_loop_over_points_and_codebooks():
    books, points = books_and_points()
    found = residuals(points, books)
    assert len(found) == 4
    assert torch.equal(found[0], points)
    for row, point in enumerate(points.numpy()):
        left = point.copy()
        for level, codes in enumerate(book.numpy() for book in books):
            left = left - codes[np.argmin([((left - code) ** 2).sum() for code in codes])]
            np.testing.assert_allclose(found[level + 1][row].numpy(), left, atol=1e-12)


def test_a_further_codebook_of_centres_never_adds_to_the_error():
    """Exact on the points that the centres were made of: a cluster's mean is nearer to its points than the origin is."""
    for seed in range(20):
        source = generator(seed)
        points = torch.randn(64, 3, generator=source, dtype=torch.float64) + 5 * torch.rand(3, generator=source)
        books: list[torch.Tensor] = []
        for _ in range(4):
            books.append(k_means(residuals(points, books)[-1], 3, source))
        errors = [float(left.square().sum()) for left in residuals(points, books)]
        assert errors == sorted(errors, reverse=True)
        of_the_points = residuals(points, [books[0], k_means(points, 3, source)])[-1]
        assert float(of_the_points.square().sum()) > errors[1]  # the control: centres of points, not of residuals


@pytest.mark.parametrize("steps", [[2], [3, 2], [4, 4]])
def test_two_levels_of_a_lattice_are_the_lattice_of_their_product(steps):
    """Coarse and fine code add up to the nearest of the levels² per coordinate that share out the range evenly."""
    per_coordinate = torch.tensor(steps, dtype=torch.float64)
    points = fsq_bound(torch.randn(500, len(steps), generator=generator(), dtype=torch.float64), per_coordinate)
    coarse = fsq_lattice(steps).double()
    left = residuals(points, [coarse, coarse / per_coordinate])[-1]
    edge = per_coordinate / (per_coordinate - 1)  # the range is [-edge, edge]
    cell = 2 * edge / per_coordinate**2
    nearest = ((points + edge) / cell).floor().clamp(max=per_coordinate**2 - 1) * cell + cell / 2 - edge
    assert_close(points - left, nearest)
    same_scale = residuals(points, [coarse, coarse])[-1]
    assert same_scale.square().sum() > left.square().sum()  # the control
