"""The book: built without a warning, whole by itself, readable in a browser on a desk and on a phone."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
CHARTS = {"docs/explore": 3, "results/walkthroughs/1_quantizers": 1, "results/walkthroughs/4_what_regularizes": 2}
LOADED = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-b", "html", ".", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@cache
def parsed(page):
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(page):
    return {tag["id"] for tag in parsed(page).find_all(id=True)}


def pages(book):
    return [path for path in book.rglob("*.html") if path.name not in ("search.html", "genindex.html")]


def test_its_pages_are_those_of_the_project(book):
    found = {path.relative_to(book).with_suffix("").as_posix() for path in pages(book)}
    docs = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"contents"}
    studies = {path.parent.name for path in (ROOT / "results").glob("*/summary.ipynb")}
    walkthroughs = {path.stem for path in (ROOT / "notebooks").glob("[0-9]*_*.ipynb")}
    assert {"README", *(f"docs/{name}" for name in docs)} <= found
    assert {*(f"results/{name}/summary" for name in studies)} <= found
    assert {*(f"results/walkthroughs/{name}" for name in walkthroughs)} <= found


def test_no_link_is_broken(book):
    broken = []
    for page in pages(book):
        for tag in parsed(page).find_all("a", href=True):
            address, anchor = urldefrag(tag["href"])
            if ":" in address:
                continue
            target = (page.parent / unquote(address)).resolve() if address else page
            if not target.exists() or (anchor and target.suffix == ".html" and unquote(anchor) not in anchors(target)):
                broken.append(f"{page.relative_to(book)}: {tag['href']}")
    assert not broken


def test_no_link_is_left_as_text(book):
    for page in pages(book):
        text = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        for tag in text.find_all(["code", "pre", "script", "math"]):
            tag.decompose()
        assert "](" not in text.get_text(), page


def test_nothing_is_loaded_from_elsewhere(book):
    loaded = [
        f"{page.name}: {tag[attribute]}"
        for page in pages(book)
        for name, attribute in LOADED.items()
        for tag in parsed(page).find_all(name)
        if tag.get(attribute, "").startswith(("http", "//")) and "canonical" not in tag.get("rel", [])
    ]
    assert not loaded


def test_every_formula_is_drawn(book):
    text = parsed(book / "results" / "walkthroughs" / "2_noise_model.html")
    assert len(text.find_all("math")) > 20
    assert "$" not in text.find("article").find("p").get_text()


def test_the_charts_are_of_the_committed_results(book):
    page = parsed(book / "docs" / "explore.html")
    assert [tag.div["id"] for tag in page.find_all(class_="chart")] == ["quantizer", "heatmap", "verdicts"]
    text = str(page)
    assert '"study": "mechanism"' in text and '"corruption": "fog"' in text and '"relative noise"' in text


def test_pages_with_charts_are_live_and_no_other_page_loads_what_draws_them(book):
    charts, loading = {}, set()
    for page in pages(book):
        name = page.relative_to(book).with_suffix("").as_posix()
        for tag in parsed(page).find_all(class_="chart"):
            charts[name] = charts.get(name, 0) + 1
            (picture,) = tag.find_all("img")  # where scripts are off
            assert picture["alt"] == tag["aria-label"] and picture["src"].startswith("data:image/png;base64,")
            drawing = tag.find_next_sibling("script").string
            assert drawing.startswith(f'vegaEmbed("#{tag.div["id"]}", ')
        if any("vega.js" in tag["src"] for tag in parsed(page).find_all("script", src=True)):
            loading.add(name)
    assert charts == CHARTS and loading == set(CHARTS)


def test_every_picture_of_a_summary_says_what_it_shows(book):
    for page in book.glob("results/*/summary.html"):
        silent = [tag["src"] for tag in parsed(page).find("article").find_all("img") if not tag.get("alt")]
        assert not silent, page


# Opens pages in frames; the document then says, as JSON, which of them are wider than their frame.
FRAMES = """<!doctype html><title>frames</title><body><script>
const pages = PAGES, wide = {};
Promise.all(pages.map(page => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style = "width: WIDTHpx; height: 800px";
  frame.onload = () => {
    wide[page] = frame.contentDocument.documentElement.scrollWidth;
    done();
  };
  frame.src = page;
  document.body.append(frame);
}))).then(() => document.body.textContent = "WIDTHS" + JSON.stringify(wide));
</script>"""


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize("width", [1300, 390])
def test_a_browser_shows_every_page_without_an_error_and_within_its_width(book, tmp_path, width):
    names = [page.relative_to(book).as_posix() for page in pages(book)]
    frames = book / f"frames-{width}.htm"
    frames.write_text(FRAMES.replace("PAGES", json.dumps(names)).replace("WIDTHpx", f"{width}px"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path}", "--window-size=1400,900"]
    command += ["--virtual-time-budget=60000", "--dump-dom", frames.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    errors = [
        line for line in done.stderr.splitlines() if "CONSOLE" in line and re.search("[Ee]rror|[Ww]arn|Vega", line)
    ]
    assert not errors
    widths = json.loads(done.stdout.partition("WIDTHS")[2].partition("</body>")[0])
    assert set(widths) == set(names)
    assert not {name: found for name, found in widths.items() if found > width}
    for name, number in CHARTS.items():
        command = [*command[:-1], (book / f"{name}.html").as_uri()]
        page = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
        drawn = BeautifulSoup(page, "html.parser").find_all(class_="chart")
        assert len(drawn) == number
        assert all(len(tag.find_all("path")) > 20 for tag in drawn), f"{name}: a chart that is not drawn"
