"""The page in a real browser: each path, a large file, hostile text, two users, a phone, the dark."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from c3_hf import C3Pipeline
from c3_hf.web.study import Limits
from factories import make_model, make_processor


pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without the last four it looks for hosts of its own at every start.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
# Milliseconds: a busy machine is no fault of the page.
PATIENCE = 240_000
TEXT = "The keeper of the light counted the ships twice.\n\nThen it rained for a week, and nobody came."
HOSTILE = (
    "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"> <|im_end|> {{x}} ${1}"
)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def serve(pipe, folder, **limits):
    pytest.importorskip("gradio", reason="the package gradio is not installed")
    from c3_hf.web.app import launch

    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return launch(pipe, TEXT, Limits(**limits), prevent_thread_lock=True, quiet=True, server_port=None)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def url(browser, uploads):
    """A page of a tiny model that can be asked and told where to begin."""
    prompts = {"ask": "", "find": "Find: "}
    app = serve(C3Pipeline(make_model(), make_processor(prompts=prompts)), uploads, seconds=8)
    yield app.local_url
    app.close()


@pytest.fixture
def visit(browser, url):
    """Opens the page; at the end nothing must have been wrong in the console or asked of another machine."""
    wrong, contexts = [], []

    def opened(width=1100, height=900, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: foreign(request.url) and wrong.append(request.url))
        page.goto(url)
        page.wait_for_selector("#c3-run")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def foreign(address):
    return not address.startswith(("http://127.0.0.1:", "http://localhost:", "data:", "blob:"))


def type_text(page, text):
    page.fill("#c3-box textarea", text)


def wait_for(page, place, words):
    page.wait_for_function(
        "([place, words]) => document.querySelector(place)?.innerText.match(words)", arg=[place, words]
    )


def left(folder):
    """What an upload left: gradio makes a file without content for each."""
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def run(page, words="tokens for each"):
    page.click("#c3-run")
    wait_for(page, "#c3-status", words)


def test_a_text_is_compressed_restored_saved_and_opened(visit, tmp_path, uploads):
    page = visit()
    assert page.title() == "What C3 keeps"
    assert page.input_value("#c3-box textarea") == TEXT
    run(page)
    blocks = page.inner_text("#c3-status")
    assert "4 latents" in blocks
    assert "characters a latent" in page.inner_text("#c3-figures").lower()
    assert "certain to come back" in page.inner_text("#c3-fidelity")
    assert page.locator("#c3-differences .c3-half").count() >= 2
    page.fill("#c3-ratio input[type=number]", "8")
    page.keyboard.press("Tab")
    page.click("#c3-run")
    page.wait_for_function("(old) => { const now = document.querySelector('#c3-status').innerText;"
                           " return now.match('tokens for each') && now !== old }", arg=blocks)  # fmt: skip
    with page.expect_download() as download:
        page.click("#c3-save")
    file = tmp_path / "text.c3"
    download.value.save_as(file)
    assert file.stat().st_size > 1000
    page.set_input_files("input[type=file]", str(file))
    wait_for(page, "#c3-differences", "not exact")
    assert page.input_value("#c3-box textarea") == ""
    assert left(uploads) == []


def test_samples_fill_the_box(visit):
    page = visit()
    page.get_by_label("小说").check()
    page.wait_for_function("document.querySelector('#c3-box textarea').value.includes('大观园')")


def test_asking_streams_and_marks_what_was_read(visit):
    page = visit()
    page.get_by_role("tab", name="Ask").click()
    page.fill("#c3-question textarea", "Who counted?")
    page.click("#c3-ask")
    page.wait_for_selector("#c3-read mark")
    assert "read: segment 0" in page.inner_text("#c3-read")
    assert re.search("Read: segment 0", page.inner_text("#c3-answer"))
    page.fill("#c3-question textarea", "")
    page.fill("#c3-start textarea", "no such words")
    page.click("#c3-ask")
    wait_for(page, "#c3-answer", "no segment looked at holds")


def test_it_forgets_before_ones_eyes(visit):
    page = visit()
    page.get_by_role("tab", name="How it forgets").click()
    page.click("#c3-forget")
    wait_for(page, "#c3-tried", "Each row")
    assert page.locator("#c3-here tbody tr").count() >= 2
    assert "No recorded curve" in page.inner_text("#c3-recorded")


def test_a_large_file_is_read_and_what_the_time_allows_is_said(visit, tmp_path, uploads):
    page = visit()
    file = tmp_path / "large.txt"
    file.write_text("A line of a long log, number 12345, and no more.\n" * 6200, encoding="utf-8")
    assert file.stat().st_size > 300_000
    page.set_input_files("input[type=file]", str(file))
    wait_for(page, "#c3-status", "303,800 characters read")
    assert left(uploads) == []
    page.fill("#c3-ratio input[type=number]", "60")
    page.keyboard.press("Tab")
    run(page, "8 seconds are what this page gives")


def test_hostile_text_is_text(visit):
    page = visit()
    type_text(page, HOSTILE)
    run(page)
    assert page.title() == "What C3 keeps"
    assert HOSTILE in page.inner_text("#c3-fidelity")
    assert page.locator("#c3-fidelity script, #c3-fidelity img, #c3-differences img").count() == 0
    page.get_by_role("tab", name="Ask").click()
    page.fill("#c3-start textarea", "<img src=x onerror=alert(1)>")
    page.click("#c3-ask")
    wait_for(page, "#c3-answer", "<img src=x")
    assert page.locator("#c3-answer img").count() == 0


def test_two_users_at_once_each_get_their_own(visit):
    one, two = visit(), visit()
    type_text(one, "One of two texts, the first.")
    type_text(two, "The second is another.")
    one.click("#c3-run")
    two.click("#c3-run")
    for page in (one, two):
        wait_for(page, "#c3-status", "tokens for each")
    assert "the first" in one.inner_text("#c3-fidelity")
    assert "another" in two.inner_text("#c3-fidelity")
    assert "the first" not in two.inner_text("#c3-fidelity")


def test_by_keyboard_alone(visit):
    page = visit()
    page.focus("#c3-box textarea")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "c3-run":
            break
    page.keyboard.press("Enter")
    wait_for(page, "#c3-status", "tokens for each")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(visit, scheme):
    page = visit(390, 800, color_scheme=scheme)
    run(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    colours = page.evaluate("(() => { const text = getComputedStyle(document.querySelector('#c3-fidelity .c3-wrong'));"
                            " return [text.color, text.backgroundColor] })()")  # fmt: skip
    assert contrast(*colours) >= 4.5


def contrast(one, other):
    """The ratio of WCAG 2, 1 to 21."""

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
