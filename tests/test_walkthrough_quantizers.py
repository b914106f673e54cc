"""What is particular to walkthroughs 1 and 1b: a slider, shown to whoever runs it by hand, and the folded solutions."""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

from qreg_utils.batch.papermill_engine import PROVISIONER

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
EXERCISES = {"1_quantizers": 2, "1b_learned_steps": 1}
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.DOTALL)


@pytest.fixture(scope="module", params=EXERCISES)
def live(request):
    """The notebook's name, the notebook executed as by hand, with the solutions as its last cells, and its client."""
    notebook = nbformat.read(NOTEBOOKS / f"{request.param}.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    notebook.cells += [nbformat.v4.new_code_cell(solution) for solution in SOLUTION.findall(text)]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="qreg-") as folder:
        sockets = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})  # as in the batch: no TCP ports
        client = NotebookClient(notebook, kernel_name="python3", timeout=300, config=sockets)
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        patch.setenv("JUPYTER_DEFAULT_PROVISIONER_NAME", PROVISIONER)
        patch.delenv("QREG_STATIC", raising=False)
        client.execute()
    return request.param, notebook, client


@pytest.mark.parametrize("live", ["1b_learned_steps"], indirect=True)
def test_the_slider_is_there_and_has_drawn_its_figure(live):
    _, notebook, client = live
    (cell,) = [cell for cell in notebook.cells if "interact(" in cell.source]
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in cell.outputs)
    widgets = {state["_model_name"]: state for state in client.widget_state.values()}
    slider = widgets["IntSliderModel"]
    assert (slider["min"], slider["max"]) == (2, 8)
    assert any("image/png" in output["data"] for output in widgets["OutputModel"]["outputs"])


def test_every_exercise_has_a_solution_that_runs(live):
    name, notebook, _ = live
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert len(SOLUTION.findall(text)) == text.count("### Exercise") == text.count("<details>") == EXERCISES[name]
    for cell in notebook.cells[-EXERCISES[name] :]:
        assert cell.cell_type == "code" and cell.outputs and cell.execution_count
