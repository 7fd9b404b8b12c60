"""The report: it stands alone, its links lead somewhere, names are escaped, and a real browser finds no fault."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from adpretrain_hf.errors import BundleError, InputError
from tests.training.evaluation.browser import Browser, find_chromium, running
from tests.training.evaluation.made_up import made_up_cell, made_up_result, made_up_shown, write_run
from training.evaluation.plan import FEATURES
from training.evaluation.report import write_report
from training.evaluation.store import load_results, save_result
from training.evaluation.tables import misses

EVIL = "<script>alert(1)</script>"
# On 2 data sets, 2 detectors have a plot; each of 3 classes has its patches, and 4 maps of 2 detectors on 3 kinds.
PICTURES = 2 * (2 + 3 * (1 + 4 * 2 * 3))


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.words += " "
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, name: str, attribute: str) -> list[str]:
        return [values[attribute] or "" for tag, values in self.tags if name in ("*", tag) and attribute in values]


def decoded(address: str) -> bytes:
    return base64.b64decode(address.partition(",")[2], validate=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, categories=("bottle", EVIL, "50% $x_{"))
    path = write_report(folder)
    assert path == folder / "report.html"
    return path


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_is_well_formed_and_its_links_lead_somewhere(page: Page) -> None:
    assert page.open == []
    ids = page.all("*", "id")
    assert len(ids) == len(set(ids))
    links = page.all("a", "href")
    assert {link[1:] for link in links} <= set(ids) and all(link.startswith("#") for link in links)
    assert len(links) == 2 * (3 + 3)  # of each data set the title, tables, detectors and three classes


def test_what_is_missed_is_listed(text: str, report: Path) -> None:
    assert "Missed where 5 % of the normal images are rejected" in text
    for result in load_results(report.parent):
        for name in misses(result)[:1]:
            assert f", first {name}" in text


def test_needs_nothing_else(text: str, page: Page) -> None:
    assert {source.partition(",")[0] for source in page.all("img", "src")} == {
        "data:image/svg+xml;base64",
        "data:image/png;base64",
        "data:image/jpeg;base64",
    }
    assert not re.search(r"(?i)<script|<iframe|<object|<embed|@import|@font-face|\burl\(|srcset|\bon\w+=", text)
    assert re.findall(r"https?:", text) == []
    assert page.all("link", "href") == ["data:,"]
    assert "default-src 'none'; img-src data:;" in page.all("meta", "content")[-1]


def test_every_picture_can_be_read_and_is_described(page: Page) -> None:
    sources, alts = page.all("img", "src"), page.all("img", "alt")
    assert len(sources) == len(alts) == PICTURES
    assert all(alts) and len(set(alts)) == len(alts)
    for source in sources:
        if source.startswith("data:image/svg"):
            ElementTree.fromstring(decoded(source))
            assert not re.search(rb'(?i)(href|src)="https?:|@import|url\(http', decoded(source))
        else:
            Image.open(io.BytesIO(decoded(source))).load()


def test_names_are_escaped(text: str, page: Page) -> None:
    assert EVIL in page.words and EVIL not in text
    assert any(EVIL in alt for alt in page.all("img", "alt"))


def test_has_the_tables(page: Page) -> None:
    words = " ".join(page.words.split())
    assert words.count("Mean of 3 classes") == 2
    assert "detector features image AUROC image AP image F1-max pixel AUROC pixel AP pixel F1-max AUPRO" in words
    assert "finished cells 36" in words
    assert "Gain of pretrained features" in words


def test_is_the_same_again(tmp_path: Path) -> None:
    write_run(tmp_path, data_sets=["visa"], categories=["candle"], detectors=["padim"])
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_settings_are_named_where_there_are_several(tmp_path: Path) -> None:
    for shots in (1, 4):
        for features in FEATURES:
            cell = made_up_cell(features=features, shots=shots)
            save_result(tmp_path, made_up_result(cell), made_up_shown(cell, number=1))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    sources = page.all("img", "src")
    assert sum(source.startswith("data:image/svg") for source in sources) == 2
    assert sum(source.startswith("data:image/jpeg") for source in sources) == 3  # of one choice of settings
    words = " ".join(page.words.split())
    assert "The anomalies that are found best and worst: 4 reference images, 0 % anomalies" in words
    assert "1 reference image, 0 % anomalies" in words


def test_without_patches_or_pictures(tmp_path: Path) -> None:
    cell = made_up_cell()
    save_result(tmp_path, made_up_result(cell), made_up_shown(cell, number=0))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert len(page.all("img", "src")) == 1
    assert "None was chosen." in page.words


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished cells to sum up: run some first"):
        write_report(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (cell, *_) = write_run(tmp_path, data_sets=["visa"], categories=["candle"], detectors=["padim"])
    (tmp_path / "cells" / f"{cell.name}.npz").write_bytes(b"PK")
    with pytest.raises(BundleError, match=r"padim__raw.*\.npz is damaged"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_seconds_and_megabytes_of_a_large_run(tmp_path: Path) -> None:
    """A twelfth of 12 categories x 6 detectors x 3 kinds of features at 224 px, in noise: the worst to compress."""
    detectors = ("patchcore", "padim", "featurenorm")
    write_run(tmp_path, data_sets=["mvtecad"], categories=("a", "b"), detectors=detectors, patches=300, side=224)
    began = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - began < 15
    assert path.stat().st_size < 15e6 / 12


def test_plots_are_imported_only_by_the_report() -> None:
    code = (
        "import sys, training.evaluation.tables, training.evaluation.store\n"
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# In a browser: no error, all figures there and decoded, nothing asked of any other host


CHROMIUM = find_chromium()
DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs the package chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(str(CHROMIUM), tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@needs_chromium
def test_the_report_has_no_fault_in_a_browser(browser: Browser, report: Path) -> None:
    count = "document.querySelectorAll('{}').length".format
    visit = browser.visit(report, count("script"), count('img:not([alt]), img[alt=""]'), "document.body.textContent")
    assert visit.faults() == []
    assert visit.requests[0] == report.as_uri()
    assert len(visit.pictures) == PICTURES
    scripts, without_alt, text = visit.values
    assert (scripts, without_alt) == (0, 0)
    assert EVIL in text and "50% $x_{" in text


@needs_chromium
def test_the_report_is_light_or_dark_as_the_reader_has_it(browser: Browser, report: Path) -> None:
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
