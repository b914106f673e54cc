"""Other people's parts: the code of docs/extending.md through a study, and what is refused before any training."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from qreg_utils import datasets
from qreg_utils.datasets import DatasetError, from_arrays, from_folder, load_dataset
from qreg_utils.names import CLEAN, DATASETS, PAPER_CORRUPTIONS, Dataset
from tests.test_batch import Project

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(PARAMS,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
WITH_PARTS = {"QREG_EXTENSIONS": "my_parts"}


# --- the page ---


def test_each_part_takes_at_most_30_lines():
    assert len(BLOCKS) == 5  # a quantizer, a model, a data set from arrays and one from a folder, a corruption
    for code in BLOCKS:
        assert sum(line.strip() != "" for line in code.splitlines()) <= 30, code
        assert sum(line.startswith("register_") for line in code.splitlines()) == 1
        compile(code, "docs/extending.md", "exec")


def python(folder, code, **variables):
    """Run ``code`` in ``folder`` in a process of its own, which registers what it likes."""
    environment = {key: value for key, value in os.environ.items() if key != "QREG_EXTENSIONS"}
    environment |= {"PYTHONPATH": str(ROOT), "QREG_DATA": str(folder), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def write_parts(folder):
    """The page's code as my_parts.py, its study, and a folder of photographs."""
    (folder / "my_parts.py").write_text("\n\n".join(BLOCKS), encoding="utf-8")
    digits = load_dataset("digits")
    for split, count in (("train", 32), ("test", 8)):
        images, labels = getattr(digits, f"{split}_images"), getattr(digits, f"{split}_labels")
        for digit in (0, 1):
            target = folder / "data" / "photos" / split / f"digit {digit}"
            target.mkdir(parents=True)
            for number, image in enumerate(images[labels == digit][:count]):
                Image.fromarray(image.permute(1, 2, 0).numpy()).resize((80, 64)).save(target / f"{number}.png")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    (folder / "mine.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False))
    return folder


@pytest.mark.slow
def test_the_pages_study_is_valid_with_its_module_and_not_without(parts):
    code = "from qreg_utils.study import load_study; print(*(e.id for e in load_study('mine.yaml').experiments))"
    done = python(parts, code, **WITH_PARTS)
    settings = ["fp32", "min-max-w4a4", "min-max-w2a2", "lsq-w4a4", "lsq-w2a2"]
    expected = {f"{dataset}-small_cnn-{setting}" for dataset in ("stripes", "photos") for setting in settings}
    assert set(done.stdout.split()) == expected, done.stderr
    without = python(parts, code)
    assert without.returncode and "model: 'small_cnn' is not allowed: 'resnet8', " in without.stderr


@pytest.mark.slow
def test_the_pages_data_sets_are_what_they_say(parts):
    code = """
        import my_parts
        from qreg_utils.datasets import load_dataset
        for name in ("stripes", "photos"):
            data = load_dataset(name)
            print(data.name, tuple(data.train_images.shape), tuple(data.test_images.shape), data.classes)
    """
    done = python(parts, code, QREG_DATA=str(parts / "data"), PYTHONPATH=f"{ROOT}{os.pathsep}{parts}")
    assert done.stdout.splitlines() == [
        "stripes (800, 3, 32, 32) (200, 3, 32, 32) ('vertical', 'horizontal', 'rising', 'falling')",
        "photos (64, 3, 64, 64) (16, 3, 64, 64) ('digit 0', 'digit 1')",
    ], done.stderr


@pytest.mark.slow
def test_the_pages_quantizer_has_a_step_for_each_channel(parts):
    code = """
        import my_parts, torch
        from qreg_utils.models import build_model
        from qreg_utils.quantize import assert_quantized, calibrate, quantize_model, quantized_layers
        from qreg_utils.theory.noise import weight_noise

        model = quantize_model(build_model("small_cnn", 4, seed=0), "min-max", 2, 2, first_last_bits=3)
        calibrate(model, torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        assert_quantized(model)
        for (name, layer), row in zip(quantized_layers(model), weight_noise(model), strict=True):
            weight = layer.quantized_weight()
            levels = (weight / layer.weight_quantizer.step_size()).round()
            assert torch.allclose(levels * layer.weight_quantizer.step_size(), weight)
            assert (levels.abs().flatten(1).amax(1) == 2 ** (layer.weight_quantizer.bits - 1) - 1).all()
            assert layer.weight_quantizer.step_size().shape[0] == len(weight) and row["sigma"] > 0
            assert weight.unique().numel() > 2 ** layer.weight_quantizer.bits
        print(name, layer.weight_quantizer.bits)
    """
    done = python(parts, code, PYTHONPATH=f"{ROOT}{os.pathsep}{parts}")
    assert done.stdout.strip() == "5 3", done.stderr


# --- a study, for real ---

TOY = {"seeds": [0], "epochs": 1, "severities": [3], "train_images": 64, "test_images": 16}
TOY |= {"theory": True, "theory_images": 4}
PHOTOS, STRIPES = "photos-small_cnn-fp32-seed0", "stripes-small_cnn-fp32-seed0"
MIN_MAX = "stripes-small_cnn-min-max-w4a4-seed0"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"))
    write_parts(project.root)
    grid = [{"dataset": "stripes", "method": "min-max", "weight_bits": 4}]
    grid += [{"dataset": ["stripes", "photos"], "method": "fp32"}]
    params = {"description": PARAMS["description"], "common": PARAMS["common"] | TOY, "grid": grid}
    (project.root / "params" / "toy.yaml").write_text(yaml.safe_dump(params))
    return project


@pytest.fixture(scope="module")
def study(project):
    done = project.snakemake(variables=WITH_PARTS)
    assert done.returncode == 0, done.stdout + done.stderr
    return project.results


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [PHOTOS, STRIPES, MIN_MAX])
def test_all_files_of_an_experiment_are_left(study, experiment):
    metrics = pd.read_csv(study / experiment / "metrics.csv")
    assert set(metrics["corruption"]) == {CLEAN, *PAPER_CORRUPTIONS, "dead_pixels"}
    assert len(metrics) == (1 + 19 + 1) * 4 and metrics["value"].notna().all()
    loss = metrics[metrics["metric"] == "loss"].set_index("corruption")["value"]
    assert loss["dead_pixels"] != loss[CLEAN]
    run = json.loads((study / experiment / "run.json").read_text())
    assert run["parameters"]["extra_corruptions"] == ["dead_pixels"]
    assert "dead_pixels: made by qreg" in run["corrupted_images"]
    for name in ("history", "penalty", "sharpness"):
        assert len(pd.read_csv(study / experiment / f"{name}.csv"))


@pytest.mark.slow
def test_averages_are_over_the_papers_19(study):
    table = pd.read_csv(study / "table.csv").set_index("dataset")
    metrics = pd.read_csv(study / PHOTOS / "metrics.csv").query("metric == 'accuracy'").set_index("corruption")["value"]
    assert table.loc["photos", "avg_corrupted"] == pytest.approx(metrics[list(PAPER_CORRUPTIONS)].mean(), rel=1e-6)


@pytest.mark.slow
def test_what_was_measured_is_quantized(study, project):
    assert len(pd.read_csv(study / MIN_MAX / "noise.csv")) == 4  # three convolutions and a linear layer, once
    code = f"""
        import pathlib
        from qreg_utils.checkpoints import load_experiment
        from qreg_utils.quantize import assert_quantized

        experiment, model, noise = load_experiment(pathlib.Path({str(study / MIN_MAX)!r}), 0)
        assert_quantized(model)
        print(experiment.method, len(noise))
    """
    done = python(project.root, code, **WITH_PARTS)
    assert done.stdout.split() == ["min-max", "4"], done.stderr


@pytest.mark.slow
def test_the_summary_has_the_parts_under_their_labels(study):
    table = (study / "table.md").read_text(encoding="utf-8")
    assert "min-max" in table and "small CNN" in table
    assert {"heatmap", "improvement-stripes-small_cnn"} <= {path.stem for path in (study / "figures").glob("*.png")}


@pytest.mark.slow
def test_the_module_counts_as_code(project, study):
    """Its comments do not."""
    module = project.root / "my_parts.py"
    before = module.read_text(encoding="utf-8")
    module.write_text(f"# nothing but a comment\n{before}", encoding="utf-8")
    assert project.planned(**WITH_PARTS) == set()
    module.write_text(f"{before}\nMORE = 1\n", encoding="utf-8")
    assert project.planned(**WITH_PARTS) == {PHOTOS, STRIPES, MIN_MAX, "summary"}
    module.write_text(before, encoding="utf-8")


@pytest.mark.slow
def test_a_mistake_ends_the_batch_before_anything_is_trained(project, study):
    before = sorted(path.stat().st_mtime_ns for path in study.rglob("*"))
    done = project.snakemake(variables={"QREG_EXTENSIONS": "my_part"})
    output = done.stdout + done.stderr
    assert done.returncode == 2 and "QREG_EXTENSIONS: my_part: no such module" in output
    assert "Traceback" not in output and len(output.splitlines()) < 6
    assert sorted(path.stat().st_mtime_ns for path in study.rglob("*")) == before


# --- what is refused ---

QUANTIZER = f"""
import torch
{BLOCKS[0].rpartition("register_quantizer(")[0]}
ROW = Method("NAME", "mine", colour="#123456")
"""
DATASET = """
from qreg_utils.datasets import register_dataset
from qreg_utils.names import Dataset
"""
CORRUPTION = """
import torch
from qreg_utils.corruptions import register_corruption
from qreg_utils.names import Corruption

ROW = Corruption("NAME", "mine", "noise")
def darker(images, draws, factor): return images / 255 * factor
"""
MODEL = "from qreg_utils.models import register_model\nfrom qreg_utils.names import Model\n"

REFUSED = {
    "raises": ("x = 1 / 0", "ZeroDivisionError: division by zero"),
    "needs_more": ("import nowhere_to_be_found", "needs nowhere_to_be_found, which is not installed"),
    "has_two_lines": ("raise ValueError('one\\ntwo')", "ValueError: one two"),
    "is_no_python": ("def f(:", r"SyntaxError: invalid syntax \(is_no_python\.py, line 1\)"),
    "takes_our_name": (
        QUANTIZER + 'register_quantizer(Method("lsq", "mine", colour="#123456"), weight=MinMaxWeight, '
        "activation=MinMaxActivation)",
        "method lsq: the name is registered already",
    ),
    "registers_twice": (
        MODEL + 'for _ in range(2): register_model(Model("NAME", "mine", "classification"), print)',
        "model NAME: the name is registered already",
    ),
    "no_activation": (
        QUANTIZER + "register_quantizer(ROW, weight=MinMaxWeight)",
        "method NAME: activation is missing: a class derived from ActivationQuantizer",
    ),
    "no_weight": (
        QUANTIZER + "register_quantizer(ROW, weight=MinMaxActivation, activation=MinMaxActivation)",
        "method NAME: weight <class 'no_weight.MinMaxActivation'> is not allowed: a class derived from WeightQuantizer",
    ),
    "no_colour": (QUANTIZER + 'Method("NAME", "mine")', "method NAME: colour is missing: such as #1b7f5c"),
    "is_a_control": (
        QUANTIZER + "from qreg_utils.names import METHODS\n"
        'register_quantizer(METHODS["gaussian-noise"], weight=MinMaxWeight, activation=MinMaxActivation)',
        "method gaussian-noise: kind 'control' is not allowed: a quantizer",
    ),
    "too_many_weights": (
        QUANTIZER
        + """
class Finer(MinMaxWeight):
    def forward(self, weight):
        return round_ste(weight * 100) / 100
register_quantizer(ROW, weight=Finer, activation=MinMaxActivation)""",
        r"method NAME: Finer returns \d+ values in one channel; 2 bits allow 4",
    ),
    "too_many_activations": (
        QUANTIZER
        + """
class Finer(MinMaxActivation):
    def forward(self, x):
        return round_ste(x * 100) / 100
register_quantizer(ROW, weight=MinMaxWeight, activation=Finer)""",
        r"method NAME: Finer returns \d+ values in a tensor; 2 bits allow 4",
    ),
    "a_step_for_each_channel_untold": (
        QUANTIZER
        + """
class Untold(MinMaxWeight):
    per_channel = False
register_quantizer(ROW, weight=Untold, activation=MinMaxActivation)""",
        r"method NAME: Untold returns \d+ values in a tensor; 2 bits allow 4",
    ),
    "no_gradient": (
        QUANTIZER
        + """
class Stuck(MinMaxWeight):
    def forward(self, weight):
        return (weight / self.step).round() * self.step + 0 * weight.sum()
register_quantizer(ROW, weight=Stuck, activation=MinMaxActivation)""",
        "method NAME: Stuck lets no gradient through to the weight: see round_ste",
    ),
    "no_step": (
        QUANTIZER
        + """
class Stepless(MinMaxActivation):
    step_size = ActivationQuantizer.step_size
register_quantizer(ROW, weight=MinMaxWeight, activation=Stepless)""",
        "method NAME: Stepless fails at 2 bits: NotImplementedError:",
    ),
    "no_family": (
        DATASET + 'Dataset("NAME", "mine", "classification")',
        "dataset NAME: corruption_family is missing: cifar, imagenet",
    ),
    "no_load": (
        DATASET + 'register_dataset(Dataset("NAME", "mine", "classification", "cifar"))',
        "dataset NAME: load is missing: a function without arguments that returns an ImageDataset",
    ),
    "detects": (
        DATASET + 'register_dataset(Dataset("NAME", "mine", "detection", "cifar", classes=("a",)), print)',
        "dataset NAME: task 'detection' is not allowed: register_dataset is for classification",
    ),
    "no_severities": (
        CORRUPTION + "register_corruption(ROW, darker)",
        "corruption NAME: severities are missing: a table for one of cifar, imagenet",
    ),
    "four_severities": (
        CORRUPTION + 'register_corruption(ROW, darker, cifar={"factor": (0.9, 0.8, 0.7, 0.6)})',
        "corruption NAME: cifar: factor has 4 values, not 5",
    ),
    "no_function": (
        CORRUPTION + 'register_corruption(ROW, cifar={"factor": 0.5})',
        "corruption NAME: function is missing: of images, draws and its parameters",
    ),
    "other_parameters": (
        CORRUPTION + 'register_corruption(ROW, darker, cifar={"factr": 0.5})',
        r"corruption NAME: darker at severity 1 \(cifar\) fails: TypeError: darker\(\) got an unexpected keyword",
    ),
    "another_shape": (
        CORRUPTION + "register_corruption(ROW, lambda images, draws: images[:, :1], imagenet={})",
        r"corruption NAME: <lambda> at severity 1 \(imagenet\) returns shape \(2, 1, 32, 32\), not \(2, 3, 32, 32\)",
    ),
    "its_own_random_numbers": (
        CORRUPTION + "register_corruption(ROW, lambda images, draws: torch.rand(images.shape), cifar={})",
        "makes something else of an image alone: its random numbers must come from draws",
    ),
    "no_label": (
        MODEL + 'register_model(Model("NAME", "", "classification"), print)',
        "model NAME: label is missing: what figures and tables call it",
    ),
    "no_build": (
        MODEL + 'register_model(Model("NAME", "mine", "classification"))',
        "model NAME: build is missing: a function of the number of classes that returns a network",
    ),
}
OTHER_MISTAKES = {
    "nowhere": "nowhere: no such module, neither on Python's path (PYTHONPATH) nor in ",
    "nowhere.below": "nowhere.below: no such module, ",
    "a_folder": "a_folder: it has no source; a folder of modules needs an __init__.py",
    "my parts": "'my parts' is not allowed: names of Python modules, such as my_parts",
    "../my_parts": "'../my_parts' is not allowed: names of Python modules, such as my_parts",
    "sys": "sys: it has no source",
}


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """For each extension what ``load_study`` says; all in one process, each with names of its own."""
    folder = tmp_path_factory.mktemp("refused")
    for module, (code, _) in REFUSED.items():
        (folder / f"{module}.py").write_text(code.replace("NAME", module))
    (folder / "a_folder").mkdir()
    (folder / "mine.yaml").write_text("grid: []")
    code = """
        import json, os
        from qreg_utils.study import StudyError, load_study

        for extension in json.loads(os.environ["EXTENSIONS"]):
            os.environ["QREG_EXTENSIONS"] = extension
            try:
                load_study("mine.yaml")
            except StudyError as error:
                print(json.dumps([extension, str(error)]))
    """
    done = python(folder, code, EXTENSIONS=json.dumps([*REFUSED, *OTHER_MISTAKES]))
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("extension", REFUSED)
def test_an_extension_with_a_mistake_is_refused_in_one_line(messages, extension):
    _, expected = REFUSED[extension]
    assert re.match(f"QREG_EXTENSIONS: {extension}: .*{expected.replace('NAME', extension)}", messages[extension])
    assert len(messages[extension].splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("extension", OTHER_MISTAKES)
def test_an_extension_that_cannot_be_found_is_refused_in_one_line(messages, extension):
    assert messages[extension].startswith(f"QREG_EXTENSIONS: {OTHER_MISTAKES[extension]}")
    assert len(messages[extension].splitlines()) == 1


# --- a data set from arrays ---


def arrays(**changes):
    """24 grey training images and 12 test images of two classes, with ``changes``."""
    random = np.random.default_rng(0)
    values = {"train_images": random.integers(0, 256, (24, 32, 40), np.uint8), "train_labels": np.arange(24) % 2}
    values |= {"test_images": random.integers(0, 256, (12, 32, 40), np.uint8), "test_labels": np.arange(12) % 2}
    return values | changes


def test_a_data_set_from_grey_arrays():
    given = arrays()
    data = from_arrays("mine", **given, shift=1, flip=True)
    assert data.train_images.shape == (24, 3, 32, 40) and data.train_images.dtype == torch.uint8
    assert all((data.test_images[:, channel].numpy() == given["test_images"]).all() for channel in range(3))
    assert data.test_labels.tolist() == given["test_labels"].tolist() and data.test_labels.dtype == torch.int64
    assert (data.name, data.classes, data.shift, data.flip) == ("mine", ("0", "1"), 1, True)
    images = data.normalise(data.train_images).double()
    assert images.mean().item() == pytest.approx(0, abs=1e-6)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_colour_images_may_have_their_channels_first_or_last():
    random = np.random.default_rng(0)
    train, test = (random.integers(0, 256, (n, 33, 35, 3), np.uint8) for n in (24, 12))
    last = from_arrays("mine", **arrays(train_images=train, test_images=test))
    channels_first = {"train_images": train.transpose(0, 3, 1, 2), "test_images": test.transpose(0, 3, 1, 2)}
    first = from_arrays("mine", **arrays(**channels_first))
    tensors = from_arrays("mine", **arrays(**{name: torch.tensor(array) for name, array in channels_first.items()}))
    assert (last.train_images.numpy() == channels_first["train_images"]).all()
    for other in (first, tensors):
        assert torch.equal(other.train_images, last.train_images) and other.mean == last.mean and other.std == last.std
    expected = train.reshape(-1, 3).astype(float) / 255
    assert last.mean == pytest.approx(expected.mean(0)) and last.std == pytest.approx(expected.std(0))


@pytest.mark.filterwarnings("error")  # on a notebook's page a warning would stand for nothing
def test_arrays_may_be_read_only_and_are_copied():
    given = arrays()
    for array in given.values():
        array.flags.writeable = False
    data = from_arrays("mine", **given)
    data.train_images.zero_()
    assert given["train_images"].any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_images": np.zeros((24, 32, 32))}, "images are float64; they must be uint8, 0 to 255"),
        ({"train_images": np.zeros((24, 32, 31), np.uint8)}, r"images are \(24, 3, 32, 31\); .* at least 32"),
        ({"train_images": np.zeros((24, 32), np.uint8)}, r"images are \(24, 32\); they must be \(N, H, W\)"),
        ({"train_images": np.zeros((24, 32, 32, 4), np.uint8)}, r"images are \(24, 32, 32, 4\)"),
        ({"train_images": np.zeros((24, 32, 48), np.uint8)}, r"\(32, 48\) pixels to train, \(32, 40\) to test"),
        ({"train_images": np.full((24, 32, 40), 7, np.uint8)}, "a colour channel of its training images is constant"),
        ({"train_labels": np.zeros(23, int)}, r"24 images and labels of shape \(23,\)"),
        ({"test_labels": np.zeros((12, 1), int)}, r"12 images and labels of shape \(12, 1\)"),
        ({"test_labels": np.zeros(12)}, "labels are float64; they must be integers"),
        ({"test_labels": ["cat"] * 12}, "labels are <U3; they must be integers"),
        ({"test_labels": np.arange(12) - 1}, "its labels are not 0 to 10, one of at least 2 classes"),
        ({"test_labels": np.arange(12), "classes": ("a", "b")}, "its labels are not 0 to 1"),
        ({"train_labels": np.zeros(24, int), "test_labels": np.zeros(12, int)}, "one of at least 2 classes"),
        ({"test_images": np.zeros((0, 32, 40), np.uint8), "test_labels": np.zeros(0, int)}, "0 images and labels"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(change, message):
    with pytest.raises(DatasetError, match=f"data set mine: .*{message}"):
        from_arrays("mine", **arrays(**change))


# --- a data set from a folder ---


@pytest.fixture
def folder(tmp_path):
    """Two classes of two training images and one test image; of various sizes, modes and formats."""
    random = np.random.default_rng(0)
    sizes = {"train/cat/1.png": (50, 40), "train/cat/2.jpg": (40, 64), "train/dog/1.png": (32, 32)}
    sizes |= {"train/dog/2.gif": (90, 33), "test/cat/1.png": (64, 64), "test/dog/1.bmp": (35, 80)}
    for number, (name, (width, height)) in enumerate(sizes.items()):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (height, width) if number % 2 else (height, width, 3)
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(file)
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("a file of the system's")
    return tmp_path


def test_a_data_set_from_a_folder(folder):
    data = from_folder("pets", folder, size=32, flip=True)
    assert (data.name, data.classes, data.shift, data.flip) == ("pets", ("cat", "dog"), 0, True)
    assert data.train_images.shape == (4, 3, 32, 32) and data.train_labels.tolist() == [0, 0, 1, 1]
    assert data.test_images.shape == (2, 3, 32, 32) and data.test_labels.tolist() == [0, 1]


def test_an_image_is_turned_upright_and_its_middle_square_is_taken(folder):
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:, 32:] = 200  # the left edge and a bit is black: cut off but for 16 columns
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(picture).save(folder / "test" / "cat" / "1.png", exif=exif)
    image = from_folder("pets", folder, size=64).test_images[0]
    assert image.shape == (3, 64, 64)
    assert (image[:, :, :46] == 200).all() and (image[:, :, 50:] == 0).all()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "train").rename(folder / "learn"), "train has no folders: one for each class"),
        (lambda folder: (folder / "test").rename(folder / "tests"), "test has no images of the classes cat, dog"),
        (
            lambda folder: (folder / "test" / "dog").rename(folder / "test" / "cow"),
            r"test/cow is of a class that is not in .*train: cat, dog",
        ),
        (
            lambda folder: [(folder / "train" / "dog" / name).unlink() for name in ("1.png", "2.gif")],
            "train/dog has no images",
        ),
        (
            lambda folder: (folder / "train" / "cat" / "1.png").write_text("no image"),
            r"train/cat/1\.png cannot be read as an image: UnidentifiedImageError",
        ),
        (
            lambda folder: (folder / "test" / "dog" / "1.bmp").write_bytes(
                (folder / "test" / "dog" / "1.bmp").read_bytes()[:200]
            ),
            r"test/dog/1\.bmp cannot be read as an image: OSError",
        ),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(DatasetError, match=message):
        from_folder("pets", folder, size=32)


def test_a_size_that_cannot_be_corrupted_is_refused(folder):
    with pytest.raises(DatasetError, match=r"data set pets: images are \(4, 3, 16, 16\); .* at least 32"):
        from_folder("pets", folder, size=16)


# --- what a registered data set must keep to ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"row": {"name": "yours"}}, "data set yours: name is mine, registered as yours"),
        ({"row": {"train_images": 25}}, "data set mine: train_images is 24, registered as 25"),
        ({"row": {"test_images": 11}}, "data set mine: test_images is 12, registered as 11"),
        ({"load": lambda: [1, 2]}, "data set mine: load returns list, not an ImageDataset"),
        ({}, None),
    ],
)
def test_a_data_set_is_what_its_row_says(change, message, monkeypatch):
    row = {"name": "mine", "label": "Mine", "task": "classification", "corruption_family": "cifar"}
    row = Dataset(**row | {"train_images": 24, "test_images": 12} | change.get("row", {}))
    monkeypatch.setattr(datasets, "LOADERS", dict(datasets.LOADERS))
    datasets.register_dataset(row, change.get("load", lambda: from_arrays("mine", **arrays())))
    try:
        if message is None:
            assert load_dataset("mine").classes == ("0", "1")
        else:
            with pytest.raises(DatasetError, match=message):
                load_dataset(row.name)
    finally:
        DATASETS.remove(row.name)
