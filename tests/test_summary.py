"""The summary notebook on a made-up study that has everything at once: variants, controls, one corruption more."""

import itertools
from unittest.mock import patch

import nbformat
import pandas as pd
import papermill
import pytest

from qreg_utils.names import CLEAN, CORRUPTIONS, Corruption
from qreg_utils.results import tidy, write_results
from qreg_utils.study import load_study, write_params
from tests.test_results import CODE
from tests.test_study import FP32, LSQ, ROOT, study_file

WEIGHTS = {"method": ["lsq", "gaussian-noise"], "weight_bits": 4, "activation_bits": None}
GRID = [{**setting, "variant": variant} for variant in (None, "no_augment") for setting in (FP32, LSQ, WEIGHTS)]
EXTENSION = """
from qreg_utils.names import CORRUPTIONS, Corruption

CORRUPTIONS.add(Corruption("rain", "heavy rain", "weather"))
"""


def made_up_frames(experiment):
    """Numbers of the right kind, and of no meaning."""
    seeds, gain = experiment.seeds, {"fp32": 0, "lsq": 1}.get(experiment.method, 2)
    offset = 70 - 10 * (experiment.variant is not None) + gain
    images = [(CLEAN, 0), *itertools.product(experiment.corruptions, experiment.severities)]
    metrics = [
        {"seed": seed, "corruption": name, "severity": severity, "metric": "accuracy", "value": value}
        for seed in seeds
        for name, severity in images
        for value in [0.0 if name == "rain" else offset + seed * gain - severity]
    ]
    epochs = [{"seed": seed, "epoch": epoch} for seed in seeds for epoch in range(experiment.epochs)]
    history = [{**row, "split": split, "loss": 2 / (1 + row["epoch"])} for row in epochs for split in ("train", "val")]
    shape = dict.fromkeys(["kurtosis", "clipped", "correlation", "distance_to_normal", "distance_to_uniform"], 0.02)
    layer = {"layer": "fc", "bits": 4, "weights": 100, "sigma": 0.1, "weight_sigma": 1.0, **shape}
    noise = [{**row, **layer} for row in epochs] if experiment.quantized else []
    penalty = [
        {"statistics": statistics, "seed": seed, "bits": bits, "noise": noise, "curvature": 0.1, **both}
        for statistics, seed, bits, noise in itertools.product(
            ("batch", "frozen"), seeds, (4, 2), ("normal", "uniform", "quantization")
        )
        for both in [{"predicted": 4.0**-bits, "measured": 4.0**-bits}]
    ]
    sharpness = [
        {"statistics": "batch", "seed": seed, "weights": weights, "measure": measure, "size": size, "value": 1.0 + seed}
        for seed, weights in itertools.product(seeds, ["unrounded", "quantized"][: 1 + experiment.quantized])
        for measure, size in (("relative_largest_eigenvalue", 0.0), ("relative_trace", 0.0), ("loss_rise", 0.1))
    ]
    rows = {"metrics": metrics, "history": history, "noise": noise, "penalty": penalty, "sharpness": sharpness}
    return {name: tidy(experiment, content) for name, content in rows.items()}


@pytest.fixture(scope="module")
def summarised(tmp_path_factory):
    """The results folder of the study, and the executed summary."""
    root = tmp_path_factory.mktemp("summary")
    folder = root / "results" / "toy"
    CORRUPTIONS.add(Corruption("rain", "heavy rain", "weather"))  # here; in the notebook's kernel it is an extension's
    try:
        path = study_file(root, GRID, extra_corruptions=["rain"], theory=True)
        study = load_study(path)
        write_params(study, path, folder)
        facts = {"wall_seconds": 60, "unverified_files": [], "corrupted_images": "made by qreg"}
        for experiment in study.experiments:
            with patch.multiple("qreg_utils.results", **CODE):
                write_results(folder / experiment.id, experiment, made_up_frames(experiment), facts)
    finally:
        CORRUPTIONS.remove("rain")
    (folder / "figures").mkdir()
    for name in ("training-digits-resnet20.png", "heatmap.png", "heatmap.svg.part"):
        (folder / "figures" / name).write_text("of an earlier summary")
    (root / "rainy.py").write_text(EXTENSION)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("QREG_EXTENSIONS", "rainy")
        patched.setenv("PYTHONPATH", str(root))
        patched.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        source, executed = ROOT / "notebooks" / "summary.ipynb", root / "executed.ipynb"
        papermill.execute_notebook(
            source, executed, {"study": str(folder)}, engine_name="qreg", progress_bar=False
        )  # an absolute path: not in this project
    return folder, nbformat.read(executed, as_version=4)


NETWORK, ABLATION = "digits-resnet8", "digits-resnet8-no_augment"


def test_the_figures_are_those_of_this_summary_and_no_others(summarised):
    """Curves for each variant; heatmaps and improvements with all of them; nothing that an earlier summary has left."""
    folder, _ = summarised
    kinds = ("training", "training-weights", "noise", "penalty", "sharpness", "severity")
    names = {f"{kind}-{network}" for kind in kinds for network in (NETWORK, ABLATION)}
    names |= {"heatmap", "heatmap-weights", f"improvement-{NETWORK}", f"improvement-weights-{NETWORK}"}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{ending}" for name in names for ending in ("png", "svg")
    }
    assert (folder / "figures" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert "<dc:date>" not in (folder / "figures" / "heatmap.svg").read_text(), "the same numbers give the same file"


def pages(notebook):
    """What the page shows, by kind."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    return {
        kind: [output["data"][kind] for output in outputs if kind in output.get("data", {})]
        for kind in ("text/markdown", "text/html", "image/png")
    }


def test_the_page_shows_variants_side_by_side_and_the_published_heatmap(summarised):
    folder, notebook = summarised
    page = pages(notebook)
    assert len(page["image/png"]) == len(list((folder / "figures").glob("*.png"))) + 1  # published, and in no file
    tables = [text for text in page["text/markdown"] if text.startswith("|")]
    of_ours = [text for text in tables if "ResNet-8" in text]
    assert len(of_ours) == 5  # results, gaps, noise, weights only, claims
    assert all("no_augment" in text for text in of_ours)
    captions = [text for text in page["text/html"] if "Made from 4 experiments" in text]
    assert captions and all("#source-digits-resnet8" in text for text in captions)


def test_tables_are_compared_within_a_variant_and_leave_out_other_corruptions(summarised):
    folder, _ = summarised
    table = pd.read_csv(folder / "table.csv", keep_default_na=False)
    assert set(table["variant"]) == {"", "no_augment"} and len(table) == 8
    ours, ablation = (table[table["variant"] == name].reset_index() for name in ("", "no_augment"))
    means = ours.set_index(["method", "activation_bits"])["avg_corrupted"]
    assert means["fp32", 32] == pytest.approx(70 - 2)  # severities 1 and 3; rain is 0
    assert (ours["avg_corrupted"] - ablation["avg_corrupted"]).tolist() == pytest.approx([10] * 4)
    assert "avg_corrupted_low" in table and not [name for name in table if name.endswith("_ci")]
    claims = pd.read_csv(folder / "claims.csv", keep_default_na=False)
    assert {"", "no_augment"} <= set(claims["variant"])
    text = (folder / "table.md").read_text()
    assert text.splitlines()[0].split("|")[3].strip() == "variant"
