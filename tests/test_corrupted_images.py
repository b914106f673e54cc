"""The CIFAR-10-C file layout: written once, shared, and refused when it is not what it says."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from qreg_utils import corrupted_images, digest
from qreg_utils.corrupted_images import CorruptedImagesError, open_downloaded, open_or_make
from qreg_utils.corruptions import CORRUPTIONS, corrupt

REFERENCE = Path(__file__).parents[1].parent / "shared" / "corruptions"


@pytest.fixture(scope="module")
def images(tiny):
    return tiny.test_images[:40]


@pytest.fixture(scope="module")
def labels(tiny):
    return tiny.test_labels[:40]


@pytest.fixture(scope="module")
def made(images, labels, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corrupted_images, "CHUNK", 7)
        return open_or_make([tmp_path_factory.mktemp("corrupted")], images, labels)


@pytest.fixture
def copy(made, tmp_path):
    """A folder of one's own: with our checksums."""
    return Path(shutil.copytree(made.folder, tmp_path / made.folder.name))


@pytest.fixture
def downloaded(copy):
    """The same files without checksums, as somebody else would have made them."""
    (copy / "checksums.json").unlink()
    return copy


def test_the_layout_is_that_of_cifar_10_c(made, labels):
    assert {path.stem for path in made.folder.glob("*.npy")} == {*CORRUPTIONS, "labels"}
    assert np.array_equal(np.load(made.folder / "labels.npy"), np.tile(labels, 5))
    fog = np.load(made.folder / "fog.npy")
    assert (fog.shape, fog.dtype) == ((200, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_are_those_of_corrupt_whatever_the_chunk_they_were_written_in(made, images, name):
    for severity in (1, 2, 5):
        assert torch.equal(made.images(name, severity), corrupt(images, name, severity))


def test_files_are_written_once(made, images, labels, monkeypatch):
    monkeypatch.setattr(corrupted_images, "corrupt", None)
    again = open_or_make([made.folder.parent], images, labels)
    assert again.folder == made.folder
    assert torch.equal(again.images("snow", 3), made.images("snow", 3))


def test_mapped_images_can_be_changed_without_touching_the_file(made, images):
    made.images("fog", 1).zero_()
    assert torch.equal(made.images("fog", 1), corrupt(images, "fog", 1))


def test_other_images_labels_or_code_have_another_folder(made, images, labels, tmp_path, monkeypatch):
    def fingerprint(images=images, labels=labels, family="cifar"):
        return corrupted_images._fingerprint(images, labels, family)

    others = [fingerprint(images.flip(0)), fingerprint(labels=labels + 1), fingerprint(family="imagenet")]
    package = Path(shutil.copytree(digest.PACKAGE / "corruptions", tmp_path / "corruptions")).parent
    monkeypatch.setattr(digest, "PACKAGE", package)
    weather, path = (package / "corruptions" / "weather.py").read_text(), package / "corruptions" / "weather.py"
    for text, same in ((weather, True), (f"# mended\n{weather}", True), (f"{weather}\nCHANGED = 1\n", False)):
        path.write_text(text)
        digest._package_sources.cache_clear()
        others += [] if same else [fingerprint()]
        assert (fingerprint() == made.folder.name) == same
    digest._package_sources.cache_clear()
    assert len({made.folder.name, *others}) == 5


def test_what_a_read_only_parent_holds_is_used(made, images, labels, tmp_path, monkeypatch):
    monkeypatch.setattr(
        corrupted_images.os, "access", lambda path, mode: not Path(path).is_relative_to(made.folder.parent)
    )
    parents = [made.folder.parent, tmp_path / "own"]
    assert open_or_make(parents, images, labels).folder == made.folder
    assert open_or_make(parents, images[:2], labels[:2]).folder.parent == tmp_path / "own"


def test_checksums_are_not_lost_when_two_note_one_at_once(tmp_path):
    with FileLock(tmp_path / ".checksums.lock"):
        second = threading.Thread(target=corrupted_images._note_checksum, args=(tmp_path, "snow", 2))
        second.start()
        second.join(0.3)
        assert second.is_alive(), "it did not wait"
        (tmp_path / "checksums.json").write_text('{"fog": 1}')
    second.join(30)
    assert corrupted_images._read_checksums(tmp_path) == {"fog": 1, "snow": 2}


def test_what_was_interrupted_is_made_again_and_the_rest_is_kept(images, labels, tmp_path, monkeypatch):
    def fail_in_the_third_file(chunk, name, severity, **arguments):
        if name == CORRUPTIONS[2] and severity == 4:
            raise OSError("No space left on device")
        return corrupt(chunk, name, severity, **arguments)

    monkeypatch.setattr(corrupted_images, "corrupt", fail_in_the_third_file)
    with pytest.raises(OSError, match="No space left"):
        open_or_make([tmp_path], images[:3], labels[:3])
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.npy")}
    assert set(written) == {"labels.npy", *(f"{name}.npy" for name in CORRUPTIONS[:2])}
    assert not list(tmp_path.glob("*/*.part"))
    monkeypatch.undo()
    folder = open_or_make([tmp_path], images[:3], labels[:3]).folder
    assert all((folder / name).stat().st_mtime_ns == time for name, time in written.items() if name != "labels.npy")


def test_two_processes_share_the_work(tmp_path):
    code = """
import sys
from pathlib import Path
import torch
from qreg_utils import corrupted_images
write = corrupted_images._save
def say(path, *arguments):
    print(path.name)
    return write(path, *arguments)
corrupted_images._save = say
torch.set_num_threads(1)
images = torch.arange(300 * 3 * 32 * 32).view(300, 3, 32, 32).to(torch.uint8)
made = corrupted_images.open_or_make([Path(sys.argv[1])], images, torch.arange(300))
print(made.images("zoom_blur", 5).sum().item())
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    written = [line for output in outputs for line in output if line.endswith(".npy.part") and "labels" not in line]
    assert sorted(written) == [f"{name}.npy.part" for name in CORRUPTIONS]


# --- what is refused --------------------------------------------------------------------------------------------------


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def fill_with_text(path):
    path.write_text("<html>not found</html>" * 100)


def hide_an_object(path):
    np.save(path, np.array([print], dtype=object), allow_pickle=True)


def save_as_float(path):
    np.save(path, np.load(path).astype(np.float32))


def drop_a_severity(path):
    np.save(path, np.load(path)[: -len(np.load(path)) // 5])


def save_in_fortran_order(path):
    np.save(path, np.asfortranarray(np.load(path)))


def lose_an_image(path):
    """As a download does that was cut off after its file had been given its length."""
    content = np.load(path)
    content[-3] = 0
    np.save(path, content)


@pytest.mark.parametrize(
    "damage",
    [
        *(cut_short, empty, fill_with_text, hide_an_object, save_as_float, drop_a_severity, Path.unlink),
        *(save_in_fortran_order, lose_an_image),
    ],
)
@pytest.mark.parametrize("file", ["frost.npy", "labels.npy"])
def test_damaged_or_missing_files_are_refused_by_name(downloaded, images, labels, damage, file):
    if file == "labels.npy" and damage is save_in_fortran_order:
        return  # one-dimensional: there is only one order
    damage(downloaded / file)
    with pytest.raises(CorruptedImagesError, match=f"{file}.*unpack the published archive there again, or move"):
        open_downloaded(downloaded, images, labels)


def test_an_empty_folder_is_refused_with_what_to_do(images, labels, tmp_path):
    with pytest.raises(CorruptedImagesError, match=r"labels\.npy is missing; unpack"):
        open_downloaded(tmp_path, images, labels)


def test_a_changed_byte_of_our_own_file_is_noticed(copy, images, labels):
    content = bytearray((copy / "snow.npy").read_bytes())
    content[-5000] ^= 1
    (copy / "snow.npy").write_bytes(content)
    with pytest.raises(CorruptedImagesError, match=r"snow\.npy is damaged.*delete"):
        open_or_make([copy.parent], images, labels)


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_damaged_checksums_are_named(copy, images, labels, content):
    (copy / "checksums.json").write_text(content, encoding="latin-1")
    with pytest.raises(CorruptedImagesError, match=r"checksums\.json is damaged.*delete"):
        open_or_make([copy.parent], images, labels)


def test_a_missing_checksum_is_not_called_damage(copy, images, labels):
    (copy / "checksums.json").unlink()
    with pytest.raises(CorruptedImagesError, match=r"checksums\.json has no checksum for brightness\.npy"):
        open_or_make([copy.parent], images, labels)


def test_a_downloaded_folder_is_used_as_it_is(downloaded, made, images, labels):
    found = open_downloaded(downloaded, images, labels)
    assert torch.equal(found.images("frost", 4), made.images("frost", 4))
    assert "downloaded" in found.source


def test_labels_of_another_test_set_are_refused(downloaded, images, labels):
    with pytest.raises(CorruptedImagesError, match=r"labels\.npy has other labels"):
        open_downloaded(downloaded, images, labels.flip(0))


@pytest.mark.parametrize("mistake", ["another corruption", "severities reversed", "images in another order"])
def test_a_file_that_is_not_what_its_name_says_is_refused(downloaded, images, labels, mistake):
    path = downloaded / "fog.npy"
    fog = np.load(path).reshape(5, 40, 32, 32, 3)
    if mistake == "another corruption":
        shutil.copy(downloaded / "contrast.npy", path)
    else:
        changed = fog[::-1] if mistake == "severities reversed" else fog[:, ::-1]
        np.save(path, changed.reshape(200, 32, 32, 3))
    with pytest.raises(CorruptedImagesError, match=r"fog\.npy is not fog"):
        open_downloaded(downloaded, images, labels)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference arrays are not part of the project")
def test_files_of_the_original_generator_are_accepted(tmp_path):
    """Photographs in frost included, and a noise that is not ours."""
    with np.load(REFERENCE / "cifar_c_reference.npz") as arrays:
        for name in CORRUPTIONS:
            np.save(tmp_path / f"{name}.npy", arrays[name].reshape(-1, 32, 32, 3))
        images = torch.from_numpy(arrays["clean"]).permute(0, 3, 1, 2)
    labels = torch.arange(len(images)) % 10
    np.save(tmp_path / "labels.npy", labels.tile(5))
    assert open_downloaded(tmp_path, images, labels).images("frost", 5).shape == images.shape
