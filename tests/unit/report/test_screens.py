"""The report in a browser, on a wide screen and on a telephone's."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadcore.report.page import write_overlay, write_report
from tests.support.browser import Browser, find_browser
from tests.support.report_runs import THREE, folder, metrics

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome")
IN_SIGHT = """[...document.querySelectorAll(".changes td")].every((cell) => {
  const box = cell.getBoundingClientRect();
  return box.width > 0 && box.left >= 0 && box.right <= innerWidth;
})"""


def test_every_change_is_in_sight_and_nothing_is_wider_than_the_screen(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", metrics(), THREE)
    other = folder(tmp_path / "other", metrics(2, 5), {"after_gad": THREE["after_gad"]})
    (tmp_path / "profile").mkdir()
    with Browser(tmp_path / "profile") as browser:
        for page in (write_report(run), write_overlay(run, other)):
            for width in (1280, 390):
                browser.look(width, 900)
                browser.open(page)
                assert browser.run("document.documentElement.scrollWidth") <= width
                assert browser.run(IN_SIGHT), (page, width)
        assert browser.run("document.querySelector('#machinery').open") is False
        browser.click("nav a[href='#machinery']")
        browser.run("new Promise((done) => setTimeout(done, 100))")
        assert browser.run("document.querySelector('#machinery').open") is True
        assert browser.errors == []
