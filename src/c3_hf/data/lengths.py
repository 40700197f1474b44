"""How long each training sample is, and how samples are grouped into batches of one length.

With the original's positions restoring is learnt only if lengths start short and grow slowly, so the longest permitted
length, the ceiling, rises during training along a curve given beforehand, which may wait for the model to master what
it sees. All micro-batches of one optimizer step share one length: padding is small, compiled code sees few shapes, and
how a step is divided into micro-batches and processes does not change its samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


GROWTH_FILE = "growth.json"
# Tokens that a sample costs beyond its context, where batches are sized by tokens.
_OVERHEAD_TOKENS = 48


class SampleKey(NamedTuple):
    """Address of one sample: its number in the whole run, the length in tokens its batch is padded to, the step, the
    least tokens a latent stands for, and whether it asks for a place of its text (`None`: its own draw decides)."""

    index: int  # type: ignore[assignment]
    length: int
    step: int = 0
    stride: int = 1
    asks: bool | None = None


class LengthSchedule:
    """Longest context of every optimizer step.

    Args:
        min_tokens: shortest length, in tokens, at least 1.
        ceiling: `(step, tokens)` pairs with rising steps; between them the ceiling is interpolated linearly, and
            after the last one it stays. The steps of this and the other curves are those of `curve_step`.
        multiple: lengths are rounded up to multiples of this.
        long_share: share of the steps (0 to 1) whose length lies in the upper fifth below the ceiling; the others
            lie between `min_tokens` and the ceiling, evenly on a logarithmic scale: what a latent has to hold is
            found fastest in short texts.
        seed: lengths are a function of this, the step and the ceiling alone.
        num_latents: of a context, for a model whose latents have a stride. Then the tokens a latent stands for are
            drawn first, and lengths lie below what so many latents hold, so that low strides are seen as well.
        stride_ceiling: `(step, tokens)` pairs, the most tokens a latent stands for, interpolated like `ceiling`;
            `None` means as many as let the latents hold the ceiling. New places of a latent are found fastest in short
            texts, so strides may grow before lengths do.
        low_stride_share: `(step, share)` pairs, interpolated likewise: share of the steps (0 to 1) whose latents stand
            for any number of tokens up to the most, evenly; in the others they stand for the most.
        full_share: share (0 to 1) of the long steps that go to the ceiling itself, and of the samples of each step
            that fill its length to the last token. Long texts are cut into full blocks, whose end nothing but their
            length tells; drawn evenly, under a hundredth of the samples end there.
        asking_share: share (0 to 1) of the steps whose samples all ask for a place of their text, if there is an
            `asking_stride_ceiling`; those of the others never do.
        asking_stride_ceiling: `(step, tokens)` pairs, interpolated likewise: the most tokens a latent stands for in
            the steps that ask. A place of a latent is found by words much later than by its distance, so asking
            begins at low strides, and restoring at all of them goes on beside it. `None` draws samples and strides of
            all steps alike.

    Raises:
        ValueError: for a curve that is empty, out of order or below its least value, a share above 1, a non-positive
            `multiple`, or strides without latents.
    """

    def __init__(
        self,
        min_tokens: int,
        ceiling: Sequence[tuple[int, int]],
        multiple: int = 16,
        long_share: float = 0.4,
        seed: int = 0,
        num_latents: int | None = None,
        stride_ceiling: Sequence[tuple[int, int]] | None = None,
        low_stride_share: Sequence[tuple[int, float]] = ((0, 0.5),),
        full_share: float = 0.0,
        asking_share: float = 0.0,
        asking_stride_ceiling: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        strides = {"stride_ceiling": stride_ceiling, "asking_stride_ceiling": asking_stride_ceiling}
        for name, pairs in {"ceiling": ceiling, **strides}.items():
            least = min_tokens if name == "ceiling" else 1
            if pairs is None:
                continue
            steps = [step for step, _ in pairs]
            if not steps or steps != sorted(set(steps)) or min(tokens for _, tokens in pairs) < least:
                raise ValueError(
                    f"`{name}` must be (step, number) pairs with rising steps and numbers of at least {least}, got "
                    f"{list(pairs)}."
                )
        shares = [share for _, share in low_stride_share]
        steps = [step for step, _ in low_stride_share]
        if not steps or steps != sorted(set(steps)) or not 0 <= min(shares) <= max(shares) <= 1:
            raise ValueError(
                f"`low_stride_share` must be (step, share) pairs with rising steps and shares of 0 to 1, got "
                f"{list(low_stride_share)}."
            )
        for name, pairs in strides.items():
            if pairs is not None and num_latents is None:
                raise ValueError(
                    f"`{name}` was given, but the latents of this model have no stride (`latent_stride`). Leave it "
                    "out."
                )
        if min_tokens < 1 or multiple < 1:
            raise ValueError(f"`min_tokens` and `multiple` must be positive, got {min_tokens} and {multiple}.")
        self.min_tokens = min_tokens
        self.ceiling = [(int(step), int(tokens)) for step, tokens in ceiling]
        self.multiple = multiple
        self.long_share = long_share
        self.seed = seed
        self.num_latents = num_latents
        self.stride_ceiling = stride_ceiling
        self.low_stride_share = low_stride_share
        self.full_share = full_share
        self.asking_share = asking_share
        self.asking_stride_ceiling = asking_stride_ceiling
        self.waits: list[tuple[int, int]] = []

    def curve_step(self, step: int) -> int:
        """Where on the curves optimizer step `step` is: so many steps back as the curves have waited before it."""
        return step - sum(min(step, end) - begin for begin, end in self.waits if begin < step)

    def wait(self, step: int) -> None:
        """Let the step after `step` stand where `step` does on the curves; steps have to come in order."""
        if self.waits and self.waits[-1][1] > step:
            return
        if self.waits and self.waits[-1][1] == step:
            self.waits[-1] = (self.waits[-1][0], step + 1)
        else:
            self.waits.append((step, step + 1))

    def rises_at(self, step: int) -> bool:
        """Whether lengths or strides are higher right behind `step` on their curves."""
        at = self.curve_step(step)
        curves = (self.ceiling, self.stride_ceiling, self.asking_stride_ceiling)
        return any(_interpolate(curve, at + 1) > _interpolate(curve, at) for curve in curves if curve is not None)

    def ceiling_at(self, step: int) -> int:
        """Longest length permitted at `step`, in tokens."""
        return int(_interpolate(self.ceiling, self.curve_step(step)))

    def stride_ceiling_at(self, step: int) -> int:
        """Most tokens a latent stands for at `step`.

        Raises:
            TypeError: without `num_latents`.
        """
        if self.num_latents is None:
            raise TypeError("`num_latents` is None: only a schedule for latents with a stride draws strides.")
        if self.stride_ceiling is None:
            return -(-self.ceiling_at(step) // self.num_latents)
        return int(_interpolate(self.stride_ceiling, self.curve_step(step)))

    def longest_at(self, step: int, stride: int | None = None) -> int:
        """Longest length that may be drawn at `step`, in tokens: the ceiling, or, if that is less, what the latents
        hold at `stride` tokens each, by default the most."""
        ceiling = self.ceiling_at(step)
        if self.num_latents is None:
            return ceiling
        stride = self.stride_ceiling_at(step) if stride is None else stride
        return max(self.min_tokens, min(ceiling, stride * self.num_latents))

    def length_at(self, step: int) -> int:
        """Length the samples of `step` are padded to, in tokens."""
        rng = np.random.default_rng([self.seed, step])
        ceiling = self.longest_at(step, None if self.num_latents is None else self.stride_at(step))
        if rng.random() < self.long_share:
            length = ceiling * rng.uniform(0.8, 1.0)
            # Drawn after everything else: without full lengths a run draws what it drew before there were any.
            if rng.random() < self.full_share:
                length = ceiling
        else:
            length = math.exp(rng.uniform(math.log(self.min_tokens), math.log(ceiling)))
        return -(-max(self.min_tokens, round(length)) // self.multiple) * self.multiple

    def stride_at(self, step: int) -> int:
        """Tokens a latent stands for at `step`: the most, or in `low_stride_share` of steps evenly from 1 to that.

        Raises:
            TypeError: without `num_latents`.
        """
        most = self.stride_ceiling_at(step)
        if self.asking_stride_ceiling is not None and self.asks_at(step):
            most = int(_interpolate(self.asking_stride_ceiling, self.curve_step(step)))
        rng = np.random.default_rng([self.seed, 1, step])
        lower = rng.random() >= 1 - _interpolate(self.low_stride_share, self.curve_step(step))
        return int(rng.integers(1, most + 1)) if lower else most

    def asks_at(self, step: int) -> bool | None:
        """Whether all samples of `step` ask for a place of their text, or none; `None` if that is left to each."""
        if self.asking_stride_ceiling is None:
            return None
        return bool(np.random.default_rng([self.seed, 2, step]).random() < self.asking_share)

    def draw(self, rng: np.random.Generator, padded_length: int) -> int:
        """Length of one sample inside a batch padded to `padded_length`, in tokens."""
        length = int(rng.integers(max(self.min_tokens, padded_length - self.multiple + 1), padded_length + 1))
        # A share of 0 draws nothing, so that the texts are those of a run from before there were full lengths.
        return padded_length if self.full_share and rng.random() < self.full_share else length


def _interpolate(pairs: Sequence[tuple[int, float]], step: int) -> float:
    steps, values = zip(*pairs)
    return float(np.interp(step, steps, values))


class GrowthByAccuracy:
    """Lets the curves of a schedule rise only while training accuracy on the longest contexts is high enough.

    How many steps a length or a stride takes to learn depends on the size of a batch and on the model. A curve that
    is followed so is the fastest growth, not the growth itself.

    Args:
        schedule: changed in place.
        accuracy: share of tokens, 0 to 1, below which the curves wait where they would rise; a running mean over the
            micro-batches whose contexts are within a fifth of the longest.
        steps_ahead: how many steps after the decision the curves wait: batches already drawn keep their lengths, so
            that a resumed run draws the same ones.
        window: micro-batches the running mean goes back.

    Raises:
        ValueError: if `accuracy` is not between 0 and 1.
    """

    def __init__(self, schedule: LengthSchedule, accuracy: float, steps_ahead: int = 2, window: int = 20) -> None:
        if not 0 < accuracy < 1:
            raise ValueError(f"`growth_accuracy` must lie between 0 and 1, got {accuracy}.")
        self.schedule = schedule
        self._accuracy = accuracy
        self._steps_ahead = steps_ahead
        self._window = window
        self._mean = 0.0
        self._seen = 0

    @property
    def mean_accuracy(self) -> float:
        """Running token accuracy near the longest contexts, 0 to 1; 0 before the first."""
        return self._mean

    def update(self, step: int, context_length: int, num_right: int, num_labels: int) -> None:
        """Take in the result of one micro-batch of optimizer step `step`."""
        if num_labels and context_length >= 0.8 * self.schedule.longest_at(step):
            self._seen += 1
            # A mean over all at first, over about the last `window` ones later.
            self._mean += (num_right / num_labels - self._mean) / min(self._seen, self._window)
        ahead = step + self._steps_ahead
        if self._mean < self._accuracy and self.schedule.rises_at(ahead):
            self.schedule.wait(ahead)

    def save(self, folder: str | Path) -> None:
        """Write where the curves have waited, and the running mean, into a checkpoint folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {"waits": self.schedule.waits, "mean": self._mean, "seen": self._seen}
        (folder / GROWTH_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Go on from `save`.

        Raises:
            FileNotFoundError: if the checkpoint was written by a run whose curves did not wait.
        """
        state = json.loads((Path(folder) / GROWTH_FILE).read_text(encoding="utf-8"))
        self.schedule.waits = [(begin, end) for begin, end in state["waits"]]
        self._mean, self._seen = state["mean"], state["seen"]


class LengthGroupedBatches(Sampler):
    """Batch sampler that yields lists of `SampleKey`, one length a step.

    The k-th sample of a step is the same whatever the division into micro-batches, so a batch of 1 with 8
    accumulation steps trains on what a batch of 8 trains on.

    Args:
        schedule: lengths by step.
        num_steps: optimizer steps in the run.
        micro_batches_per_step: gradient accumulation steps times processes.
        batch_size: samples of a micro-batch.
        batch_tokens: if given, the size of a micro-batch is instead this many tokens divided by the length of all
            contexts plus what a sample costs beyond them, between 1 and `max_batch_size`.
        max_batch_size: see `batch_tokens`.
    """

    # Accelerate takes this as "batches may differ in size".
    batch_size = None
    drop_last = True

    def __init__(
        self,
        schedule: LengthSchedule,
        num_steps: int,
        micro_batches_per_step: int,
        batch_size: int,
        batch_tokens: int | None = None,
        max_batch_size: int = 64,
    ) -> None:
        self.schedule = schedule
        self.num_steps = num_steps
        self.micro_batches_per_step = micro_batches_per_step
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self._max_batch_size = max_batch_size

    def __len__(self) -> int:
        return self.num_steps * self.micro_batches_per_step

    def size_for(self, length: int) -> int:
        """Samples of a micro-batch whose contexts are padded to `length` tokens."""
        if self._batch_tokens is None:
            return self._batch_size
        return min(max(self._batch_tokens // (length + _OVERHEAD_TOKENS), 1), self._max_batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        index = 0
        for step in range(self.num_steps):
            length = self.schedule.length_at(step)
            stride = 1 if self.schedule.num_latents is None else self.schedule.stride_at(step)
            asks, size = self.schedule.asks_at(step), self.size_for(length)
            for _ in range(self.micro_batches_per_step):
                yield [SampleKey(index + offset, length, step, stride, asks) for offset in range(size)]
                index += size
