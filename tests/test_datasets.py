"""Data sets, and what is said when one is missing, damaged or not what it claims to be."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from qreg_utils import datasets
from qreg_utils.datasets import DatasetError, all_digits, load_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_digits_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    theirs = load_digits()
    images, labels = all_digits()
    assert labels.tolist() == theirs.target.tolist()
    centres = images[:, 0, 2::4, 2::4] / 255 * 16  # enlarged four times; close to the pixel that was there
    assert (centres - torch.from_numpy(theirs.images)).abs().mean() < 1
    assert digits.train_images.shape == (1442, 3, 32, 32) and digits.test_images.shape == (355, 3, 32, 32)
    assert digits.train_images.dtype == torch.uint8
    assert digits.test_labels.bincount().min() >= 34  # stratified
    assert torch.equal(digits.train_images[:, 0], digits.train_images[:, 2])


def test_splits_share_no_image(digits):
    def hashes(images):
        return {hashlib.md5(image.numpy().tobytes()).hexdigest() for image in images}

    assert not hashes(digits.train_images) & hashes(digits.test_images)


def test_normalised_training_images_have_mean_0_and_deviation_1(digits):
    x = digits.normalise(digits.train_images)
    assert x.dtype == torch.float32
    assert x.mean().item() == pytest.approx(0, abs=2e-3)
    assert x.std().item() == pytest.approx(1, abs=2e-3)


def test_augmentation_only_moves_pixels(digits):
    images = digits.train_images[:50]
    moved = digits.augment(images, torch.Generator().manual_seed(0))
    again = digits.augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.dtype == torch.uint8
    assert torch.equal(moved, again)
    padded = torch.nn.functional.pad(images, [2] * 4)
    for before, after in zip(padded, moved, strict=True):  # each is one of the 25 shifts
        windows = before.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
        assert (windows == after).all(dim=(1, 2, 3)).any()


def test_flips_are_for_data_sets_that_say_so(digits):
    from dataclasses import replace

    ramp = torch.arange(32, dtype=torch.uint8).expand(200, 3, 32, 32)
    flipping = replace(digits, flip=True, shift=0).augment(ramp, torch.Generator().manual_seed(0))
    flipped = (flipping[:, 0, 0, 0] == 31).float().mean().item()
    assert 0.35 < flipped < 0.65
    assert torch.equal(replace(digits, shift=0).augment(ramp, torch.Generator().manual_seed(0)), ramp)


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"'mnist'.*digits, cifar10, cifar100"):
        load_dataset("mnist")


# --- CIFAR-10, with small files in its layout -------------------------------------------------------------------------


def write_batch(path, count=20, labels=None, seed=0, label_key=b"labels"):
    rng = np.random.default_rng(seed)
    labels = labels if labels is not None else rng.integers(0, 10, count).tolist()
    batch = {b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), label_key: labels}
    path.write_bytes(pickle.dumps(batch, protocol=2))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number in range(1, 6):
        write_batch(folder / f"data_batch_{number}", seed=number)
    write_batch(folder / "test_batch", count=10, seed=9)
    return folder


def test_files_with_another_md5_are_refused_by_name(cifar):
    with pytest.raises(
        DatasetError, match=r"data_batch_1 has md5 .*c99cafc152244af753f735de768cd75f.*accept_unverified"
    ):
        load_dataset("cifar10")


def test_accepted_unverified_files_are_listed(cifar):
    data = load_dataset("cifar10", accept_unverified_files=True)
    assert data.train_images.shape == (100, 3, 32, 32) and len(data.test_labels) == 10
    assert len(data.unverified_files) == 6 and data.unverified_files[-1] == "cifar-10-batches-py/test_batch"
    expected = np.random.default_rng(1)
    expected.integers(0, 10, 20)
    first = expected.integers(0, 256, (20, 3072), dtype=np.uint8)[0].reshape(3, 32, 32)
    assert np.array_equal(data.train_images[0].numpy(), first)


def test_a_missing_file_is_named(cifar):
    (cifar / "data_batch_3").unlink()
    with pytest.raises(DatasetError, match=r"data_batch_3 is missing.*cifar-10-python\.tar\.gz"):
        load_dataset("cifar10", accept_unverified_files=True)


@pytest.mark.parametrize("damage", ["truncated", "labels", "not a pickle"])
def test_a_damaged_file_is_named(cifar, damage):
    path = cifar / "data_batch_2"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "labels":
        write_batch(path, labels=[10] * 20)
    else:
        path.write_text("hello")
    with pytest.raises(DatasetError, match="data_batch_2"):
        load_dataset("cifar10", accept_unverified_files=True)


def test_an_unverified_file_cannot_run_code(cifar, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    (cifar / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DatasetError, match=r"data_batch_1 .*not allowed"):
        load_dataset("cifar10", accept_unverified_files=True)
    assert not (tmp_path / "executed").exists()


def test_a_failed_download_says_where_to_get_the_files(tmp_path, monkeypatch):
    def no_network(self, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    monkeypatch.setattr(CIFAR10, "download", no_network)
    with pytest.raises(DatasetError, match=r"cannot download .*no network.*cifar-10-python\.tar\.gz.*QREG_DATA"):
        load_dataset("cifar10")


def test_a_download_happens_once_when_nothing_is_there(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    monkeypatch.setattr(CIFAR10, "__init__", lambda self, root, download: write_batches(CIFAR10, root, calls))
    for _ in range(2):
        assert len(load_dataset("cifar10", accept_unverified_files=True).train_labels) == 100
    assert len(calls) == 1 and not list(tmp_path.glob("*.part"))


def write_batches(source, root, calls):
    """What torchvision leaves after a download."""
    calls.append(root)
    (root / source.base_folder).mkdir()
    for file, _ in source.train_list + source.test_list:
        write_batch(root / source.base_folder / file)


def test_an_interrupted_download_is_not_taken_for_the_data(tmp_path, monkeypatch):
    def interrupted(self, root, download):
        (root / CIFAR10.base_folder).mkdir()
        write_batch(root / CIFAR10.base_folder / "data_batch_1")
        raise OSError("connection lost")

    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    calls = []
    monkeypatch.setattr(CIFAR10, "__init__", interrupted)
    with pytest.raises(DatasetError, match="connection lost"):
        load_dataset("cifar10", accept_unverified_files=True)
    monkeypatch.setattr(CIFAR10, "__init__", lambda self, root, download: write_batches(CIFAR10, root, calls))
    assert len(load_dataset("cifar10", accept_unverified_files=True).train_labels) == 100 and len(calls) == 1


@pytest.mark.parametrize("mode", ["somebody else's lock", "read-only folder"])
def test_data_that_others_have_put_there_need_no_lock(tmp_path, monkeypatch, mode):
    """Root may write anywhere, so the lock itself fails here."""
    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    write_batches(CIFAR10, tmp_path, [])
    if mode == "somebody else's lock":
        (tmp_path / ".cifar-10-batches-py.lock").touch(mode=0o444)
    before = sorted(tmp_path.iterdir())

    def refused(*args):
        raise PermissionError("not yours")

    monkeypatch.setattr(datasets, "FileLock", refused)
    assert len(load_dataset("cifar10", accept_unverified_files=True).train_labels) == 100
    assert sorted(tmp_path.iterdir()) == before


def test_real_cifar10_where_it_is_at_hand():
    if not (datasets.data_dir() / "cifar-10-batches-py" / "test_batch").exists():
        pytest.skip("no CIFAR-10 in QREG_DATA")
    data = load_dataset("cifar10", accept_unverified_files=True)
    assert data.train_images.shape == (50_000, 3, 32, 32) and len(data.test_labels) == 10_000
    x = data.normalise(data.train_images[:10_000])
    assert x.mean(dim=(0, 2, 3)).abs().max() < 0.03
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.classes[data.test_labels[0]] == "cat"


# --- CIFAR-100: the same code, so what differs ------------------------------------------------------------------------


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    write_batch(folder / "train", labels=list(range(80, 100)), label_key=b"fine_labels")
    write_batch(folder / "test", count=10, seed=9, label_key=b"fine_labels")
    return folder


def test_cifar100_files_with_another_md5_are_refused_or_listed(cifar100):
    with pytest.raises(DatasetError, match=r"cifar-100-python/train has md5 .*16019d7e3df5f24257cddd939b257f8d"):
        load_dataset("cifar100")
    data = load_dataset("cifar100", accept_unverified_files=True)
    assert data.unverified_files == ("cifar-100-python/train", "cifar-100-python/test")
    assert data.train_images.shape == (20, 3, 32, 32) and data.train_labels.tolist() == list(range(80, 100))
    assert data.name == "cifar100" and len(data.test_labels) == 10


def test_a_missing_cifar100_file_is_named(cifar100):
    (cifar100 / "test").unlink()
    with pytest.raises(DatasetError, match=r"test is missing.*cifar-100-python\.tar\.gz"):
        load_dataset("cifar100", accept_unverified_files=True)


@pytest.mark.parametrize("damage", [{"labels": [100] * 20}, {"label_key": b"coarse_labels"}])
def test_a_cifar100_file_without_100_fine_labels_is_damaged(cifar100, damage):
    write_batch(cifar100 / "train", **{"label_key": b"fine_labels", **damage})
    with pytest.raises(DatasetError, match=r"cifar-100-python/train (is damaged|cannot be read)"):
        load_dataset("cifar100", accept_unverified_files=True)


def test_there_are_100_class_names_in_alphabetical_order():
    names = datasets.CIFAR100_CLASSES.split()
    assert len(set(names)) == 100 and names == sorted(names)


def test_real_cifar100_where_it_is_at_hand():
    folder = datasets.data_dir() / "cifar-100-python"
    if not (folder / "meta").exists():
        pytest.skip("no CIFAR-100 in QREG_DATA")
    data = load_dataset("cifar100")
    assert data.train_images.shape == (50_000, 3, 32, 32) and data.test_images.shape == (10_000, 3, 32, 32)
    assert data.unverified_files == ()
    assert data.train_labels.bincount().tolist() == [500] * 100
    assert list(data.classes) == pickle.loads((folder / "meta").read_bytes())["fine_label_names"]
    x = data.train_images.flatten(2).double() / 255
    assert x.mean(dim=(0, 2)).tolist() == pytest.approx(data.mean, abs=5e-5)
    assert x.std(dim=(0, 2)).tolist() == pytest.approx(data.std, abs=5.5e-5)


def test_a_subset_is_the_same_every_time(digits):
    part = digits.subset(500, 100)
    again = digits.subset(500, 100)
    assert torch.equal(part.train_images, again.train_images) and torch.equal(part.train_labels, again.train_labels)
    assert part.train_images.shape == (500, 3, 32, 32) and part.train_labels.shape == (500,)
    assert torch.equal(part.test_images, digits.test_images[:100])
    assert torch.equal(part.test_labels, digits.test_labels[:100])
    assert not torch.equal(part.train_labels, digits.train_labels[:500])  # chosen at random
    seen = {
        image.numpy().tobytes(): label for image, label in zip(digits.train_images, digits.train_labels, strict=True)
    }
    for image, label in zip(part.train_images, part.train_labels, strict=True):
        assert seen[image.numpy().tobytes()] == label
    assert torch.equal(digits.subset(None, None).train_images, digits.train_images)


def test_a_subset_larger_than_the_set_is_an_error(digits):
    with pytest.raises(ValueError, match=r"test_images: 1000 is not allowed: digits has 355"):
        digits.subset(None, 1000)
    with pytest.raises(ValueError, match=r"train_images: 0 is not allowed"):
        digits.subset(0, None)
