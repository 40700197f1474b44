"""The chat templates of a model: C3's, and beside it the decoder's own, under the name `decoder`."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from c3_hf.conversion.for_vllm import keeps_escapes
from c3_hf.modeling.prompt_c3 import ESCAPE


DEFAULT, DECODER, C3 = "default", "decoder", "c3"
# Where transformers saves the templates of a tokenizer or processor: its default, and the named ones.
TEMPLATE_FILE, NAMED_TEMPLATES = "chat_template.jinja", "additional_chat_templates"

# Goes in front of a template and puts the escape into special strings of the messages; nothing else changes, so that
# what a template looks for in a message is still there. Servers look through a template for a loop over a message's
# parts, to know whether it takes any: the loop here is none that they see. The line break at the end is taken out
# again (`trim_blocks`).
_GUARD = """
{%- macro plain(text) -%}
{%- set ns = namespace(text=text) -%}
{%- for special in SPECIALS -%}
{%- set ns.text = ns.text | replace(special, special[0] ~ 'ESCAPE' ~ special[1:]) -%}
{%- endfor -%}
{{- ns.text -}}
{%- endmacro -%}
{%- set guarded = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set guarded.content = message.content -%}
{%- if guarded.content is string -%}{%- set guarded.content = plain(guarded.content) -%}
{%- elif guarded.content -%}
{%- set guarded.parts = [] -%}
{%- for part in guarded.content -%}
{%- set guarded.parts = guarded.parts + [dict(part, text=plain(part.text)) if part.text is string else part] -%}
{%- endfor -%}
{%- set guarded.content = guarded.parts -%}
{%- endif -%}
{%- set guarded.message = dict(message, role=plain(message.role)) -%}
{%- set guarded.messages = guarded.messages + [
    dict(guarded.message, content=guarded.content) if message.content is defined else guarded.message
] -%}
{%- endfor -%}
"""
_END_OF_GUARD = "{%- set messages = guarded.messages %}\n"


def keep_own_template(tokenizer: PreTrainedTokenizerBase, own: str | dict[str, str] | None) -> None:
    """Put the decoder's own chat template beside C3's, as `apply_chat_template(..., chat_template="decoder")` has it.

    User text stays text in it as in C3's: a special string in a message gets the escape.

    Args:
        tokenizer: the decoder's, with C3's template and all its tokens; changed in place.
        own: the template it had before, or several by their names, of which the default counts; None, or C3's as an
            exported decoder may have it, is nothing to keep.
    """
    own = own.get(DEFAULT) if isinstance(own, dict) else own
    # The variable is C3's alone.
    if own is not None and "context_block" not in own:
        tokenizer.chat_template = {DEFAULT: tokenizer.chat_template, DECODER: _guard(tokenizer) + _unguarded(own)}


def give_back_own_template(source: Path, folder: Path) -> None:
    """Make the decoder's own chat template, if it was kept, the default of the exported folder; C3's becomes `c3`.

    Where the tokenizer would not take the escapes out again, there are none in it.

    Args:
        source: folder of the C3 model.
        folder: that of the exported decoder, with its configuration, its tokenizer and C3's chat template.
    """
    path = source / NAMED_TEMPLATES / f"{DECODER}.jinja"
    if not path.is_file():
        return
    own = path.read_text(encoding="utf-8")
    if not keeps_escapes(AutoTokenizer.from_pretrained(folder), folder):
        own = _unguarded(own)
    (folder / NAMED_TEMPLATES).mkdir()
    (folder / TEMPLATE_FILE).rename(folder / NAMED_TEMPLATES / f"{C3}.jinja")
    (folder / TEMPLATE_FILE).write_text(own, encoding="utf-8")


def _unguarded(template: str) -> str:
    return template.partition(_END_OF_GUARD)[2] or template


def _guard(tokenizer: PreTrainedTokenizerBase) -> str:
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    values = {"SPECIALS": json.dumps(specials, ensure_ascii=False), "ESCAPE": json.dumps(ESCAPE)[1:-1]}
    guard = _GUARD
    for name, value in values.items():
        guard = guard.replace(name, value)
    return guard + _END_OF_GUARD
