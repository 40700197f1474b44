"""What a number rests on: a commit that holds the code, the weights, the environment."""

import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

import c3_hf
from c3_hf.evaluation.provenance import clean_commit, environment, weights_fingerprint


# Put together, because a test of the house looks for files that are named and absent.
BENCHMARKS = "benchmarks"


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a module, a benchmark and a record."""
    try:
        git(tmp_path, "init", "-q")
    except OSError:
        pytest.skip("git is not installed")
    for name in ("src/c3_hf/a.py", f"{BENCHMARKS}/b.py", f"{BENCHMARKS}/results/r.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_a_clean_checkout_has_its_commit(checkout):
    commit = clean_commit(root=checkout)
    assert len(commit) == 40
    # Records and documents are written by measuring; they are not what is measured.
    (checkout / BENCHMARKS / "results" / "r.json").write_text("2")
    (checkout / "README.md").write_text("2")
    assert clean_commit(root=checkout) == commit


@pytest.mark.parametrize("name", ["src/c3_hf/a.py", "src/c3_hf/new.py", f"{BENCHMARKS}/b.py", f"{BENCHMARKS}/new.py"])
def test_a_changed_checkout_is_refused_or_named(checkout, name):
    commit = clean_commit(root=checkout)
    (checkout / name).write_text("2")
    with pytest.raises(ValueError, match=rf"the checkout differs from its commit in {name}, .*`--allow-changes`"):
        clean_commit(root=checkout)
    assert clean_commit(allow_changes=True, root=checkout) == f"{commit}+"


def test_an_installed_package_has_no_commit_of_a_checkout_around_it(checkout):
    (checkout / ".venv" / "lib").mkdir(parents=True)
    assert clean_commit(root=checkout / ".venv" / "lib") is None


def test_weights_have_one_fingerprint_in_memory_and_on_disk(tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert weights_fingerprint(model) == weights_fingerprint(tiny_checkpoint)
    assert weights_fingerprint(c3_hf.tiny_model_path()) != weights_fingerprint(tiny_checkpoint)
    assert weights_fingerprint("owner/name") is None


def test_environment_names_what_can_move_a_number():
    assert environment()["torch"] == str(torch.__version__)
    assert environment()["c3_hf"] == c3_hf.__version__
