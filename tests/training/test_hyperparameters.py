"""Hyperparameters: the official values, and what a file can contain."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.training.hyperparameters import (
    FRACTIONS,
    PRESETS,
    UNUSED,
    Hyperparameters,
    default_preset,
    format_hyperparameters,
    read_hyperparameters,
)

NAMES = ("tiny", "p5", "p6", "custom")
# The official files (section 5.1 of the reference): one value for all presets, or one for each name above.
OFFICIAL = {
    "lr0": 0.01,
    "lrf": (0.01, 0.1, 0.2, 0.1),
    "momentum": 0.937,
    "weight_decay": 0.0005,
    "warmup_epochs": 3.0,
    "warmup_momentum": 0.8,
    "warmup_bias_lr": 0.1,
    "box": 0.05,
    "cls": (0.5, 0.3, 0.3, 0.3),
    "cls_pw": 1.0,
    "obj": (1.0, 0.7, 0.7, 0.7),
    "obj_pw": 1.0,
    "anchor_t": 4.0,
    "fl_gamma": 0.0,
    "hsv_h": 0.015,
    "hsv_s": 0.7,
    "hsv_v": 0.4,
    "degrees": 0.0,
    "translate": (0.1, 0.2, 0.2, 0.2),
    "scale": (0.5, 0.9, 0.9, 0.5),
    "shear": 0.0,
    "perspective": 0.0,
    "flipud": 0.0,
    "fliplr": 0.5,
    "mosaic": 1.0,
    "mixup": (0.05, 0.15, 0.15, 0.0),
    "copy_paste": 0.0,
    "paste_in": (0.05, 0.15, 0.15, 0.0),
}
OURS = {"label_smoothing": 0.0}  # an option of the official program, not a key of its files
KEYS = [field.name for field in dataclasses.fields(Hyperparameters)]
WRONG = ("-0.1", ".nan", ".inf", "many", "true", "null", "[1, 2]", "{a: 1}", "nan", "2026-01-01", "9" * 400)
DAMAGED = (
    *(b"lr0: [1", b"\xff\xfe\x00lr0!", b"lr0: \x00", b"[" * 100_000, b"lr0: !!python/name:os.x"),
    *(b"lr0: !!float", b"lr0: !!int", b"lr0: !!timestamp x", b"lr0: !!bool x"),
)

OFFICIAL_FILE = """\
lr0: 0.01  # initial learning rate (SGD=1E-2, Adam=1E-3)
lrf: 0.2
box: 0.05
iou_t: 0.20  # IoU training threshold
# anchors: 3
anchors: 3
loss_ota: 1
mixup: 0
"""


@pytest.mark.parametrize("index, name", list(enumerate(NAMES)))
def test_a_preset_has_the_official_value_of_every_key(index, name):
    expected = {key: value[index] if isinstance(value, tuple) else value for key, value in OFFICIAL.items()}
    assert dataclasses.asdict(PRESETS[name]) == expected | OURS
    assert read_hyperparameters(name) == PRESETS[name]


def test_the_only_other_preset_is_that_of_quantization_aware_training():
    assert tuple(PRESETS) == (*NAMES, "qat")
    assert {default_preset(name, pretrained=True, qat=True) for name in VARIANTS} == {"qat"}


def test_a_variant_has_its_own_preset_from_scratch_and_custom_if_pretrained():
    assert {name: default_preset(name, pretrained=False) for name in VARIANTS} == {
        "yolov7": "p5",
        "yolov7x": "p5",
        "yolov7-tiny": "tiny",
        "yolov7-tiny-silu": "tiny",
        "yolov7-w6": "p6",
        "yolov7-e6": "p6",
        "yolov7-d6": "p6",
        "yolov7-e6e": "p6",
    }
    assert {default_preset(name, pretrained=True) for name in VARIANTS} == {"custom"}


def written(tmp_path, text):
    path = tmp_path / "hyp.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_an_official_file_can_have_unused_keys_and_defaults_to_p5(tmp_path):
    found = read_hyperparameters(written(tmp_path, OFFICIAL_FILE))
    assert found == dataclasses.replace(PRESETS["p5"], lrf=0.2, mixup=0.0)
    assert UNUSED.isdisjoint(KEYS)


def test_single_values_change_a_preset_or_a_file(tmp_path):
    changes = {"mixup": 0.5, "lr0": 0.002}
    assert read_hyperparameters("tiny", changes=changes) == dataclasses.replace(PRESETS["tiny"], **changes)
    found = read_hyperparameters(written(tmp_path, OFFICIAL_FILE), changes=changes)
    assert (found.mixup, found.lr0, found.lrf) == (0.5, 0.002, 0.2)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "'0.001'", "0.001", "+1e-3"])
def test_numbers_in_any_usual_notation_are_read(tmp_path, text):
    # YAML 1.1 reads 1e-3, without a decimal point, as a string
    assert read_hyperparameters(written(tmp_path, f"lr0: {text}\n")).lr0 == 0.001


def test_whole_numbers_become_floats(tmp_path):
    assert isinstance(read_hyperparameters(written(tmp_path, "mosaic: 1\n")).mosaic, float)


@pytest.mark.parametrize("text", ["lr: 0.1", "Lr0: 0.1", "3: 4", "null: 1", "fl_gama: 0.0"])
def test_the_error_for_an_unknown_key_lists_the_known_ones(tmp_path, text):
    path = written(tmp_path, f"lrf: 0.2\n{text}\n")
    with pytest.raises(UsageError, match="is not a hyperparameter") as caught:
        read_hyperparameters(path)
    assert path in caught.value.message and "anchor_t, box, cls" in caught.value.fix


def test_an_unknown_change_is_named():
    with pytest.raises(UsageError, match="hyp: 'momentun' is not a hyperparameter"):
        read_hyperparameters("p5", changes={"momentun": 0.9})


@pytest.mark.parametrize("key", KEYS)
def test_a_value_that_is_not_a_number_of_at_least_zero_is_refused(tmp_path, key):
    for value in WRONG:
        path = written(tmp_path, f"{key}: {value}\n")
        with pytest.raises(UsageError, match=rf"Hyperparameter {key}: .* is not a number of at least 0") as caught:
            read_hyperparameters(path)
        assert "--show-hyp" in caught.value.fix and len(caught.value.message) < 150


@pytest.mark.parametrize("key", FRACTIONS)
def test_a_fraction_above_one_is_refused(key):
    with pytest.raises(UsageError, match=f"Hyperparameter {key}: 1.01 is above 1"):
        Hyperparameters(**{key: 1.01})
    assert getattr(Hyperparameters(**{key: 1.0}), key) == 1


@pytest.mark.parametrize(
    ("key", "value", "requirement"),
    [
        ("scale", 1.0, "below 1"),
        ("anchor_t", 1.0, "above 1"),
        ("anchor_t", 0.0, "above 1"),
        ("momentum", 0.0, "above 0 and below 1"),
        ("momentum", 1.0, "above 0 and below 1"),
        ("warmup_momentum", 1.0, "below 1"),
    ],
)
def test_a_value_without_meaning_is_refused(key, value, requirement):
    with pytest.raises(UsageError, match=f"Hyperparameter {key}: {value:g} must be {requirement}"):
        Hyperparameters(**{key: value})


@pytest.mark.parametrize("value", ["0", "0.0", "'0'", "false"])
def test_training_without_ota_is_an_option_and_not_a_hyperparameter(tmp_path, value):
    with pytest.raises(UsageError, match="loss_ota: 0 selects the loss without OTA") as caught:
        read_hyperparameters(written(tmp_path, f"loss_ota: {value}\n"))
    assert caught.value.fix == "Leave it out and use --no-ota"


def test_the_error_for_an_unknown_name_lists_the_presets(tmp_path):
    with pytest.raises(UsageError, match=r"hyp=\"p7\" is neither a preset nor a file") as caught:
        read_hyperparameters("p7")
    assert "tiny, p5, p6, custom" in caught.value.fix


@pytest.mark.parametrize("text", ["", "just words", "- 1\n- 2\n", "0.5"])
def test_a_file_without_names_and_values_is_a_usage_error(tmp_path, text):
    with pytest.raises(UsageError, match="is not a list of `name: value` lines"):
        read_hyperparameters(written(tmp_path, text))


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_file_is_a_usage_error(tmp_path, data):
    path = tmp_path / "hyp.yaml"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="cannot be read"):
        read_hyperparameters(str(path))


def test_a_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_hyperparameters(str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_written_and_read_back(tmp_path, name):
    path = tmp_path / "hyp.yaml"
    path.write_text(format_hyperparameters(PRESETS[name]))
    assert read_hyperparameters(str(path)) == PRESETS[name]
    assert path.read_text().splitlines()[0] == "lr0: 0.01"


@given(st.dictionaries(st.sampled_from(KEYS), st.floats(0, 0.999), max_size=len(KEYS)))
def test_all_values_are_read_back_without_rounding(tmp_path_factory, values):
    above_0_or_1 = {"anchor_t": 1.001 + values.get("anchor_t", 3), "momentum": 0.0005 + values.get("momentum", 0.9)}
    hyperparameters = Hyperparameters(**values | above_0_or_1)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(format_hyperparameters(hyperparameters), encoding="utf-8")
    assert read_hyperparameters(str(path)) == hyperparameters


def test_a_preset_is_not_changed_by_reading_it_with_changes():
    before = dataclasses.asdict(PRESETS["p5"])
    read_hyperparameters("p5", changes={"box": 1.0})
    assert dataclasses.asdict(PRESETS["p5"]) == before


def test_aliases_that_expand_are_refused(tmp_path):
    levels = "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12))
    (tmp_path / "hyp.yaml").write_text(f"a0: &a0 {{lr0: 0.1}}\n{levels}\n")
    with pytest.raises(UsageError, match="aliases expand to more than"):
        read_hyperparameters(str(tmp_path / "hyp.yaml"))
