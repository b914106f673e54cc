"""The 19 corruptions against the original generators: pixel by pixel with replayed draws, and by statistics."""

import csv
import itertools
import json

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tests.fidelity as fidelity
from qreg_utils.corruptions import CORRUPTIONS, FAMILIES, corrupt, frost_textures
from qreg_utils.corruptions.blur import _scan_of_copies
from qreg_utils.corruptions.counter_rng import CounterGenerator
from qreg_utils.corruptions.digital import _means_of_rows, box_means, nearest_pixels
from qreg_utils.corruptions.linear_filters import (
    axis_filter,
    clipped_zooms,
    correlate,
    filter_columns,
    filter_rows,
    gaussian_filter,
    motion_filter,
)
from qreg_utils.corruptions.registry import REGISTRY, SEVERITIES
from qreg_utils.corruptions.weather import _plasma
from tests.fidelity import (
    DATA,
    MEASURES,
    OWN_STATISTICS,
    PICTURE_SETS,
    RANDOM,
    REFERENCE,
    NumpyReplay,
    clean_pictures,
    mean_differences,
    measure,
    own_statistics,
    pixel_differences,
    reference_pictures,
    statistics_deviations,
    to_torch,
)

needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference arrays are not part of the project")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small batches gain nothing from threads, and on a busy machine waiting for them costs minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_pictures(count, height=32, width=32, seed=0):
    """Smooth colourful pictures with all levels in them."""
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    smooth = gaussian_filter(noise, 1.5)
    low, high = smooth.amin((1, 2, 3), keepdim=True), smooth.amax((1, 2, 3), keepdim=True)
    return ((smooth - low) / (high - low) * 255).to(torch.uint8)


# --- pixel by pixel ---------------------------------------------------------------------------------------------------


# Most agree to the byte. saturate multiplies in another order, before it truncates.
PIXEL_LIMITS = {"jpeg_compression": 0.001, "saturate": 0.02}


@needs_reference
@pytest.mark.parametrize("pictures", PICTURE_SETS)
@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != fidelity.WITHOUT_PIXEL_REFERENCE])
def test_pixels_agree_with_the_reference(name, pictures):
    """frost alone cannot agree, for its photographs are not ours to ship."""
    assert max(pixel_differences(name, PICTURE_SETS[pictures])) <= PIXEL_LIMITS.get(name, 0.005)


@needs_reference
def test_jpeg_agrees_off_the_grid_of_an_earlier_compression():
    with np.load(REFERENCE / "jpeg_extra_reference.npz") as arrays:
        clean, reference = to_torch(arrays["clean"]), to_torch(arrays["ijg9"])
    ours = torch.stack([corrupt(clean, "jpeg_compression", severity) for severity in SEVERITIES])
    assert max(mean_differences(ours, reference)) <= 0.001


@pytest.mark.parametrize("family", FAMILIES)
def test_constants_are_those_of_the_original_programs(family):
    reference = json.loads((DATA / "severities.json").read_text())[family]
    assert set(reference) == set(CORRUPTIONS)
    # The reference lists the factors of zoom_blur; the other corruptions' numbers are ours in the same order, to which
    # ours add words and numbers that tell the families apart.
    for name in set(CORRUPTIONS) - {"zoom_blur"}:
        for severity in SEVERITIES:
            theirs = reference[name][severity - 1]
            theirs = [value for key, value in theirs.items() if key != "mode"] if isinstance(theirs, dict) else [theirs]
            ours = [value for value in REGISTRY[name].parameters(family, severity).values() if value is not None]
            assert ours[: len(theirs)] == theirs, (name, severity)
    for severity in SEVERITIES:
        zoom = REGISTRY["zoom_blur"].parameters(family, severity)
        factors = np.arange(1, zoom["stop"], zoom["step"])
        assert factors.tolist() == reference["zoom_blur"][severity - 1]


def test_every_table_has_five_values_for_the_same_parameters():
    for corruption in REGISTRY.values():
        assert tuple(corruption.tables) == FAMILIES
        assert len({tuple(table) for table in corruption.tables.values()}) == 1
        assert {len(values) for table in corruption.tables.values() for values in table.values()} <= {5}


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [pytest.param("cifar_c", marks=needs_reference), "digits_c", "imagenet_c"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_statistics(name, pictures):
    for severity in SEVERITIES:
        for key, (deviation, tolerated) in statistics_deviations(name, severity, PICTURE_SETS[pictures]).items():
            assert deviation <= tolerated, (severity, key)


@pytest.mark.parametrize("pictures", [pytest.param("cifar_c", marks=needs_reference), "digits_c"])
@pytest.mark.parametrize("name", sorted(RANDOM))
def test_statistics_of_the_default_seed(name, pictures):
    """Not for the two photographs: with so few, single seeds of the original itself leave the tolerance."""
    for severity in SEVERITIES:
        deviations = statistics_deviations(name, severity, PICTURE_SETS[pictures], seeds=(0,))
        for key, (deviation, tolerated) in deviations.items():
            assert deviation <= tolerated, (severity, key)


def test_our_own_outputs_are_as_they_were():
    """Where the reference is absent, this notices what the tolerances of the statistics let through.

    After a deliberate change `python -m tests.fidelity` writes the table anew.
    """
    with open(OWN_STATISTICS, newline="") as file:
        before = list(csv.DictReader(file))
    now = list(own_statistics())
    assert len(now) == len(before) == 2 * 19 * 5
    for old, new in zip(before, now, strict=True):
        assert [old[key] for key in ("family", "corruption", "severity")] == [str(v) for v in list(new.values())[:3]]
        for key in MEASURES:
            assert new[key] == pytest.approx(float(old[key]), abs=0.02), old


@needs_reference
@pytest.mark.parametrize("name, limit", [("digits_c", 0), ("imagenet_c", 1e-4)])
def test_pictures_are_those_of_the_reference(name, limit):
    difference = clean_pictures(name).int() - reference_pictures(name).int()
    assert difference.abs().double().mean() <= limit


@needs_reference
@pytest.mark.parametrize("name", ["digits_c", "imagenet_c"])
def test_committed_statistics_are_those_of_the_reference(name, monkeypatch):
    committed = fidelity.expected_statistics(name)
    monkeypatch.setattr(fidelity, "STATISTICS", REFERENCE / "nowhere")
    assert committed == fidelity.expected_statistics.__wrapped__(name)


def test_no_report_without_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "REFERENCE", tmp_path / "nowhere")
    monkeypatch.setattr(fidelity, "REPORT", tmp_path / "fidelity.md")
    with pytest.raises(SystemExit, match="nowhere"):
        fidelity.write_report()
    assert not list(tmp_path.iterdir())


# glass_blur trades blur for iterations, elastic_transform affine for local warps, saturate turns from pale to strong,
# spatter from water to mud, frost takes more away from the image as it adds more.
# In ImageNet-C snow's noise turns from more to brighter.
UNEVEN = {
    "cifar": {"glass_blur", "elastic_transform", "saturate", "spatter", "frost"},
    "imagenet": {"glass_blur", "saturate", "frost", "snow"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_grows(name, family):
    pictures = random_pictures(64)
    changes = [measure(pictures, corrupt(pictures, name, severity, family=family))["mad"] for severity in SEVERITIES]
    assert min(changes) > 0
    if name not in UNEVEN[family]:
        assert changes == sorted(changes)


# --- what a result depends on -----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(CORRUPTIONS),
    severity=st.sampled_from(SEVERITIES),
    seed=st.integers(-(2**63), 2**64),
    total=st.integers(1, 9),
    kept=st.integers(0, 9),
    size=st.sampled_from([(32, 32), (33, 40), (48, 32), (70, 131)]),
    family=st.sampled_from(FAMILIES),
)
def test_a_prefix_of_the_batch_gives_a_prefix_of_the_result(name, severity, seed, total, kept, size, family):
    pictures = random_pictures(total, *size)
    whole = corrupt(pictures, name, severity, seed=seed, family=family)
    assert torch.equal(corrupt(pictures[:kept], name, severity, seed=seed, family=family), whole[:kept])


@pytest.mark.parametrize("family, count, size", [("cifar", 70, (32, 32)), ("imagenet", 10, (75, 90))])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_do_not_depend_on_batch_or_chunk(name, family, count, size, monkeypatch):
    """Flat regions and few levels: exact ties at the truncation, where another summation order would show."""
    pictures = random_pictures(count, *size) // 32 * 32
    pictures[::2, :, 8:-8, 4:-4] = torch.arange(count // 2, dtype=torch.uint8)[:, None, None, None] * 7
    for severity in SEVERITIES:
        whole = corrupt(pictures, name, severity, family=family)
        assert torch.equal(corrupt(pictures[:1], name, severity, family=family), whole[:1])
        assert torch.equal(corrupt(pictures[-2:], name, severity, family=family, first_image=count - 2), whole[-2:])
        monkeypatch.setattr("qreg_utils.corruptions.CHUNK_PIXELS", 3 * size[0] * size[1])
        assert torch.equal(corrupt(pictures, name, severity, family=family), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_seed_decides_the_draws_and_nothing_else(name, family):
    pictures = random_pictures(4, 48, 40)
    first = corrupt(pictures, name, 3, seed=0, family=family)
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(corrupt(pictures, name, 3, seed=0, family=family), first)
    assert torch.equal(corrupt(pictures, name, 3, seed=1, family=family), first) == (name not in RANDOM)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_families_differ_and_cifar_is_the_default(name):
    pictures = random_pictures(2)
    cifar = corrupt(pictures, name, 2, family="cifar")
    assert torch.equal(corrupt(pictures, name, 2), cifar)
    # saturate's first two severities are the same in both.
    assert torch.equal(corrupt(pictures, name, 2, family="imagenet"), cifar) == (name == "saturate")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(RANDOM))
def test_equal_images_of_a_batch_get_different_draws(name, family):
    twins = random_pictures(1, 48, 40).repeat(6, 1, 1, 1)
    results = corrupt(twins, name, 3, family=family)
    assert all(not torch.equal(results[i], results[j]) for i in range(6) for j in range(i))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_memory_layout_does_not_matter_and_the_input_stays(name, family):
    pictures = random_pictures(3, 32, 48)
    copy = pictures.clone()
    result = corrupt(pictures, name, 5, family=family)
    assert torch.equal(pictures, copy)
    assert torch.equal(corrupt(pictures.to(memory_format=torch.channels_last), name, 5, family=family), result)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(
    "family, size",
    [
        *(("cifar", size) for size in ((32, 32), (37, 64), (130, 33))),
        *(("imagenet", size) for size in ((32, 32), (37, 64), (130, 33), (385, 641))),
    ],
)
def test_sizes(name, family, size):
    pictures = random_pictures(2 if max(size) < 200 else 1, *size)
    for severity in (1, 3, 5):
        result = corrupt(pictures, name, severity, family=family)
        assert result.dtype == torch.uint8
        assert result.shape == pictures.shape
        changed = measure(pictures, result)["mad"]
        assert 0 < changed < 110, (severity, changed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_empty_batch(name, family):
    assert corrupt(torch.empty(0, 3, 32, 40, dtype=torch.uint8), name, 2, family=family).shape == (0, 3, 32, 40)


FILTERS = {"contrast", "elastic_transform", "gaussian_blur", "glass_blur", "pixelate", "zoom_blur"}
# ImageNet-C's disks do not sum to 1, and its motion blur truncates.
CIFAR_FILTERS = FILTERS | {"defocus_blur", "motion_blur"}


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(
    "family, level, unchanged",
    [
        ("cifar", 0, CIFAR_FILTERS | {"fog", "saturate", "shot_noise", "speckle_noise"}),
        ("cifar", 255, CIFAR_FILTERS | {"brightness", "snow"}),
        ("imagenet", 0, CIFAR_FILTERS | {"fog", "saturate", "shot_noise", "speckle_noise"}),
        ("imagenet", 255, FILTERS | {"brightness", "snow"}),
    ],
)
def test_black_and_white_pictures_stay(family, level, unchanged, severity):
    """Filters keep flat pictures to the level, and 0 / 0 (saturation, fog's largest value) leaves no trace."""
    flat = torch.full((2, 3, 33, 40), level, dtype=torch.uint8)
    results = {name: corrupt(flat, name, severity, family=family) for name in unchanged}
    assert [name for name, result in results.items() if not torch.equal(result, flat)] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family, size", [("cifar", (32, 32)), ("imagenet", (75, 130))])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_cuda_agrees_with_the_cpu(name, family, size):
    pictures = random_pictures(16, *size)
    for severity in SEVERITIES:
        on_gpu = corrupt(pictures.cuda(), name, severity, family=family)
        assert on_gpu.is_cuda
        on_cpu = corrupt(pictures, name, severity, family=family)
        difference = (on_gpu.cpu().int() - on_cpu.int()).abs().double().mean()
        assert difference <= 0.01


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_brightness_keeps_the_ratios_of_the_channels():
    picture = torch.tensor([100, 50, 25], dtype=torch.uint8)[None, :, None, None].repeat(1, 1, 32, 32)
    # Severity 5 adds 0.3 to the value: 100 + 76.5, and the ratios 1 : 1/2 : 1/4, truncated.
    assert corrupt(picture, "brightness", 5)[0, :, 0, 0].tolist() == [176, 88, 44]


def test_saturate_turns_greys_reddish():
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    red, green, blue = corrupt(grey, "saturate", 5)[0, :, 0, 0].tolist()
    assert (red, green, blue) == (100, 80, 80)
    assert torch.equal(corrupt(grey, "saturate", 3), grey)


def test_impulse_noise_changes_single_channel_values_to_the_extremes():
    pictures = torch.full((64, 3, 32, 32), 100, dtype=torch.uint8)
    result = corrupt(pictures, "impulse_noise", 5)
    shares = [(result == level).double().mean().item() for level in (0, 255, 100)]
    assert shares == pytest.approx([0.035, 0.035, 0.93], abs=0.002)
    assert set(result.unique().tolist()) == {0, 100, 255}


def plasma_point_by_point(draws, side, decay):
    """Diamond-square as its definition reads, one point after the other."""
    grid, step, width = np.zeros((side, side)), side, 100.0
    while step >= 2:
        half, cells = step // 2, side // step
        # Where the new points lie in their cell, and where their four neighbours lie, seen from there.
        diagonal = [(-half, -half), (-half, half), (half, -half), (half, half)]
        straight = [(-half, 0), (half, 0), (0, -half), (0, half)]
        for place, neighbours in (((half, half), diagonal), ((0, half), straight), ((half, 0), straight)):
            jitter = width * draws.uniform(-width, width, (cells, cells))[0].numpy()
            for i in range(cells):
                for j in range(cells):
                    row, column = i * step + place[0], j * step + place[1]
                    around = [grid[(row + down) % side, (column + right) % side] for down, right in neighbours]
                    grid[row, column] = np.mean(around) + jitter[i, j]
        step, width = half, width / decay
    grid -= grid.min()
    return grid / grid.max()


@pytest.mark.parametrize("decay", [3, 1.75])
def test_fog_is_diamond_square_noise(decay):
    ours = _plasma(NumpyReplay(7), 16, decay, CPU)[0].numpy()
    assert ours == pytest.approx(plasma_point_by_point(NumpyReplay(7), 16, decay), abs=1e-5)


def glass_pixel_by_pixel(picture, offsets, reach):
    """One scan of glass_blur over (H,W) as its definition reads."""
    picture, offsets = picture.copy(), iter(offsets.reshape(-1, 2).tolist())
    height, width = picture.shape
    for row in range(height - reach, reach, -1):
        for column in range(width - reach, reach, -1):
            right, down = next(offsets)
            picture[row, column] = picture[row + down, column + right]
    return picture


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_blur_copies_one_pixel_after_the_other(reach):
    height, width = 32, 45
    pixels = np.arange(height * width).reshape(height, width)
    offsets = np.random.RandomState(3).randint(-reach, reach, (height - 2 * reach, width - 2 * reach, 2))
    ours = _scan_of_copies(NumpyReplay(3), height, width, reach, CPU)[0].view(height, width)
    assert np.array_equal(ours.numpy(), glass_pixel_by_pixel(pixels, offsets, reach))


@pytest.mark.parametrize("padding, mode", [("edge", "nearest"), ("reflect", "mirror"), ("symmetric", "reflect")])
@pytest.mark.parametrize("size", [20, 150])
def test_axis_filter_is_a_padded_correlation(padding, mode, size):
    """150 pixels are three blocks."""
    image = np.random.RandomState(0).rand(7, size)
    taps = (0.1, 0.5, -0.3, 0.2, 0.7)
    blocks = axis_filter(size, taps, padding, CPU)
    expected = scipy.ndimage.correlate1d(image, taps, mode=mode)
    assert filter_columns(torch.from_numpy(image), blocks).numpy() == pytest.approx(expected)
    assert filter_rows(torch.from_numpy(image.T), blocks).numpy() == pytest.approx(expected.T)


@pytest.mark.parametrize("symmetric", [True, False])
def test_correlate_is_a_convolution_layer(symmetric):
    pictures = random_pictures(2, 135, 32)
    kernel = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if symmetric:
        kernel += kernel.flip(0)
    padded = torch.nn.functional.pad(pictures.double(), (2, 2, 2, 2), mode="reflect")
    expected = torch.nn.functional.conv2d(padded, kernel.expand(3, 1, 5, 5), groups=3)
    ours = correlate(pictures.double(), tuple(map(tuple, kernel.tolist())), "reflect")
    assert torch.allclose(ours, expected, atol=1e-6)


def test_gaussian_filter_is_scipys():
    """One standard deviation for each axis, wide enough for several blocks to overlap."""
    image = np.random.RandomState(0).rand(140, 70) * 255
    expected = scipy.ndimage.gaussian_filter(image, (6, 1.5), mode="reflect", truncate=3)
    ours = gaussian_filter(torch.from_numpy(image), (6, 1.5), "symmetric", truncate=3)
    assert ours.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size, factor", [(32, 1.25), (97, 1.11), (160, 2.5), (333, 4.5)])
def test_clipped_zoom_is_scipys(size, factor):
    """At 160 and 2.5 SciPy's rounding leaves the last pixel black."""
    signal = np.random.RandomState(0).rand(size)
    window = int(np.ceil(size / factor))
    start = (size - window) // 2
    expected = scipy.ndimage.zoom(signal[start : start + window], factor, order=1)

    def ours(trim):
        return filter_columns(torch.from_numpy(signal)[None], clipped_zooms(size, (factor,), CPU, trim))[0].numpy()

    surplus = len(expected) - size
    assert ours(trim=False) == pytest.approx(expected)
    assert ours(trim=True) == pytest.approx(expected[surplus // 2 :][:size])


def test_motion_filter_leaves_out_taps_beyond_the_frame():
    """A trail of 41 pixels over 32: the first 32 taps alone count, and are not made up for."""
    weights = np.exp(-(np.arange(41) ** 2) / (2 * 15**2))
    expected = 200 * weights[:32].sum() / weights.sum()
    white = torch.full((1, 3, 40, 32), 200, dtype=torch.uint8)
    blurred = motion_filter(white, 20, 15, torch.zeros(1))
    assert torch.allclose(blurred, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("scale", REGISTRY["pixelate"].tables["imagenet"]["scale"])
def test_nearest_pixels_are_pillows(scale):
    for size in range(32, 700):
        small = int(size * scale)
        expected = Image.fromarray(np.arange(small, dtype=np.int32)[None]).resize((size, 1), Image.Resampling.NEAREST)
        assert np.array_equal(nearest_pixels(small, size).numpy(), np.asarray(expected)[0])


@pytest.mark.parametrize("size, new_size", [(224, 134), (224, 67), (128, 32), (331, 99)])
def test_box_means_are_pillows(size, new_size):
    """At sizes without ties, which Pillow has decided in other ways since 2019."""
    levels = np.random.RandomState(0).randint(0, 256, (1, size), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(levels).resize((new_size, 1), Image.Resampling.BOX))
    ours = _means_of_rows(torch.from_numpy(levels).mT, *box_means(size, new_size)).mT
    assert np.array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("size", [(64, 48), (75, 90)])
def test_jpeg_of_grey_pictures_is_pillows(size, tmp_path):
    """Only colours depend on the version of the library."""
    grey = random_pictures(1, *size)[:, :1].repeat(1, 3, 1, 1)
    for severity in SEVERITIES:
        quality = REGISTRY["jpeg_compression"].parameters("imagenet", severity)["quality"]
        path = tmp_path / "picture.jpg"
        Image.fromarray(grey[0].movedim(0, -1).numpy()).save(path, quality=quality)
        expected = to_torch(np.asarray(Image.open(path)).copy()).int()
        ours = corrupt(grey, "jpeg_compression", severity, family="imagenet")[0].int()
        assert torch.equal(ours, expected)


# --- the random numbers -----------------------------------------------------------------------------------------------


def generator(num_images=64, first_image=0, name="test", severity=1, seed=0):
    return CounterGenerator(name, severity, seed, first_image, num_images, CPU)


def assert_uncorrelated(samples):
    """Rows of standardised samples: no correlation of neighbouring rows, nor of neighbours within a row."""
    samples = (samples - samples.mean()) / samples.std()
    for products in (samples[1:] * samples[:-1], samples[:, 1:] * samples[:, :-1], samples[1:, 1:] * samples[:-1, :-1]):
        assert abs(products.mean()) < 4 / products.numel() ** 0.5


def test_splitmix64_known_answers():
    """The first outputs of the published algorithm for the seed 1234567."""
    draws = generator(1)
    draws.keys[:] = 1234567 + int(np.uint64(0x9E3779B97F4A7C15).astype(np.int64))
    words = draws._bits(4).transpose(1, 2).contiguous().view(torch.int64).flatten().numpy().astype(np.uint64)
    assert words.tolist() == [6457827717110365317, 3203168211198807973]


def test_uniform_moments():
    samples = generator().uniform(-1, 3, (20000,)).double()
    assert samples.min() >= -1
    assert samples.max() <= 3
    assert samples.mean() == pytest.approx(1, abs=4 * 4 / 12**0.5 / samples.numel() ** 0.5)
    assert samples.std() == pytest.approx(4 / 12**0.5, rel=0.002)
    histogram = torch.histc(samples, 64, -1, 3)
    expected = samples.numel() / 64
    assert ((histogram - expected) ** 2 / expected).sum() < 63 + 4 * (2 * 63) ** 0.5
    assert_uncorrelated(samples)


def test_coins_are_uniform_numbers_below_one_half():
    assert torch.equal(generator().coins((3, 7)), generator().uniform(0, 1, (3, 7)) < 0.5)
    assert generator().coins((20000,)).double().mean() == pytest.approx(0.5, abs=0.002)


def test_normal_moments():
    samples = generator().normal(2, 0.5, (20001,)).double()
    assert samples.shape == (64, 20001)
    standard = (samples - 2) / 0.5
    expected = {1: 0, 2: 1, 3: 0, 4: 3, 6: 15}
    for power, moment in expected.items():
        powers = standard**power
        assert powers.mean() == pytest.approx(moment, abs=4 * powers.std().item() / samples.numel() ** 0.5)
    assert 4.5 < standard.abs().max() < 6.7
    assert_uncorrelated(samples)
    # The two numbers made from one pair of uniforms are independent too.
    assert_uncorrelated(samples[:, :20000].view(64, 2, 10000).transpose(1, 2).reshape(-1, 2) ** 2)


def test_integers_are_uniform():
    samples = generator().integers(-2, 3, (20000,))
    shares = torch.bincount(samples.flatten() + 2).double() / samples.numel()
    assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.002)
    bounds = torch.arange(1, 65)
    assert bool((generator().integers(0, bounds, ()) < bounds).all())


@pytest.mark.parametrize("rate", [50, 500])
@pytest.mark.parametrize("level", [1, 37, 255])
def test_poisson_follows_its_distribution(rate, level):
    from scipy.stats import chisquare, poisson

    counts = generator(seed=level).poisson(torch.full((64, 4000), level, dtype=torch.uint8), rate).flatten().numpy()
    law = poisson(rate * level / 255)
    # Cells of at least some 0.1 % each.
    edges = np.unique(law.ppf(np.linspace(0.001, 0.999, 40)))
    cells = np.diff(np.concatenate(([0], law.cdf(edges), [1])))
    observed = np.bincount(np.searchsorted(edges, counts), minlength=len(cells))
    assert chisquare(observed[cells > 0], counts.size * cells[cells > 0]).pvalue > 1e-4
    assert counts.mean() == pytest.approx(law.mean(), abs=4 * law.std() / counts.size**0.5)


def test_poisson_of_black_is_zero():
    assert not generator().poisson(torch.zeros(64, 100, dtype=torch.uint8), 100).any()


@pytest.mark.parametrize("other", [{"name": "tset"}, {"severity": 2}, {"seed": 1}, {"seed": -1}, {"first_image": 64}])
def test_other_keys_give_unrelated_numbers(other):
    ours, theirs = generator().uniform(-1, 1, (1000,)), generator(**other).uniform(-1, 1, (1000,))
    assert abs((ours * theirs).mean() * 3) < 4 / ours.numel() ** 0.5


def test_each_call_takes_the_next_counters():
    draws = generator()
    first, second = draws.uniform(-1, 1, (1000,)), draws.uniform(-1, 1, (1000,))
    assert abs((first * second).mean() * 3) < 4 / first.numel() ** 0.5


# --- errors -----------------------------------------------------------------------------------------------------------


def test_names():
    assert len(CORRUPTIONS) == 19
    assert isinstance(CORRUPTIONS, tuple)
    assert list(CORRUPTIONS) == sorted(CORRUPTIONS)
    assert (CORRUPTIONS[0], CORRUPTIONS[-1]) == ("brightness", "zoom_blur")


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.zeros(2, 3, 32, 32), TypeError, "torch.uint8.*torch.float32"),
        (torch.full((2, 3, 32, 32), float("nan")), TypeError, "torch.uint8.*torch.float32"),
        (np.zeros((2, 3, 32, 32), np.uint8), TypeError, "torch.uint8.*ndarray"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), ValueError, r"\(N, 3, H, W\).*\(3, 32, 32\)"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), ValueError, r"\(N, 3, H, W\).*\(2, 32, 32, 3\)"),
        (torch.zeros(2, 3, 31, 64, dtype=torch.uint8), ValueError, r">= 32.*\(2, 3, 31, 64\)"),
    ],
)
def test_bad_images(images, error, message):
    with pytest.raises(error, match=message):
        corrupt(images, "fog", 3)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"severity": 0}, ValueError, "severity.*1, 2, 3, 4, 5.*0"),
        ({"severity": 6}, ValueError, "severity.*1, 2, 3, 4, 5.*6"),
        ({"severity": True}, TypeError, "severity.*int.*True"),
        ({"severity": 2.0}, TypeError, "severity.*int.*2.0"),
        ({"severity": "2"}, TypeError, "severity.*int.*'2'"),
        ({"severity": float("nan")}, TypeError, "severity.*int.*1, 2, 3, 4, 5.*nan"),
        ({"seed": 0.5}, TypeError, "seed.*int.*0.5"),
        ({"first_image": "0"}, TypeError, "first_image.*int.*'0'"),
        ({"first_image": -1}, ValueError, "first_image.*from 0.*-1"),
        ({"first_image": 2**63}, ValueError, "first_image.*from 0.*9223372036854775808"),
        ({"name": ["fog"]}, ValueError, "'fog'.*brightness.*zoom_blur"),
        ({"name": "rain"}, ValueError, "rain.*brightness.*zoom_blur"),
        ({"name": None}, ValueError, "None.*brightness.*zoom_blur"),
        ({"family": "mnist"}, ValueError, "mnist.*cifar.*imagenet"),
        ({"family": None}, ValueError, "None.*cifar.*imagenet"),
    ],
)
def test_bad_arguments(arguments, error, message):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(error, match=message):
        corrupt(images, **{"name": "fog", "severity": 3, **arguments})


def test_numpy_integers_are_integers():
    pictures = random_pictures(2)
    assert torch.equal(
        corrupt(pictures, "fog", np.int64(3), seed=np.int64(7)), corrupt(pictures, "fog", severity=3, seed=7)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_does_not_change_a_corruption(dtype):
    images = torch.randint(0, 256, (2, 3, 33, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def corrupted():
        for cached in ("reduced_textures", "_textures_of_sizes", "_full_size_textures"):
            getattr(frost_textures, cached).cache_clear()
        settings = itertools.product(CORRUPTIONS, ("cifar", "imagenet"))
        return {setting: corrupt(images, setting[0], 3, family=setting[1]) for setting in settings}

    expected = corrupted()
    torch.set_default_dtype(dtype)
    try:
        found = corrupted()
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert [setting for setting in expected if not torch.equal(expected[setting], found[setting])] == []
