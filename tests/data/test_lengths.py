from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from c3_hf.data.lengths import LengthGroupedBatches, LengthSchedule


def test_ceiling_is_linear_between_its_points():
    schedule = LengthSchedule(4, [(0, 8), (100, 108)])
    assert [schedule.ceiling_at(step) for step in (0, 50, 100, 1000)] == [8, 58, 108, 108]


def test_a_wait_leaves_earlier_steps_alone():
    schedule = LengthSchedule(4, [(0, 8), (100, 108)])
    schedule.wait(10)
    schedule.wait(10)
    schedule.wait(11)
    schedule.wait(20)
    assert [schedule.ceiling_at(step) for step in (0, 9, 10, 11, 12, 13, 20, 21, 22)] == [
        8, 17, 18, 18, 18, 19, 26, 26, 27
    ]  # fmt: skip
    assert schedule.waits == [(10, 12), (20, 21)]


@given(step=st.integers(0, 500), multiple=st.integers(1, 32), low=st.integers(1, 16))
def test_lengths_keep_to_their_bounds(step, multiple, low):
    schedule = LengthSchedule(low, [(0, 16), (400, 200)], multiple=multiple)
    padded = schedule.length_at(step)
    assert padded % multiple == 0
    assert low <= padded < schedule.ceiling_at(step) + multiple
    lengths = [schedule.draw(np.random.default_rng(seed), padded) for seed in range(8)]
    assert all(max(low, padded - multiple + 1) <= length <= padded for length in lengths)


def test_long_share():
    schedule = LengthSchedule(1, [(0, 100)], multiple=1, long_share=1.0)
    assert min(schedule.length_at(step) for step in range(200)) >= 80
    schedule = LengthSchedule(1, [(0, 100)], multiple=1, long_share=0.0)
    assert min(schedule.length_at(step) for step in range(200)) < 20


def test_division_into_micro_batches_does_not_change_the_samples():
    schedule = LengthSchedule(4, [(0, 8), (5, 64)])
    whole = LengthGroupedBatches(schedule, num_steps=5, micro_batches_per_step=1, batch_size=8)
    divided = LengthGroupedBatches(schedule, num_steps=5, micro_batches_per_step=8, batch_size=1)
    assert [key for batch in whole for key in batch] == [key for batch in divided for key in batch]
    assert (len(whole), len(divided)) == (5, 40)


def test_batches_by_tokens():
    schedule = LengthSchedule(4, [(0, 16), (20, 512)])
    batches = LengthGroupedBatches(schedule, 20, 2, batch_size=1, batch_tokens=1024, max_batch_size=10)
    keys = list(batches)
    assert max(map(len, keys)) == 10
    assert min(map(len, keys)) < 4
    assert all(len({key.length for key in batch}) == 1 for batch in keys)
    assert [key.index for batch in keys for key in batch] == list(range(sum(map(len, keys))))
    assert LengthGroupedBatches(schedule, 1, 1, 1, batch_tokens=10).size_for(512) == 1


def test_lengths_drawn_are_those_of_the_steps_drawn():
    # The curve may wait while the batches are being iterated; what was yielded before is not affected.
    schedule = LengthSchedule(8, [(0, 8), (19, 8), (20, 64)], multiple=8)
    iterator = iter(LengthGroupedBatches(schedule, 60, 1, batch_size=1))
    first = [batch[0].length for batch in islice(iterator, 20)]
    for step in range(19, 40):
        schedule.wait(step)
    second = [batch[0].length for batch in iterator]
    assert set(first + second[:20]) == {8}
    assert max(second) == 64
    again = [batch[0].length for batch in LengthGroupedBatches(schedule, 60, 1, batch_size=1)]
    assert again == first + second


@pytest.mark.parametrize("ceiling", [[], [(5, 10), (5, 20)], [(5, 10), (0, 20)], [(0, 3)]])
def test_bad_ceilings(ceiling):
    with pytest.raises(ValueError, match=r"`ceiling` must be \(step, number\) pairs"):
        LengthSchedule(4, ceiling)


def test_bad_multiple():
    with pytest.raises(ValueError, match="`min_tokens` and `multiple` must be positive"):
        LengthSchedule(4, [(0, 10)], multiple=0)
