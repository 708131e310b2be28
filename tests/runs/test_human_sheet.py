"""The blind sheet in a real headless browser: by keyboard and by mouse, left and come back to, exported and tallied."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gadcore.evaluate.human import Sheet, make_sheet
from gadcore.evaluate.human_tally import tally
from tests.support import judging
from tests.support.browser import Browser, find_browser

pytestmark = [
    pytest.mark.skipif(
        find_browser() is None,
        reason="no Chromium or Chrome: apt-get install chromium-headless-shell, or name one by GADCORE_BROWSER",
    ),
    pytest.mark.timeout(180),
]

COUNT = 6
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>bold</b>"


@pytest.fixture
def sheet(tmp_path: Path) -> Sheet:
    # Long enough that both answers need scrolling.
    a = judging.rows([f"gad {i} " + "word " * 300 for i in range(COUNT)])
    b = judging.rows([f"seqkd {i} {HOSTILE}" for i in range(COUNT)])
    made = make_sheet(("gad", a), ("seqkd", b), set_name="held", title="Which answer is better?", seed=3)
    (tmp_path / "sheet.html").write_text(made.page, encoding="utf-8")
    (tmp_path / "key.json").write_text(json.dumps(made.key))
    return made


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    (tmp_path / "profile").mkdir()
    with Browser(tmp_path / "profile") as running:
        running.downloads_to(tmp_path)
        yield running
        assert running.errors == []


def begin(browser: Browser, folder: Path, rater: str = "Ada") -> None:
    browser.open(folder / "sheet.html")
    browser.run("document.getElementById('rater').focus()")
    browser.type(rater)
    browser.press("Enter")


def exported(browser: Browser, folder: Path, button: str, rater: str = "Ada") -> Path:
    for old in folder.glob("answers-*"):
        old.unlink()
    browser.click(button)
    end = time.monotonic() + 20
    while not (found := list(folder.glob(f"answers-*-{rater}.json"))):
        assert time.monotonic() < end, "nothing was downloaded"
        time.sleep(0.05)
    return found[0]


def choices(path: Path) -> list[str]:
    return [answer["choice"] for answer in json.loads(path.read_text())["answers"]]


def test_by_keyboard_from_the_name_to_the_tally(browser: Browser, sheet: Sheet, tmp_path: Path) -> None:
    begin(browser, tmp_path)
    assert browser.text("#asked") == f"Prompt 1 of {COUNT}"
    # gad wins wherever its text is seen: the key has to lead back to it.
    for i in range(COUNT):
        assert browser.run("document.activeElement.id") == "asked"
        assert browser.run("scrollY") == 0
        browser.press("ArrowLeft" if browser.text("#left .text").startswith("gad") else "ArrowRight")
        assert browser.text("#count") == f"{i + 1} of {COUNT} answered"
        assert browser.run("document.getElementById('bar').value") == i + 1
    assert browser.text("#thanks") == "All answered. Thank you!"
    path = exported(browser, tmp_path, "#finish")
    result = tally(tmp_path / "key.json", [path])
    assert (result["all"]["win"], result["all"]["n"], result["raters"][0]["missing"]) == (1, COUNT, 0)
    assert result["raters"][0]["rater"] == "Ada"
    assert set(choices(path)) == {"left", "right"}


def test_back_changes_an_answer_and_ties_count(browser: Browser, sheet: Sheet, tmp_path: Path) -> None:
    begin(browser, tmp_path)
    assert browser.run("document.getElementById('back').disabled")
    browser.press("Backspace")
    assert browser.text("#asked").startswith("Prompt 1 ")
    browser.press("ArrowDown")
    browser.press("ArrowLeft")
    browser.press("Backspace")
    assert browser.text("#asked").startswith("Prompt 2 ")
    assert browser.run("document.querySelector('[data-choice=left]').ariaPressed") == "true"
    browser.press("ArrowRight")
    assert browser.text("#asked").startswith("Prompt 3 ")
    assert browser.run("document.querySelector('[aria-pressed=true]')") is None
    assert choices(exported(browser, tmp_path, "#export")) == ["tie", "right"]
    assert "Exported 2 of 6" in browser.text("#said")


def test_from_the_end_back_to_the_last_prompt(browser: Browser, sheet: Sheet, tmp_path: Path) -> None:
    begin(browser, tmp_path)
    for _ in range(COUNT):
        browser.press("ArrowLeft")
    browser.press("ArrowLeft")  # nothing is left to be answered
    browser.press("Backspace")
    assert browser.text("#asked").startswith(f"Prompt {COUNT} ")
    browser.press("ArrowDown")
    assert choices(exported(browser, tmp_path, "#finish")) == ["left"] * (COUNT - 1) + ["tie"]


def test_buttons_do_what_keys_do(browser: Browser, sheet: Sheet, tmp_path: Path) -> None:
    browser.open(tmp_path / "sheet.html")
    browser.click("#go")
    assert browser.run("document.getElementById('pair').hidden"), "a name has to be given"
    browser.run("document.getElementById('rater').focus()")
    browser.type("Bo")
    browser.click("#go")
    for choice in ("left", "tie", "right"):
        browser.click(f"[data-choice={choice}]")
    browser.click("#back")
    browser.click("[data-choice=tie]")
    assert choices(exported(browser, tmp_path, "#export", "Bo")) == ["left", "tie", "tie"]


def test_keys_held_down_or_meant_for_the_browser_answer_nothing(browser: Browser, sheet: Sheet, tmp_path: Path) -> None:
    begin(browser, tmp_path)
    browser.press("ArrowLeft", repeat=True)
    for modifier in (1, 2, 4, 8):
        browser.press("ArrowRight", modifiers=modifier)
    assert browser.text("#count") == f"0 of {COUNT} answered"
    browser.press("ArrowLeft")
    assert browser.text("#count") == f"1 of {COUNT} answered"


def test_closed_and_opened_again_it_goes_on(sheet: Sheet, tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    with Browser(tmp_path / "profile") as first:
        begin(first, tmp_path)
        first.press("ArrowLeft")
        first.press("ArrowDown")
    with Browser(tmp_path / "profile") as second:
        second.downloads_to(tmp_path)
        second.open(tmp_path / "sheet.html")
        assert second.text("#hello") == f"Welcome back: 2 of {COUNT} answered"
        assert second.run("document.getElementById('rater').value") == "Ada"
        second.click("#go")
        assert second.text("#asked").startswith("Prompt 3 ")
        second.press("ArrowRight")
        assert choices(exported(second, tmp_path, "#export")) == ["left", "tie", "right"]
        assert second.errors == []


def test_a_browser_that_keeps_nothing_says_so(browser: Browser, sheet: Sheet, tmp_path: Path) -> None:
    refuse = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied') }})"
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=refuse)
    begin(browser, tmp_path)
    assert "keeps nothing" in browser.text("#trouble")
    browser.press("ArrowLeft")
    assert choices(exported(browser, tmp_path, "#export")) == ["left"]


def test_it_asks_the_network_for_nothing_and_texts_stay_texts(browser: Browser, sheet: Sheet, tmp_path: Path) -> None:
    begin(browser, tmp_path)
    sides = [browser.text(f"#{side} .text") for side in ("left", "right")]
    assert any(text.endswith(HOSTILE) for text in sides)
    assert browser.run("document.title") == "Which answer is better?"
    assert browser.run("document.querySelectorAll('img, b').length") == 0
    assert browser.requested == [(tmp_path / "sheet.html").resolve().as_uri()]


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read_in_both_schemes(browser: Browser, sheet: Sheet, tmp_path: Path, width: int) -> None:
    pages = {}
    for scheme in ("light", "dark"):
        browser.look(width, 844, scheme)
        browser.open(tmp_path / "sheet.html")
        browser.run("document.getElementById('rater').value || (document.getElementById('rater').value = 'Ada')")
        assert browser.run("document.documentElement.scrollWidth") <= width
        browser.click("#go")
        assert browser.run("document.documentElement.scrollWidth") <= width
        boxes = browser.run(
            "[...document.querySelectorAll('[data-choice], #left, #right')].map((node) => {"
            " const box = node.getBoundingClientRect(); return [box.left, box.right, box.top, box.bottom]; })"
        )
        left, right, *buttons = boxes
        assert all(box[0] >= 0 and box[1] <= width for box in boxes)
        # The buttons are in sight although the answers are longer than the window, and big enough for a thumb.
        assert all(box[3] <= 844 and box[3] - box[2] >= 44 for box in buttons)
        assert (right[0] > left[1]) == (width > 800), "side by side where there is room"
        assert min(contrasts(browser)) >= 4.5
        pages[scheme] = browser.run("getComputedStyle(document.body).backgroundColor")
    assert pages["light"] != pages["dark"]


CONTRASTS = """[...document.querySelectorAll('h1, h2, h3, .text, button:not(:disabled), #count, kbd')]
  .filter((node) => node.offsetParent).map((node) => {
    let ground = node;
    while (/, 0\\)$/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
    const light = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number)
      .map((c) => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
      .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
    const [low, high] = [node, ground].map((one, i) => light(getComputedStyle(one)[i ? 'backgroundColor' : 'color']))
      .sort((a, b) => a - b);
    return (high + .05) / (low + .05);
  })"""


def contrasts(browser: Browser) -> list[float]:
    """WCAG's contrast ratio of every visible text to what lies behind it."""
    return browser.run(CONTRASTS)


def test_names_roles_and_what_is_said(browser: Browser, sheet: Sheet, tmp_path: Path) -> None:
    begin(browser, tmp_path)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    told = {(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node.get("ignored")}
    for expected in (("button", "A is better"), ("button", "B is better"), ("button", "Tie"), ("heading", "Answer A"),
                     ("heading", "Prompt 1 of 6"), ("progressbar", "Prompts answered"),
                     ("group", "Which answer is better?"), ("region", "Answer B")):  # fmt: skip
        assert expected in told, expected
    browser.press("ArrowRight")
    assert browser.text("#said") == f"Prompt 1: B is better. 1 of {COUNT} answered."
    assert browser.run("document.getElementById('said').ariaLive") == "polite"
