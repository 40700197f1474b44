from __future__ import annotations

import torch

from c3_hf.data.collator import OUTCOMES
from c3_hf.training.measures import TrainingMeter


def test_entries_are_sums_since_the_last_ones():
    meter = TrainingMeter()
    outcomes = torch.zeros(len(OUTCOMES), dtype=torch.long)
    outcomes[OUTCOMES.index("examples")] = 3
    meter.add(100, 8, torch.tensor([1, 2]), outcomes)
    meter.add(100, 9, torch.tensor([3, 4]), outcomes)
    meter.add(100, 16, torch.tensor([1, 4]), outcomes)
    meter.add(100, 5000, torch.tensor([0, 7]), outcomes)
    entries = meter.collect(lambda counts: 2 * counts)
    assert entries.pop("tokens_per_second") > 0
    assert entries == {
        "outcome_examples": 24,
        "accuracy_to_8": 0.5,
        "accuracy_to_16": 0.5,
        "accuracy_over_2048": 0.0,
    }
    assert meter.collect(lambda counts: counts).keys() == {"tokens_per_second"}
