"""Quantizer: calibrate once, measure AP, and find and exclude a layer that INT8 damages."""

import copy
import json
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.support.sample_images import noise
from tests.support.small_models import HW, exported_tiny, fused_tiny, metadata_of
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ExportError, LoadError, ParityError, UsageError
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions, Int8Options, QuantizeOptions
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.precision.weight_rounding import round_weights
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows import quantize
from yolov7_deploy.workflows.quantize import Measurement, Quantizer, describe, to_dict
from yolov7_deploy.workflows.sensitivity_chart import find_frontier, write_sensitivity_chart

SENSITIVE = "model.1.conv"  # the only consumer of model.0, whose outputs pass a LeakyReLU
FACTOR = 2.0**9
COUNT, BOXES = 6, 12
# AP points. Deterministic weights have little structure: INT8 loses 29 points against the detections of FP32, 59 with
# the sensitive layer in INT8, and 34 with that layer excluded.
MARGIN = 15


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for seed in range(COUNT):
        write_image(folder / f"{seed}.png", noise(*HW, seed=seed))
    return folder


@lru_cache
def sensitive_model():
    """Return a model of the same function with one channel 512 times larger, and its next weights 512 times smaller.

    All channels of a tensor share a scale, so INT8 rounds the other channels to zero.
    """
    net = copy.deepcopy(fused_tiny())
    with torch.no_grad():
        producer, consumer = (dict(net.named_modules())[name] for name in ("model.0.conv", SENSITIVE))
        producer.weight[3] *= FACTOR
        producer.bias[3] *= FACTOR
        consumer.weight[:, 3] /= FACTOR
    return export_onnx(net, metadata_of(net), ExportOptions(input_hw=HW))


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    """Dataset whose labels are the detections of FP32, so that every change by INT8 costs AP."""
    path = tmp_path_factory.mktemp("data") / "m.onnx"
    exported_tiny().save(path)
    entries, annotations = [], []
    with Detector(path, device="cpu") as detector:
        for number, file in enumerate(sorted(images.iterdir())):
            found = detector(noise(*HW, seed=number), max_det=BOXES)
            entries.append({"id": number, "file_name": str(file), "height": HW[0], "width": HW[1]})
            for (x1, y1, x2, y2), kind in zip(found.boxes.tolist(), found.class_ids.tolist(), strict=True):
                box = [x1, y1, x2 - x1, y2 - y1]
                common = {"id": len(annotations) + 1, "image_id": number, "category_id": kind, "iscrowd": 0}
                annotations.append({**common, "bbox": box, "area": box[2] * box[3]})
        names = detector.metadata.class_names
    document = {
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    target = path.with_name("instances.json")
    target.write_text(json.dumps(document))
    return open_dataset(target, images=images)


def run(model, images, data=None, log=None, **options):
    lines = [] if log is None else log
    return Quantizer(model, open_calibration(images), QuantizeOptions(**options), data=data, log=lines.append).run()


# --- the sensitive layer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline_drop(images, data):
    """AP lost by INT8 on the network without the sensitive layer."""
    return run(exported_tiny(), images, data).drop


def test_the_sensitive_layer_is_found_and_excluded(images, data, baseline_drop, tmp_path):
    allowed = baseline_drop.points + MARGIN
    before = run(sensitive_model(), images, data)
    assert before.drop.points > allowed + 10
    log = []
    result = run(sensitive_model(), images, data, log, max_drop=allowed)
    assert result.sensitivities[0].layer == SENSITIVE
    assert result.sensitivities[0].error > 3 * result.sensitivities[1].error
    floats = dict(result.model.metadata.int8.float_layers)
    assert [layer for layer in floats if layer not in result.model.metadata.heads] == [SENSITIVE]
    assert "excluded to keep AP: alone in INT8 it changes the head by" in floats[SENSITIVE]
    assert result.drop.points <= allowed
    assert [len(one.excluded) for one in result.measurements] == [0, 1]
    assert any(f"excluded 1 layer from INT8: {SENSITIVE}" in line for line in log)
    assert SENSITIVE in describe(result) and "float" in describe(result)
    assert to_dict(result)["measurements"][1]["excluded"] == [SENSITIVE]
    json.dumps(to_dict(result), allow_nan=False)
    full, reduced = (one.share for one in result.measurements)
    assert full > reduced == result.model.metadata.int8.share
    write_sensitivity_chart(result, tmp_path / "both.png", title="tiny")
    write_sensitivity_chart(before, tmp_path / "none.png", title="tiny")
    assert cv2.imread(str(tmp_path / "both.png")).shape[0] > cv2.imread(str(tmp_path / "none.png")).shape[0] + 300


def test_no_layer_is_excluded_if_the_drop_is_small(images, data, baseline_drop):
    result = run(exported_tiny(), images, data, max_drop=baseline_drop.points + 1)
    assert len(result.model.metadata.int8.float_layers) == len(result.model.metadata.heads)
    assert result.sensitivities == () and len(result.measurements) == 1


@pytest.mark.slow
def test_a_drop_that_no_exclusion_repairs_is_an_error(images, data):
    class Hopeless(Quantizer):
        """INT8 files detect nothing."""

        def _evaluate(self, model, title):
            report = super()._evaluate(model, title)
            if model.metadata.precision == "int8":
                report.predictions.clear()
            return report

    pair = (exported_tiny(), open_calibration(images))
    quantizer = Hopeless(*pair, QuantizeOptions(max_drop=0.3), data=data, log=lambda text: None)
    with pytest.raises(ParityError, match=r"more than 0\.3 AP points even with all layers but one excluded"):
        quantizer.run()


def test_max_drop_without_labels_is_refused(images):
    with pytest.raises(UsageError, match="requires a dataset") as caught:
        run(exported_tiny(), images, max_drop=0.3)
    assert "--data" in caught.value.fix


# --- calibration cache --------------------------------------------------------------------------------------------


def test_another_method_reuses_the_calibration(images, tmp_path, monkeypatch):
    cache = tmp_path / "ranges.npz"
    first = run(exported_tiny(), images, cache=cache)
    monkeypatch.setattr(quantize, "calibrate", None)  # would be called
    log = []
    second = run(exported_tiny(), images, log=log, cache=cache, int8=Int8Options(method="max"))
    assert f"calibration of {COUNT} images from {cache}" in log
    assert second.model.metadata.int8.method == "max"
    assert second.model.metadata.int8.images_sha256 == first.model.metadata.int8.images_sha256
    again = run(exported_tiny(), images, cache=cache)
    assert again.model.proto.SerializeToString(deterministic=True) == first.model.proto.SerializeToString(
        deterministic=True
    )


@pytest.mark.slow
def test_the_cache_folder_has_one_file_per_model_and_images(images, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(exported_tiny(), images)
    assert len(saved := list((tmp_path / "yolov7_deploy" / "calibration").iterdir())) == 1
    run(sensitive_model(), images)
    assert len(list(saved[0].parent.iterdir())) == 2


def test_a_calibration_of_another_model_or_other_images_is_refused(images, tmp_path):
    cache = tmp_path / "ranges.npz"
    run(exported_tiny(), images, cache=cache)
    before = cache.read_bytes()
    with pytest.raises(UsageError, match="another model"):
        run(sensitive_model(), images, cache=cache)
    with pytest.raises(UsageError, match="other images"):
        run(exported_tiny(), images / "0.png", cache=cache)
    assert cache.read_bytes() == before


def test_a_damaged_calibration_is_an_error_only_if_the_user_named_it(images, tmp_path, monkeypatch):
    named = tmp_path / "ranges.npz"
    named.write_bytes(b"damaged")
    with pytest.raises(LoadError):
        run(exported_tiny(), images, cache=named)
    assert named.read_bytes() == b"damaged"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(exported_tiny(), images)
    (saved,) = (tmp_path / "cache" / "yolov7_deploy" / "calibration").iterdir()
    content = saved.read_bytes()
    saved.write_bytes(content[: len(content) // 2])
    log = []
    run(exported_tiny(), images, log=log)
    assert any(line.startswith("calibrating again") for line in log)
    assert saved.read_bytes() == content


@pytest.mark.slow
def test_a_read_only_cache_folder_is_not_an_error(images, tmp_path, monkeypatch):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    log = []
    assert run(exported_tiny(), images, log=log).summary.int8_convolutions > 0
    assert any("not saved" in line for line in log)
    with pytest.raises(ExportError):
        run(exported_tiny(), images, cache=blocked / "ranges.npz")


# --- reports ------------------------------------------------------------------------------------------------------


def test_the_metadata_notes_state_the_drop_and_too_few_images(images, data):
    notes = run(exported_tiny(), images, data).model.metadata.notes
    assert any("of the images used to measure AP are also calibration images" in note for note in notes)
    assert any("images" in note and "95 % interval" in note for note in notes)
    assert any("ew images (6)" in note for note in notes)


def test_the_frontier_has_the_trials_that_no_other_trial_beats():
    def trial(number, share, points):
        return Measurement(excluded=("layer",) * number, ap=0.5, points=points, low=None, high=None, share=share)

    best = [trial(4, 0.90, 0.1), trial(2, 0.95, 0.4), trial(0, 0.99, 2.0)]
    beaten = [trial(3, 0.93, 0.5), trial(1, 0.97, 2.5), trial(4, 0.90, 0.3)]
    assert find_frontier([beaten[0], best[2], *beaten[1:], best[0], best[1]]) == best


@pytest.mark.slow
def test_weights_are_rounded_once_for_all_trials_of_a_search(images, data, baseline_drop, monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return round_weights(*arguments, **options)

    monkeypatch.setattr(quantize, "round_weights", counted)
    allowed = baseline_drop.points + MARGIN
    log = []
    result = run(sensitive_model(), images, data, log, max_drop=allowed, int8=Int8Options(rounding="gptq"))
    assert len(calls) == 1 and result.model.metadata.int8.rounding == "gptq"
    assert any("rounded the weights of 55 convolutions by gptq" in line for line in log)
    assert result.drop.points <= allowed


@pytest.mark.slow
def test_sensitivity_is_measured_on_request(images):
    result = run(exported_tiny(), images, sensitivity=True)
    assert len(result.sensitivities) == result.summary.int8_convolutions
    assert result.sensitivities[0].layer in describe(result)
    assert result.drop is None and to_dict(result)["accuracy"] is None


def test_file_names_of_calibration_images_do_not_matter(images, tmp_path):
    for number, file in enumerate(sorted(images.iterdir(), reverse=True)):
        (tmp_path / f"again-{number}.png").write_bytes(Path(file).read_bytes())
    first, second = (run(exported_tiny(), folder).model.metadata.int8 for folder in (images, tmp_path))
    assert first == second


@pytest.mark.slow
def test_the_fp32_model_is_evaluated_once(images, data, baseline_drop, monkeypatch):
    evaluated = []
    evaluate = Quantizer._evaluate

    def counted(self, model, title):
        evaluated.append(model.metadata.precision)
        return evaluate(self, model, title)

    monkeypatch.setattr(Quantizer, "_evaluate", counted)
    run(sensitive_model(), images, data, max_drop=baseline_drop.points + MARGIN)
    assert evaluated == ["fp32", "int8", "int8"]


def test_the_sensitive_model_computes_the_same_function():
    from tests.support.small_models import images, session

    ours, expected = (
        session(model.proto).run(None, {"images": images()}) for model in (sensitive_model(), exported_tiny())
    )
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-2)
