"""Compress a corpus with Ray Data: documents in, `.c3` files and a manifest out, on two cores as on a cluster.

Each document, a row of JSON Lines or Parquet, becomes one file below OUTPUT/contexts, named by its id and text, and
one line of OUTPUT/manifest.jsonl: exactly once, however often workers or the whole run are killed and started again.
Every machine of the cluster must see OUTPUT under the same name.

    pip install "ray[data]"
    python examples/corpus_ray.py OUTPUT documents.jsonl more.parquet --workers 2
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import ray

from c3_hf import C3Pipeline, CompressedContext
from c3_hf.files import append_jsonl, read_jsonl


READERS = {".jsonl": ray.data.read_json, ".gz": ray.data.read_json, ".parquet": ray.data.read_parquet}
# Documents that a worker gets at a time.
BLOCK = 16


class Worker:
    """A process of its own with a model: rows of documents to rows of the manifest."""

    def __init__(self, output: str, model: str | None = None, device: str = "cpu"):
        self.folder = Path(output) / "contexts"
        self.pipe = C3Pipeline.from_pretrained(model, device=device)

    def __call__(self, row: dict) -> dict:
        key, text = str(row["id"]), row["text"]
        name = hashlib.sha256(f"{key}\0{text}".encode(errors="replace")).hexdigest()
        # Folders of a few thousand files each, also of a corpus of millions.
        path = self.folder / name[:2] / f"{name[2:]}.c3"
        entry = {"id": key, "file": f"{name[:2]}/{path.name}", "error": None}
        try:
            context = self.compress(text, path)
        except (TypeError, ValueError) as error:
            return {**entry, "tokens": 0, "segments": 0, "bytes": 0, "error": str(error)}
        return {**entry, "tokens": context.num_tokens, "segments": len(context), "bytes": path.stat().st_size}

    def compress(self, text: str, path: Path) -> CompressedContext:
        """The context in `path`: the one that is there, if it is whole and of this text and model, else a new one."""
        if path.exists():
            context = CompressedContext.load(path)
            if self.pipe.would_make(context, hashlib.sha256(text.encode()).hexdigest()):
                return context
        path.parent.mkdir(parents=True, exist_ok=True)
        # What a killed worker had begun is gone on with: the pipeline keeps a journal beside the file.
        return self.pipe.compress(text, output=path)


def run(
    output: str,
    documents: ray.data.Dataset,
    *,
    workers: int = 2,
    worker: type = Worker,
    gpus_per_worker: float = 0,
    **options: object,
) -> tuple[int, dict[str, str]]:
    """Compress all of `documents`, rows with `id` and `text`.

    Returns:
        How many lines came to the manifest, and what went wrong, by the document's id; a new start tries those again.
    """
    manifest = Path(output) / "manifest.jsonl"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    # One writer, so one line each; a file without its line gets it at the next start, when it is found.
    known = {entry["file"] for entry in read_jsonl(manifest, skip_torn=True)} if manifest.exists() else set()
    before, failed = len(known), {}
    rows = documents.repartition(target_num_rows_per_block=BLOCK).map(
        worker,
        fn_constructor_kwargs={"output": output, **options},
        compute=ray.data.ActorPoolStrategy(size=workers),
        # To Ray's mind, so that as many workers as there are cores leave room for the reading.
        num_cpus=0.5,
        num_gpus=gpus_per_worker,
        # A process that dies is started again and gets the same block again.
        max_restarts=-1,
        max_task_retries=-1,
    )
    for row in rows.iter_rows():
        error = row.pop("error")
        if error is not None:
            failed[row["file"]] = row["id"], error
        elif row["file"] not in known:
            append_jsonl(manifest, [row])
            known.add(row["file"])
    return len(known) - before, {key: error for file, (key, error) in failed.items() if file not in known}


def read(files: list[str], id_column: str, text_column: str) -> ray.data.Dataset:
    """The documents of all files, as `id` and `text`."""
    kinds = {kind: [file for file in files if Path(file).suffix == kind] for kind in READERS}
    unknown = sorted(set(files).difference(*kinds.values()))
    if unknown:
        raise ValueError(f"`files` must be .jsonl, .jsonl.gz or .parquet, got {unknown}.")
    parts = [READERS[kind](found) for kind, found in kinds.items() if found]
    names = {id_column: "id", text_column: "text"}
    first, *others = [part.select_columns(list(names)).rename_columns(names) for part in parts]
    return first.union(*others) if others else first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder that all machines see")
    parser.add_argument("files", nargs="+", help="JSON Lines (.jsonl, .jsonl.gz) or Parquet")
    parser.add_argument("--id-column", default="id")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with a model (default: 2)")
    parser.add_argument("--model", help="folder or Hub id (default: c3-tiny)")
    parser.add_argument("--device", default="cpu", help="such as cuda, with --gpus-per-worker 1")
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    parser.add_argument("--address", help="of a running cluster, or auto (default: this machine alone)")
    arguments = parser.parse_args()
    ray.init(address=arguments.address, log_to_driver=False)
    documents = read(arguments.files, arguments.id_column, arguments.text_column)
    count, failed = run(
        str(Path(arguments.output).resolve()),
        documents,
        workers=arguments.workers,
        gpus_per_worker=arguments.gpus_per_worker,
        model=arguments.model,
        device=arguments.device,
    )
    print(f"{count} documents compressed, {len(failed)} failed")
    for key, error in failed.items():
        print(f"{key}: {error}")


if __name__ == "__main__":
    main()
