"""The walkthrough notebooks, executed from their first cell to their last at toy size."""

from base64 import b64decode
from pathlib import Path

import nbformat
import papermill
import pytest
import vl_convert

from qreg_utils.batch import walkthroughs
from qreg_utils.batch.walkthroughs import relinked
from qreg_utils.figures.interactive import MIME, SCHEMA

ROOT = Path(__file__).resolve().parent.parent
TOY = {
    "1_quantizers": {"num_values": 2000},
    "1b_learned_steps": {"num_values": 2000, "iterations": 10, "epochs": 1, "num_images": 96},
    "2_noise_model": {"epochs": 1, "train_images": 64, "num_images": 8, "batch_size": 8, "draws": 2},
    "3_corruptions": {"height": 64, "epochs": 1, "num_images": 24},
    "4_what_regularizes": {},  # trains nothing
}


OLDEST = "5.8"  # version of Vega-Lite to try: JupyterLab has 5.6
CHARTS = {"1_quantizers": 1, "4_what_regularizes": 2}  # that answer when they are pointed at


def test_every_walkthrough_has_a_toy_size():
    assert set(TOY) == {path.stem for path in (ROOT / "notebooks").glob("[0-9]*_*.ipynb")}


@pytest.mark.parametrize("name", TOY)
def test_a_walkthrough_runs_and_shows_its_figures(name, tmp_path, monkeypatch):
    monkeypatch.setenv("QREG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    source, executed = ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "executed.ipynb"
    papermill.execute_notebook(source, executed, TOY[name], engine_name="qreg", progress_bar=False)
    cells = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"], "warnings on the page"
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert not [kind for kind in kinds if "widget" in kind], "nobody can move a slider on a page"
    check_charts(outputs, CHARTS.get(name, 0))
    pictures = sum({"image/png", "image/jpeg"} & set(output.get("data", {})) != set() for output in outputs)
    figures = sum(cell.source.rstrip().endswith(");") for cell in cells)
    assert pictures >= figures > 0


def check_charts(outputs, number):
    """Each is drawn by JupyterLab without a kernel, and has a small picture for those who cannot."""
    charts = [output for output in outputs if MIME in output.get("data", {})]
    assert len(charts) == number
    for chart in charts:
        specification, picture = chart.data[MIME], b64decode(chart.data["image/png"])
        assert specification["$schema"] == SCHEMA
        assert specification["description"] == chart.data["text/plain"]
        assert picture.startswith(b"\x89PNG") and len(picture) < 100_000
        vl_convert.vegalite_to_vega(specification, vl_version=OLDEST)


@pytest.mark.parametrize("name", TOY)
def test_the_executed_walkthrough_is_that_of_the_source(name):
    source = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    executed = nbformat.read(ROOT / "results" / "walkthroughs" / f"{name}.ipynb", as_version=4)
    folders = (Path("notebooks"), Path("results/walkthroughs"))
    assert [cell.source for cell in executed.cells] == [relinked(cell.source, *folders) for cell in source.cells]
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    check_charts([output for cell in code for output in cell.outputs], CHARTS.get(name, 0))
    assert (ROOT / "results" / "walkthroughs" / f"{name}.ipynb").stat().st_size < 3_000_000


def test_links_lead_to_the_same_files_from_another_folder():
    text = "[a](../docs/methods.md), [b](summary.ipynb), [c](https://x.org/a), [d](#here), [e](1b_learned_steps.ipynb)"
    assert relinked(text, Path("notebooks"), Path("results/walkthroughs")) == (
        "[a](../../docs/methods.md), [b](../../notebooks/summary.ipynb), [c](https://x.org/a), [d](#here), "
        "[e](1b_learned_steps.ipynb)"
    )


@pytest.mark.parametrize(
    "numbers, names",
    [(["1"], ["1_quantizers"]), (["1b", "4"], ["1b_learned_steps", "4_what_regularizes"]), ([], list(TOY))],
)
def test_walkthroughs_are_chosen_by_their_numbers(numbers, names, monkeypatch):
    chosen = []
    monkeypatch.setattr(walkthroughs, "execute_walkthrough", lambda notebook, target: chosen.append(notebook.stem))
    walkthroughs.main(numbers)
    assert chosen == names
