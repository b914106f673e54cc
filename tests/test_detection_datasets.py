"""Images with boxes: the digit scenes, VOC's layout, what is said when it is damaged, and the download."""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("qreg_utils.detection")  # before ultralytics: it sets the environment

from qreg_utils.datasets import DatasetError, all_digits, is_test_digit
from qreg_utils.detection import datasets
from qreg_utils.detection.datasets import VOC_CLASSES, load_detection_dataset

# --- digit scenes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QREG_DATA", str(folder))
        load_detection_dataset("digit_scenes")
    return folder


@pytest.fixture
def scenes(scenes_folder, monkeypatch):
    monkeypatch.setenv("QREG_DATA", str(scenes_folder))
    return load_detection_dataset("digit_scenes")


@pytest.fixture
def own_scenes(scenes_folder, tmp_path, monkeypatch):
    """The folder of the scenes, a copy to damage."""
    shutil.copytree(scenes_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    return next(tmp_path.glob("digit-scenes-*"))


def pixels(image):
    return np.asarray(Image.open(image.file))


def corners(boxes, size=64):
    """left, top, right, bottom in pixels: (4, n)."""
    x, y, w, h = boxes.T.astype(float) * size
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def test_scenes_are_small_labelled_images(scenes):
    assert (scenes.name, len(scenes.train), len(scenes.test)) == ("digit_scenes", 400, 200)
    assert scenes.classes == tuple("0123456789") and not scenes.flip and scenes.unreadable == ()
    for image in scenes.train + scenes.test:
        assert image.file.is_absolute() and (image.height, image.width) == (64, 64)
        assert image.classes.dtype == np.int64 and image.boxes.dtype == np.float32
        assert 1 <= len(image.classes) <= 4 and image.boxes.shape == (len(image.classes), 4)
        edges = corners(image.boxes)
        assert np.array_equal(edges, edges.round())  # whole pixels
        assert edges.min() >= 0 and edges.max() <= 64
        heights = edges[3] - edges[1]
        assert heights.min() >= 12 and heights.max() <= 30
    assert pixels(scenes.train[0]).shape == (64, 64, 3)
    assert np.bincount(np.concatenate([image.classes for image in scenes.train])).min() > 60


def test_scenes_are_the_same_everywhere(scenes):
    """Should this fail after a change of the scenes, raise SCENES["version"] too, lest old folders are used."""
    digest = hashlib.sha256()
    for image in scenes.train + scenes.test:
        for part in (pixels(image), image.classes, image.boxes):
            digest.update(part.tobytes())
    assert digest.hexdigest()[:16] == "a73397b4bb0b266a"
    assert datasets.SCENES["version"] == 1


def test_boxes_are_tight_around_the_ink(monkeypatch):
    """On a flat background the ink is what differs."""
    monkeypatch.setattr(datasets, "_background", lambda rng, pixels: np.full((pixels, pixels, 3), 0.5))
    digits, labels = all_digits()
    for seed in range(100):
        image, objects = datasets._scene(np.random.default_rng(seed), digits[:, 0].numpy(), labels.numpy())
        ink = np.abs(image - 127.5).max(axis=-1) > 20
        outside = np.ones((64, 64), dtype=bool)
        for digit in objects:
            place = (slice(digit.top, digit.bottom), slice(digit.left, digit.right))
            outside[place] = False
            if all(digit.overlap(other) == 0 for other in objects if other is not digit):
                box = ink[place]
                assert box[0].any() and box[-1].any() and box[:, 0].any() and box[:, -1].any()
        assert not ink[outside].any()


def test_digits_of_a_scene_hardly_overlap_and_contrast_with_the_background(scenes):
    for image in scenes.train:
        left, top, right, bottom = corners(image.boxes)
        width = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
        height = np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)
        area = (right - left) * (bottom - top)
        shared = width.clip(0) * height.clip(0) / np.minimum(area[:, None], area)
        assert (shared[~np.eye(len(area), dtype=bool)] <= 0.05).all()
        grey = pixels(image) @ [0.299, 0.587, 0.114] / 255
        for a, b, c, d in corners(image.boxes).T.astype(int):
            assert np.ptp(np.percentile(grey[b:d, a:c], [5, 95])) > 0.15


def test_backgrounds_are_textured(scenes):
    assert min(pixels(image)[:8, :8].std(axis=(0, 1)).max() for image in scenes.train) > 0.5
    assert len({pixels(image).tobytes() for image in scenes.train + scenes.test}) == 600


def test_training_and_test_scenes_share_no_digit(tmp_path, monkeypatch):
    def note(rng, digits, labels):
        pools.append({digit.tobytes() for digit in digits})
        return np.zeros((64, 64, 3), dtype=np.uint8), []

    pools = []
    monkeypatch.setattr(datasets, "_scene", note)
    monkeypatch.setattr(datasets, "SCENES", datasets.SCENES | {"train": 3, "test": 2})
    datasets._write_scenes(tmp_path / "scenes")
    seen = {"train": set.union(*pools[:3]), "test": set.union(*pools[3:])}
    images, labels = all_digits()
    expected = {"train": images[~is_test_digit(labels), 0], "test": images[is_test_digit(labels), 0]}
    for split, digits in expected.items():
        assert seen[split] == {digit.numpy().tobytes() for digit in digits}
    assert not seen["train"] & seen["test"]


def test_scenes_are_written_once_by_those_that_start_together(tmp_path, monkeypatch):
    calls, write = [], datasets._write_scenes

    def count(root):
        calls.append(root)
        write(root)

    monkeypatch.setenv("QREG_DATA", str(tmp_path / "new"))
    monkeypatch.setattr(datasets, "_write_scenes", count)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: len(load_detection_dataset("digit_scenes").train), range(4)))
    assert found == [400] * 4 and len(calls) == 1
    assert {path.name[:13] for path in (tmp_path / "new").iterdir()} == {"digit-scenes-", ".digit-scenes"}


def test_an_interrupted_writer_leaves_no_half_folder(tmp_path, monkeypatch):
    def interrupted(root):
        (root / "images").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(datasets, "_write_scenes", interrupted)
        load_detection_dataset("digit_scenes")
    assert [path.suffix for path in tmp_path.glob("digit-scenes-*")] == [".part"]
    assert len(load_detection_dataset("digit_scenes").test) == 200
    assert not list(tmp_path.glob("*.part"))


def test_other_constants_are_another_folder(own_scenes, monkeypatch):
    monkeypatch.setattr(datasets, "SCENES", datasets.SCENES | {"train": 4, "test": 2})
    data = load_detection_dataset("digit_scenes")
    assert len(data.train) == 4 and data.train[0].file.parents[2] != own_scenes


def test_damaged_scenes_are_made_again_when_deleted(own_scenes):
    image = own_scenes / "images" / "test" / "0007.png"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(DatasetError, match=rf"0007\.png is damaged; delete {own_scenes} and it is made again"):
        load_detection_dataset("digit_scenes")
    image.unlink()
    with pytest.raises(DatasetError, match=r"images/test has 199 images, not 200; delete"):
        load_detection_dataset("digit_scenes")
    shutil.rmtree(own_scenes)
    assert len(load_detection_dataset("digit_scenes").test) == 200


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QREG_DATA", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match=r"cannot write .*digit-scenes.*QREG_DATA"):
        load_detection_dataset("digit_scenes")


def test_neither_ultralytics_nor_torchvision_is_needed(scenes_folder):
    code = (
        "import sys; from qreg_utils.detection.datasets import load_detection_dataset as load; load('digit_scenes');"
        "print({'ultralytics', 'cv2', 'torchvision', 'sklearn'} & {*sys.modules})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"QREG_DATA": str(scenes_folder)}, capture_output=True, text=True
    )
    assert run.stdout == "set()\n", run.stderr


def test_unknown_names_and_splits_of_scenes():
    with pytest.raises(ValueError, match=r"'coco'.*digit_scenes, voc"):
        load_detection_dataset("coco")
    with pytest.raises(ValueError, match=r"train_split and test_split are for voc"):
        load_detection_dataset("digit_scenes", test_split=["test"])


def test_a_subset_is_a_fixed_random_choice(scenes):
    part, again = scenes.subset(50, 20), scenes.subset(50, 20)
    assert part == again and (len(part.train), len(part.test)) == (50, 20)
    for chosen, all_images in ((part.train, scenes.train), (part.test, scenes.test)):
        places = [all_images.index(image) for image in chosen]
        assert places == sorted(set(places)) and places != list(range(len(places)))
    assert scenes.subset(None, None) == scenes
    assert scenes.subset(None, 20).test == part.test and scenes.subset(None, 20).train == scenes.train


def test_a_subset_larger_than_the_set_is_an_error(scenes):
    with pytest.raises(ValueError, match=r"test_images: 1000 is not allowed: digit_scenes has 200"):
        scenes.subset(None, 1000)
    with pytest.raises(ValueError, match=r"train_images: 0 is not allowed: digit_scenes has 400"):
        scenes.subset(0, None)


# --- VOC, with small files in its layout ------------------------------------------------------------------------------

LABEL = "14 0.5 0.5 0.25 0.5\n"


def write_image(voc, path, size=(20, 12), label=LABEL, **options):
    file = voc / "images" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, **options)
    labels = voc / "labels" / Path(path).with_suffix(".txt")
    labels.parent.mkdir(parents=True, exist_ok=True)
    labels.write_text(label)
    return file


@pytest.fixture
def voc(tmp_path, monkeypatch):
    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    folder = tmp_path / "VOC"
    for split, names in {
        "train2012": ("b.jpg", "a.PNG", "c.webp"),
        "val2012": ("d.jpeg",),
        "test2007": ("t.jpg", "u.bmp"),
    }.items():
        for name in names:
            write_image(folder, f"{split}/{name}")
    return folder


def load(train=("train2012", "val2012"), test=("test2007",)):
    return load_detection_dataset("voc", train_split=list(train), test_split=list(test))


def names(images):
    return [f"{image.file.parent.name}/{image.file.name}" for image in images]


def test_voc_has_the_classes_of_ultralytics_recipe():
    assert len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES)
    utils = pytest.importorskip("ultralytics.utils")
    recipe = utils.YAML.load(utils.ROOT / "cfg" / "datasets" / "VOC.yaml")
    assert tuple(recipe["names"].values()) == VOC_CLASSES
    assert list(datasets.VOC_TRAIN) == [Path(split).name for split in recipe["train"]]
    assert list(datasets.VOC_TEST) == [Path(split).name for split in recipe["val"]]
    assert sum(datasets.VOC_TRAIN.values()) == 16551


def test_voc_is_read_in_the_order_of_its_splits(voc):
    (voc / "images" / "train2012" / "._b.jpg").touch()  # macOS' leftovers, notes
    (voc / "images" / "train2012" / "notes.md").touch()
    data = load()
    assert names(data.train) == ["train2012/a.PNG", "train2012/b.jpg", "train2012/c.webp", "val2012/d.jpeg"]
    assert names(data.test) == ["test2007/t.jpg", "test2007/u.bmp"]
    assert data.name == "voc" and data.flip and data.classes[14] == "person" and data.unreadable == ()
    image = data.train[0]
    assert image.file == voc / "images" / "train2012" / "a.PNG" and (image.height, image.width) == (12, 20)
    assert image.classes.tolist() == [14] and image.boxes.tolist() == [[0.5, 0.5, 0.25, 0.5]]


def test_lists_name_images_too(voc):
    (voc / "lists").mkdir()
    (voc / "lists" / "mine.txt").write_text("images/train2012/c.webp\n\n./images/train2012/a.PNG  \r\n")
    data = load(["lists/mine.txt", "val2012"])
    assert names(data.train) == ["train2012/c.webp", "train2012/a.PNG", "val2012/d.jpeg"]


def test_sizes_are_those_of_the_image_as_displayed(voc):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in ("jpg", "webp", "png"):
            write_image(voc, f"turned/{orientation}{suffix}.{suffix}", exif=exif)
    from PIL import ImageOps

    for image in load(["turned"]).train:
        with Image.open(image.file) as file:
            assert ImageOps.exif_transpose(file).size == (image.width, image.height)


def test_a_missing_voc_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    with pytest.raises(DatasetError, match=rf"{tmp_path}/VOC is missing; `make voc` downloads it .*QREG_DATA"):
        load_detection_dataset("voc")


def test_the_official_splits_must_have_the_official_counts(voc):
    with pytest.raises(DatasetError) as error:
        load_detection_dataset("voc")
    for part in ("train2012: 3, train2007: 0", "train2012: 5717, train2007: 2501", "make voc", "train_split"):
        assert part in str(error.value)
    with pytest.raises(
        DatasetError, match=r"has test2007: 2 images, the official VOC has test2007: 4952; .*test_split"
    ):
        load_detection_dataset("voc", train_split=["train2012"])


def test_official_counts_are_enough(voc, monkeypatch):
    monkeypatch.setattr(datasets, "VOC_TRAIN", {"train2012": 3, "val2012": 1})
    monkeypatch.setattr(datasets, "VOC_TEST", {"test2007": 2})
    data = load_detection_dataset("voc")
    assert (len(data.train), len(data.test)) == (4, 2)


def test_missing_parts_are_named(voc):
    with pytest.raises(DatasetError, match=r"images/train2007 is missing; `make voc`"):
        load(["train2007"])
    (voc / "images" / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"images/empty has no images"):
        load(["empty"])
    with pytest.raises(DatasetError, match=r"names no image"):
        load([])
    with pytest.raises(DatasetError, match=r"VOC/mine\.txt is missing: a list of images"):
        load(["mine.txt"])
    (voc / "labels" / "train2012" / "b.txt").unlink()
    with pytest.raises(
        DatasetError, match=r"labels/train2012/b\.txt is missing: the labels of images/train2012/b\.jpg"
    ):
        load()
    shutil.rmtree(voc / "labels")
    with pytest.raises(DatasetError, match=r"labels/train2012/a\.txt is missing.*make voc"):
        load()


@pytest.mark.parametrize("entry", ["/etc", "../VOC/images/train2012", "train2012/../../..", "", ".", "../list.txt"])
def test_splits_stay_inside_the_folder(voc, entry):
    with pytest.raises(DatasetError, match=r"is not a path inside .*VOC"):
        load([entry])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../outside.jpg", r"'\.\./outside\.jpg' is not a path inside"),
        ("/images/train2012/a.PNG", "is not a path inside"),
        ("images/train2012/../../../outside.jpg", "is not a path inside"),
        ("train2012/a.PNG", r"not an image in images/"),
        ("images/train2012/a.txt", r"not an image in images/"),
        ("images/train2012/z.jpg", r"images/train2012/z\.jpg is missing; correct the list"),
        ("images/train2012/\0.jpg", "is missing"),
        ("images/" + 300 * "x" + ".jpg", "is missing"),
    ],
)
def test_a_bad_line_of_a_list_is_named(voc, line, message):
    (voc.parent / "outside.jpg").touch()
    (voc / "mine.txt").write_text(f"images/train2012/a.PNG\n{line}\n")
    with pytest.raises(DatasetError, match=rf"mine\.txt:2: .*{message}"):
        load(["mine.txt"])


def test_links_do_not_lead_out_of_the_data_folder(voc, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(voc / "images" / "train2012", elsewhere / "images")
    (elsewhere / "mine.txt").write_text("images/train2012/a.PNG\n")
    (voc / "images" / "away").symlink_to(elsewhere / "images")
    (voc / "away.txt").symlink_to(elsewhere / "mine.txt")
    for entry in ("away", "away.txt"):
        with pytest.raises(DatasetError, match=rf"{entry} is a link to {elsewhere}.*, which is not in"):
            load([entry])
    (voc / "mine.txt").write_text("images/train2012/a.PNG\nimages/away/b.jpg\n")
    with pytest.raises(DatasetError, match=r"mine\.txt:2: .*b\.jpg is a link to .*, which is not in"):
        load(["mine.txt"])


def test_the_voc_folder_itself_may_be_a_link(voc, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk") / "VOC"
    voc.rename(disk)
    voc.symlink_to(disk)
    (disk / "mine.txt").write_text("images/train2012/a.PNG\n")
    (disk / "images" / "inside").symlink_to(disk / "images" / "val2012")
    shutil.copytree(disk / "labels" / "val2012", disk / "labels" / "inside")
    assert names(load(["mine.txt", "inside"]).train) == ["train2012/a.PNG", "inside/d.jpeg"]


def test_an_image_twice_in_a_split_or_in_both_splits_is_an_error(voc):
    (voc / "mine.txt").write_text("images/train2012/b.jpg\nimages/train2012//./a.PNG\n")
    with pytest.raises(DatasetError, match=r"train2012/b\.jpg is twice in the split: train2012, mine\.txt"):
        load(["train2012", "mine.txt"])
    with pytest.raises(DatasetError, match=r"train2012/a\.PNG is in both train_split and test_split"):
        load(["train2012"], ["test2007", "mine.txt"])


@pytest.mark.parametrize("damage", ["truncated", "not an image", "empty", "a folder"])
@pytest.mark.parametrize("name", ["a.PNG", "b.jpg", "c.webp"])
def test_an_image_that_cannot_be_decoded_is_left_out_and_named(voc, damage, name):
    image = write_image(voc, f"train2012/{name}", size=(100, 100))
    whole = image.read_bytes()
    image.unlink()
    if damage == "a folder":
        image.mkdir()
    else:
        image.write_bytes({"truncated": whole[: len(whole) // 2], "not an image": b"hello", "empty": b""}[damage])
    data = load()
    assert data.unreadable == (f"VOC/images/train2012/{name}",)
    assert len(data.train) == 3 and not any(found.file == image for found in data.train)


def test_a_split_in_which_no_image_can_be_decoded_is_an_error(voc):
    (voc / "images" / "val2012" / "d.jpeg").write_bytes(b"hello")
    with pytest.raises(DatasetError, match=r"no image of the split with .*val2012/d\.jpeg can be decoded"):
        load(["val2012"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("14 0.5 0.5 0.25", "not a class and 4 numbers"),
        ("14 0.5 0.5 0.25 0.5 0.9", "not a class and 4 numbers"),
        ("person 0.5 0.5 0.25 0.5", "not a class and 4 numbers"),
        ("14 0.5 0.5 0.25 1,5", "not a class and 4 numbers"),
        ("20 0.5 0.5 0.25 0.5", r"class 20 is not in 0\.\.19"),
        ("-1 0.5 0.5 0.25 0.5", r"class -1 is not in 0\.\.19"),
        ("1.5 0.5 0.5 0.25 0.5", r"class 1\.5 is not in 0\.\.19"),
        ("nan 0.5 0.5 0.25 0.5", "class nan"),
        ("14 1.02 0.5 0.25 0.5", r"centre x 1\.02 is not a share"),
        ("14 0.5 -0.02 0.25 0.5", r"centre y -0\.02 is not a share"),
        ("14 0.5 0.5 -0.005 0.5", r"width -0\.005 is not a share"),
        ("14 0.5 0.5 0.25 64", r"height 64\.0 is not a share"),
        ("14 nan 0.5 0.25 0.5", "centre x nan is not a share"),
        ("14 0.5 0.5 inf 0.5", "width inf is not a share"),
        ("14 0.5 0.5 0 0.5", "without area"),
        ("14 0.5 0.5 0.5 1e-60", "without area"),
        ("14 -0.01 0.5 0.01 0.5", "without area in the image"),
    ],
)
def test_a_bad_label_is_named_before_any_image_is_read(voc, monkeypatch, line, message):
    monkeypatch.delattr(datasets, "_decoded_size")
    (voc / "labels" / "test2007" / "u.txt").write_text(f"{LABEL}\n{line}\n")
    with pytest.raises(DatasetError, match=rf"labels/test2007/u\.txt:3: .*{message}.*; correct the file"):
        load()


def test_labels_that_are_not_text_are_an_error(voc):
    (voc / "labels" / "val2012" / "d.txt").write_bytes(b"\xff\xfe14")
    with pytest.raises(DatasetError, match=r"d\.txt cannot be read"):
        load()


def labels_of(voc, text):
    (voc / "labels" / "val2012" / "d.txt").write_text(text)
    (image,) = load(["val2012"]).train
    return image.classes.tolist(), image.boxes


def test_an_image_may_have_no_objects(voc):
    for text in ("", "\n \n"):
        classes, boxes = labels_of(voc, text)
        assert classes == [] and boxes.shape == (0, 4) and boxes.dtype == np.float32


def test_labels_may_look_different(voc):
    text = f"\ufeff0.0 .5 5e-1 1 1\n\n{LABEL}\t19  0.25 0.75 0.5 0.5  \n{LABEL}14 0.50 0.5 0.250 0.5"
    classes, boxes = labels_of(voc, text)
    assert classes == [0, 14, 19]  # a row that is there three times counts once
    assert boxes.tolist() == [[0.5, 0.5, 1, 1], [0.5, 0.5, 0.25, 0.5], [0.25, 0.75, 0.5, 0.5]]


def test_boxes_end_with_the_image(voc):
    _, boxes = labels_of(voc, "1 0 0.5 0.5 1.01\n1 1.01 0.99 0.5 0.5\n1 0.1 0.3 0.2 0.6")
    assert boxes == pytest.approx(np.array([[0.125, 0.5, 0.25, 1], [0.88, 0.87, 0.24, 0.26], [0.1, 0.3, 0.2, 0.6]]))
    assert np.array_equal(boxes[2], np.float32([0.1, 0.3, 0.2, 0.6]))


SHARE = st.floats(1e-3, 1 - 1e-3)


@given(st.lists(st.tuples(st.integers(0, 19), SHARE, SHARE, SHARE, SHARE), unique=True))
def test_label_rows_survive_the_file(rows):
    text = "".join(" ".join(map(repr, row)) + "\n" for row in rows)
    read = [datasets._row(line, "here", 20) for line in text.splitlines()]
    for (label, *box), (found, *found_box) in zip(rows, read, strict=True):
        assert label == found
        for centre, size, found_centre, found_size in zip(box[:2], box[2:], found_box[:2], found_box[2:], strict=True):
            start, end = max(0, centre - size / 2), min(1, centre + size / 2)
            assert found_centre - found_size / 2 == pytest.approx(start, abs=1e-6)
            assert found_centre + found_size / 2 == pytest.approx(end, abs=1e-6)


NUMBERS = st.one_of(st.floats().map(repr), st.integers().map(str), st.sampled_from(["0.5", "1", "14", "1_0", "१"]))


@given(st.one_of(st.text(), st.lists(st.lists(NUMBERS).map(" ".join)).map("\n".join), st.binary()))
def test_the_reader_of_labels_raises_nothing_but_its_own_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "label.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        rows = [datasets._row(line, where, 20) for where, line in datasets._lines(path)]
    except DatasetError as error:
        assert str(path) in str(error) and len(str(error)) < len(str(path)) + 500
    else:
        for label, *box in rows:
            assert label in range(20) and min(box[2:]) > 0 and min(box) >= -1e-6 and max(box) <= 1 + 1e-6


def test_the_real_pack_where_it_is_at_hand(monkeypatch):
    homes = [os.environ.get("QREG_DATA"), "~/.cache/qreg-data"]
    packs = [Path(home).expanduser() for home in homes if home]
    there = [pack for pack in packs if (pack / "VOC" / "images" / "test2012").is_dir()]
    if not there:
        pytest.skip("no VOC with test2012 in QREG_DATA or ~/.cache/qreg-data")
    monkeypatch.setenv("QREG_DATA", str(there[0]))
    data = load(["train2012", "val2012"], ["test2012"])
    assert (len(data.train), len(data.test), data.unreadable) == (2608, 1000, ())
    classes = np.bincount(np.concatenate([image.classes for image in data.train]), minlength=20)
    assert VOC_CLASSES[classes.argmax()] == "dog" and classes.sum() == 4961
    assert max(max(image.height, image.width) for image in data.train) == 256
    with pytest.raises(DatasetError, match="train2012: 1879"):
        load_detection_dataset("voc")


# --- the download, with ultralytics' recipe and a small VOCdevkit -----------------------------------------------------

OFFICIAL = {"train2012": 2, "train2007": 1, "val2012": 2, "val2007": 1, "test2007": 3}
XML = """<annotation><size><width>20</width><height>12</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult><bndbox>
<xmin>1</xmin><ymin>1</ymin><xmax>11</xmax><ymax>7</ymax></bndbox></object>
<object><name>cat</name><difficult>1</difficult><bndbox>
<xmin>1</xmin><ymin>1</ymin><xmax>11</xmax><ymax>7</ymax></bndbox></object></annotation>"""


def write_devkit(urls, dir, **options):
    """What ultralytics' download() leaves: archives, and what was in them."""
    assert len(urls) == 3 and options["exist_ok"]
    dir.mkdir(parents=True, exist_ok=True)
    for url in urls:
        (dir / Path(url).name).touch()
    for split, count in OFFICIAL.items():
        folder = dir / "VOCdevkit" / f"VOC{split[-4:]}"
        ids = [f"{split}_{number}" for number in range(count)]
        for part in ("ImageSets/Main", "JPEGImages", "Annotations"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets" / "Main" / f"{split[:-4]}.txt").write_text("\n".join(ids))
        for name in ids:
            Image.new("RGB", (20, 12)).save(folder / "JPEGImages" / f"{name}.jpg")
            (folder / "Annotations" / f"{name}.xml").write_text(XML)


@pytest.fixture
def download_voc(tmp_path, monkeypatch):
    """The function, and the files it may use: there is no network."""
    pytest.importorskip("ultralytics")
    from ultralytics.data import utils
    from ultralytics.utils import downloads

    from qreg_utils.detection import download

    monkeypatch.setenv("QREG_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(downloads, "download", write_devkit)
    monkeypatch.setattr(utils, "check_font", lambda font: None)
    train = {split: count for split, count in OFFICIAL.items() if split != "test2007"}
    for module in (datasets, download):
        monkeypatch.setattr(module, "VOC_TRAIN", train)
        monkeypatch.setattr(module, "VOC_TEST", {"test2007": 3})
    return download.download_voc


def test_a_download_becomes_the_voc_that_is_loaded(download_voc, tmp_path, monkeypatch):
    root = tmp_path / "data" / "VOC"
    assert download_voc() == root
    data = load_detection_dataset("voc")
    assert (len(data.train), len(data.test)) == (6, 3)
    assert data.test[0].classes.tolist() == [VOC_CLASSES.index("dog")]  # the difficult cat is not an object
    assert data.test[0].boxes == pytest.approx(np.array([[5 / 20, 3 / 12, 10 / 20, 6 / 12]]))
    assert {path.name for path in root.iterdir()} == {"images", "labels"}
    assert {path.name for path in (root / "images").iterdir()} == set(OFFICIAL)
    assert {path.name for path in root.parent.iterdir()} == {"VOC", ".VOC.lock"}
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
    from ultralytics.utils import downloads

    monkeypatch.delattr(downloads, "download")
    assert download_voc() == root  # it is there: nothing to do


@pytest.mark.parametrize("split", OFFICIAL)
def test_an_interrupted_download_is_resumed(download_voc, tmp_path, monkeypatch, split):
    """Killed in the conversion of each split: its first image has moved, its label is not written."""
    from ultralytics.utils import downloads

    def cut_short(urls, dir, **options):
        write_devkit(urls, dir, **options)
        (dir / ".VOC.zip.123.part").touch()
        next((dir / "VOCdevkit" / f"VOC{split[-4:]}" / "Annotations").glob(f"{split}_*.xml")).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "download", cut_short)
        with pytest.raises(
            DatasetError, match=r"cannot download to .*VOC\.part .*FileNotFoundError.*`make voc` resumes it"
        ):
            download_voc()
    root = tmp_path / "data" / "VOC"
    assert not root.exists() and root.with_name("VOC.part").exists()
    download_voc()
    assert len(load_detection_dataset("voc").train) == 6
    assert not root.with_name("VOC.part").exists() and not list((root / "images").glob(".*"))


def test_a_failed_download_says_why(download_voc, monkeypatch):
    from ultralytics.utils import downloads

    def no_network(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(downloads, "download", no_network)
    with pytest.raises(DatasetError, match=r"ConnectionError: no network.*make voc"):
        download_voc()


def test_an_incomplete_download_does_not_become_voc(download_voc, tmp_path, monkeypatch):
    monkeypatch.setitem(OFFICIAL, "val2007", 0)
    with pytest.raises(DatasetError, match=r"val2007: 0, .*delete .*VOC\.part, and `make voc` starts again"):
        monkeypatch.setattr("qreg_utils.detection.download.VOC_TRAIN", OFFICIAL | {"val2007": 1})
        download_voc()
    assert not (tmp_path / "data" / "VOC").exists()


def test_another_voc_in_the_way_is_left_alone(download_voc, tmp_path):
    image = write_image(tmp_path / "data" / "VOC", "train2012/a.jpg")
    with pytest.raises(DatasetError, match=r"train2012: 1, .*move .*VOC away, and `make voc` downloads it"):
        download_voc()
    assert image.exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_any_object_is_an_error_before_any_work(voc, split):
    for label in (voc / "labels" / "val2012").iterdir():
        label.write_text("")
    data = load(**{"train": ["train2012"], "test": ["test2007"], split: ["val2012"]})
    with pytest.raises(ValueError, match=f"the {split} images of voc show no object"):
        data.count_objects()
