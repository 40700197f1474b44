"""What every test area shares: the opt-in markers and the optional folder of shared data."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings


REPOSITORY = Path(__file__).parents[1]
OPT_IN = {
    "slow": "takes long; run with --run-slow",
    "gpu": "needs a CUDA device; run with --run-gpu",
    "hub": "needs the Hugging Face Hub; run with --run-hub",
    "browser": "drives Chromium; run with --run-browser",
}
# Markers of tests that need an environment of their own, the variable that names it, and how to come by it.
BY_VARIABLE = {"vllm": ("C3_VLLM_PYTHON", "the Python of an environment that tests/serving/make_vllm_env.sh makes")}


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker, reason in OPT_IN.items():
        parser.addoption(f"--run-{marker}", action="store_true", help=f"run the tests marked {marker} ({reason})")


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module imports torch or huggingface_hub, which read these once. The models are so small that a
    # second thread costs more than it brings.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Remote code of test folders is copied here, not among the user's own modules.
    if hasattr(config, "workerinput") or "HF_MODULES_CACHE" not in os.environ:
        os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="c3-hf-modules-")
    if not config.getoption("--run-hub"):
        os.environ["HF_HUB_OFFLINE"] = "1"
    # xdist would begin with the files of most tests, so that the slowest, of few tests each, are left to one process.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    # How long an example takes is the machine's business.
    settings.register_profile("any machine", deadline=None)
    settings.load_profile("any machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, reason in OPT_IN.items():
        if config.getoption(f"--run-{marker}"):
            continue
        for item in items:
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
    for marker, (variable, what) in BY_VARIABLE.items():
        for item in items:
            if item.get_closest_marker(marker) is not None and not os.environ.get(variable):
                item.add_marker(pytest.mark.skip(reason=f"needs {variable}: {what}"))

    # The goldens are converted once, which takes long: begun first, nobody else has to wait for them.
    first = next((item.path for item in items if "converted_goldens" in getattr(item, "fixturenames", ())), None)
    items.sort(key=lambda item: item.path != first)


def pytest_collection_finish() -> None:
    # What the packages made when they were imported stays to the end. Gone through at every collection of garbage, it
    # was a fifth of the suite's time.
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed()


def seed() -> None:
    """Before a test and its fixtures, so that it draws the same numbers alone and among others."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree the tests lie in."""
    return REPOSITORY


@pytest.fixture(scope="session")
def load_example(repository: Path):
    """Load a file of `examples` as a module; skips where a package that it needs is absent."""

    def load(name: str, *needed: str):
        for package in needed:
            pytest.importorskip(package, reason=f"{package} is not installed")
        path = repository / "examples" / name
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The optional folder next to the repository: golden checkpoints, evaluation texts, tokenizer files."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "README.md").is_file():
        pytest.skip("the folder `shared` next to the repository is absent (goldens and evaluation data)")
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Make a folder once a run, whichever of its processes asks first: `made_once(name, fill)`, only to be read.

    `fill` is given the path of the folder, which it makes.
    """
    root = tmp_path_factory.getbasetemp()
    # The processes of xdist have a folder each, in that of the run.
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, unfinished = root / name, root / f"{name}.unfinished"
        with FileLock(root / f"{name}.lock"):
            if not folder.is_dir():
                fill(unfinished)
                unfinished.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def converted_goldens(shared_dir: Path, made_once: Callable) -> dict[str, Path]:
    """Both golden checkpoints, converted with verification: name to folder, only to be read."""
    # Here, because this file is imported before the environment above is set.
    from c3_hf.conversion.convert_c3_to_hf import convert

    return {
        name: made_once(f"golden-{name}", partial(convert, shared_dir / "goldens" / name / "checkpoint", verify=True))
        for name in ("tiny_a", "vocab_b")
    }


@pytest.fixture(scope="session")
def real_processor(converted_goldens: dict[str, Path]):
    """The processor of the golden checkpoint with the released vocabulary, which takes seconds to load."""
    from c3_hf import C3Processor

    return C3Processor.from_pretrained(converted_goldens["vocab_b"])


@pytest.fixture(scope="session")
def model():
    """A tiny model. Tests that change it make their own with `factories.make_model`."""
    from factories import make_model

    return make_model()


@pytest.fixture(scope="session")
def processor():
    """The tiny model's processor, likewise."""
    from factories import make_processor

    return make_processor()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, model, processor) -> str:
    """Folder of the two, saved."""
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)
