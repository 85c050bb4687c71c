"""From images to targets: HSV jitter, flips, mixup, letterbox and paste-in, compared with slow, obvious versions."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from tests.support.training_images import (
    dataset_of,
    labels_of,
    random_dataset,
    reader_of,
    record,
    smooth,
    star,
    written,
)
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import PAD_GREY, fit_letterbox
from yolov7_deploy.training import augment
from yolov7_deploy.training.augment import (
    NO_JITTER,
    Augmentation,
    jitter_hsv,
    make_mosaic_mixup,
    make_sample,
    make_single_image,
)
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.mosaic import MIN_CROPS, make_mosaic, random_crops
from yolov7_deploy.training.random_affine import Warp, warp_pixels

SIZE = 64
UNAUGMENTED = Hyperparameters(
    hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0, mixup=0, paste_in=0
)  # leaves only a scale from 1 to 1.1
ROUNDING = 1  # OpenCV rounds differently for the last pixels of a row, which it does not vectorise
INTERPOLATION = 12  # grey levels: interpolated once here, twice by the slow version
EDGE_PX = 1.5  # an edge can be anywhere in the warped pixels that it cuts
HWS = [(64, 48), (40, 64), (64, 64), (64, 20)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return random_dataset(tmp_path_factory.mktemp("augment"), HWS)


@pytest.fixture
def reader(dataset):
    return reader_of(dataset, size=SIZE)


@pytest.fixture
def bright(tmp_path):
    """A reader of one image, a bright rectangle on black."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[16:32, 8:40] = 255
    labels = labels_of([], boxes=[[8 / SIZE, 16 / SIZE, 40 / SIZE, 32 / SIZE]])
    return reader_of(dataset_of([record(written(tmp_path / "a.png", image), (SIZE, SIZE), labels)]), size=SIZE)


def sample_of(reader, hyp, *, index=0, seed=0, epoch=0, hw=(SIZE, SIZE), close_mosaic_epoch=None, mosaic=True):
    out = np.zeros((*hw, 3), np.uint8)
    targets = make_sample(
        reader,
        Augmentation(hyp=hyp, size=SIZE, close_mosaic_epoch=close_mosaic_epoch),
        index=index,
        epoch=epoch,
        out=out,
        mosaic=mosaic,
        rng=np.random.default_rng(seed),
    )
    return out, targets


def slow_jitter(image, gains, flips):
    """Apply jitter with floating-point arithmetic instead of lookup tables, and flips."""
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(np.float64) * gains
    hsv[..., 0] %= 180
    changed = cv2.cvtColor(np.minimum(hsv, 255).astype(np.uint8), cv2.COLOR_HSV2BGR)[:, :, ::-1]
    return changed[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]


# --- colours and flips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("hw", [(64, 64), (301, 500), (7, 3)])
@pytest.mark.parametrize("gains", [(1.01, 0.4, 1.3), (0.99, 1.7, 0.6)])
def test_jitter_matches_arithmetic_on_every_pixel(flips, hw, gains):
    image, out = np.random.default_rng(0).integers(0, 256, (*hw, 3), np.uint8), np.empty((*hw, 3), np.uint8)
    jitter_hsv(image, np.array(gains), out=out, code=cv2.COLOR_HSV2RGB, flips=flips)
    assert np.abs(out.astype(int) - slow_jitter(image, np.array(gains), flips)).max() <= ROUNDING


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_without_jitter_pixels_are_only_flipped(flips):
    image, out = smooth((301, 500), 0), np.empty((301, 500, 3), np.uint8)
    jitter_hsv(image, NO_JITTER, out=out, code=cv2.COLOR_HSV2RGB, flips=flips)
    np.testing.assert_array_equal(out, image[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1, ::-1])


@pytest.mark.parametrize("flipud", [0, 1])
@pytest.mark.parametrize("fliplr", [0, 1])
def test_boxes_flip_with_their_pixels(bright, flipud, fliplr):
    out, targets = sample_of(bright, replace(UNAUGMENTED, flipud=flipud, fliplr=fliplr))
    rows, columns = np.where(out[..., 0] > 190)
    centre, sides = targets[0, 1:3] * SIZE, targets[0, 3:] * SIZE
    low, high = [columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(centre - sides / 2, low, atol=EDGE_PX)
    np.testing.assert_allclose(centre + sides / 2, high, atol=EDGE_PX)
    assert (centre[0] > SIZE / 2) == fliplr and (centre[1] > SIZE / 2) == flipud


def test_the_jitter_stays_in_its_ranges(bright):
    """For white, only the value matters."""
    maxima = [sample_of(bright, replace(UNAUGMENTED, hsv_v=0.4), seed=seed)[0].max() for seed in range(40)]
    assert 0.6 * 255 - 1 <= min(maxima) < 0.7 * 255 and max(maxima) == 255


# --- single images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(HWS)))
@pytest.mark.parametrize("hw", [(64, 64), (64, 96), (96, 32)])
def test_one_warp_matches_letterbox_and_warp(reader, monkeypatch, index, hw):
    matrix = np.array([[1.2, 0.1, -4], [-0.1, 1.1, 3], [0.0005, 0, 1]])
    warp = Warp(matrix=matrix, scale=1.2, out_hw=hw)
    monkeypatch.setattr(augment, "random_warp", lambda *_, **__: warp)
    sample = make_single_image(reader, index, hyp=UNAUGMENTED, hw=hw, rng=np.random.default_rng(0))
    box = fit_letterbox(reader.store.hw(index), hw)
    canvas = box.apply(reader.store.load_resized(index))
    slow = warp_pixels(canvas, warp)
    # The single step interpolates image edges with grey, the letterbox does not: compare inner pixels only.
    inside = np.zeros(hw, np.uint8)
    inside[box.top + 2 : box.top + box.resized_hw[0] - 2, box.left + 2 : box.left + box.resized_hw[1] - 2] = 255
    clear = warp_pixels(inside[:, :, None].repeat(3, axis=2), warp)[..., 0] == 255
    assert np.abs(sample.image.astype(int) - slow)[clear].max() <= INTERPOLATION


def test_boxes_of_a_single_image_enclose_their_pixels(bright):
    for hw in ((64, 64), (64, 128), (128, 64)):
        sample = make_single_image(bright, 0, hyp=replace(UNAUGMENTED, scale=0.3), hw=hw, rng=np.random.default_rng(1))
        rows, columns = np.where(sample.image[..., 0] > 190)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(sample.objects.boxes[0], expected, atol=EDGE_PX)


def test_a_single_image_ignores_outlines(reader):
    sample = make_single_image(
        reader, 0, hyp=Hyperparameters(degrees=40), hw=(SIZE, SIZE), rng=np.random.default_rng(3)
    )
    assert all(len(polygon) == 0 for polygon in sample.objects.polygons)


def test_another_image_replaces_an_unreadable_one(tmp_path):
    dataset = random_dataset(tmp_path, HWS)
    dataset.path(0).write_bytes(b"not an image")
    reader = reader_of(dataset, size=SIZE)
    out, _ = sample_of(reader, UNAUGMENTED)
    assert list(reader.problems) == [0] and reader.has_read and (out != PAD_GREY).any()


def test_a_sample_is_grey_if_no_image_can_be_read(tmp_path):
    dataset = random_dataset(tmp_path, HWS[:1])
    dataset.path(0).write_bytes(b"not an image")
    reader = reader_of(dataset, size=SIZE)
    out, targets = sample_of(reader, UNAUGMENTED)
    assert (out == PAD_GREY).all() and targets.shape == (0, 5) and not reader.has_read


# --- mixup and the order of steps ------------------------------------------------------------------------------------


def test_mixup_blends_two_mosaics_and_keeps_all_objects(reader):
    hyp = Hyperparameters(mixup=1.0)
    mixed = make_mosaic_mixup(reader, 1, hyp=hyp, rng=np.random.default_rng(4))
    rng = np.random.default_rng(4)
    first = make_mosaic(reader, 1, hyp=hyp, rng=rng)
    rng.random()
    second = make_mosaic(reader, int(rng.integers(len(HWS))), hyp=hyp, rng=rng)
    weight = rng.beta(8, 8)
    np.testing.assert_array_equal(mixed.objects.boxes, np.concatenate([first.objects.boxes, second.objects.boxes]))
    slow = first.image * weight + second.image * (1 - weight)
    assert np.abs(mixed.image - slow).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(("mosaic", "allowed", "mosaics"), [(1, True, 20), (0, True, 0), (1, False, 0)])
def test_mosaics_are_created_with_their_probability_if_allowed(reader, monkeypatch, mosaic, allowed, mosaics):
    made = []
    monkeypatch.setattr(augment, "make_mosaic_mixup", lambda *a, **k: made.append(1) or make_mosaic_mixup(*a, **k))
    for seed in range(20):
        sample_of(reader, Hyperparameters(mosaic=mosaic), seed=seed, mosaic=allowed)
    assert len(made) == mosaics


def test_the_last_epochs_use_single_images_without_pasted_objects(reader, monkeypatch):
    hyp = Hyperparameters(paste_in=1.0, copy_paste=1.0, mixup=1.0)
    sample_of(reader, hyp, epoch=4, close_mosaic_epoch=5)
    monkeypatch.setattr(augment, "make_mosaic_mixup", None)
    monkeypatch.setattr(augment, "paste_in", None)
    sample_of(reader, hyp, epoch=5, close_mosaic_epoch=5)
    with pytest.raises(TypeError):
        sample_of(reader, hyp, epoch=4, close_mosaic_epoch=5)


def test_a_sample_depends_only_on_its_generator(dataset):
    one, other = (sample_of(reader_of(dataset, size=SIZE), Hyperparameters(), seed=5) for _ in range(2))
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    assert (sample_of(reader_of(dataset, size=SIZE), Hyperparameters(), seed=6)[0] != one[0]).any()


def test_targets_are_inside_the_image(reader):
    for seed in range(30):
        _, targets = sample_of(reader, Hyperparameters(degrees=10, paste_in=0.5), seed=seed)
        low, high = targets[:, 1:3] - targets[:, 3:] / 2, targets[:, 1:3] + targets[:, 3:] / 2
        assert targets.dtype == np.float32 and targets.shape[1] == 5
        assert (low >= -1e-6).all() and (high <= 1 + 1e-6).all() and (targets[:, 3:] > 0).all()
        assert set(targets[:, 0]) <= {0, 1, 2}


def test_a_size_of_zero_is_refused():
    with pytest.raises(UsageError, match="0 pixels"):
        Augmentation(hyp=Hyperparameters(), size=0)


# --- pasted objects ---------------------------------------------------------------------------------------------------


def test_pasted_objects_keep_their_colours(tmp_path):
    """Yellow objects on a blue image: jitter darkens the image before objects are pasted; the result is RGB."""
    image = np.zeros((256, 256, 3), np.uint8)
    image[:] = (255, 0, 0)
    outline = np.array([[0.2, 0.2], [0.8, 0.2], [0.8, 0.8], [0.2, 0.8]])
    image[50:206, 50:206] = (0, 255, 255)
    dataset = dataset_of([record(written(tmp_path / "a.png", image), (256, 256), labels_of([outline]))])
    out = np.zeros((256, 256, 3), np.uint8)
    hyp = Hyperparameters(paste_in=1.0, hsv_v=1.0, hsv_h=0, hsv_s=0)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        targets = make_sample(
            reader_of(dataset, size=256), Augmentation(hyp=hyp, size=256), index=0, epoch=0, out=out, rng=rng
        )
        yellow = (out == (255, 255, 0)).all(axis=2)
        if out[..., 2].max() < 150 and yellow.sum() > 100:
            break
    else:
        pytest.fail("an object was never pasted on a dark image")
    assert any(yellow[int(y * 256), int(x * 256)] for _, x, y, _, _ in targets)
    red, _, blue = np.moveaxis(out.astype(int), 2, 0)
    assert (blue > red + 20).any() and not (red > blue + 20)[~yellow & (out[..., 1] < 20)].any()


def test_there_are_thirty_crops_and_each_is_read_on_access(reader, monkeypatch):
    read = []
    resized = reader.load_resized
    monkeypatch.setattr(reader, "load_resized", lambda index: read.append(index) or resized(index))
    crops = random_crops(reader, rng=np.random.default_rng(0))
    assert len(crops) >= MIN_CROPS and read == []
    assert crops[3] is crops[3] and len(read) == 1
    assert len(crops[:]) == len(crops) and len(read) <= len(HWS)


def test_a_crop_contains_its_object(tmp_path):
    """With bright stars on black, pixels are bright inside of each mask and dark outside."""
    rng, records = np.random.default_rng(2), []
    for number in range(4):
        outline = star(rng, corners=9)
        image = np.zeros((256, 256, 3), np.uint8)
        cv2.fillPoly(image, [(outline * 256 * 16 - 8).round().astype(np.int32)], (255, 255, 255), shift=4)
        records.append(record(written(tmp_path / f"{number}.png", image), (256, 256), labels_of([outline])))
    crops = random_crops(reader_of(dataset_of(records), size=256), rng=rng)
    assert {crop.class_id for crop in crops} == {0}
    for crop in crops:
        assert crop.image.shape == (*crop.mask.shape, 3)
        bright = crop.image[..., 0] > 127
        inner = cv2.erode(crop.mask.astype(np.uint8), np.ones((3, 3)), borderValue=0) > 0
        outer = cv2.dilate(crop.mask.astype(np.uint8), np.ones((3, 3))) > 0
        assert bright[inner].all() and not bright[~outer].any()


def test_images_without_outlines_give_no_crops(bright):
    assert len(random_crops(bright, rng=np.random.default_rng(0))) == 0
    sample_of(bright, replace(UNAUGMENTED, paste_in=1.0))


def test_rare_outlines_give_fewer_crops(tmp_path):
    rng = np.random.default_rng(0)
    path = written(tmp_path / "a.png", smooth((SIZE, SIZE), 0))
    rich = [record(path, (SIZE, SIZE), labels_of([star(rng) for _ in range(6)]))]
    reader = reader_of(dataset_of(rich + [record(path, (SIZE, SIZE))] * 300), size=SIZE)
    counts = {len(random_crops(reader, rng=np.random.default_rng(seed))) for seed in range(300)}
    assert 0 in counts and any(0 < count < MIN_CROPS for count in counts)


def test_a_crop_of_an_unreadable_image_has_an_empty_mask(tmp_path):
    dataset = random_dataset(tmp_path, HWS[:1])
    dataset.path(0).write_bytes(b"not an image")
    reader = reader_of(dataset, size=SIZE)
    crops = random_crops(reader, rng=np.random.default_rng(0))
    assert not any(crop.mask.any() for crop in crops) and list(reader.problems) == [0]
