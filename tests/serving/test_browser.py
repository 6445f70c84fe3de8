"""The page in a real browser: what a visitor sees, presses and types.

Needs playwright and a Chromium; `MMLM_SHOTS=FOLDER` keeps a picture of every step.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from pathlib import Path

import pytest

from mmlm.errors import ImageError
from mmlm.generation.session import Sessions
from mmlm.serving.about import About, Example
from mmlm.serving.chat_ui import build_page, page_options
from mmlm.serving.engine import Engine
from tests.serving.fakes import FakeSpeaker
from tests.serving.live import free_port, until
from tests.tiny import compose_tiny, picture

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]  # fmt: skip
LEVEL_A = ["wcag2a", "wcag21a", "wcag22a"]
WAIT_MS = float(os.environ.get("MMLM_BROWSER_SECONDS", "60")) * 1000
_ANSWERED = "document.querySelectorAll('.mmlm-facts, .mmlm-fault').length"
HAND_OVER = """async ([kind, urls]) => {
  const data = new DataTransfer();
  for (const [number, url] of urls.entries()) {
    const blob = await (await fetch(url)).blob();
    data.items.add(new File([blob], `${number}.png`, { type: "image/png" }));
  }
  const box = document.querySelector("#ask textarea");
  const options = { bubbles: true, cancelable: true };
  const event = (name) => kind === "paste"
    ? new ClipboardEvent(name, { clipboardData: data, ...options })
    : new DragEvent(name, { dataTransfer: data, ...options });
  for (const name of kind === "paste" ? ["paste"] : ["dragenter", "dragover", "drop"])
    box.dispatchEvent(event(name));
}"""


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found or None, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in (1, 2):
        picture(number, 120, 160).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def speaker(pictures):
    examples = (Example(question="What is this?", image=str(pictures / "1.png")),)
    told = About(title="fake", learned="It says what it was asked.", examples=examples)
    return FakeSpeaker("fake", words=3, about=told)


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """Return a function that opens a page on some models and gives its address."""
    opened = []

    def serve(*speakers):
        blocks = build_page(speakers)
        allowed = [e.image for s in speakers for e in s.about.examples if e.image]
        _, address, _ = blocks.launch(
            server_name="127.0.0.1", server_port=free_port(), quiet=True, prevent_thread_lock=True,
            allowed_paths=allowed, **page_options(),
        )  # fmt: skip
        opened.append(blocks)
        return address

    yield serve
    for blocks in opened:
        blocks.close()


@pytest.fixture(scope="module")
def address(page_of, speaker):
    return page_of(speaker)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    tiny = compose_tiny(tmp_path_factory.mktemp("tiny"))
    return Engine(Sessions(tiny.model, tiny.processor), name="tiny")


@pytest.fixture(scope="module")
def real(page_of, engine):
    return page_of(engine)


class Visitor:
    """Somebody before the page."""

    def __init__(self, chromium, address, request, query="", **options):
        size = {"width": 1180, "height": 820}
        options = {"viewport": size, "color_scheme": "light", **options}
        self.context = chromium.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.faults, self.strangers = [], []
        self.page.on("pageerror", lambda fault: self.faults.append(str(fault)))
        self.page.on("request", lambda request: self._note(request.url, address))
        self._name, self._shots = request.node.name, 0
        self.page.goto(address + query)
        self.page.wait_for_selector("#ask textarea")
        self.page.wait_for_function("document.querySelector('#ask textarea:not([disabled])')")

    def _note(self, url, address):
        if not url.startswith((address, "data:", "blob:")):
            self.strangers.append(url)

    def show(self, *paths):
        self.page.locator("#ask input[type=file]").set_input_files([str(path) for path in paths])
        self.page.wait_for_selector("#ask .thumbnail-item, #ask img")

    def ask(self, text, *paths, wait=True):
        if paths:
            self.show(*paths)
        box, done = self.page.locator("#ask textarea"), self.num_answered()
        box.fill(text)
        box.press("Enter")
        if wait:
            self.page.wait_for_function(f"{_ANSWERED} > {done}")
            self.idle()

    def num_answered(self):
        return self.page.evaluate(_ANSWERED)

    def idle(self):
        """Wait until the last turn is an answer with its facts."""
        self.page.wait_for_function(
            "[...document.querySelectorAll('.talk')].every(talk => {"
            " const rows = [...talk.querySelectorAll('.bot-row, .user-row')];"
            " return rows.length && /mmlm-fa(cts|ult)/.test(rows.at(-1).innerHTML) })"
        )
        self.page.wait_for_selector("#ask [data-testid=submit-button], #ask .submit-button")

    def said(self, talk=0):
        """What was answered, without facts."""
        rows = self.page.locator(f"#chat-{talk} .bot-row").all()
        texts = [row.inner_text().strip() for row in rows if not row.locator(".mmlm-facts").count()]
        return [text for text in texts if text]

    def asked(self, talk=0):
        rows = self.page.locator(f"#chat-{talk} .user-row").all_inner_texts()
        return [text.strip() for text in rows if text.strip()]

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def shot(self, what):
        folder = os.environ.get("MMLM_SHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(500)
            name = re.sub(r"\W+", "-", f"{self._name[5:40]}-{what}")
            self.page.screenshot(path=f"{folder}/{name}.png")


@pytest.fixture
def visit(chromium, request):
    opened = []

    def visit(address, query="", **options):
        opened.append(Visitor(chromium, address, request, query, **options))
        return opened[-1]

    yield visit
    for visitor in opened:
        visitor.context.close()
        assert visitor.faults == []
        assert visitor.strangers == []  # nothing is fetched from elsewhere


def test_a_visitor_shows_two_pictures_and_sees_the_answer_with_its_facts(
    visit, address, speaker, pictures
):
    visitor = visit(address)
    visitor.shot("empty")
    visitor.ask("What are these?", pictures / "1.png", pictures / "2.png")
    assert visitor.said() == ["1 turns, 2 pictures: What are these? word0 word1 word2"]
    facts = visitor.page.locator(".mmlm-facts").inner_text()
    assert re.search(r"\d+ tokens · first after .* · read 7 \(4 of images\)", facts)
    assert visitor.page.locator("#chat-0 .user-row img").count() == 2
    assert visitor.page.locator("#ask textarea").input_value() == ""
    visitor.ask("And now?")
    assert len(visitor.said()) == 2
    visitor.shot("answered")


def test_an_answer_streams_and_stop_ends_generation_itself(visit, page_of):
    slow = FakeSpeaker("slow", words=2000, pause=0.03)
    visitor = visit(page_of(slow))
    visitor.ask("Go on.", wait=False)
    visitor.page.wait_for_function("document.body.innerText.includes('word5')")
    visitor.shot("streaming")
    visitor.page.locator("#ask .stop-button").click()
    visitor.idle()
    until(lambda: slow.num_closed == 1)
    said = slow.num_said
    visitor.page.wait_for_timeout(300)
    assert 5 < slow.num_said == said < 2000
    assert "stopped" in visitor.page.locator(".mmlm-facts").inner_text()
    visitor.shot("stopped")


def test_closing_the_page_ends_generation(visit, page_of):
    slow = FakeSpeaker("slow", words=2000, pause=0.03)
    visitor = visit(page_of(slow))
    visitor.ask("Go on.", wait=False)
    visitor.page.wait_for_function("document.body.innerText.includes('word5')")
    visitor.page.close()
    until(lambda: slow.num_closed == 1)
    assert slow.num_said < 2000


@pytest.mark.parametrize(("kind", "names"), [("paste", ["1.png"]), ("drop", ["1.png", "2.png"])])
def test_pictures_are_pasted_and_dropped(visit, address, pictures, kind, names):
    visitor = visit(address)
    data = [base64.b64encode((pictures / name).read_bytes()).decode() for name in names]
    urls = [f"data:image/png;base64,{text}" for text in data]
    visitor.page.evaluate(HAND_OVER, [kind, urls])
    shown = "document.querySelectorAll('#ask .thumbnail-item, #ask .thumbnail-wrapper').length"
    visitor.page.wait_for_function(f"{shown} >= {len(names)}")
    visitor.ask("What is it?")
    assert f"{len(names)} pictures" in visitor.said()[0]


def test_the_camera_puts_a_picture_into_the_question(visit, address):
    visitor = visit(address)
    visitor.button("Camera").click()
    visitor.page.wait_for_selector("#camera")
    visitor.page.get_by_text("Click to Access Webcam").click()
    visitor.page.wait_for_selector("#camera video")
    visitor.page.wait_for_timeout(500)
    visitor.shot("camera")
    visitor.page.locator(
        "#camera .button-wrap button, #camera button[aria-label*='capture' i]"
    ).first.click()
    visitor.page.wait_for_selector("#ask .thumbnail-item, #ask img")
    visitor.ask("What is it?")
    assert "1 pictures" in visitor.said()[0]
    assert visitor.page.locator("#camera").count() == 0


def test_a_question_is_edited_answered_again_and_taken_back(visit, address, speaker, pictures):
    visitor = visit(address)
    visitor.ask("What is it?", pictures / "1.png")
    visitor.ask("And this?")
    heard = len(speaker.heard)
    visitor.page.locator("#chat-0 button[aria-label=Retry]:visible").last.click()
    until(lambda: len(speaker.heard) == heard + 1)
    visitor.idle()
    assert [len(visitor.asked()), len(visitor.said())] == [2, 2]
    visitor.page.locator("#chat-0 button[aria-label=Edit]").first.click()
    visitor.page.locator("#chat-0 textarea").last.fill("Which colour?")
    visitor.shot("editing")
    visitor.page.locator("#chat-0 button[aria-label=Submit]").first.click()
    until(lambda: len(speaker.heard) == heard + 2)
    visitor.idle()
    assert visitor.asked() == ["Which colour?"]
    assert visitor.said() == ["1 turns, 1 pictures: Which colour? word0 word1 word2"]
    visitor.page.locator("#chat-0 button[aria-label=Undo]:visible").last.click()
    visitor.page.wait_for_function("!document.querySelector('#chat-0 .user-row')")
    assert visitor.page.locator("#ask textarea").input_value() == "Which colour?"


def test_an_example_is_asked_and_a_new_chat_begins(visit, address):
    visitor = visit(address)
    visitor.page.locator("button.example").first.click()
    visitor.idle()
    assert "1 pictures: What is this?" in visitor.said()[0]
    visitor.button("New chat").click()
    visitor.page.wait_for_function("!document.querySelector('#chat-0 .user-row')")


def test_what_cannot_be_answered_is_said_in_words(visit, address, page_of, tmp_path):
    (tmp_path / "fake.png").write_bytes(b"no picture at all")
    visitor = visit(address)
    visitor.ask("What is it?", tmp_path / "fake.png", wait=False)
    visitor.page.wait_for_selector(".toast-body")
    assert "fake.png" in visitor.page.locator(".toast-body").inner_text()
    assert visitor.page.locator("#ask textarea").input_value() == "What is it?"
    visitor.shot("refused")
    broken = visit(page_of(FakeSpeaker(fault=ImageError("The picture <is> empty."))))
    broken.ask("What is this here?")
    assert broken.page.locator(".mmlm-fault").inner_text() == "The picture <is> empty."
    broken.shot("fault")


def test_two_models_stand_side_by_side(visit, page_of, pictures):
    left, right = FakeSpeaker("before", words=2), FakeSpeaker("after", words=6)
    visitor = visit(page_of(left, right))
    visitor.ask("What is it?", pictures / "1.png")
    assert visitor.said(0)[0].endswith("word1")
    assert visitor.said(1)[0].endswith("word5")
    names = visitor.page.locator(".talk-name").all_inner_texts()
    assert list(dict.fromkeys(names)) == ["before", "after"]
    visitor.shot("compare")


def test_the_page_shows_where_the_words_of_an_answer_looked(visit, real, pictures):
    visitor = visit(real)
    visitor.ask("What is it?", pictures / "1.png")
    visitor.page.get_by_text("What the model saw").click()
    visitor.page.locator("#look").click()
    visitor.page.wait_for_function("document.querySelectorAll('#seen-pictures img').length >= 2")
    assert "Share of attention" in visitor.page.locator("#seen-told").inner_text()
    visitor.page.locator("#seen").scroll_into_view_if_needed()
    visitor.shot("seen")
    visitor.page.locator("#seen input:visible").last.click()
    options = visitor.page.locator("[role=option]")
    assert options.count() >= 2
    options.nth(1).click()
    visitor.page.wait_for_timeout(300)
    visitor.page.wait_for_function("document.querySelectorAll('#seen-pictures img').length >= 2")
    visitor.shot("word")


IS_DARK = "document.body.classList.contains('dark')"


def test_dark_mode_is_kept_over_a_reload(visit, address):
    visitor = visit(address)
    assert not visitor.page.evaluate(IS_DARK)
    for dark in (True, False):
        visitor.button("Light / dark").click()
        assert visitor.page.evaluate(IS_DARK) is dark
        visitor.page.reload()
        visitor.page.wait_for_selector("#ask textarea")
        visitor.page.wait_for_timeout(1500)  # Gradio sets its own choice while it draws the page
        assert visitor.page.evaluate(IS_DARK) is dark
        visitor.ask("What?")
        visitor.shot("dark" if dark else "light")


def test_without_a_choice_the_page_follows_the_system(visit, address):
    visitor = visit(address, color_scheme="dark")
    assert visitor.page.evaluate(IS_DARK)
    visitor.page.emulate_media(color_scheme="light")
    visitor.page.wait_for_function(f"!{IS_DARK}")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_all_of_it_in_390_px(visit, address, pictures, dark):
    visitor = visit(address, viewport={"width": 390, "height": 780}, device_scale_factor=2)
    if dark:
        visitor.button("Light / dark").click()
    visitor.shot("empty")
    visitor.ask("What are these two things, and which colours do they have?",
                pictures / "1.png", pictures / "2.png")  # fmt: skip
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("New chat", "Download", "Link", "Settings", "Light / dark"):
        box = visitor.button(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    visitor.shot("answered")
    visitor.button("Settings").click()
    visitor.page.wait_for_selector("#settings.open")
    visitor.shot("settings")


def test_everything_is_reached_with_the_keyboard_alone(visit, address):
    visitor = visit(address)
    keys = visitor.page.keyboard
    for _ in range(40):  # where there is a mouse, the text box has the focus from the beginning
        if visitor.page.evaluate("!!document.activeElement.closest('#ask textarea')"):
            break
        keys.press("Tab")
    keys.type("What is it?")
    keys.press("Enter")
    visitor.idle()
    seen = set()
    for _ in range(60):
        keys.press("Tab")
        name = visitor.page.evaluate(
            "(document.activeElement.getAttribute('aria-label') || document.activeElement"
            ".innerText || document.activeElement.tagName || '').trim().slice(0, 40)"
        )
        seen.add(name)
        if name == "Retry":
            visitor.shot("focus")
    wanted = {"New chat", "Download", "Link", "Settings", "Light / dark", "Retry", "Undo", "Edit"}
    assert wanted <= seen, seen
    before = len(visitor.said())
    visitor.page.locator("#chat-0 button[aria-label=Retry]:visible").last.focus()
    keys.press("Enter")
    visitor.idle()
    assert len(visitor.said()) == before
    visitor.button("New chat").focus()
    keys.press("Space")
    visitor.page.wait_for_function("!document.querySelector('#chat-0 .user-row')")


def test_a_conversation_is_downloaded_as_one_file(visit, address, pictures, tmp_path):
    visitor = visit(address)
    visitor.ask("What is <b>it</b>?", pictures / "1.png")
    with visitor.page.expect_download() as told:
        visitor.button("Download").click()
    told.value.save_as(tmp_path / "talk.html")
    text = (tmp_path / "talk.html").read_text(encoding="utf-8")
    assert "What is &lt;b&gt;it&lt;/b&gt;?" in text
    assert text.count("data:image/jpeg;base64,") == 1


def test_a_link_opens_the_conversation_elsewhere(visit, address, pictures):
    visitor = visit(address)
    visitor.ask("What is it?", pictures / "1.png")
    visitor.button("Link").click()
    visitor.page.wait_for_function(
        "(document.querySelector('#link input, #link textarea')?.value || '').includes('?talk=')"
    )
    visitor.shot("link")
    link = visitor.page.locator("#link input, #link textarea").first.input_value()
    assert link.startswith(address)
    friend = visit(address, "?" + link.partition("?")[2])
    friend.page.wait_for_selector("#chat-0 .bot-row")
    assert friend.said() == visitor.said()
    friend.ask("And now?")
    assert "3 turns, 1 pictures: And now?" in friend.said()[-1]
    assert len(visitor.said()) == 1
    late = visit(address, "?talk=nothing")
    late.page.wait_for_selector(".toast-body")
    assert "no longer kept" in late.page.locator(".toast-body").inner_text()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("state", ["empty", "talk", "compare", "seen"])
def test_there_is_no_violation_of_level_a(visit, address, real, page_of, pictures, state, dark):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    where = {"compare": lambda: page_of(FakeSpeaker("a"), FakeSpeaker("b")), "seen": lambda: real}
    scheme = "dark" if dark else "light"
    visitor = visit(where.get(state, lambda: address)(), color_scheme=scheme)
    if state != "empty":
        visitor.ask("What is it?", pictures / "1.png")
    if state == "seen":
        visitor.page.get_by_text("What the model saw").click()
        visitor.page.locator("#look").click()
        visitor.page.wait_for_selector("#seen-pictures img")
    if state == "talk":
        visitor.button("Settings").click()
        visitor.page.wait_for_selector("#settings.open")
    visitor.page.wait_for_timeout(400)  # what was just drawn has its names
    visitor.shot(f"{state}-{scheme}")
    options = {"runOnly": {"type": "tag", "values": LEVEL_A}}
    found = axe.Axe().run(visitor.page, options=options).response["violations"]
    told = [(f["id"], f["help"], [n["html"][:200] for n in f["nodes"]]) for f in found]
    assert told == []
