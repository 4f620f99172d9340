"""Points of micro-batches are given out once, in order, without their gradients' graph."""

import torch

from models.backbones.point_buffer import PointBuffer


def test_points_are_joined_by_key_and_given_out_once():
    buffer, first, second = PointBuffer(), torch.ones(2, 3, requires_grad=True), torch.zeros(1, 3)
    buffer.add("a", first)
    buffer.add("b", second)
    buffer.add("a", second)
    found = buffer.pop()
    assert found.keys() == {"a", "b"}
    assert torch.equal(found["a"], torch.tensor([[1.0] * 3, [1.0] * 3, [0.0] * 3]))
    assert not found["a"].requires_grad
    assert buffer.pop() == {}
