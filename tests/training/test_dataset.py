"""Images and labels resized for training: exact coordinates, one decoding, independent of the worker that is first."""

import multiprocessing
import pickle
import struct

import cv2
import numpy as np
import pytest

from tests.support.training_images import dataset_of, labels_of, random_dataset, record, smooth, star, written
from yolov7_deploy.errors import DatasetError, DeviceError, ImageError
from yolov7_deploy.image import decode_image, read_image
from yolov7_deploy.training import dataset as images
from yolov7_deploy.training.dataset import ImageCache, ImageStore, reduction_factor

ROUNDING_PX = 1e-3  # float32 of coordinates below 1000
JPEG = 12  # grey levels of error from compression and from averaging in the decoder
POSITION_PX = 0.3  # accuracy of a position read from a brightness ramp of 3 levels per pixel


def ramp(hw, axis):
    """Return an image whose brightness is the position of the pixel: 3 levels per pixel."""
    line = np.arange(hw[axis], dtype=np.float64) * 3 + 1.5
    plane = np.broadcast_to(line if axis else line[:, None], hw)
    return np.repeat(plane.round().astype(np.uint8)[:, :, None], 3, axis=2)


def with_exif_orientation(data, orientation):
    """Return a JPEG with an EXIF orientation."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, orientation, 0) + bytes(4)
    body = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


@pytest.fixture
def three(tmp_path):
    return random_dataset(tmp_path, [(40, 60), (60, 30), (24, 24)])


def test_the_longer_side_becomes_the_size_and_the_other_is_truncated(three):
    store = ImageStore(three, size=50)
    assert [store.hw(i) for i in range(3)] == [(33, 50), (50, 25), (50, 50)]


def test_sizes_and_objects_are_known_without_decoding(three, monkeypatch):
    monkeypatch.setattr(images, "read_image", None)
    store = ImageStore(three, size=50)
    for index in range(3):
        height, width = store.hw(index)
        objects, labels = store.objects(index), three.record(index).labels
        np.testing.assert_allclose(objects.boxes, labels.boxes * np.tile([width, height], 2), atol=ROUNDING_PX)
        for found, polygon in zip(objects.polygons, labels.polygons, strict=True):
            np.testing.assert_allclose(found, polygon * [width, height], atol=ROUNDING_PX)
        np.testing.assert_array_equal(objects.class_ids, labels.class_ids)
    assert [len(store.objects(index)) for index in range(3)] == [4, 4, 4]


def test_crowd_boxes_are_excluded(tmp_path):
    rng = np.random.default_rng(0)
    labels = labels_of([star(rng), star(rng)], boxes=[[0, 0, 1, 1]], crowd=[True, False, True])
    store = ImageStore(
        dataset_of([record(written(tmp_path / "a.png", smooth((40, 60), 0)), (40, 60), labels)]), size=60
    )
    assert store.objects(0).class_ids.tolist() == [1]
    np.testing.assert_allclose(store.objects(0).polygons[0], labels.polygons[1] * [60, 40], atol=ROUNDING_PX)


def test_a_resized_image_is_the_result_of_opencv(three):
    store = ImageStore(three, size=50)
    for index in range(3):
        slow = cv2.resize(read_image(three.path(index)), store.hw(index)[::-1], interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(store.load_resized(index), slow)


@pytest.mark.parametrize(
    ("scale", "step"), [(1.0, 1), (0.51, 1), (0.5, 2), (0.26, 2), (0.25, 4), (0.125, 8), (0.01, 8)]
)
def test_an_image_is_never_reduced_below_its_scale(scale, step):
    assert reduction_factor(scale) == step


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25, 0.125])
@pytest.mark.parametrize("size", [83, 50])
@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_the_factors_give_the_source_position_of_each_pixel(tmp_path, suffix, scale, size, cache_bytes):
    hw = (59, 83)
    for axis in (0, 1):
        path = written(tmp_path / f"{axis}{suffix}", ramp(hw, axis))
        store = ImageStore(dataset_of([record(path, hw)]), size=size, cache_bytes=cache_bytes)
        image, factors = store.load_scaled(0, scale=scale)
        resized_px = (np.arange(image.shape[axis]) + 0.5) / factors[1 - axis]
        source_px = resized_px * hw[axis] / store.hw(0)[axis]
        seen = image[..., 0].astype(float).mean(axis=1 - axis) / 3
        inner = slice(1, -1)  # pixels averaged over the edge are not exact
        np.testing.assert_allclose(seen[inner], source_px[inner], atol=POSITION_PX)


def test_a_large_photo_is_decoded_at_reduced_size(tmp_path, monkeypatch):
    reductions = []
    monkeypatch.setattr(
        images, "read_image", lambda path, reduced: reductions.append(reduced) or read_image(path, reduced=reduced)
    )
    store = ImageStore(dataset_of([record(written(tmp_path / "a.jpg", smooth((300, 400), 0)), (300, 400))]), size=64)
    image, (factor_x, factor_y) = store.load_scaled(0)
    assert (reductions, image.shape) == ([4], (75, 100, 3))
    assert (factor_x, factor_y) == pytest.approx((100 / 64, 75 / 48))


@pytest.mark.parametrize("hw", [(64, 80), (63, 83), (67, 81)])
def test_a_large_photo_is_resized_from_a_reduced_decoding_without_a_shift(tmp_path, hw):
    for axis in (0, 1):
        store = ImageStore(dataset_of([record(written(tmp_path / f"{axis}.jpg", ramp(hw, axis)), hw)]), size=30)
        image = store.load_resized(0)
        assert image.shape[:2] == store.hw(0)
        source_px = (np.arange(image.shape[axis]) + 0.5) * hw[axis] / image.shape[axis]
        seen = image[..., 0].astype(float).mean(axis=1 - axis) / 3
        np.testing.assert_allclose(seen[1:-1], source_px[1:-1], atol=POSITION_PX)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reduced", [2, 4, 8])
def test_a_reduced_image_follows_its_exif_orientation(orientation, reduced):
    _, encoded = cv2.imencode(".jpg", smooth((64, 96), 3))
    data = np.frombuffer(with_exif_orientation(encoded.tobytes(), orientation), np.uint8)
    full = decode_image(data, name="a")
    small = decode_image(data, name="a", reduced=reduced)
    assert full.shape[:2] == ((96, 64) if orientation > 4 else (64, 96))
    slow = cv2.resize(full, None, fx=1 / reduced, fy=1 / reduced, interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - slow).max() <= JPEG


def test_a_hostile_image_is_refused_at_any_reduction():
    _, data = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))
    huge = bytearray(data.tobytes())
    huge[16:24] = struct.pack(">II", 60000, 60000)
    for reduced in (1, 8):
        with pytest.raises(ImageError, match="60000"):
            decode_image(np.frombuffer(bytes(huge), np.uint8), name="a", reduced=reduced)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_cached_image_is_decoded_once(three, monkeypatch):
    store = ImageStore(three, size=50, cache_bytes=10**6)
    first = [store.load_resized(index).copy() for index in range(3)]
    monkeypatch.setattr(images, "read_image", None)
    for index, image in enumerate(first):
        np.testing.assert_array_equal(store.load_resized(index), image)
        np.testing.assert_array_equal(store.load_scaled(index)[0], image)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_an_image_decoded_by_one_process_is_cached_for_all(three, monkeypatch):
    store = ImageStore(three, size=50, cache_bytes=10**6)
    worker = multiprocessing.get_context("fork").Process(target=store.load_resized, args=(1,))
    worker.start()
    worker.join()
    monkeypatch.setattr(images, "read_image", None)
    assert store.load_resized(1).shape == (50, 25, 3)


@pytest.mark.parametrize("scale", [1.0, 0.6, 0.5, 0.2])
def test_cached_and_newly_decoded_images_are_identical(three, scale):
    store = ImageStore(three, size=50, cache_bytes=10**6)
    before = [store.load_scaled(index, scale=scale) for index in range(3)]
    for index, (image, factors) in enumerate(before):
        again, same = store.load_scaled(index, scale=scale)
        np.testing.assert_array_equal(image, again)
        assert factors == same


def test_the_cache_holds_random_images_up_to_its_budget():
    sizes = np.random.default_rng(0).integers(1, 1000, 200)
    cached = []
    for seed in (0, 0, 1):
        cache = ImageCache(sizes, cache_bytes=20_000, seed=seed)
        cached.append([index for index in range(200) if cache.is_reserved(index)])
        assert 20_000 - 1000 < cache.reserved_bytes <= 20_000
        assert cache.reserved_bytes == sizes[cached[-1]].sum()
    assert cached[0] == cached[1] != cached[2]


def test_no_two_images_share_a_byte():
    hws = [(2, 3), (4, 1), (5, 5), (1, 1)]
    cache = ImageCache(np.array([h * w * 3 for h, w in hws]), cache_bytes=1000, seed=0)
    images = [np.full((*hw, 3), 10 + number, np.uint8) for number, hw in enumerate(hws)]
    assert all(cache.get(number, hw) is None for number, hw in enumerate(hws))
    for number, image in enumerate(images):
        cache.put(number, image)
    for number, image in enumerate(images):
        np.testing.assert_array_equal(cache.get(number, hws[number]), image)


def test_without_a_budget_nothing_is_cached(three, monkeypatch):
    store = ImageStore(three, size=50)
    store.load_resized(0)
    monkeypatch.setattr(images, "read_image", None)
    with pytest.raises(TypeError):
        store.load_resized(0)


def test_memory_that_cannot_be_reserved_is_a_device_error():
    with pytest.raises(DeviceError, match="cannot be reserved"):
        ImageCache(np.array([2**62]), cache_bytes=2**63 - 1, seed=0)


def test_a_pickled_store_reads_without_the_cache(three):
    store = pickle.loads(pickle.dumps(ImageStore(three, size=50, cache_bytes=10**6)))
    np.testing.assert_array_equal(store.load_resized(0), ImageStore(three, size=50).load_resized(0))


# --- images that cannot be read -------------------------------------------------------------------------------------


def test_a_broken_image_is_an_error_that_names_it(tmp_path, three):
    three.path(1).write_bytes(b"not an image")
    store = ImageStore(three, size=50)
    for read in (store.load_resized, store.load_scaled):
        with pytest.raises(ImageError, match=r"001\.png"):
            read(1)


def test_an_image_with_another_size_than_its_annotation_is_refused(tmp_path):
    path = written(tmp_path / "a.jpg", smooth((40, 60), 0))
    store = ImageStore(dataset_of([record(path, (60, 40))]), size=30)
    for read in (store.load_resized, store.load_scaled):
        with pytest.raises(ImageError, match="does not have the 60x40 pixels of its annotation"):
            read(0)


def test_an_image_with_an_unreadable_header_has_no_objects(tmp_path):
    good = record(written(tmp_path / "a.png", smooth((40, 60), 0)), None, labels_of([star(np.random.default_rng(0))]))
    bad = record(tmp_path / "missing.png", None, labels_of([star(np.random.default_rng(1))]))
    store = ImageStore(dataset_of([good, bad]), size=50, cache_bytes=10**6)
    assert store.hw(1) == (50, 50)
    assert [len(store.objects(index)) for index in (0, 1)] == [1, 0]
    for read in (store.load_resized, store.load_scaled):
        with pytest.raises(ImageError, match=r"missing\.png"):
            read(1)


def test_a_dataset_without_a_readable_header_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="None of the 2 training images"):
        ImageStore(dataset_of([record(tmp_path / name, None) for name in ("a.png", "b.png")]), size=50)


def test_a_dataset_without_a_readable_image_is_refused_on_request(three):
    for index in range(2):
        three.path(index).write_bytes(b"not an image")
    store = ImageStore(three, size=50)
    store.require_readable_image()
    three.path(2).unlink()
    with pytest.raises(DatasetError, match="None of the 3 training images"):
        store.require_readable_image()
