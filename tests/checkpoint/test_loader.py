"""Official weights files of every kind give the same Checkpoint; other files are refused with a reason."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tests.support.official_modules import ANCHORS, Model, save_official
from tests.support.torch_archives import PROTO, name, text, write_archive
from yolov7_deploy._version import __version__
from yolov7_deploy.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from yolov7_deploy.checkpoint.architecture import FINGERPRINTS, identify_architecture
from yolov7_deploy.datasets.coco import COCO_NAMES
from yolov7_deploy.errors import CheckpointError, LoadError, UnsafeCheckpointError, Y7Error
from yolov7_deploy.metadata import METADATA_KEY, ModelMetadata
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.model.yolov7 import build_model, new_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pt"


def assert_holds(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Check that the checkpoint has the model's state dict: same names, order and float32 values."""
    expected = {key: value.float() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    assert list(checkpoint.tensors) == list(expected)
    for key, value in expected.items():
        assert checkpoint.tensors[key].dtype == value.dtype
        assert torch.equal(checkpoint.tensors[key], value)


def shapes_of(variant: str, *, training: bool, classes: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of a complete network, without allocating weights."""
    with torch.device("meta"):
        model = new_model(variant, classes=classes, training_form=training)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert caught.value.fix
    return caught.value.message


def test_a_training_checkpoint_gives_its_ema_weights(path):
    model, ema = Model().half(), Model().half()
    with torch.no_grad():
        ema.model[0].conv.weight += 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    content = {
        "epoch": 3,
        "best_fitness": np.array([0.5]),
        "training_results": "0/299 1.2G",
        "model": model,
        "ema": ema,
        "updates": 12,
        "optimizer": optimizer.state_dict(),
        "wandb_id": None,
    }
    assert_holds(load_checkpoint(save_official(content, path)), ema)


@pytest.mark.parametrize(
    "wrap", [lambda m: {"epoch": -1, "model": m, "ema": None}, lambda m: {"model": m}, lambda m: m]
)
@pytest.mark.parametrize("training", [True, False])
def test_stripped_deploy_and_bare_modules_give_the_model(path, wrap, training):
    model = Model(training_form=training).half()
    checkpoint = load_checkpoint(save_official(wrap(model), path))
    assert_holds(checkpoint, model)
    assert checkpoint.variant == "yolov7-tiny"
    assert checkpoint.training is training
    assert checkpoint.class_names == ("thing 0", "thing 1")
    assert np.allclose(checkpoint.anchors, ANCHORS.numpy())
    assert checkpoint.strides == (8, 16, 32)
    assert checkpoint.source == path.name
    assert checkpoint.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_loading_does_not_need_or_leave_official_classes(path):
    save_official({"model": Model()}, path)
    load_checkpoint(path)
    assert not any(module.split(".")[0] == "models" for module in sys.modules)


def test_a_wrapped_module_loses_its_prefix(path):
    model = Model()
    assert_holds(load_checkpoint(save_official({"model": nn.DataParallel(model)}, path)), model)


def test_sync_batch_norm_is_batch_norm(path):
    model = Model()
    assert_holds(load_checkpoint(save_official({"model": nn.SyncBatchNorm.convert_sync_batchnorm(model)}, path)), model)


def save_plain(tensors: dict[str, torch.Tensor], folder: Path, form: str) -> Path:
    """Write a state dict in one of the forms in which weights are passed on."""
    if form == "safetensors":
        path = folder / "weights.safetensors"
        safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        return path
    path = folder / "weights.pt"
    content: dict[str, object] = tensors  # type: ignore[assignment]
    for key in reversed(form.split("/")) if form != "bare" else ():
        content = {key: content, "epoch": 1, "loss": torch.tensor(0.5)}
    torch.save(content, path)
    return path


FORMS = (
    *("bare", "model", "ema", "state_dict", "model_state_dict", "ema_state_dict", "net", "module"),
    *("model/state_dict", "state_dict/model/net", "safetensors"),
)
PREFIXES = (
    *("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module.", "model.", "net.module."),
    *("_fsdp_wrapped_module.", "_forward_module.module."),
)


@pytest.mark.parametrize(
    ("form", "prefix"),
    [*((form, "module.") for form in FORMS), *((form, p) for p in PREFIXES for form in ("bare", "safetensors"))],
)
def test_state_dicts_are_read_in_every_form_and_below_every_wrapper(tmp_path, form, prefix):
    model = Model()
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    checkpoint = load_checkpoint(save_plain(weights, tmp_path, form))
    assert set(checkpoint.tensors) == set(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(checkpoint.tensors[key], value.float() if value.is_floating_point() else value)
    assert checkpoint.class_names == ("class_0", "class_1")
    assert checkpoint.variant == "yolov7-tiny"


def wrapped_inside() -> nn.Module:
    model = Model()
    model.model[0] = nn.DataParallel(model.model[0])
    return model


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch.compile
@pytest.mark.parametrize("form", ["bare", "safetensors"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model.model,
        lambda model: torch.compile(model),
        lambda model: torch.compile(nn.DataParallel(torch.compile(model))),
        lambda model: torch.optim.swa_utils.AveragedModel(model),
        lambda _: wrapped_inside(),
    ],
    ids=["layers", "compiled", "compiled-parallel-compiled", "averaged", "inside"],
)
def test_state_dicts_of_real_wrappers_are_read(tmp_path, form, wrap):
    path = save_plain(wrap(Model()).state_dict(), tmp_path, form)
    checkpoint = load_checkpoint(path)
    assert set(checkpoint.tensors) == set(Model().state_dict())


@pytest.mark.parametrize("form", ["bare", "safetensors"])
def test_missing_counters_of_batch_norm_are_zero(tmp_path, form):
    model = Model()
    path = save_plain({k: v for k, v in model.state_dict().items() if "num_batches" not in k}, tmp_path, form)
    tensors = load_checkpoint(path).tensors
    assert set(tensors) == set(model.state_dict())
    counters = [value for key, value in tensors.items() if "num_batches" in key]
    assert counters and all(value.dtype == torch.int64 and value == 0 for value in counters)
    if form == "bare":
        assert list(tensors) == list(model.state_dict())


def test_a_file_without_counters_gives_the_same_network(tmp_path):
    model = new_model("yolov7-tiny", classes=2)
    weights = {f"module.{k}": v for k, v in model.state_dict().items() if "num_batches" not in k}
    built = build_model(load_checkpoint(save_plain(weights, tmp_path, "safetensors")))
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        for a, b in zip(built(image), model.eval()(image), strict=True):
            assert torch.equal(a, b)


def test_nested_wrappers_of_a_module_lose_their_prefixes(path):
    model = Model()
    assert_holds(load_checkpoint(save_official({"model": nn.DataParallel(nn.DataParallel(model))}, path)), model)
    inside = wrapped_inside()
    checkpoint = load_checkpoint(save_official({"model": inside}, path))
    assert list(checkpoint.tensors) == list(model.state_dict())


def test_eighty_classes_without_names_get_the_names_of_coco(path):
    torch.save(Model(classes=80).state_dict(), path)
    assert load_checkpoint(path).class_names == COCO_NAMES
    assert len(set(COCO_NAMES)) == 80


@pytest.mark.parametrize("names", [("a", "b"), {1: "b", 0: "a"}])
def test_class_names_can_be_a_list_or_a_dict(path, names):
    assert load_checkpoint(save_official({"model": Model(names=names)}, path)).class_names == ("a", "b")


def test_names_stored_next_to_a_state_dict_are_used(path):
    torch.save({"model": Model().state_dict(), "names": ["a", "b"]}, path)
    assert load_checkpoint(path).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("names", "reason"),
    [(["a"], "1 class names"), ({0: "a", 2: "b"}, "neither"), ([["a"], "b"], "neither"), ("ab", "neither")],
)
def test_class_names_that_do_not_fit_are_refused(path, names, reason):
    assert reason in refusal(save_official({"model": Model(names=names)}, path))


@pytest.mark.parametrize(("act", "variant"), [(nn.SiLU(), "yolov7-tiny-silu"), (nn.LeakyReLU(0.1), "yolov7-tiny")])
def test_the_activation_distinguishes_tiny_from_tiny_silu(path, act, variant):
    assert load_checkpoint(save_official({"model": Model(act=act)}, path)).variant == variant


@pytest.mark.parametrize(("act", "reason"), [(nn.ReLU(), "ReLU"), (nn.LeakyReLU(0.01), "negative_slope = 0.01")])
def test_other_activations_are_refused(path, act, reason):
    assert reason in refusal(save_official({"model": Model(act=act)}, path))


def test_another_batch_norm_epsilon_is_refused_with_the_name_of_its_module(path):
    found = refusal(save_official({"model": Model(eps=1e-5)}, path))
    assert "model.0.bn" in found
    assert "1e-05" in found


def test_weights_saved_after_fusion_are_refused(path):
    weights = Model().state_dict()
    torch.save({**weights, "model.0.conv.bias": torch.zeros(32)}, path)
    assert "fuse()" in refusal(path)
    torch.save({**weights, "model.1.rbr_reparam.weight": torch.zeros(1)}, path)
    assert "rbr_reparam" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(path, value):
    weights = Model().state_dict()
    weights["model.0.bn.running_var"][3] = value
    torch.save(weights, path)
    assert "model.0.bn.running_var" in refusal(path)


def test_float64_beyond_float32_is_refused(path):
    torch.save({**Model().state_dict(), "model.0.bn.bias": torch.full((32,), 1e300, dtype=torch.float64)}, path)
    assert "model.0.bn.bias" in refusal(path)


def test_an_entry_that_is_not_a_tensor_is_named(path):
    torch.save({**Model().state_dict(), "model.3.note": "hello"}, path)
    assert "model.3.note" in refusal(path)


@pytest.mark.parametrize("value", [{"epoch": 3, "loss": 0.1}, [1, 2], {"model": None}, {}, "x", {"model": {}}])
def test_the_error_for_a_file_without_weights_lists_its_contents(path, value):
    torch.save(value, path)
    assert "contains" in refusal(path)


def test_a_foreign_network_is_described(path):
    torch.save({f"model.{i}.conv.weight": torch.zeros(8, 8, 1, 1) for i in range(24)}, path)
    found = refusal(path)
    assert "24 layers" in found
    assert all(variant in found for variant in ("yolov7-tiny", "yolov7-e6e"))
    torch.save({"backbone.conv1.weight": torch.zeros(1)}, path)
    assert "backbone.conv1.weight" in refusal(path)


def test_a_scaled_variant_is_refused(path):
    torch.save({**Model().state_dict(), "model.0.conv.weight": torch.zeros(16, 3, 3, 3)}, path)
    assert "(16, 3, 3, 3)" in refusal(path)


@pytest.mark.parametrize("anchors", [torch.ones(3, 1, 2, 1, 1, 2), torch.zeros(3, 1, 3, 1, 1, 2), None])
def test_invalid_anchors_are_refused(path, anchors):
    weights = Model().state_dict()
    del weights["model.77.anchor_grid"]
    torch.save(weights if anchors is None else {**weights, "model.77.anchor_grid": anchors}, path)
    assert "anchor" in refusal(path)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize(("training", "classes"), [(True, 80), (False, 1)])
def test_every_variant_and_form_is_recognised_by_names_and_shapes(variant, training, classes):
    found = identify_architecture(shapes_of(variant, training=training, classes=classes), source="x.pt")
    # tiny-silu has the same tensors as tiny, by construction.
    assert found.variant == variant.removesuffix("-silu")
    assert (found.training, found.classes) == (training, classes)


def test_a_saved_network_is_loaded_unchanged(path):
    model = new_model("yolov7-tiny", classes=3, training_form=True)
    torch.save(model.state_dict(), path)
    checkpoint = load_checkpoint(path)
    assert_holds(checkpoint, model)
    assert_holds(checkpoint, build_model(checkpoint))


def test_every_variant_has_a_fingerprint():
    assert {known.variant for known in FINGERPRINTS} == set(VARIANTS) - {"yolov7-tiny-silu"}


def test_a_head_between_training_and_deploy_form_is_refused():
    shapes = dict(shapes_of("yolov7-w6", training=True, classes=80))
    without = {key: shape for key, shape in shapes.items() if ".m2." not in key}
    with pytest.raises(CheckpointError, match="auxiliary tensors: no"):
        identify_architecture(without, source="x.pt")


@pytest.mark.parametrize("rows", [256, 15, 18 * 3 + 1])
def test_head_rows_that_do_not_match_anchors_and_classes_are_refused(rows):
    shapes = dict(shapes_of("yolov7", training=False, classes=80))
    shapes["model.105.m.0.weight"] = (rows, 256, 1, 1)
    with pytest.raises(CheckpointError, match=str(rows)):
        identify_architecture(shapes, source="x.pt")


def test_code_is_refused_before_anything_else(path, tmp_path):
    marker = tmp_path / "code-ran"
    write_archive(
        path, PROTO + b"}" + text("model") + name("posix", "system") + b"(" + text(f"touch {marker}") + b"tRs."
    )
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        load_checkpoint(path)
    assert not marker.exists()


def module(children: bytes, *, memo: bytes = b"") -> bytes:
    """Return a pickled Sequential with these `_modules` (key, value, ...) and no tensors."""
    state = text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + b"}(" + children + b"u"
    return name("torch.nn.modules.container", "Sequential") + b")\x81" + memo + b"}(" + state + b"ub"


def test_a_module_that_contains_itself_is_refused(path):
    write_archive(path, PROTO + module(text("0") + b"h\x00", memo=b"q\x00") + b".")
    assert "cyclic" in refusal(path)


def test_a_tree_that_doubles_at_every_level_is_refused(path):
    level = module(b"")
    for i in range(30):
        level = module(text("a") + level + bytes((ord("q"), i)) + text("b") + bytes((ord("h"), i)))
    write_archive(path, PROTO + level + b".")
    assert "larger than any network" in refusal(path)


@pytest.mark.parametrize("half", [False, True])
def test_saved_checkpoints_load_equal(path, tmp_path, half):
    first = load_checkpoint(save_official({"model": Model(act=nn.SiLU()).half()}, path))
    ours = tmp_path / "ours.safetensors"
    save_checkpoint(first, ours, half=half)
    again = load_checkpoint(ours)
    assert list(again.tensors) == list(first.tensors)
    for key, value in first.tensors.items():
        assert again.tensors[key].dtype == value.dtype
        assert torch.equal(again.tensors[key], value)
    assert again.variant == "yolov7-tiny-silu"
    assert (again.training, again.class_names, again.anchors) == (first.training, first.class_names, first.anchors)
    assert not list(tmp_path.glob(".*"))


def test_saved_checkpoints_keep_training_size_source_and_version(path, tmp_path):
    official = load_checkpoint(save_official({"model": Model()}, path))
    assert (official.training_size, official.version, official.origin) == (None, "", "")
    assert official.metadata.default_hw == (640, 640)
    ours = tmp_path / "ours.safetensors"
    save_checkpoint(replace(official, training_size=160), ours)
    again = load_checkpoint(ours)
    assert (again.training_size, again.metadata.training_size, again.metadata.default_hw) == (160, 160, (160, 160))
    assert (again.version, again.metadata.version) == (__version__, __version__)
    assert (again.origin, again.origin_sha256) == (path.name, official.source_sha256)
    assert (again.source, again.metadata.source) == (ours.name, ours.name)


def write_with_metadata(file, checkpoint, **changes):
    """Save a checkpoint, with changed fields in its metadata; `None` removes a field."""
    document = json.loads(checkpoint.metadata.to_json()) | changes
    text = json.dumps({key: value for key, value in document.items() if value is not None})
    safetensors.torch.save_file(dict(checkpoint.tensors), file, {METADATA_KEY: text})
    return file


def test_files_from_before_the_training_size_was_stored_have_the_size_of_the_paper(path, tmp_path):
    checkpoint = load_checkpoint(save_official({"model": Model()}, path))
    file = write_with_metadata(tmp_path / "old.safetensors", checkpoint, training_size=None)
    assert load_checkpoint(file).training_size is None
    assert load_checkpoint(file).metadata.default_hw == (640, 640)


@pytest.mark.parametrize("size", [0, -32, 100, 2**20, "640", 640.0, True])
def test_an_impossible_training_size_is_refused(path, tmp_path, size):
    checkpoint = load_checkpoint(save_official({"model": Model()}, path))
    file = write_with_metadata(tmp_path / "wrong.safetensors", checkpoint, training_size=size)
    with pytest.raises(LoadError, match="training_size"):
        load_checkpoint(file)


@pytest.mark.parametrize("length", [999, 70_000])
def test_a_long_variant_is_not_repeated_in_the_message(path, tmp_path, length):
    checkpoint = load_checkpoint(save_official({"model": Model()}, path))
    file = write_with_metadata(tmp_path / "wrong.safetensors", checkpoint, variant="x" * length)
    with pytest.raises(Y7Error) as caught:
        load_checkpoint(file)
    assert len(str(caught.value)) < 300


def test_a_training_size_that_does_not_suit_the_network_is_refused(path, tmp_path):
    checkpoint = load_checkpoint(save_official({"model": Model()}, path))
    changes = {"strides": [8], "anchors": [[[1.0, 1.0]]], "training_size": 104}
    file = write_with_metadata(tmp_path / "wrong.safetensors", checkpoint, **changes)
    assert "training size 104, not a multiple of this network's stride 32" in refusal(file)


@pytest.mark.parametrize(("strides", "size"), [((8, 16, 32), 640), ((8, 16, 32, 64), 1280)])
def test_the_default_input_is_the_fixed_one_else_the_training_size_else_that_of_the_paper(strides, size):
    anchors = (((1.0, 1.0),),) * len(strides)
    plain = ModelMetadata(variant="custom", class_names=("a",), strides=strides, anchors=anchors)
    assert plain.default_hw == (size, size)
    trained = replace(plain, training_size=320)
    assert trained.default_hw == (320, 320)
    assert replace(trained, input_hw=(128, 256)).default_hw == (128, 256)
    assert ModelMetadata.from_json(trained.to_json()) == trained


def test_the_same_checkpoint_gives_the_same_bytes_under_any_suffix(path, tmp_path):
    checkpoint = load_checkpoint(save_official({"model": Model()}, path))
    files = [tmp_path / f"{i}.pt" for i in range(8)]
    for file in files:
        save_checkpoint(checkpoint, file)
    assert len({file.read_bytes() for file in files}) == 1
    assert load_checkpoint(files[0]).class_names == checkpoint.class_names


def test_a_value_beyond_float16_is_refused_when_halving(path, tmp_path):
    checkpoint = load_checkpoint(save_official({"model": Model()}, path))
    checkpoint.tensors["model.0.bn.running_var"][0] = 1e6
    with pytest.raises(CheckpointError, match="running_var"):
        save_checkpoint(checkpoint, tmp_path / "x.safetensors", half=True)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_missing_folder_is_created(path, tmp_path):
    checkpoint = load_checkpoint(save_official({"model": Model()}, path))
    save_checkpoint(checkpoint, tmp_path / "new" / "x.safetensors")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_a_path_that_cannot_be_written_is_reported(path, tmp_path):
    checkpoint = load_checkpoint(save_official({"model": Model()}, path))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(checkpoint, tmp_path / "file" / "x.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(checkpoint, tmp_path / "a\0.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_safetensors_file_without_metadata_is_read(tmp_path, dtype):
    model = Model().to(dtype)
    file = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file(copy.deepcopy(model.state_dict()), file)
    checkpoint = load_checkpoint(file)
    assert set(checkpoint.tensors) == set(model.state_dict())
    assert checkpoint.class_names == ("class_0", "class_1")
    assert {t.dtype for t in checkpoint.tensors.values()} == {torch.float32, torch.int64}


@pytest.mark.skipif(sys.platform == "win32", reason="Names are Unicode there.")
def test_a_safetensors_file_whose_name_is_not_unicode_is_read(path, tmp_path):
    model = Model()
    save_official({"model": model}, path)
    target = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors"))
    save_checkpoint(load_checkpoint(path), target)
    assert_holds(load_checkpoint(target), model)


def test_the_state_of_a_training_run_names_the_weights_beside_it(tmp_path):
    tensors = {f"{part}.model.0.conv.weight": torch.zeros(1) for part in ("ema", "model")}
    safetensors.torch.save_file(tensors, tmp_path / "state.safetensors")
    with pytest.raises(LoadError, match="the state from which a training run is resumed") as caught:
        load_checkpoint(tmp_path / "state.safetensors")
    assert caught.value.fix == f"Use the weights beside it:  {tmp_path / 'best.safetensors'}"


def test_a_truncated_safetensors_file_is_reported_as_truncated(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(copy.deepcopy(Model().state_dict()), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoadError, match="truncated"):
        load_checkpoint(file)


@pytest.mark.parametrize("metadata", ["[" * 100_000, "{}", "null", json.dumps({"schema": 1, "variant": 3})])
def test_hostile_metadata_is_refused(tmp_path, metadata):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(copy.deepcopy(Model().state_dict()), file, {METADATA_KEY: metadata, "key_order": "[[["})
    with pytest.raises(LoadError, match="metadata"):
        load_checkpoint(file)


def test_complex_numbers_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    weights = copy.deepcopy(Model().state_dict())
    safetensors.torch.save_file({**weights, "model.0.bn.bias": torch.zeros(32, dtype=torch.complex64)}, file)
    with pytest.raises(CheckpointError, match="complex64"):
        load_checkpoint(file)


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.touch(), lambda p: p.write_text("hi")]
)
def test_files_that_are_not_weights_are_refused(path, make):
    make(path)
    with pytest.raises(LoadError) as caught:
        load_checkpoint(path)
    assert caught.value.fix


def test_the_official_training_weights_load():
    shared = os.environ.get("Y7_SHARED")
    if shared is None:
        pytest.skip("Y7_SHARED is not set: no official weights on this machine")
    checkpoint = load_checkpoint(Path(shared) / "weights" / "yolov7_training.pt")
    expected = shapes_of("yolov7", training=True, classes=80)
    assert {key: tuple(value.shape) for key, value in checkpoint.tensors.items()} == dict(expected)
    assert list(checkpoint.tensors) == list(expected)
    assert len(checkpoint.tensors) == 566
    assert (checkpoint.variant, checkpoint.training) == ("yolov7", True)
    assert checkpoint.class_names == COCO_NAMES
    assert checkpoint.anchors == VARIANTS["yolov7"].anchors
