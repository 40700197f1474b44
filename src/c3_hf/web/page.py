"""What the page answers to each click. Whatever is wrong comes back as a notice, in the place of a result."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

from ..pipeline import C3Pipeline
from . import markup
from .answers import answers
from .study import Limits, Study, Trial, compress_within, forget, from_file, recorded_trials, restore_within, to_file


# State, status, figures, the text in colours, differences.
Shown = tuple[Study | None, str, str, str, str]


class Page:
    """A model and what a visitor may ask of it; it remembers nothing of a text."""

    def __init__(self, pipe: C3Pipeline, limits: Limits):
        self.pipe, self.limits = pipe, limits

    def run(self, text: str, ratio: int) -> Iterator[Shown]:
        """Compress and restore; more is shown at each step."""
        try:
            yield None, markup.notice("Compressing…"), "", "", ""
            yield from self._restored(self._compressed(text, ratio))
        except ValueError as error:
            yield _failed(str(error))

    def open(self, path: str | None, text: str) -> Iterator[tuple[str, Study | None, str, str, str, str]]:
        """A file: a text goes into the box, in front of what [`run`] gives; the latents of a `.c3` file are restored.

        The copy that the upload made goes at once.
        """
        if path is None:
            return
        file = Path(path)
        try:
            if file.stat().st_size > self.limits.file_bytes:
                raise ValueError(f"The file is larger than {self.limits.file_bytes:,} bytes, which this page takes.")
            if file.suffix == ".c3":
                study = from_file(file)
                file.unlink()
                self.pipe.restorer.fingerprints.check(study.context)
                for shown in self._restored(study):
                    yield "", *shown
            else:
                data = file.read_bytes()
                file.unlink()
                read = self.limits.check(data.decode("utf-8"))
                words = f"{len(read):,} characters read from the file. Now compress and restore."
                yield read, None, markup.notice(words), "", "", ""
        except UnicodeDecodeError:
            yield text, *_failed("The file is neither UTF-8 text nor a .c3 file.")
        except ValueError as error:
            yield text, *_failed(str(error).replace(path, "the file"))
        finally:
            file.unlink(missing_ok=True)

    def forget(self, text: str) -> Iterator[tuple[str, str, str]]:
        """How it forgets: status, this text's table, the recorded one."""
        recorded = recorded_trials(self.pipe)
        beside = markup.notice("No recorded curve lies beside this model's weights.")
        if recorded:
            beside = markup.trials(f"Recorded: {recorded[0].what}", recorded)
        status, rows, table = markup.notice("Trying one ratio after the other…"), list[Trial](), ""
        try:
            yield status, table, beside
            for trial in forget(self.pipe, self.limits.check(text), self.limits.seconds):
                rows.append(trial)
                table = markup.trials("This text", rows)
                yield status, table, beside
            words = f"Each row is the beginning of the text in one block, up to {rows[-1].ratio:.3g} tokens a latent."
            yield markup.notice(words), table, beside
        except ValueError as error:
            yield markup.notice(str(error), "error"), "", beside

    def ask(
        self, text: str, ratio: int, study: Study | None, question: str, start: str
    ) -> Iterator[tuple[Study | None, str, str]]:
        """Ask: state, answer, and the text with the segments marked that were read."""
        try:
            if study is None or not self._is_of(study, text, ratio):
                yield None, markup.notice("Compressing…"), ""
                study = self._compressed(text, ratio)
            for answer, read in answers(self.pipe, study, question, start):
                yield study, answer, read
        except ValueError as error:
            words = str(error).replace("`start`", "The words").replace("`question`", "The question")
            yield study, markup.notice(words, "error"), ""

    def file(self, study: Study | None) -> tuple[str, str]:
        """The `.c3` file in base64, for the browser to save, and a status."""
        if study is None:
            return "", markup.notice("There is nothing to save yet: compress a text first.", "error")
        return base64.b64encode(to_file(study.context)).decode(), markup.notice("text.c3 lies in your downloads.")

    def _compressed(self, text: str, ratio: int) -> Study:
        text = self.limits.check(text)
        return compress_within(self.pipe, text, self.limits.seconds / 2, ratio=int(ratio), verify=True)

    def _is_of(self, study: Study, text: str, ratio: int) -> bool:
        """Whether a study is what this text gives, or is from a file and nothing has been written since."""
        if study.text is None:
            return not text.strip()
        length = int(ratio) * self.pipe.model.config.num_latents
        return (len(text), length) == (study.num_given, study.context.header.segment_length) and text.startswith(
            study.text
        )

    def _restored(self, study: Study) -> Iterator[Shown]:
        fidelity, calibrated = markup.fidelity(self.pipe, study), bool(self.pipe.processor.calibration)
        config, total = self.pipe.model.config, len(study.context)

        def shown(status: str) -> Shown:
            numbers = markup.figures(config, study, calibrated) if total else ""
            return study, status, numbers, fidelity, markup.differences(study) if study.restored else ""

        yield shown(markup.notice(f"Restoring {markup.counted(total, 'segment')}…"))
        for step in restore_within(self.pipe, study, self.limits.seconds / 2):
            study = step
            yield shown(markup.notice(f"Restored {len(study.restored)} of {markup.counted(total, 'segment')}…"))
        yield shown(self._conclusion(study))

    def _conclusion(self, study: Study) -> str:
        total, done, read = len(study.context), len(study.restored), len(study.text or "")
        if done < total or read < study.num_given:
            first = f"{read:,} of {study.num_given:,} characters were compressed, " if study.num_given else ""
            words = f"{self.limits.seconds:g} seconds are what this page gives a text: {first}"
            return markup.notice(f"{words}{done} of {markup.counted(total, 'segment')} restored.", "error")
        context = study.context
        words = f"{total} × {context.header.num_latents} latents, {context.compression_ratio:.1f} tokens for each."
        if total == 1 and context.num_tokens < 0.7 * context.header.segment_length:
            words += " All of the text fits into one block: only a longer one can have more tokens a latent."
        return markup.notice(words)


def _failed(words: str) -> Shown:
    return None, markup.notice(words, "error"), "", "", ""
