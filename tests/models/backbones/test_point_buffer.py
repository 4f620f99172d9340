"""Points of micro-batches are given out once, in order, without their gradients' graph."""

import torch

from models.backbones.point_buffer import PointBuffer


def test_points_are_joined_by_key_and_given_out_once():
    buffer, first, second = PointBuffer(), torch.ones(2, 3, requires_grad=True), torch.zeros(1, 3)
    buffer.add(0, first)
    buffer.add(1, second)
    buffer.add(0, second)
    found = buffer.pop()
    assert found.keys() == {0, 1}
    assert torch.equal(found[0], torch.tensor([[1.0] * 3, [1.0] * 3, [0.0] * 3]))
    assert not found[0].requires_grad
    assert buffer.pop() == {}
