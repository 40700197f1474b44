"""What docs/latent_format.md says of the file is true, down to its reader."""

from __future__ import annotations

import re

import pytest
import torch

from c3_hf.latents.file import INDEX, ORDER


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "latent_format.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_reader_on_the_page_reads_a_segment(page, compressed, tmp_path, dtype):
    context = compressed(latent_dtype=dtype, exact=True)
    context.save(tmp_path / "text.c3")
    scope = {}
    exec(re.search(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)[1], scope)
    found = torch.from_numpy(scope["read_segment"](tmp_path / "text.c3", 2).copy())
    assert torch.equal(found, context.dense_latents()[2].float())


def test_the_page_lists_every_tensor_in_file_order_and_every_header_entry(page, compressed):
    listed = re.findall(r"^\| `(\w+)` \| (?:[FIBU]\d+|BF16)", page, flags=re.MULTILINE)
    assert tuple(listed) == ORDER
    (checksum,) = re.findall(r"^\| `crc32` \|.* in this order: (.*) \|$", page, flags=re.MULTILINE)
    assert tuple(re.findall(r"\w+", checksum)) == INDEX
    header = page.split("## Header")[1].split("## Fidelity")[0]
    first_columns = re.findall(r"^\| (`.*?) \|", header, flags=re.MULTILINE)
    entries = {name for column in first_columns for name in re.findall(r"`(\w+)`", column)}
    assert entries == set(vars(compressed("x").header))


@pytest.fixture
def tiny_folder(tmp_path, monkeypatch, model, processor):
    """A working folder in which the bundled model is the tiny random one."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("c3_hf.pipeline.tiny_model_path", lambda: str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippets_on_the_page_of_contexts_run(repository, tiny_folder, capsys):
    page = (repository / "docs" / "contexts.md").read_text(encoding="utf-8")
    scope = {}
    for snippet in re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        exec(snippet, scope)
    processor, context = scope["processor"], scope["context"]
    assert capsys.readouterr().out == scope["pipe"].restore(context).text + "\n"
    length = processor.apply_chat_template(scope["messages"])["input_ids"].shape[1]
    answer = processor.tokenizer.decode(scope["output"][0, length:], skip_special_tokens=True)
    assert scope["answer"] == {"role": "assistant", "content": answer}
