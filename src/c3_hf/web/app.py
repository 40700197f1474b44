"""The page: its parts, and which click does what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from ..pipeline import C3Pipeline
from . import markup
from .page import Page
from .study import Limits, ratio_range


HERE = Path(__file__).parent
# Seconds after which a file that an upload left, and what a visitor did last, are forgotten.
_FILE_LIFE, _STATE_LIFE = 60, 1800
# The file goes from memory into the browser's downloads and lies on no disk of the server.
_DOWNLOAD = """(data) => {
  if (!data) return "";
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], {type: "application/octet-stream"}));
  link.download = "text.c3";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  return "";
}"""


def samples() -> list[dict[str, str]]:
    """The sample texts: name, language, kind, credit with the licence, source, text."""
    return [json.loads(line) for line in (HERE / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def create_app(pipe: C3Pipeline, text: str | None = None, limits: Limits | None = None) -> gr.Blocks:
    """The page of a model.

    Args:
        pipe: The model; what it can do, its checkpoint says.
        text: What stands in the box at the beginning; by default the first sample.
        limits: How much a visitor may ask for.
    """
    limits = limits or Limits()
    page = Page(pipe, limits)
    # One thing at a time is computed; other visitors wait in line and see their place.
    model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
    with gr.Blocks(title="What C3 keeps", analytics_enabled=False, delete_cache=(_FILE_LIFE, _FILE_LIFE)) as app:
        study, data = gr.State(time_to_live=_STATE_LIFE), gr.Textbox(visible=False)
        gr.HTML(markup.heading(pipe))
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                label = f"Text, up to {limits.characters:,} characters"
                first = samples()[0]["text"] if text is None else text
                box = gr.Textbox(first, label=label, lines=12, max_lines=12, elem_id="c3-box")
                upload = gr.UploadButton("Open a text file or a .c3 file", size="sm", elem_id="c3-open")
            with gr.Column(scale=2, min_width=300):
                _choose_sample(box, begins=text is None)
                ratio = _choose_ratio(pipe)
                run = gr.Button("Compress and restore", variant="primary", elem_id="c3-run")
        with gr.Tabs():
            with gr.Tab("What came back"):
                status = gr.HTML(markup.notice("Press “Compress and restore”."), elem_id="c3-status")
                parts = [gr.HTML(elem_id=f"c3-{name}") for name in ("figures", "fidelity", "differences")]
                save = gr.Button("Save the latents as a .c3 file", size="sm", elem_id="c3-save")
            with gr.Tab("Ask"):
                question, start, ask = _asking(pipe)
                answer, read = gr.HTML(elem_id="c3-answer"), gr.HTML(elem_id="c3-read")
            with gr.Tab("How it forgets"):
                gr.HTML(markup.FORGETTING)
                draw = gr.Button("Try this text at every ratio", variant="primary", elem_id="c3-forget")
                tried = gr.HTML(elem_id="c3-tried")
                with gr.Row():
                    with gr.Column(min_width=460):
                        here = gr.HTML(elem_id="c3-here")
                    with gr.Column(min_width=460):
                        recorded = gr.HTML(elem_id="c3-recorded")
        gr.HTML(markup.PRIVACY)
        shown = [study, status, *parts]
        run.click(page.run, [box, ratio], shown, show_progress_on=status, **model)
        upload.upload(page.open, [upload, box], [box, *shown], show_progress_on=status, **model)
        saved = save.click(page.file, study, [data, status], show_progress_on=status, **model)
        saved.then(None, data, data, js=_DOWNLOAD)
        gr.on(
            [ask.click, question.submit, start.submit],
            page.ask,
            [box, ratio, study, question, start],
            [study, answer, read],
            show_progress_on=answer,
            **model,
        )
        draw.click(page.forget, box, [tried, here, recorded], show_progress_on=tried, **model)
    return app.queue(max_size=32)


def _choose_sample(box: gr.Textbox, begins: bool) -> None:
    """The samples' names, which fill the box; the first is chosen where the page begins with it."""
    chosen = {sample["name"]: sample for sample in samples()}
    first = next(iter(chosen.values()))
    own: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    names = gr.Radio(list(chosen), value=first["name"] if begins else None, label="Samples", elem_id="c3-samples")
    credit = gr.HTML(markup.credit(first["credit"]) if begins else "")
    names.input(
        lambda name: (chosen[name]["text"], markup.credit(chosen[name]["credit"])), names, [box, credit], **own
    )
    box.input(lambda: (None, ""), None, [names, credit], **own)


def _choose_ratio(pipe: C3Pipeline) -> gr.Slider:
    least, most, usual = ratio_range(pipe)
    label = "Tokens for each latent, at most"
    return gr.Slider(least, most, usual, step=1, label=label, info=markup.ratios(usual, most), elem_id="c3-ratio")


def _asking(pipe: C3Pipeline) -> tuple[gr.Textbox, gr.Textbox, gr.Button]:
    """A box for each way of asking that the checkpoint declares; without any, the reason why there is none."""
    prompts = pipe.processor.prompts
    question = gr.Textbox(label="Question", visible="ask" in prompts, elem_id="c3-question")
    start = gr.Textbox(
        label="Words of the text; the model goes on from them",
        info=markup.BEGINNING,
        placeholder="The beginning of a sentence, as it stands in the text",
        visible="find" in prompts,
        elem_id="c3-start",
    )
    asks = {"ask", "find"} & set(prompts)
    gr.HTML(markup.abilities(prompts))
    return question, start, gr.Button("Ask", variant="primary", visible=bool(asks), elem_id="c3-ask")


def launch(pipe: C3Pipeline, text: str | None = None, limits: Limits | None = None, **options: Any) -> gr.Blocks:
    """Serve the page; `options` are those of gradio's `launch`, such as `server_port`."""
    limits = limits or Limits()
    app = create_app(pipe, text, limits)
    settings: dict[str, Any] = {
        # Fonts of the reader's own machine: none is fetched.
        "theme": gr.themes.Default(
            primary_hue="emerald",
            secondary_hue="emerald",
            neutral_hue="slate",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        "css_paths": [HERE / "style.css"],
        "max_file_size": limits.file_bytes,
        "footer_links": ["settings"],
        "enable_monitoring": False,
        "run_history": False,
        "ssr_mode": False,
    }
    app.launch(**settings | options)
    return app
