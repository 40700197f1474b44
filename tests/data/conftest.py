from __future__ import annotations

import json
from pathlib import Path

import pytest

import factories
from c3_hf import C3Processor
from c3_hf.data.records import TrainingFile


PROSE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
    "There were a king with a large jaw and a queen with a plain face, on the throne of England.\n"
)
CHINESE = "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。"


@pytest.fixture(scope="session")
def processor() -> C3Processor:
    return factories.make_processor()


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> list[TrainingFile]:
    folder = tmp_path_factory.mktemp("texts")
    files = []
    for name, text, weight in (("prose", PROSE, 3.0), ("chinese", CHINESE, 1.0)):
        path = Path(folder) / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text * repeat}) + "\n" for repeat in (1, 2, 5)), encoding="utf-8")
        files.append(TrainingFile(str(path), weight))
    return files
