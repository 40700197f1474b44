"""A corpus on Ray: every document once, though workers and runs are killed on the way."""

from __future__ import annotations

import json
import os
import signal

import pytest

from c3_hf import C3Pipeline, CompressedContext


pytestmark = [
    pytest.mark.ray,
    # Ray's own, in this process and in its threads.
    pytest.mark.filterwarnings("ignore"),
]
DOCUMENTS = [
    {"id": f"d{number}", "text": f"The access code of depot {number} is {482913 + number}."} for number in range(40)
]


@pytest.fixture(scope="module")
def example(load_example):
    example = load_example("corpus_ray.py", "ray")
    import ray

    # Two cores of this machine, or the cluster that Ray's own variable names.
    local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": 2, "include_dashboard": False}
    ray.init(log_to_driver=False, **local)
    yield example
    ray.shutdown()


def write(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return str(path)


def test_every_document_is_compressed_once(example, tmp_path):
    output, marks = tmp_path / "output", tmp_path / "marks"
    marks.mkdir()

    class Mortal(example.Worker):
        """Notes what it compresses; kills itself at a document, the first time it sees it."""

        def compress(self, text, path):
            fresh = not path.exists()
            context = super().compress(text, path)
            if fresh:
                (marks / f"{path.stem}-{os.getpid()}").touch()
            if "depot 11 " in text and not (marks / "killed").exists():
                (marks / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return context

    def run(documents, name):
        read = example.read([write(tmp_path / name, documents)], "id", "text")
        return example.run(str(output), read, workers=2, worker=Mortal)

    def manifest():
        return [json.loads(line) for line in (output / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]

    first = DOCUMENTS[:30]
    assert run(first, "first.jsonl") == (30, {})
    assert (marks / "killed").exists()
    assert sorted(entry["id"] for entry in manifest()) == sorted(document["id"] for document in first)
    # None was compressed again for the killed worker's sake.
    compressed = [mark.name.split("-")[0] for mark in marks.iterdir() if mark.name != "killed"]
    assert len(compressed) == len(set(compressed)) == 30

    # The run itself died while it wrote the manifest; there is more to do, and something that cannot be done.
    lines = (output / "manifest.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (output / "manifest.jsonl").write_text("".join(lines[:-3]) + lines[-3][:20], encoding="utf-8")
    count, failed = run([*DOCUMENTS, {"id": "none", "text": None}], "second.jsonl")
    assert count == 3 + 10
    assert list(failed) == ["none"]
    entries = {entry["id"]: entry for entry in manifest()}
    assert len(manifest()) == len(entries) == 40
    assert len(list((output / "contexts").rglob("*.c3"))) == 40
    assert len([mark for mark in marks.iterdir() if mark.name != "killed"]) == 40
    assert list((output / "contexts").rglob("*.journal")) == []
    context = CompressedContext.load(output / "contexts" / entries["d11"]["file"])
    assert C3Pipeline.from_pretrained().restore(context).text == DOCUMENTS[11]["text"]


def test_parquet_is_read_and_other_kinds_are_refused(example, tmp_path):
    import pandas

    pandas.DataFrame([{"name": 1, "body": "a"}, {"name": 2, "body": "b"}]).to_parquet(tmp_path / "some.parquet")
    rows = example.read([str(tmp_path / "some.parquet")], "name", "body").take_all()
    assert sorted(rows, key=str) == [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}]
    with pytest.raises(ValueError, match=r"`files` must be .jsonl, .jsonl.gz or .parquet, got \['some.txt'\]"):
        example.read(["some.txt"], "id", "text")
