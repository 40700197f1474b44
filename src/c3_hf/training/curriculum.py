"""A length curriculum that follows the model: longer contexts as soon as those at the ceiling are mastered."""

from __future__ import annotations

import json
import math
from pathlib import Path

from transformers.utils import logging

from ..data.lengths import LengthSchedule


logger = logging.get_logger(__name__)

CURRICULUM_FILE = "curriculum.json"


class AdaptiveCurriculum:
    """Raises the ceiling of a schedule whenever token accuracy on the longest contexts reaches a threshold.

    Args:
        schedule: changed in place.
        accuracy: threshold, 0 to 1; a running mean over the micro-batches whose contexts are near the ceiling.
        growth: factor by which the ceiling is raised, by at least the `multiple` of the schedule.
        max_tokens: where the raising ends.
        steps_ahead: how many steps after the decision the new ceiling starts: batches already drawn keep theirs, so
            that a resumed run draws the same ones.
        patience: micro-batches near the ceiling that must have been seen since the last change.

    Raises:
        ValueError: if `growth` is not above 1 or `accuracy` not between 0 and 1.
    """

    def __init__(
        self,
        schedule: LengthSchedule,
        accuracy: float,
        growth: float,
        max_tokens: int,
        steps_ahead: int = 2,
        patience: int = 10,
    ) -> None:
        if growth <= 1 or not 0 < accuracy < 1:
            raise ValueError(
                f"`curriculum_growth` must be above 1 and `curriculum_accuracy` between 0 and 1, got {growth} and "
                f"{accuracy}."
            )
        self.schedule = schedule
        self._accuracy = accuracy
        self._growth = growth
        self._max_tokens = max_tokens
        self._steps_ahead = steps_ahead
        self._patience = patience
        self._mean = 0.0
        self._seen = 0

    @property
    def mean_accuracy(self) -> float:
        """Running token accuracy near the ceiling, 0 to 1; 0 right after a change."""
        return self._mean

    def update(self, step: int, context_length: int, num_right: int, num_labels: int) -> None:
        """Take in the result of one micro-batch of optimizer step `step`."""
        ceiling = self.schedule.ceiling_at(step)
        waiting = self.schedule.ceiling[-1][0] > step
        if waiting or context_length < 0.8 * ceiling or ceiling >= self._max_tokens or not num_labels:
            return
        self._seen += 1
        # A mean over all since the last change at first, over about the last 2 * patience ones later.
        self._mean += (num_right / num_labels - self._mean) / min(self._seen, 2 * self._patience)
        if self._seen >= self._patience and self._mean >= self._accuracy:
            tokens = max(math.ceil(ceiling * self._growth), ceiling + self.schedule.multiple)
            self.schedule.raise_ceiling(step + self._steps_ahead, min(tokens, self._max_tokens))
            logger.info(f"Step {step}: accuracy {self._mean:.3f} at {ceiling} tokens, ceiling raised to {tokens}.")
            self._mean, self._seen = 0.0, 0

    def save(self, folder: str | Path) -> None:
        """Write the history of the ceiling and the running mean into a checkpoint folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {"ceiling": self.schedule.ceiling, "mean": self._mean, "seen": self._seen}
        (folder / CURRICULUM_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Go on from `save`.

        Raises:
            FileNotFoundError: if the checkpoint has no curriculum, having been written by a run without one.
        """
        state = json.loads((Path(folder) / CURRICULUM_FILE).read_text(encoding="utf-8"))
        self.schedule.ceiling = [(step, tokens) for step, tokens in state["ceiling"]]
        self._mean, self._seen = state["mean"], state["seen"]
