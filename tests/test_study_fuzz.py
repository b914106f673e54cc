"""Params files that nobody should have written: each is accepted and runs, or is refused with one clear message.

Never a traceback, never a half-made results folder. The tests follow the Snakefile: load_study, then write_params.
"""

import os
import re
import tempfile
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qreg_utils.quantize import QuantizationError, quantize_model
from qreg_utils.study import Classification, Detection, StudyError, load_study, write_params
from qreg_utils.study.messages import MAX_PROBLEMS
from tests.test_batch import Project
from tests.test_study import COMMON, FP32, LSQ, SCENES

EXAMPLES = int(os.environ.get("QREG_FUZZ", 1))  # so many times more examples than in CI
FIELDS = [*{**Classification.model_fields, **Detection.model_fields}, "resources", "results_dir", "common", "grid"]
VOC = {**SCENES, **FP32, "dataset": "voc", "train_split": ["train2012", "mine.txt"], "classes": ["cat", "dog"]}
STUDY = {
    "description": "toy",
    "common": {**COMMON, "resources": {"runtime": 60, "gres": "gpu:1"}},
    "grid": [FP32, {**LSQ, "weight_bits": [4, 2], "resources": {"slurm_partition": "long"}}],
}
MIXED = {**STUDY, "grid": [FP32, {**SCENES, **FP32}, VOC]}


def many(examples):
    return settings(deadline=None, max_examples=examples * EXAMPLES)


def load_or_refuse(path):
    """The study, or None for one that is refused with readable lines that name the file."""
    try:
        return load_study(path)
    except StudyError as error:
        lines = str(error).split("\n")
        assert len(lines) <= MAX_PROBLEMS + 1
        for line in lines:
            assert line.startswith(f"{path}: ") or (line == "... and more" and len(lines) > MAX_PROBLEMS)
            assert line.isprintable() and len(line) < len(str(path)) + 700, line
        return None


def check(content: bytes):
    """What the Snakefile does with a params file; the study that comes out."""
    with tempfile.TemporaryDirectory() as folder:
        path, results = Path(folder, "toy.yaml"), Path(folder, "results", "toy")
        path.write_bytes(content)
        study = load_or_refuse(path)
        if study:
            write_params(study, path, results)
            assert load_study(results / "toy.yaml") == study
            for experiment in study.experiments:
                assert as_in_the_notebook(results / experiment.id / "params.yaml", experiment) == experiment
            assert set(study.resources) == {experiment.id for experiment in study.experiments}
            assert len(list(results.iterdir())) == len(study.experiments) + 1
        assert results.exists() == bool(study)
        assert {file.name for file in Path(folder).iterdir()} <= {"toy.yaml", "results"}
        return study


def as_in_the_notebook(file, experiment):
    """What comes out of papermill's ``-f``: the file becomes Python code, which is run."""
    from papermill.translators import PythonTranslator

    namespace = {"results_dir": "results/toy"}
    exec(PythonTranslator.codify(yaml.safe_load(file.read_text(encoding="utf-8"))), {}, namespace)
    return type(experiment).from_notebook(namespace, also=("results_dir",))


# --- params files that hypothesis makes -------------------------------------------------------------------------------

# fmt: off
SENSIBLE = [
    0, 1, 2, 3, 4, 8, 32, 64, 0.0, 0.1, 0.5, 1e-320, True, False, None, "same", "auto", "fp32", "lsq", "pact", "dorefa",
    "gaussian-noise", "gradient-penalty", "digits", "cifar10", "resnet20", "yolov5n", "voc", "digit_scenes", "cosine",
    "linear", "one-cycle", [0], [1, 2], [2, 4], [None, "same", 4], ["lsq", "pact"], ["train2012"], ["../up"], {},
    {"runtime": 5}, [{}],
]
TRICKS = [
    "&a ", "*a", " *a ", "&b [*b]", "!!set ", "!!binary ", "!!omap ", "!!pairs ", "!!str ", "!!int ", "!!bool ",
    "!!float ", "!!timestamp ", "!!python/object/apply:os.system ", "!!python/name:os.system ", "!new ", "!<x> ",
    "!%ff ", "<<: *a\n", "<<", "=", "= : 1", "? ", "? [1]\n: 2\n", "---\n", "...\n", "%YAML 9.9\n", "%TAG ! x\n",
    "|\n", ">\n", "\t", "\r", "\x00", "\x07", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\ufffe", "😀",
    '"\\ud800"', '"\\U00200000"', '"\\0"', '"\\x1b"', "'", '"', "#", ",", ":", ": ", "- ", "[", "]", "{", "}", "~",
    "null", ".nan", "-.inf", "1e400", "1.0e+400", "-1.0e+400", "1.0e-320", "9" * 5000, "-0x" + "f" * 5000, "0b_",
    "0x_", "08", "1_000", "59:" * 300 + "59.5", "2020-13-45", "2020-01-01 00:00:00", "!!int x", "!!bool maybe",
    "!!float ''", "on", "off",
]
# fmt: on
SCALARS = st.one_of(
    st.sampled_from(SENSIBLE),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=100),
    st.dates(),
    st.binary(max_size=5),
    st.sets(st.integers(), max_size=2),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(FIELDS) | st.one_of(st.text(max_size=200), st.integers(), st.booleans(), st.none(), st.floats())


@st.composite
def changed_studies(draw):
    """A valid study in which some keys are dropped, added or have other values."""
    content = yaml.safe_load(yaml.safe_dump(draw(st.sampled_from([STUDY, MIXED]))))
    for _ in range(draw(st.integers(0, 3))):
        places = [content, content.get("common"), *(content["grid"] if isinstance(content.get("grid"), list) else [])]
        place = draw(st.sampled_from([place for place in places if isinstance(place, dict)]))
        key = draw(st.sampled_from(list(place)) if place and draw(st.booleans()) else KEYS)
        if draw(st.integers(0, 4)) == 0:
            place.pop(key, None)
        else:
            place[key] = draw(VALUES)
    return content


@st.composite
def changed_texts(draw):
    """The text of a study with YAML's tricks in it, and lines that are there twice."""
    content = draw(changed_studies() | st.just(STUDY))
    text = yaml.safe_dump(content, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.booleans()))
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 3)) == 0:
            lines = text.splitlines(keepends=True) or [""]
            text = "".join([*lines, ""]).replace(line := draw(st.sampled_from(lines)), line * 2, 1)
        else:
            starts = [i + 2 for i in range(len(text)) if text[i : i + 2] in (": ", "- ", "[[", "{{")]
            place = draw(st.sampled_from(starts) if starts and draw(st.booleans()) else st.integers(0, len(text)))
            text = text[:place] + draw(st.sampled_from(TRICKS)) + text[place:]
    return text


@many(200)
@given(changed_studies())
def test_a_changed_study_is_accepted_and_laid_out_or_refused(content):
    check(yaml.safe_dump(content).encode())


@many(250)
@given(changed_texts())
def test_yamls_tricks_are_understood_or_refused(text):
    check(text.encode())


@many(200)
@given(st.lists(st.sampled_from([*TRICKS, "\n", " ", "  ", "common:", "grid:", "method: ", "fp32"]) | st.text()))
def test_random_yaml_is_refused(parts):
    assert check("".join(parts).encode(errors="replace")) is None


@many(100)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_random_bytes_are_refused(content, place):
    assert check(content) is None
    text = yaml.safe_dump(STUDY).encode()
    check(text[:place] + content + text[place:])


# --- what is accepted can be built and trained ------------------------------------------------------------------------

BITS = st.integers(2, 8)
RATES = st.floats(0, 1, exclude_max=True) | st.just(1e-320)


@cache
def resnet8():
    from qreg_utils.models import build_model

    return build_model("resnet8")


@settings(deadline=None, max_examples=12 * EXAMPLES)
@given(
    st.fixed_dictionaries(
        {
            "method": st.sampled_from(["fp32", "lsq", "pact", "dorefa"]),
            "weight_bits": BITS,
            "activation_bits": BITS | st.none() | st.just("same"),
            "first_last_bits": BITS,
            "seeds": st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3, unique=True),
            "batch_size": st.integers(2, 8),
            "train_images": st.integers(8, 16),
            "learning_rate": st.floats(0, 100, exclude_min=True) | st.just(1e-320),
            "momentum": RATES,
            "weight_decay": RATES,
            "alpha_decay": RATES,
            "schedule": st.sampled_from(["one-cycle", "cosine"]),
            "augment": st.booleans(),
        }
    )
)
def test_an_accepted_experiment_trains(tiny, values):
    from qreg_utils.training import fit

    if values["method"] == "fp32":
        del values["weight_bits"], values["activation_bits"]
    study = check(yaml.safe_dump({"common": {**COMMON, "epochs": 1, "compile": False}, "grid": [values]}).encode())
    if isinstance(values["seeds"], list) and len(values["seeds"]) > 1:
        assert len(study.experiments) == len(values["seeds"])
    experiment = study.experiments[0]
    model = quantized(experiment)
    try:
        result = fit(
            model,
            tiny.subset(experiment.train_images, 8),
            experiment.recipe,
            seed=experiment.seeds[0],
        )
    except FloatingPointError as error:
        assert "the loss is not finite" in str(error)
    except QuantizationError as error:  # of two images, 2 bits of the first layer can leave nothing
        assert re.fullmatch(r"layer \S+: the calibration batch is all zero", str(error))
    else:
        assert len(result["history"]) == 2


def quantized(experiment):
    import copy

    if not experiment.quantized:
        return copy.deepcopy(resnet8())
    bits = (experiment.weight_bits, experiment.activation_bits, experiment.first_last_bits)
    return quantize_model(resnet8(), experiment.method, *bits)


# --- traps by hand ----------------------------------------------------------------------------------------------------


def study_text(**changes):
    return yaml.safe_dump({"common": {**COMMON, **changes}, "grid": [FP32]}, sort_keys=False)


VALID = study_text()
LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 4)}]\n" for i in range(1, 9))
MERGES = "a0: &a0 {ha: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 8)}]}}\n" for i in range(1, 9))
LADDER = "a0: &a0 []\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000))
TRAPS = {
    "duplicate key": (f"{VALID}grid: []\n", r"line 20, column 1: grid: a duplicate key: line 18 has it already"),
    "duplicate key in common": (
        VALID.replace("  model", "  epochs: 4\n  model"),
        r"line 8, column 3: epochs: a duplicate key: line 3 has it already",
    ),
    "duplicate key in quotes": (
        VALID.replace("  model", '  "epochs": 4\n  model'),
        r"line 8, column 3: epochs: a duplicate key: line 3 has it already",
    ),
    "two merges": (f"{VALID}- &a {{x: 1}}\n- {{<<: *a, <<: *a}}", r"<<: a duplicate key"),
    "python object": (
        VALID.replace("epochs: 3", "epochs: !!python/object/apply:os.abort []"),
        "line 7, column 11: the tag '!!python/object/apply:os.abort' is not",
    ),
    "python name": (
        VALID.replace("epochs: 3", "epochs: !!python/name:os.abort"),
        "line 7, column 11: the tag '!!python/name:os.abort' is not allowed",
    ),
    "set": (
        VALID.replace("epochs: 3", "epochs: !!set {3}"),
        "line 7, column 11: the tag '!!set' is not allowed: text, numbers,",
    ),
    "binary": (
        VALID.replace("epochs: 3", "epochs: !!binary 'AA=='"),
        "line 7, column 11: the tag '!!binary' is not allowed",
    ),
    "long tag": (f"a: !{1000 * 'x'} 1", "line 1, column 4: the tag '!x{75}[.]{3} is not allowed"),
    "list as key": ("? [1]\n: 2", "line 1, column 3: a key must be text"),
    "alias of itself": ("common: &a [*a]", "line 1, column 13: an alias of something that it is in itself"),
    "merge of itself": ("common: &a {<<: *a}", "line 1, column 17: an alias of something that it is in itself"),
    "unknown alias": ("common: *a", "line 1, column 9: found undefined alias 'a'"),
    "billion laughs": (LAUGHS, r"line 9, column 5: more than 200000 characters, with aliases written out"),
    "billion merges": (MERGES, r"line 6, column 14: more than 200000 characters, with aliases written out"),
    "ladder": (LADDER, r"line 21, column 6: more than 20 levels"),
    "depth": (f"a: {25 * '['}{25 * ']'}", "line 1, column 8: more than 20 levels"),
    "great depth": (100_000 * "[", "more than 20 levels"),
    "two documents": (f"{VALID}---\n{VALID}", "line 20, column 1: expected a single document .*, but found another"),
    "control character": ("a: \x1b[2J", "line 1: character #x1b is not allowed"),
    "NUL": ("a: 1\nb: \0", "line 2: character #x00 is not allowed"),
    "no character": ('a: "\\Uffffffff"', "line 1, column 7: a number that is too large"),
    "no version": (f"%YAML {5000 * '1'}.1\n--- a", "line 1, column 7: a number that is too large"),
    "surrogate": (VALID + 'description: "\\ud800"', "half a character"),
    "control character in a value": (study_text(model="\x1b[2J\n"), r"model: '\\x1b\[2J\\n' is not allowed"),
    "control character in a key": (study_text(**{"\x1b[2J": 1}), r"common: '\\x1b\[2J': unknown key"),
    "text direction in a key": (study_text(**{"\u202eepochs": 1}), r"common: '\\u202eepochs': unknown key; did you"),
    "no text in a key": (study_text(**{"": 1}), "common: '': unknown key"),
    "null as key": (f"{VALID}~: 1", "None: unknown key"),
    "date as key": (f"{VALID}2020-01-01: 1", "2020-01-01: unknown key"),
    "infinity as key": (f"{VALID}.inf: 1", "inf: unknown key"),
    "huge key": (f"{VALID}? 0x{5000 * 'f'}\n: 1", "an integer of thousands of digits: unknown key"),
    "long key": (study_text(**{1000 * "x": 1}), f"common: 'x{{76}}{3 * '[.]'}: unknown key"),
    "long value": (study_text(model=1000 * "x"), f"model: 'x{{76}}{3 * '[.]'} is not allowed"),
    "many digits": (VALID.replace("epochs: 3", f"epochs: {5000 * '9'}"), "epochs: '9+... is not allowed: an integer"),
    "many hexadecimal digits": (VALID.replace("epochs: 3", f"epochs: 0x{5000 * 'f'}"), "epochs: an integer of thous"),
    "images of many digits": (f"{VALID}  train_images: 0x{5000 * 'f'}", "train_images: an integer of thousands of dig"),
    "many sixties": (VALID.replace("0.9", 300 * "59:" + "59.5"), "momentum: '59:.* is not allowed: a number from 0"),
    "no integer": (VALID.replace("epochs: 3", "epochs: !!int x"), "epochs: 'x' is not allowed: an integer from 1"),
    "no boolean": (VALID.replace("augment: true", "augment: !!bool x"), "augment: 'x' is not allowed: true or false"),
    "no date": (VALID.replace("epochs: 3", "epochs: 2020-13-45"), "epochs: '2020-13-45' is not allowed: an integer"),
    "infinity": (VALID.replace("0.9", "1.0e+400"), "momentum: inf is not allowed: a number from 0, below 1"),
    "not a number": (VALID.replace("0.9", ".nan"), "momentum: nan is not allowed: a number from 0, below 1"),
    "boolean": (VALID.replace("0.9", "yes"), "momentum: True is not allowed: a number from 0, below 1"),
    "nested seeds": (study_text(seeds=[[0, 1]]), r"seeds: \[\[0, 1\]\] is not allowed: a list of one or more"),
    "too many seeds": (study_text(seeds=list(range(1001))), r"seeds: \[0, 1, .* is not allowed: .* at most 1000"),
    "too many experiments": (f"{VALID}  seeds: [{'0, ' * 10_001}]", r"grid: its lists make more than 10000 exp"),
    "far too many": (
        f"{VALID}- {{{', '.join(f'k{i}: [1, 2]' for i in range(5000))}}}",
        r"grid: its lists make more th",
    ),
    "many unknown keys": (study_text(**{f"k{i}": i for i in range(5000)}), r"k9: unknown key; .*\n\.\.\. and more$"),
    "no description": (f"{VALID}description: [1]", r"description: \[1\] is not allowed: text"),
    "false as common": ("common: false\ngrid: [{method: fp32}]", "common: False is not allowed: a mapping"),
    "a place for results": (study_text(results_dir="/etc"), "common: results_dir: unknown key"),
}


@pytest.mark.parametrize("text, message", TRAPS.values(), ids=TRAPS)
def test_traps_are_told_in_a_line(tmp_path, text, message):
    path = tmp_path / "toy.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(StudyError, match=message):
        load_study(path)
    assert load_or_refuse(path) is None


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(VALID + "#" * 200_000)
    with pytest.raises(StudyError, match=r"toy\.yaml: too large for a params file: more than 200000 bytes"):
        load_study(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", "common: {}".encode("utf-16"), b"description: caf\xe9"])
def test_a_file_that_is_not_utf8(tmp_path, content):
    path = tmp_path / "toy.yaml"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=r"toy\.yaml: cannot be read: not UTF-8 text \(.* at byte \d+\)$"):
        load_study(path)


def test_a_byte_order_mark_does_not_matter(tmp_path):
    (tmp_path / "toy.yaml").write_text(VALID, encoding="utf-8-sig")
    assert load_study(tmp_path / "toy.yaml").experiments


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")  # would be waited for
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")  # has no end
    for name in ("folder", "pipe", "zero"):
        with pytest.raises(StudyError, match=rf"{name}\.yaml: not a file$"):
            load_study(tmp_path / f"{name}.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    with pytest.raises(StudyError, match=r"loop\.yaml: cannot be read: Too many levels of symbolic links$"):
        load_study(tmp_path / "loop.yaml")
    with pytest.raises(StudyError, match="cannot be read: "):
        load_study(tmp_path / "\0" / "toy.yaml")


@pytest.mark.parametrize("name", ["..", "-x", ".hidden", "a b", "a;b", "$(a)", "a\nb", "{a}", "x" * 101, ""])
def test_a_study_cannot_have_a_name_that_leads_elsewhere(tmp_path, name):
    path = tmp_path / f"{name}.yaml"
    path.write_text(VALID)
    with pytest.raises(StudyError, match=r"a study cannot be called .*: 1 to 100 letters, digits") as error:
        load_study(path)
    assert str(error.value).isprintable()


def test_merged_keys_can_be_overridden(tmp_path):
    text = (
        f"{VALID}- &lsq {{method: lsq, weight_bits: 4}}\n- {{<<: *lsq, weight_bits: 2}}\n- {{<<: [*lsq], method: pact}}"
    )
    (tmp_path / "toy.yaml").write_text(text)
    levels = [experiment.setting for experiment in load_study(tmp_path / "toy.yaml").experiments]
    assert levels == ["fp32", "lsq-w4a4", "lsq-w2a2", "pact-w4a4"]


# --- what cannot be written -------------------------------------------------------------------------------------------


def full_disk(monkeypatch, after):
    """Writing fails when so many files are written."""
    written = []

    def write(path, content, original=Path.write_bytes):
        if len(written) == after:
            original(path, content[:10])
            raise OSError(28, "No space left on device")
        written.append(path)
        return original(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_disk_leaves_no_half_made_folder(tmp_path, monkeypatch, after):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    study, results = load_study(path), tmp_path / "results" / "toy"
    full_disk(monkeypatch, after)
    with pytest.raises(StudyError, match=r"results/toy: cannot be written: No space left on device$"):
        write_params(study, path, results)
    assert not results.exists()


def test_a_full_disk_leaves_earlier_results_alone(tmp_path, monkeypatch):
    path, results = tmp_path / "toy.yaml", tmp_path / "results" / "toy"
    path.write_text(VALID)
    write_params(load_study(path), path, results)
    before = {file: file.read_bytes() for file in results.rglob("*.yaml")}
    path.write_text(yaml.safe_dump(STUDY))
    full_disk(monkeypatch, 0)
    with pytest.raises(StudyError, match="No space left"):
        write_params(load_study(path), path, results)
    assert {file: file.read_bytes() for file in results.rglob("*") if file.is_file()} == before


def test_a_file_in_the_place_of_the_results(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(VALID)
    (tmp_path / "results").touch()
    for results in (tmp_path / "results", tmp_path / "results" / "toy"):
        with pytest.raises(StudyError, match="cannot be written: "):
            write_params(load_study(path), path, results)
    assert (tmp_path / "results").is_file()


def test_damaged_params_are_written_again(tmp_path):
    path, results = tmp_path / "toy.yaml", tmp_path / "results" / "toy"
    path.write_text(VALID)
    study = load_study(path)
    write_params(study, path, results)
    for file in results.rglob("*.yaml"):
        file.write_bytes(b"\xff")
    write_params(study, path, results)
    assert load_study(results / "toy.yaml") == study


# --- the batch itself -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize("name", ["duplicate key in common", "python object", "bytes", "split"])
def test_the_batch_refuses_it_too(project, name):
    outside = yaml.safe_dump({"common": COMMON, "grid": [{**VOC, "train_split": ["../../etc"]}]}).encode()
    content = {"bytes": bytes(range(256)), "split": outside}.get(name)
    params = project.root / "params" / "toy.yaml"
    params.write_bytes(content or TRAPS[name][0].encode())
    done = project.snakemake()
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "params/toy.yaml: " in output
    assert "Traceback" not in output and len(output.splitlines()) < 6
    assert not project.results.exists()
