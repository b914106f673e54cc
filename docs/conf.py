"""The book: `make book` builds a static site of the pages, the executed notebooks and the docstrings.

Its source is the project itself, so that a link between files holds on GitHub and in the book. Nothing is executed, and
no page loads anything from elsewhere: formulas become MathML, which browsers draw by themselves.
"""

import re
import shutil
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).resolve().parent))
import explore

PROJECT = Path(__file__).resolve().parent.parent
EXPERIMENT = "results/quick/few_digits-small_resnet8-lsq-w4a4/notebook"

project, author, copyright = "qreg", "the qreg founders", "the qreg founders, MIT"
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "results/walkthroughs/*.ipynb",
    "results/*/summary.ipynb",
]
include_patterns += [f"{EXPERIMENT}.ipynb"]
exclude_patterns = [".venv", ".git", "build", "docs/contents.md"]

extensions = ["myst_nb", "sphinx.ext.autodoc"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

html_theme = "sphinx_book_theme"
html_title = "qreg"
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    "show_toc_level": 2,
}

# What one runs in the project, one reads as executed in the book.
EXECUTED = {
    r"notebooks/(?P<name>\d\w+)\.ipynb": r"results/walkthroughs/\g<name>.ipynb",
    r"notebooks/summary\.ipynb": "results/quick/summary.ipynb",
    r"notebooks/(classification|detection)\.ipynb": f"{EXPERIMENT}.ipynb",
}
JUPYTERS_ANCHORS = r"#(Where-the-numbers-come-from|A-verdict-on-every-claim)"


def as_executed(app, page: str, source: list[str]) -> None:
    """Links to notebooks lead to executed ones, their charts are live; under the README is the table of contents."""
    for notebook, executed in EXECUTED.items():
        source[0] = re.sub(rf"(\]\((?:\.\./)*){notebook}", rf"\1{executed}", source[0])
    source[0] = re.sub(JUPYTERS_ANCHORS, lambda anchor: anchor[0].lower(), source[0])
    source[0] = re.sub(r"<!-- chart: (\w+) -->", lambda chart: explore.as_html(chart[1]), source[0])
    if Path(app.env.doc2path(page)).suffix == ".ipynb":
        source[0] = explore.with_live_charts(source[0])
    if page == root_doc:
        source[0] += (PROJECT / "docs" / "contents.md").read_text(encoding="utf-8")


def add_script(app, page: str, template: str, context: dict, tree) -> None:
    """Only pages with charts load what draws them."""
    if 'class="chart"' in context.get("body", ""):
        app.add_js_file("vega.js", loading_method=None)


def write_script(app) -> None:
    explore.write_script(Path(app.outdir) / "_static" / "vega.js")


def copy_linked_files(app, failed: Exception | None) -> None:
    """What summaries link to of each experiment, and the published numbers: files in the book."""
    results = PROJECT / "results"
    for pattern in ("*/*/notebook.ipynb", "*/*/run.json", "published/*.csv"):
        for path in results.glob(pattern):
            target = Path(app.outdir) / path.relative_to(PROJECT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def inline(translator, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def displayed(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (inline, None), (displayed, None))
    app.connect("source-read", as_executed)
    app.connect("builder-inited", write_script)
    app.connect("html-page-context", add_script)
    app.connect("build-finished", copy_linked_files)
