"""Which texts are kept, and in which order."""

import torch

from models.flow.recent_texts import RecentTexts


def batch(first, rows=2, columns=3):
    return torch.arange(first, first + rows * columns).view(rows, columns)


def test_the_batch_comes_first_and_the_oldest_go():
    recent = RecentTexts(5)
    assert torch.equal(recent.add(batch(0), 0), batch(0))
    assert torch.equal(recent.add(batch(10), 0), torch.cat([batch(10), batch(0)]))
    assert torch.equal(recent.add(batch(20), 0), torch.cat([batch(20), batch(10), batch(0)])[:5])


def test_a_batch_is_kept_whole_and_alone_where_rows_have_another_length():
    recent = RecentTexts(1)
    assert torch.equal(recent.add(batch(0), 0), batch(0))
    assert torch.equal(recent.add(batch(10, columns=4), 0), batch(10, columns=4))


def test_a_new_epoch_begins_without_the_rows_that_it_will_show_again():
    recent = RecentTexts(8)
    recent.add(batch(0), 0)
    assert torch.equal(recent.add(batch(10), 1), batch(10))
    assert len(recent.add(batch(20), 1)) == 4


def test_what_is_kept_goes_into_a_checkpoint():
    recent, other = RecentTexts(4), RecentTexts(4)
    other.load_state_dict(recent.state_dict())
    assert torch.equal(other.add(batch(0), 0), batch(0))
    recent.add(batch(10), 0)
    other.load_state_dict(recent.state_dict())
    assert torch.equal(other.add(batch(20), 0), recent.add(batch(20), 0))
