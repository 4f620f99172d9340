"""Orthogonalised matrices against their singular value decomposition."""

import pytest
import torch

from models.functional.newton_schulz import COEFFICIENTS, STEPS, orthogonalised


@pytest.fixture
def matrices():
    return torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_singular_vectors_stay_and_singular_values_become_what_the_polynomial_makes_of_them(matrices):
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalised(matrices), u * s.unsqueeze(-2) @ v)
    assert 0.65 < s.min() < s.max() < 1.2
    # control: the matrices themselves are nowhere near
    assert torch.linalg.svdvals(matrices / torch.linalg.matrix_norm(matrices, keepdim=True)).min() < 0.5


def test_tall_ones_are_wide_ones_turned_and_each_is_taken_on_its_own(matrices):
    torch.testing.assert_close(orthogonalised(matrices.mT), orthogonalised(matrices).mT)
    for k in range(len(matrices)):
        torch.testing.assert_close(orthogonalised(matrices[k : k + 1]), orthogonalised(matrices)[k : k + 1])


def test_the_size_of_a_matrix_does_not_count_and_zeros_stay(matrices):
    torch.testing.assert_close(orthogonalised(1e3 * matrices), orthogonalised(matrices))
    assert not orthogonalised(torch.zeros(2, 4, 3)).any()


def test_small_singular_values_rise_to_one():
    """A matrix of condition 100 comes out with all of its singular values between .3 and 1.2."""
    u, v = (torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(k)))[0] for k in (1, 2))
    s = torch.linalg.svdvals(orthogonalised((u * torch.logspace(-2, 0, 8) @ v)[None]))
    assert 0.3 < s.min() < s.max() < 1.2
