"""Every number leads back to the experiments that made it, and what they do not have in common is reported."""

import re

import pandas as pd
import pytest

from qreg_utils.metrics import cell_scores, corruption_average, difference_to_fp32, results_table
from qreg_utils.names import CLEAN, PAPER_CORRUPTIONS
from qreg_utils.provenance import as_markdown, caption, facts, source_experiments, table, warnings
from qreg_utils.results import tidy
from qreg_utils.study import load_study
from tests.test_study import FP32, LSQ, SCENES, study_file

NAMES = ("digits-resnet8-fp32", "digits-resnet8-lsq-w4a4", "digits-resnet8-lsq-w4", "digits-resnet8-lsq-w2")
WEIGHTS = {**LSQ, "weight_bits": [4, 2], "activation_bits": None}


@pytest.fixture
def experiments(tmp_path):
    return load_study(study_file(tmp_path, [FP32, LSQ, WEIGHTS])).experiments


def metrics_of(experiments):
    """Made-up scores of every seed on the clean images and all corruptions."""
    rows = {"metric": "accuracy", "value": 90.0}
    frames = [
        tidy(experiment, [{"seed": seed, "corruption": c, "severity": 1, **rows} for c in (CLEAN, *PAPER_CORRUPTIONS)])
        for experiment in experiments
        for seed in experiment.seeds
    ]
    return pd.concat(frames, ignore_index=True)


def run(**changes):
    """What run.json says of a clean run."""
    facts = {"parameters": {"model": "resnet8"}, "commit": "a" * 40, "dirty": False, "python": "3.11.7"}
    facts |= {"versions": {"torch": "2.15.0", "ultralytics": "8.4.0"}, "platform": "linux x86_64", "processor": "Xeon"}
    facts |= {"cores": 2, "threads": 1, "gpu": None, "wall_seconds": 90.0, "peak_memory_mib": 1100}
    return {**facts, "finished": "2026-11-24T04:05:06+02:00", **changes}


def listed(text):
    return re.findall(r'<a href="#source-([^"]*)">\1</a>', text)


def test_rows_name_the_experiments_that_made_them(experiments):
    metrics = metrics_of(experiments)
    assert source_experiments(experiments, metrics) == list(NAMES)
    assert source_experiments(experiments, metrics[metrics["weight_bits"] == 2]) == [NAMES[3]]
    first, last = (metrics[metrics["experiment"] == name] for name in (NAMES[0], NAMES[3]))
    assert source_experiments(experiments, last, first, pd.DataFrame()) == [NAMES[0], NAMES[3]]
    assert source_experiments(experiments) == []


def test_rows_that_no_longer_name_it_are_known_by_their_configuration(experiments):
    cells = cell_scores(metrics_of(experiments))
    assert "experiment" not in cells
    assert source_experiments(experiments, cells[cells["activation_bits"] == 32]) == [NAMES[0], *NAMES[2:]]
    assert source_experiments(experiments, cells[cells["activation_bits"] == 4]) == [NAMES[1]]


def test_differences_to_fp32_come_from_its_experiment_too(experiments):
    cells = cell_scores(metrics_of(experiments))
    deltas = difference_to_fp32(cells)
    assert source_experiments(experiments, deltas[deltas["activation_bits"] == 4]) == [NAMES[0], NAMES[1]]
    assert source_experiments(experiments, deltas[deltas["activation_bits"] == 4].assign(experiment=NAMES[1])) == list(
        NAMES[:2]
    )
    averages = results_table(corruption_average(cells, PAPER_CORRUPTIONS))
    assert source_experiments(experiments, averages[averages["weight_bits"] == 2]) == [NAMES[0], NAMES[3]]


def test_the_fp32_of_another_data_set_has_no_part_in_a_difference(tmp_path):
    experiments = load_study(study_file(tmp_path, [FP32, LSQ, {**SCENES, **FP32}, {**SCENES, **LSQ}])).experiments
    deltas = difference_to_fp32(cell_scores(metrics_of(experiments)))
    ours = deltas[deltas["dataset"] == "digit_scenes"]
    assert source_experiments(experiments, ours) == ["digit_scenes-yolov5n-fp32", "digit_scenes-yolov5n-lsq-w4a4"]


def test_the_fp32_of_another_variant_has_no_part_in_a_difference(tmp_path):
    grid = [FP32, LSQ, {**FP32, "variant": "wide"}, {**LSQ, "variant": "wide"}]
    experiments = load_study(study_file(tmp_path, grid)).experiments
    metrics = metrics_of(experiments)
    deltas = difference_to_fp32(cell_scores(metrics))
    wide = ["digits-resnet8-wide-fp32", "digits-resnet8-wide-lsq-w4a4"]
    assert source_experiments(experiments, deltas[deltas["variant"] == "wide"]) == wide
    assert source_experiments(experiments, deltas[deltas["variant"] == ""]) == list(NAMES[:2])
    assert source_experiments(experiments, cell_scores(metrics)) == [*NAMES[:2], *wide]


def test_experiments_that_differ_in_their_seeds_are_told_apart_where_rows_have_seeds(tmp_path):
    grid = [{**setting, "seeds": [seed]} for setting in (FP32, LSQ) for seed in (0, 1)]
    experiments = load_study(study_file(tmp_path, grid)).experiments
    deltas = difference_to_fp32(cell_scores(metrics_of(experiments)))
    assert source_experiments(experiments, deltas[deltas["seed"] == 1]) == [f"{NAMES[0]}-seed1", f"{NAMES[1]}-seed1"]
    assert len(source_experiments(experiments, deltas.drop(columns="seed"))) == 4


def test_rows_of_an_experiment_that_has_not_finished_are_an_error(experiments):
    metrics = metrics_of(experiments)
    for rows in (metrics, cell_scores(metrics)):
        with pytest.raises(ValueError, match=r"rows of no finished experiment: .*lsq"):
            source_experiments(experiments[:3], rows)


def test_a_caption_lists_exactly_the_experiments(experiments):
    text = caption({name: run() for name in NAMES[:2]})
    assert listed(text) == list(NAMES[:2])
    assert "Made from 2 experiments (commit <code>aaaaaaaaaa</code>)" in text and "⚠" not in text
    one = caption({NAMES[0]: run()})
    assert listed(one) == [NAMES[0]] and "Made by <a" in one and "details" not in one


def test_a_caption_names_the_published_numbers():
    link = '<a href="../published/table.csv">results/published/table.csv</a>'
    assert f"The paper's numbers: {link}" in caption({}, "table.csv")
    assert f" and the paper's numbers, {link}" in caption({name: run() for name in NAMES}, "table.csv")


def test_nothing_is_flagged_where_nothing_differs():
    runs = {name: run(wall_seconds=seconds) for seconds, name in enumerate(NAMES)}
    assert warnings(runs) == []
    others = {"torch": "2.15.0", "ultralytics": "9.0"}
    assert warnings(runs | {"more": run(versions=others)}) == [], "ultralytics plays no part in a classifier"
    assert warnings(runs | {"more": run(versions={"torch": "2.15.0"})}) == []
    detector = run(parameters={"model": "yolov5n"})
    assert warnings(runs | {"detector": detector}) == []
    assert warnings({"a": detector, "b": {**detector, "versions": others}}) == [
        "**WARNING: different versions of ultralytics**: ultralytics 8.4.0: a; ultralytics 9.0: b"
    ]


A, B = run(), run(commit="b" * 40)


@pytest.mark.parametrize(
    "runs, warning, flag",
    [
        (
            {"one": A, "two": B, "three": A, "four": A},
            "2 code versions**: commit `bbbbbbbbbb`: two; commit `aaaaaaaaaa`: the other 3",
            "2 code versions",
        ),
        (
            {"one": A, "two": run(dirty=True)},
            "uncommitted changes (1 of 2)**: two",
            "uncommitted changes (1 of 2)",
        ),
        ({"one": run(dirty=True)}, "uncommitted changes**: all experiments", "uncommitted changes"),
        ({"one": A, "two": run(commit=None, dirty=None)}, "unknown commit (1 of 2)**: two", "unknown commit (1 of 2)"),
        ({"one": run(commit=None, dirty=None)}, "unknown commit**: all experiments", "unknown commit"),
        (
            {"one": A, "two": run(versions={"torch": "2.16.0+cu1"}), "three": A},
            "different versions of torch**: torch 2.16.0+cu1: two; torch 2.15.0: one, three",
            "different versions of torch",
        ),
        (
            {"one": A, "two": run(gpu="NVIDIA H100*", cores=16)},
            "different hardware (cores, GPU)**: 2 cores, no GPU: one; `16 cores, NVIDIA H100*`: two",
            "different hardware (cores, GPU)",
        ),
    ],
)
def test_what_differs_is_flagged_at_the_top_and_under_the_figure(runs, warning, flag):
    assert warnings(runs) == [f"**WARNING: {warning}"]
    assert f"<b>⚠ {flag}</b>" in caption(runs)


def test_many_experiments_are_counted():
    runs = {f"e{number}": A if number < 20 else B for number in range(30)}
    first = ", ".join(f"e{number}" for number in range(20, 28))
    which = f"commit `bbbbbbbbbb`: {first} and 2 more; commit `aaaaaaaaaa`: the other 20"
    assert warnings(runs) == [f"**WARNING: 2 code versions**: {which}"]


X, Y = "0123456789abcdef", "fedcba9876543210"
DETECTOR = {"model": "yolov5n", "dataset": "digit_scenes"}


def test_runs_of_the_same_code_are_of_one_version_whatever_their_commits():
    runs = {"one": run(code=X), "two": run(code=X, commit="b" * 40), "three": run(code=X, commit=None)}
    assert warnings({name: runs[name] for name in ("one", "two")}) == []
    assert warnings(runs) == ["**WARNING: unknown commit (1 of 3)**: three"]
    text = caption({name: runs[name] for name in ("one", "two")})
    assert "(commits <code>aaaaaaaaaa</code>, <code>bbbbbbbbbb</code>)" in text and "⚠" not in text


@pytest.mark.parametrize(
    "runs, which",
    [
        (
            {"one": run(code=X), "two": run(code=Y, commit="b" * 40), "three": run(code=X, commit="c" * 40)},
            "commit `bbbbbbbbbb`: two; commit `aaaaaaaaaa`, commit `cccccccccc`: one, three",
        ),
        (
            {"one": run(code=X), "two": run(code=Y), "three": run(code=X)},
            f"commit `aaaaaaaaaa`, code `{Y}`: two; commit `aaaaaaaaaa`, code `{X}`: one, three",
        ),
        (
            {"one": run(code=X), "two": run(code=X, commit="b" * 40), "old": run(commit="c" * 40)},
            "commit `cccccccccc`: old; commit `aaaaaaaaaa`, commit `bbbbbbbbbb`: one, two",
        ),
        (
            {"old": run(), "detector": run(code=X, commit="b" * 40, parameters=DETECTOR)},
            "commit `aaaaaaaaaa`: old; commit `bbbbbbbbbb`: detector",
        ),
    ],
)
def test_other_code_is_another_version_also_of_the_same_commit(runs, which):
    assert warnings(runs) == [f"**WARNING: 2 code versions**: {which}"]


@pytest.mark.parametrize(
    "others",
    [
        {"old": run(commit="b" * 40)},  # the commit of one of those with a digest
        {"detector": run(code=Y, parameters=DETECTOR)},  # digests of two tasks are never the same
        {"detector": run(code=Y, commit="b" * 40, parameters=DETECTOR), "old": run()},
    ],
)
def test_runs_without_a_digest_or_of_another_task_go_by_their_commits(others):
    runs = {"one": run(code=X), "two": run(code=X, commit="b" * 40)}
    assert warnings(runs | others) == warnings(others | runs) == []


def test_without_git_the_digests_tell_the_versions_apart():
    nowhere = {"commit": None, "dirty": None}
    runs = {"one": run(code=X, **nowhere), "detector": run(code=Y, parameters=DETECTOR, **nowhere)}
    unknown = "**WARNING: unknown commit**: all experiments"
    assert warnings(runs) == [unknown]
    versions = f"**WARNING: 2 code versions**: code `{Y}`: two; code `{X}`, code `{Y}`: one, detector"
    assert warnings(runs | {"two": run(code=Y, **nowhere)}) == [versions, unknown]


def test_the_digest_is_a_fact_where_some_run_has_one():
    assert "code" not in facts({"one": A, "two": B})
    assert facts({"one": A, "two": run(code=X)})["code"].tolist() == ["unknown code", f"code {X}"]
    header = re.findall("<th>(.*?)</th>", table({"one": A, "two": run(code=X)}))
    assert header[:2] == ["experiment", "code"]
    assert f"code {X}, no uncommitted changes" in table({"one": run(code=X), "two": run(code=X)})


def test_a_caption_says_which_experiment_is_of_which_code():
    text = caption({"one": A, "two": B, "three": A})
    assert "(commits <code>aaaaaaaaaa</code>, <code>bbbbbbbbbb</code>) <b>⚠ 2 code versions</b>" in text
    of_a, of_b = text.partition("</summary>")[2].split("<br>")
    assert of_a.startswith("<code>aaaaaaaaaa</code>") and listed(of_a) == ["one", "three"] and listed(of_b) == ["two"]


def test_every_link_of_a_caption_leads_to_a_row_of_the_table():
    runs = {name: run() for name in NAMES}
    assert re.findall(r'<tr id="source-([^"]*)">', table(runs)) == listed(caption(runs)) == list(NAMES)


def test_what_all_runs_share_is_said_once_and_what_differs_in_columns():
    text = table({"one": A, "two": {**B, "gpu": "H100"}})
    above, rows = text.split("<table")
    assert "The same for all: no uncommitted changes, Python 3.11.7, torch 2.15.0, linux x86_64, Xeon, 2 cores" in above
    header = re.findall("<th>(.*?)</th>", rows)
    assert header[:3] == ["experiment", "commit", "GPU"]
    cells = re.findall("<td>(.*?)</td>", rows)[: len(header)]
    assert cells[:-1] == ["one", "aaaaaaaaaa", "no GPU", "1.5", "1100", "2026-11-24 02:05"]
    assert '<a href="one/notebook.ipynb">' in cells[-1] and '<a href="one/run.json">' in cells[-1]
    assert "commit <code>aaaaaaaaaa</code>, " in table({"one": A}) and "<th>commit" not in table({"one": A})


def test_versions_that_only_some_have_leave_the_others_empty():
    detector = run(parameters={"model": "yolov5n"})
    newer = {**detector, "versions": {"torch": "2.15.0", "ultralytics": "9.0"}}
    rows = table({"one": A, "two": detector, "three": newer}).split("<tr ")[1:]
    assert ["<td></td>" in row for row in rows] == [True, False, False]


def test_ids_and_values_are_escaped():
    foreign = {'"><script>': run(gpu="<i>&"), "other": run(commit="<u>", versions={"<s>": "1"})}
    for text in (table(foreign), caption(foreign, "<p>")):
        assert not re.search(r"<(script|i|u|s|p)>(?!The same)", text)
        assert "&quot;&gt;&lt;script&gt;" in text


@pytest.mark.parametrize("text", ["Intel(R) Xeon(R) CPU, 2.6 GHz", "made with other parameters"])
def test_plain_text_stays_plain(text):
    assert as_markdown(text) == text


@pytest.mark.parametrize("text", ["a|b", "*a*", "_a_", "`a`", "<a>", "$a$", "[a](b)", "a\\b", "~~a~~"])
def test_text_with_a_meaning_in_markdown_is_shown_as_it_is(text):
    assert as_markdown(text) == f"`{text.replace('`', chr(39))}`"
