from __future__ import annotations

import pytest

from c3_hf.data.lengths import GrowthByAccuracy, LengthSchedule


def make(**options):
    schedule = LengthSchedule(8, [(0, 8), (10, 8), (20, 28)], multiple=4)
    return schedule, GrowthByAccuracy(schedule, **{"accuracy": 0.9, "window": 4, **options})


def run(growth, steps, right, context_length=None):
    for step in steps:
        length = growth.schedule.longest_at(step) if context_length is None else context_length
        growth.update(step, length, right, 100)


def test_a_model_that_learns_in_time_follows_the_curve():
    schedule, growth = make()
    run(growth, range(40), 95)
    assert schedule.waits == []
    assert [schedule.ceiling_at(step) for step in (0, 10, 11, 15, 20, 40)] == [8, 8, 10, 18, 28, 28]
    assert growth.mean_accuracy == pytest.approx(0.95)


def test_the_curve_waits_where_it_rises_until_accuracy_is_there():
    schedule, growth = make()
    run(growth, range(30), 50)
    # Where it is level nothing waits; from step 10 on it would rise.
    assert schedule.waits == [(10, 32)]
    assert {schedule.ceiling_at(step) for step in range(32)} == {8}
    run(growth, range(30, 60), 100)
    # The mean takes a few steps to rise; then the curve goes on from where it stood, no steeper than it is.
    (begin, end) = schedule.waits[0]
    assert (begin, len(schedule.waits)) == (10, 1)
    assert 32 < end < 50
    assert [schedule.ceiling_at(end + step) for step in (0, 1, 5, 10)] == [8, 10, 18, 28]


def test_only_the_longest_contexts_count():
    schedule, growth = make()
    run(growth, range(12), 100)
    run(growth, range(12, 15), 0, context_length=4)
    assert growth.mean_accuracy == 1.0
    run(growth, range(15, 30), 0)
    assert growth.mean_accuracy < 0.1
    assert schedule.ceiling_at(100) == 28
    assert schedule.ceiling_at(30) < 28


def test_strides_wait_too_and_the_share_of_low_ones_with_them():
    options = {"stride_ceiling": [(0, 1), (10, 11)], "low_stride_share": [(0, 0.0), (5, 0.0), (6, 1.0)]}
    schedule = LengthSchedule(1, [(0, 44)], multiple=1, num_latents=4, **options)
    growth = GrowthByAccuracy(schedule, 0.9)
    assert (schedule.longest_at(0), schedule.longest_at(5)) == (4, 24)
    for step in range(50):
        growth.update(step, 4, 10, 100)
    assert schedule.waits == [(2, 52)]
    assert [schedule.stride_ceiling_at(step) for step in (1, 2, 52, 53)] == [2, 3, 3, 4]
    assert {schedule.stride_at(step) for step in range(3, 52)} == {3}


def test_steps_drawn_ahead_keep_their_lengths():
    schedule, growth = make(steps_ahead=5)
    drawn = []
    for step in range(60):
        drawn.append(schedule.ceiling_at(step + 5))
        growth.update(step, schedule.longest_at(step), 95 if step > 30 else 10, 100)
    assert drawn == [schedule.ceiling_at(step + 5) for step in range(60)]
    assert drawn[-1] == 28


def test_tokens_without_labels_say_nothing():
    schedule, growth = make()
    for step in range(12):
        growth.update(step, 8, 0, 0)
    assert growth.mean_accuracy == 0
    assert schedule.waits == [(10, 14)]


def test_state_goes_on_where_it_was(tmp_path):
    schedule, growth = make()
    run(growth, range(14), 50)
    growth.save(tmp_path)
    other_schedule, other = make()
    other.load(tmp_path)
    assert other_schedule.waits == schedule.waits == [(10, 16)]
    assert other.mean_accuracy == growth.mean_accuracy > 0
    for one in (growth, other):
        run(one, range(14, 30), 95)
    assert other_schedule.waits == schedule.waits
    with pytest.raises(FileNotFoundError):
        other.load(tmp_path / "absent")


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_bad_accuracy(accuracy):
    with pytest.raises(ValueError, match=f"`growth_accuracy` must lie between 0 and 1, got {accuracy}"):
        make(accuracy=accuracy)
