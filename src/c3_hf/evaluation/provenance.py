"""What a measured number rests on: commit, weights and environment, for evaluation and benchmarks alike."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from c3_hf import __version__
from c3_hf.latents.fingerprints import fingerprint_model, fingerprint_parameters


# The packages whose versions can move a number; those of the extras only where they are installed.
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "rapidfuzz", "sacrebleu", "nltk", "jieba")
# What numbers are made with. Records and documents may change between two measurements.
_MEASURED = ("src", ":(glob)benchmarks/*.py")
ROOT = Path(__file__).parents[3]


def clean_commit(allow_changes: bool = False, root: Path = ROOT) -> str | None:
    """The commit that numbers measured now belong to.

    Args:
        allow_changes: Take a checkout whose code or weights differ from the commit, and say so with a `+` behind it.
        root: The folder that is the checkout's root if the package runs from one.

    Returns:
        The commit; `None` where the package does not run from a checkout of its own, as when it is installed.

    Raises:
        ValueError: If something differs from the commit and `allow_changes` is not set: no one could get the code
            back that the numbers were measured with.
    """
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", *_MEASURED)
    except (OSError, subprocess.CalledProcessError):
        return None
    if not changes:
        return commit
    if not allow_changes:
        changed = [line[3:] for line in changes.splitlines()]
        raise ValueError(
            f"the checkout differs from its commit in {', '.join(changed[:5])}{' …' if len(changed) > 5 else ''}, so "
            "that a record could not say what was measured. Commit first, or give `--allow-changes`: the record then "
            "says that there were changes."
        )
    return f"{commit}+"


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.rstrip()


def weights_fingerprint(model: PreTrainedModel | str | Path) -> str | None:
    """The fingerprint of [`fingerprint_model`], of a model in memory or of the safetensors files in a folder.

    Returns:
        64 hexadecimal digits; `None` for a Hub id, or a folder without such files.
    """
    if isinstance(model, PreTrainedModel):
        return fingerprint_model(model)
    files = sorted(Path(model).glob("*.safetensors"))
    return fingerprint_parameters(_stored(files)) if files else None


def _stored(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    names = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            names += [(name, path) for name in file.keys()]  # noqa: SIM118 - not a dictionary
    for name, path in sorted(names):
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(name)


def environment() -> dict[str, str]:
    """Versions of everything that can move a number, and the kind of machine."""
    system = f"{platform.system()} {platform.machine()}"
    versions = {package: _version(package) for package in _PACKAGES}
    return {"c3_hf": __version__, "python": platform.python_version(), "system": system, **versions}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
