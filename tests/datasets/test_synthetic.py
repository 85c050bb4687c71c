"""The synthetic shapes dataset: same pixels for the same seed, labels that match, folders complete or absent."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from yolov7_deploy.cli.app import app
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.synthetic import CLASS_NAMES, MAX_BOX, MAX_OBJECTS, MIN_BOX, generate_image, write_shapes
from yolov7_deploy.datasets.synthetic_render import (
    MARGIN_PX,
    MAX_HIDDEN,
    SHAPES,
    TEXTURES,
    ShapeCanvas,
    random_direction,
)
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.image import read_image

SIZE = 96
ROUNDING = 1e-6  # of the numbers in a label file
EDGE_PX = 2.5  # a pixel, and the soft edge around the tip of a star
FIRST_IMAGES_SHA256 = "74469affa3466ba7da637cc2b4fdec71ce5330cc0d7f8b1d55ab3252c4470469"


def images(count, *, size=320, split="train", seed=0):
    return [generate_image(k, split=split, size=size, seed=seed) for k in range(1, count + 1)]


def points_inside(points, polygon):
    """Return whether points [N, 2] are inside a polygon (even-odd rule), edge by edge."""
    inside = np.zeros(len(points), bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        above = (y1 > points[:, 1]) != (y2 > points[:, 1])
        if y1 != y2:
            inside ^= above & (points[:, 0] < (x2 - x1) * (points[:, 1] - y1) / (y2 - y1) + x1)
    return inside


@pytest.mark.parametrize("name", SHAPES)
def test_the_distance_is_negative_just_inside_the_outline(name):
    points = np.random.default_rng(0).uniform(-1.1, 1.1, (4000, 2))
    x, y = points.T.astype(np.float32)
    distance = SHAPES[name].distance(x, y)
    if name == "ring":  # its outline is the outer one
        distance = np.where(x * x + y * y < 0.7**2, -1, distance)
    clear = np.abs(distance) > 0.01  # a round outline is a polygon slightly inside the circle
    np.testing.assert_array_equal(distance[clear] < 0, points_inside(points, SHAPES[name].outline)[clear])


@pytest.mark.parametrize("name", SHAPES)
def test_an_outline_touches_the_unit_circle_from_inside(name):
    radii = np.hypot(*SHAPES[name].outline.T)
    assert radii.max() == pytest.approx(1)
    assert SHAPES[name].distance(*SHAPES[name].outline.T.astype(np.float32)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_painting_a_shape_changes_the_pixels_inside_its_outline(name, seed):
    """Two canvases with the same seed differ only by the object."""
    empty, painted = (ShapeCanvas(200, rng=np.random.default_rng(seed)) for _ in range(2))
    outline = painted.add(SHAPES[name], side_px=60.0)
    assert float(np.ptp(outline, axis=0).max()) == pytest.approx(60)
    change = np.abs(painted._pixels - empty._pixels).sum(axis=0)
    y, x = np.mgrid[:200, :200] + 0.5
    inside = points_inside(np.stack([x.ravel(), y.ravel()], axis=1), outline).reshape(200, 200)
    if name != "ring":  # the background is visible through a ring
        assert np.mean(change[inside] > 0) > 0.99
    rows, columns = np.nonzero(change > 0)
    low, high = outline.min(axis=0), outline.max(axis=0)
    assert np.all(np.abs([columns.min(), rows.min()] - low) < EDGE_PX)
    assert np.all(np.abs([columns.max() + 1, rows.max() + 1] - high) < EDGE_PX)


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_are_between_zero_and_one(texture):
    x, y = np.arange(-30, 30, dtype=np.float32)[None, :], np.arange(-20, 20, dtype=np.float32)[:, None]
    field = texture(x, y, 50.0, np.random.default_rng(0))
    assert field.shape == (40, 60) and field.dtype == np.float32
    assert field.min() >= 0 and field.max() <= 1


def test_random_directions_are_unit_vectors_in_all_directions():
    drawn = np.array([random_direction(np.random.default_rng(seed)) for seed in range(400)])
    np.testing.assert_allclose(np.hypot(*drawn.T), 1)
    quarters = np.histogram(np.arctan2(*drawn.T), bins=8, range=(-np.pi, np.pi))[0]
    assert quarters.min() > 20


def test_images_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for image, _ in images(8, size=SIZE):
        digest.update(image.tobytes())
    assert digest.hexdigest() == FIRST_IMAGES_SHA256


def test_an_image_depends_only_on_its_four_arguments():
    one, _ = generate_image(7, split="train", size=SIZE, seed=3)
    images(2, size=SIZE)
    assert np.array_equal(one, generate_image(7, split="train", size=SIZE, seed=3)[0])
    for other in (
        generate_image(8, split="train", size=SIZE, seed=3),
        generate_image(7, split="val", size=SIZE, seed=3),
        generate_image(7, split="train", size=SIZE, seed=4),
    ):
        assert not np.array_equal(one, other[0])


def test_objects_have_all_classes_and_sizes_and_some_images_are_empty():
    labels = [labels for _, labels in images(120)]
    counts = np.array([len(found.boxes) for found in labels])
    assert counts.min() == 0 and 1 <= np.sum(counts == 0) <= 20 and counts.max() == MAX_OBJECTS
    boxes = np.concatenate([found.boxes for found in labels])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert MIN_BOX - ROUNDING <= sides.min() < 0.08 and 0.38 < sides.max() <= MAX_BOX + ROUNDING
    assert boxes.min() >= MARGIN_PX / 320 - ROUNDING and boxes.max() <= 1 - MARGIN_PX / 320 + ROUNDING
    assert np.bincount(np.concatenate([found.class_ids for found in labels])).min() > 30


def test_later_objects_hide_little_of_earlier_ones():
    y, x = np.mgrid[:160, :160] + 0.5
    points, hidden = np.stack([x.ravel(), y.ravel()], axis=1), []
    for _, labels in images(25, size=160):
        masks = [points_inside(points, polygon * 160) for polygon in labels.polygons]
        rings = labels.class_ids == CLASS_NAMES.index("ring")
        for index, mask in enumerate(masks):
            later = np.zeros(len(points), bool)
            for other in range(index + 1, len(masks)):
                # A ring covers less than the area of its outline, and is itself covered less.
                later |= masks[other] & (not rings[other])
            if not rings[index]:
                hidden.append((mask & later).sum() / mask.sum())
    assert max(hidden) <= MAX_HIDDEN + 0.03  # outlines of round shapes are polygons
    assert np.mean(np.array(hidden) > 0.02) > 0.05  # but some pixels are hidden


@pytest.mark.parametrize(
    "wrong", [{"size": 8}, {"size": 100_000}, {"split": "test"}, {"seed": -1}, {"k": -1}], ids=lambda wrong: str(wrong)
)
def test_arguments_out_of_range_are_refused(wrong):
    k, options = wrong.pop("k", 1), {"split": "train", "size": SIZE, "seed": 0, **wrong}
    with pytest.raises(DatasetError, match="Cannot generate"):
        generate_image(k, **options)


@pytest.fixture
def written(tmp_path):
    return write_shapes(tmp_path / "shapes", train=6, val=2, size=SIZE, seed=1)


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("val", 2)])
def test_the_written_folder_opens_as_a_dataset_with_the_same_labels(written, split, count):
    dataset = open_dataset(written, split=split)
    assert len(dataset) == count and dataset.class_names == CLASS_NAMES and not dataset.problems
    for k, sample in enumerate(dataset, start=1):
        image, labels = generate_image(k, split=split, size=SIZE, seed=1)
        assert np.array_equal(read_image(sample.path), image)
        np.testing.assert_allclose(sample.boxes / SIZE, labels.boxes, atol=2 * ROUNDING)
        assert sample.class_ids.tolist() == labels.class_ids.tolist()
        assert all(len(polygon) > 2 for polygon in sample.polygons)


def test_a_larger_dataset_starts_with_the_smaller_one(written, tmp_path):
    larger = write_shapes(tmp_path / "larger", train=7, val=3, size=SIZE, seed=1).parent
    for path in sorted(written.parent.glob("*/*/*")):
        assert (larger / path.relative_to(written.parent)).read_bytes() == path.read_bytes()


def test_the_same_dataset_is_not_rewritten_and_another_one_is_refused(written):
    before = {path: path.stat().st_mtime_ns for path in written.parent.rglob("*")}
    assert write_shapes(written.parent, train=6, val=2, size=SIZE, seed=1) == written
    assert {path: path.stat().st_mtime_ns for path in written.parent.rglob("*")} == before
    with pytest.raises(DatasetError, match="contains another shapes dataset"):
        write_shapes(written.parent, train=6, val=2, size=SIZE, seed=2)
    next((written.parent / "images/train").iterdir()).unlink()
    with pytest.raises(DatasetError, match="contains another shapes dataset"):
        write_shapes(written.parent, train=6, val=2, size=SIZE, seed=1)


def test_a_folder_with_other_files_is_refused_and_an_empty_one_is_used(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("text")
    with pytest.raises(DatasetError, match="not a complete shapes dataset"):
        write_shapes(tmp_path / "mine", train=1, val=1, size=SIZE, seed=0)
    (tmp_path / "empty").mkdir()
    assert write_shapes(tmp_path / "empty", train=1, val=1, size=SIZE, seed=0).is_file()


def test_an_interrupted_run_leaves_no_files(tmp_path):
    def interrupt(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "shapes", train=3, val=1, size=SIZE, seed=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_dataset_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be written"):
        write_shapes(tmp_path / "file/shapes", train=1, val=1, size=SIZE, seed=0)
    with pytest.raises(DatasetError, match="0 images for training"):
        write_shapes(tmp_path / "shapes", train=0, val=1, size=SIZE, seed=0)


def test_the_command_writes_the_dataset_and_prints_the_next_command(tmp_path):
    options = ["--train", "2", "--val", "1", "--img", str(SIZE)]
    done = CliRunner().invoke(app, ["shapes", "--output", str(tmp_path / "shapes"), *options])
    assert done.exit_code == 0, done.output
    assert f"y7 train --data {tmp_path / 'shapes/shapes.yaml'}" in done.output
    assert len(list(Path(tmp_path / "shapes/images/train").iterdir())) == 2
