from __future__ import annotations

import pytest

from c3_hf.data.lengths import AdaptiveCurriculum, LengthSchedule


def make(max_tokens=100, **changes):
    schedule = LengthSchedule(8, [(0, 8)], multiple=4)
    return schedule, AdaptiveCurriculum(
        schedule, **{"accuracy": 0.9, "growth": 1.5, "max_tokens": max_tokens, "patience": 4, **changes}
    )


def test_ceiling_rises_with_accuracy():
    schedule, curriculum = make()
    for step in range(3):
        curriculum.update(step, 8, 95, 100)
    assert schedule.ceiling_at(50) == 8
    curriculum.update(3, 8, 95, 100)
    assert [schedule.ceiling_at(step) for step in (3, 4, 5, 50)] == [8, 8, 12, 12]
    assert curriculum.mean_accuracy == 0


def test_ceiling_waits_for_accuracy_and_for_long_contexts():
    schedule, curriculum = make()
    for step in range(50):
        curriculum.update(step, 8, 80, 100)
    assert schedule.ceiling_at(100) == 8
    schedule.raise_ceiling(50, 40)
    for step in range(50, 90):
        curriculum.update(step, 16, 100, 100)
    assert schedule.ceiling_at(100) == 40


def test_batches_of_the_old_ceiling_do_not_count_for_the_new_one():
    schedule, curriculum = make(steps_ahead=5)
    for step in range(4):
        curriculum.update(step, 8, 100, 100)
    assert schedule.ceiling_at(8) == 12
    for step in range(4, 8):
        curriculum.update(step, 8, 100, 100)
    assert curriculum.mean_accuracy == 0


def test_ceiling_ends():
    schedule, curriculum = make(max_tokens=10)
    for step in range(100):
        curriculum.update(step, 10, 100, 100)
    assert schedule.ceiling_at(1000) == 10


def test_state_goes_on_where_it_was(tmp_path):
    schedule, curriculum = make()
    for step in range(6):
        curriculum.update(step, 12, 95, 100)
    curriculum.save(tmp_path)
    other_schedule, other = make()
    other.load(tmp_path)
    assert other_schedule.ceiling == schedule.ceiling
    assert other.mean_accuracy == curriculum.mean_accuracy > 0
    for step in range(6, 20):
        curriculum.update(step, 12, 95, 100)
        other.update(step, 12, 95, 100)
    assert other_schedule.ceiling == schedule.ceiling
    with pytest.raises(FileNotFoundError):
        other.load(tmp_path / "absent")


@pytest.mark.parametrize("changes", [{"growth": 1.0}, {"accuracy": 1.0}, {"accuracy": 0.0}])
def test_bad_settings(changes):
    with pytest.raises(ValueError, match="`curriculum_growth` must be above 1 and `curriculum_accuracy`"):
        make(**changes)
