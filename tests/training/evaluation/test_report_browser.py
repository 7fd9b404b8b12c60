"""The report in a real browser: no error, all figures there and decoded, nothing asked of any other host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.evaluation.browser import Browser, find_chromium, running
from tests.training.evaluation.made_up import write_run
from training.evaluation.report import write_report

CHROMIUM = find_chromium()
EVIL = "<script>alert(1)</script>"
DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(str(CHROMIUM), tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, categories=("bottle", EVIL, "50% $x_{"))
    return write_report(folder)


@needs_chromium
def test_the_report(browser: Browser, report: Path) -> None:
    count = "document.querySelectorAll('{}').length".format
    visit = browser.visit(report, count("script"), count('img:not([alt]), img[alt=""]'), "document.body.textContent")
    assert visit.faults() == []
    assert visit.requests[0] == report.as_uri()
    # On 2 data sets, 2 detectors have 2 plots; each of 3 classes has its patches, and 4 maps of 2 detectors on 3 kinds.
    assert len(visit.pictures) == 2 * (2 * 2 + 3 * (1 + 4 * 2 * 3))
    scripts, without_alt, text = visit.values
    assert (scripts, without_alt) == (0, 0)
    assert EVIL in text and "50% $x_{" in text


@needs_chromium
def test_it_is_light_or_dark_as_the_reader_has_it(browser: Browser, report: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    ink = background.replace("backgroundColor", "color")
    light, dark = (browser.visit(report, background, ink, dark=dark) for dark in (False, True))
    assert light.faults() == dark.faults() == []
    for visit, sign in ((light, 1), (dark, -1)):
        page, text = (sum(value) for value in visit.values)
        assert sign * (page - text) > 3 * 128


@needs_chromium
@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<img src="http://example.invalid/x.png">', "request: http://example.invalid/x.png"),
        ('<img src="http://example.invalid/x.png">', "picture: http://example.invalid/x.png"),
        ('<img src="data:image/png;base64,AAAA">', "picture: data:image/png;base64,AAAA"),
        ('<img src="missing.png">', "picture: file://"),
        ('<img hidden src="http://example.invalid/y.png">', "request: http://example.invalid/y.png"),
        (
            '<link rel="stylesheet" href="https://example.invalid/font.css">',
            "request: https://example.invalid/font.css",
        ),
        ('<script>fetch("https://example.invalid/")</script>', "request: https://example.invalid/"),
        ('<script>console.error("oh")</script>', "console: "),
        ('<script>throw new Error("oh")</script>', "console: "),
    ],
)
def test_a_page_with_a_fault_is_found_out(browser: Browser, tmp_path: Path, body: str, fault: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(f'<!DOCTYPE html><title>page</title><img src="{DOT}">{body}', encoding="utf-8")
    assert [one for one in browser.visit(page).faults() if one.startswith(fault)]


@needs_chromium
def test_a_page_without_a_fault(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f'<!DOCTYPE html><title>page</title><img src="{DOT}">', encoding="utf-8")
    visit = browser.visit(page)
    assert visit.faults() == []
    assert [one["width"] for one in visit.pictures] == [1]
