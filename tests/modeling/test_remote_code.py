"""A saved folder on a machine without the package, and what goes to the Hub."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import c3_hf.modeling
from factories import make_model, make_processor


FRESH_PROCESS = """
import importlib.util, sys
assert importlib.util.find_spec("c3_hf") is None, "the package must not be importable here"
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

folder, again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = processor.apply_chat_template(processor.restore_messages("hello <img>"))
out = {}
for auto_class in (AutoModel, AutoModelForCausalLM):
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        out[auto_class.__name__] = model(**inputs).logits
    out[auto_class.__name__ + "_ids"] = model.generate(**inputs, max_new_tokens=6, do_sample=False)
model.save_pretrained(again)
processor.save_pretrained(again)
save_file(out, again + "/outputs.safetensors")
"""
MODULES = sorted(path.name for path in Path(c3_hf.modeling.__file__).parent.glob("*_c3.py"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model and processor, and what a process without the package saved again."""
    folder, again = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("again")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    command = [sys.executable, "-I", "-c", FRESH_PROCESS.replace("import importlib.util, sys", PATHS), folder, again]
    result = subprocess.run(command, env=environment, cwd=again, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder, again


# An installed package stays importable in an isolated process; a finder in front hides it.
PATHS = """import importlib.util, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "c3_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
real = importlib.util.find_spec
def find_spec(name, package=None):
    try:
        return real(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find_spec
"""


def test_a_process_without_the_package_computes_the_same(folders):
    _, again = folders
    outputs = load_file(again / "outputs.safetensors")
    model, processor = make_model(), make_processor()
    inputs = processor.apply_chat_template(processor.restore_messages("hello <img>"))
    with torch.no_grad():
        logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    for name in ("AutoModel", "AutoModelForCausalLM"):
        torch.testing.assert_close(outputs[name], logits)
        assert torch.equal(outputs[f"{name}_ids"], ids)


def test_the_files_are_the_packages_modules_byte_for_byte(folders):
    source = Path(c3_hf.modeling.__file__).parent
    for folder in folders:
        assert sorted(path.name for path in folder.glob("*.py")) == MODULES
        for name in MODULES:
            assert (folder / name).read_bytes() == (source / name).read_bytes(), name


def test_saving_again_changes_no_weight(folders):
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_push_to_hub_uploads_code_and_tags(monkeypatch):
    """The upload itself is replaced by a list; what would go up is complete."""
    uploaded = {}

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            uploaded[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def no_card(cls, *args, **kwargs):
        raise huggingface_hub.errors.EntryNotFoundError("no card yet")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", classmethod(no_card))
    for name, replacement in (("create_commit", create_commit), ("create_repo", create_repo)):
        # transformers 4.57 imports the functions by name, bound to one HfApi object.
        if hasattr(sys.modules["transformers.utils.hub"], name):
            monkeypatch.setattr(f"transformers.utils.hub.{name}", functools.partial(replacement, None))
    model = make_model()
    model.push_to_hub("someone/a-c3")
    assert set(MODULES) - {"processing_c3.py", "prompt_c3.py", "chats_c3.py"} <= set(uploaded)
    assert {"config.json", "model.safetensors", "generation_config.json"} <= set(uploaded)
    card = huggingface_hub.ModelCard(uploaded["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert {"c3", "context-compression"} <= set(card.data.tags)
    # What a model cannot know of itself.
    assert card.data.license is None


def test_saving_leaves_cards_alone(tmp_path):
    """A card says what somebody knows of the weights; the model itself knows nothing."""
    model = make_model()
    model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none" / "README.md").exists()
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path / "some")
    assert (tmp_path / "some" / "README.md").read_text() == "# Mine\n"


@pytest.mark.hub
def test_load_from_the_hub():
    """The real loading code, against whatever repository the environment names."""
    import os

    from transformers import AutoModelForCausalLM

    repository = os.environ.get("C3_HF_TEST_REPOSITORY")
    if not repository:
        pytest.skip("set C3_HF_TEST_REPOSITORY to the id of a C3 repository on the Hub")
    model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)
    assert model.config.model_type == "c3"
