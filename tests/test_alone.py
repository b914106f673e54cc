"""Parts of the package from its wheel, without what notebooks and studies need: the code of the two pages."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import pil_to_tensor

from qreg_utils.corruptions import corrupt
from qreg_utils.transforms import Corrupt, CorruptedDataset

ROOT = Path(__file__).resolve().parent.parent
STUDY = (
    "filelock ipykernel IPython ipywidgets matplotlib nbconvert nbformat pandas papermill psutil pydantic rich seaborn"
)
STUDY += " sklearn snakemake tabulate yaml ultralytics altair vl_convert"
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
IMAGES = torch.randint(256, (3, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked as pip would; what a study needs cannot be imported beside it."""
    folder, source = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "qreg_utils").symlink_to(ROOT / "qreg_utils")
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
        wheel.extractall(folder)
    without = f"import sys\nsys.modules.update(dict.fromkeys({STUDY.split()!r}))\n"
    (folder / "sitecustomize.py").write_text(without)
    return folder


@pytest.mark.parametrize("page", ["corruptions-alone", "quantizers-alone"])
def test_the_code_of_a_page_runs_from_the_wheel(installed, page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    code += f"\nimport qreg_utils\nassert qreg_utils.__file__.startswith({str(installed)!r})\n"
    command = [sys.executable, "-P", "-c", code]
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(installed)}
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_wheel_has_the_statistics_that_notebook_3_compares_with(installed):
    folder = installed / "qreg_utils" / "corruptions"
    assert {path.name for path in folder.glob("*.csv")} == {"digits_c_stats.csv", "imagenet_c_stats.csv"}


# --- the transform and the data set -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda x: x, tv_tensors.Image])
def test_the_transform_is_corrupt_for_every_kind_of_image(wrap):
    expected = corrupt(IMAGES, "fog", 3, seed=7, family="imagenet")
    found = Corrupt("fog", 3, seed=7)(wrap(IMAGES))
    assert type(found) is type(wrap(IMAGES)) and torch.equal(torch.as_tensor(found), expected)
    assert torch.equal(Corrupt("fog", 3, seed=7)(wrap(IMAGES[0])), expected[0])


def test_the_transform_of_a_pil_image_leaves_its_label_alone():
    image = Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy())
    found, label = Corrupt("fog", 3, seed=7)(image, 5)
    assert label == 5 and found.size == image.size
    expected = corrupt(IMAGES[:1], "fog", 3, seed=7, family="imagenet")[0]
    assert torch.equal(pil_to_tensor(found), expected)


def test_without_a_seed_torchs_generator_decides():
    transform = Corrupt("gaussian_noise", 3)
    torch.manual_seed(0)
    first, second = transform(IMAGES), transform(IMAGES)
    torch.manual_seed(0)
    assert torch.equal(transform(IMAGES), first) and not torch.equal(first, second)


def test_an_item_of_the_data_set_is_corrupted_the_same_way_each_time():
    items = CorruptedDataset([(image, label) for label, image in enumerate(IMAGES)], "shot_noise", 2, seed=4)
    whole = corrupt(IMAGES, "shot_noise", 2, seed=4, family="imagenet")
    images, labels = next(iter(DataLoader(items, batch_size=3)))
    assert torch.equal(images, whole) and labels.tolist() == [0, 1, 2] and torch.equal(items[-1][0], whole[2])
    half = CorruptedDataset(items.dataset, "shot_noise", 2, seed=4, transform=lambda image: image // 2)
    assert torch.equal(half[1][0], whole[1] // 2)


@pytest.mark.parametrize("make", [Corrupt, lambda *arguments: CorruptedDataset([], *arguments)])
def test_a_mistake_is_an_error_when_it_is_made(make):
    with pytest.raises(ValueError, match="unknown corruption 'snoww'; allowed: "):
        make("snoww", 3)
    with pytest.raises(ValueError, match="severity must be one of"):
        make("snow", 6)
