"""Valid small files of every kind that loaders read, which the fuzz test damages."""

from __future__ import annotations

import collections
import json
import pickle
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np

from yolov7_deploy.metadata import ModelMetadata, NmsMetadata

SIDE = 64
STRIDES = (8, 16, 32)
CLASSES = 2
IMAGE_FORMATS = (
    *(".jpg", ".png", ".bmp", ".webp", ".tiff", ".gif", ".jp2", ".avif", ".ppm", ".pgm", ".pam", ".sr", ".hdr", ".pfm"),
)
_FLOAT_FORMATS = (".hdr", ".pfm")


def make_image(side: int = SIDE) -> np.ndarray:
    """Return a uint8 BGR image [48, side, 3] with edges and a gradient."""
    image = np.zeros((48, side, 3), np.uint8)
    image[:, :, 1] = np.arange(side, dtype=np.uint8)
    cv2.circle(image, (side // 2, 24), 15, (10, 200, 30), -1)
    return image


def images() -> list[bytes]:
    """Return one file per format, and the variants that have separate decoders."""
    image, files = make_image(), []
    for suffix in IMAGE_FORMATS:
        if cv2.haveImageWriter(f"x{suffix}"):
            value = image[:, :, 1] if suffix == ".pgm" else image
            files.append(encoded(suffix, value.astype(np.float32) / 255 if suffix in _FLOAT_FORMATS else value))
    alpha = np.dstack([image, image[:, :, 0]])
    deep = image.astype(np.uint16) * 257
    files += [encoded(".png", alpha), encoded(".png", deep), encoded(".png", image[:, :, 0]), encoded(".tiff", deep)]
    files += [
        encoded(".jpg", image, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        encoded(".webp", image, cv2.IMWRITE_WEBP_QUALITY, 20),
    ]
    files += [encoded(".tiff", image, cv2.IMWRITE_TIFF_COMPRESSION, kind) for kind in (1, 8, 32773)]
    exif = b"\xff\xe1\x00\x22Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    return [*files, files[0][:2] + exif + files[0][2:]]


def encoded(suffix: str, image: np.ndarray, *parameters: int) -> bytes:
    done, data = cv2.imencode(suffix, image, list(parameters))
    assert done
    return data.tobytes()


def videos(folder: Path) -> list[bytes]:
    """Return a short video in each container that OpenCV can write, and an animated GIF."""
    files = []
    for suffix, codec in ((".mp4", "mp4v"), (".avi", "MJPG"), (".avi", "XVID"), (".mkv", "mp4v"), (".mov", "mjpg")):
        path = folder / f"seed-{codec}{suffix}"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (SIDE, 48))
        for shift in range(6):
            writer.write(np.roll(make_image(), 3 * shift, axis=1))
        writer.release()
        if path.is_file() and path.stat().st_size:
            files.append(path.read_bytes())
    return [*files, encoded(".gif", make_image())]


def metadata_texts() -> list[bytes]:
    """Return metadata with and without NMS, of fixed and dynamic size."""
    anchors = tuple(tuple((float(4 * i + j), float(3 * i + j)) for j in (3, 5, 9)) for i in (1, 2, 3))
    names = tuple(f"thing {i}" for i in range(CLASSES))
    plain = {"variant": "custom", "class_names": names, "strides": STRIDES, "anchors": anchors, "source": "seed.pt"}
    nms = NmsMetadata(
        kind="plugin", conf=0.25, iou=0.45, max_det=20, max_candidates=64,
        multi_label=True, class_agnostic=False, runtime_thresholds=True,
    )  # fmt: skip
    fixed = {"input_hw": (SIDE, SIDE), "batch": 1, "opset": 17, "heads": ("p3", "p4", "p5"), "notes": ("a note",)}
    infos = [
        ModelMetadata(**plain),
        ModelMetadata(**plain, **fixed, nms=nms),
        ModelMetadata(**plain, **fixed, input_kind="uint8"),
    ]
    return [metadata.to_json().encode() for metadata in infos]


def graphs() -> list[bytes]:
    """Return networks of three convolutions with every kind of NMS; the last has no metadata."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from yolov7_deploy.onnx_export.nms import attach_nms
    from yolov7_deploy.onnx_export.nms_subgraph import NmsPlan
    from yolov7_deploy.onnx_export.onnx_model import OnnxModel
    from yolov7_deploy.options import ExportOptions

    infos = [ModelMetadata.from_json(text.decode()) for text in metadata_texts()]
    heads, columns = ("p3", "p4", "p5"), 3 * (5 + CLASSES)
    rng = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []
    for head, stride in zip(heads, STRIDES, strict=True):
        weight = rng.normal(0, 0.3, (columns, 3, 4, 4)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{head}.weight"))
        nodes.append(
            helper.make_node(
                "Conv", ["images", f"{head}.weight"], [head], head, strides=[stride, stride], pads=[0, 0, 0, 0]
            )
        )
        outputs.append(
            helper.make_tensor_value_info(head, TensorProto.FLOAT, [1, columns, SIDE // stride, SIDE // stride])
        )
    network_input = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    graph = helper.make_graph(nodes, "small", [network_input], outputs, weights)
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="seeds")
    files = []
    for kind in ("none", "plugin", "standard", "efficient"):
        options = ExportOptions(input_hw=(SIDE, SIDE), batch=1, nms=kind, max_det=20, max_candidates=64)
        plan = NmsPlan.of(STRIDES, infos[0].anchors, CLASSES, options)
        proto = attach_nms(network, heads, plan)
        onnx.checker.check_model(proto)
        nms = None
        if kind != "none":
            nms = NmsMetadata(
                kind=kind, conf=0.25, iou=0.45, max_det=20, max_candidates=64,
                multi_label=True, class_agnostic=False, runtime_thresholds=kind != "efficient",
            )  # fmt: skip
        metadata = ModelMetadata.from_json(json.dumps({**json.loads(infos[1].to_json()), "nms": None}))
        foreign = proto.SerializeToString(deterministic=True)
        files.append(OnnxModel.of(proto, _with(metadata, nms)).proto.SerializeToString(deterministic=True))
    return [*files, foreign]


def _with(metadata: ModelMetadata, nms: NmsMetadata | None) -> ModelMetadata:
    from dataclasses import replace

    return replace(metadata, nms=nms)


def checkpoints(folder: Path) -> list[bytes]:
    """Return checkpoints: modules, state dicts, bfloat16, the format before torch 1.6, and bare pickles."""
    import torch

    from tests.support.official_modules import Model, save_official

    model = Model()
    half = Model().half()
    saved = [
        save_official({"model": model, "ema": half, "epoch": 3, "optimizer": None}, folder / "whole.pt"),
        save_official({"model": Model(training_form=False, names={0: "a", 1: "b"})}, folder / "deploy.pt"),
    ]
    for name, value in (("state.pt", model.state_dict()), ("bf16.pt", model.bfloat16().state_dict())):
        torch.save(value, folder / name)
        saved.append(folder / name)
    torch.save(model.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    bare = pickle.dumps({"model": collections.OrderedDict(a=[1.5, "x"])}, protocol=2)
    return [*(path.read_bytes() for path in saved), (folder / "legacy.pt").read_bytes(), bare]


def safetensors_files(folder: Path) -> list[bytes]:
    """Return files of this package in float32 and float16, and one without metadata."""
    import safetensors.torch

    from yolov7_deploy.checkpoint import load_checkpoint, save_checkpoint

    source = folder / "source.pt"
    source.write_bytes(checkpoints(folder)[0])
    checkpoint = load_checkpoint(source)
    save_checkpoint(checkpoint, folder / "full.safetensors")
    save_checkpoint(checkpoint, folder / "half.safetensors", half=True)
    tensors = {key: tensor.clone() for key, tensor in checkpoint.tensors.items()}
    foreign = safetensors.torch.save(tensors, {"format": "pt"})
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("full", "half")] + [foreign]


def int8_weights(folder: Path) -> list[bytes]:
    """Return weights with the quantization of quantization-aware training, for CPUs and for TensorRT."""
    from dataclasses import replace

    from yolov7_deploy.checkpoint import load_checkpoint, save_checkpoint
    from yolov7_deploy.checkpoint.quantization import TrainedQuantization, TrainedRange

    (folder / "source.pt").write_bytes(checkpoints(folder)[0])
    checkpoint = load_checkpoint(folder / "source.pt")
    files = []
    for target, zero in (("cpu", 3), ("tensorrt", 0)):
        names = ("images", "model.0.act", "model.1.act")
        quantization = TrainedQuantization(
            target=target, reduce_range=target == "cpu", method="mse", images=6, images_sha256="0" * 64,
            ranges=tuple(TrainedRange(tensor=name, scale=2.0**-7, zero=zero) for name in names),
            amax=tuple((name, 2.5) for name in names),
        )  # fmt: skip
        save_checkpoint(replace(checkpoint, quantization=quantization), folder / "int8.safetensors")
        files.append((folder / "int8.safetensors").read_bytes())
    return files


def coco_documents() -> list[bytes]:
    """Return annotations of two images: boxes, a crowd, polygons and a mask."""
    images = [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": 48} for i in (1, 2)]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    mask = {"counts": [10, 5, 3000], "size": [48, SIDE]}
    rows = [
        {"bbox": [4, 5, 20, 20.5], "category_id": 3, "area": 390.25, "segmentation": [[4, 5, 24, 5, 24, 25, 4, 25]]},
        {"bbox": [1, 2, 30, 30], "category_id": 7, "iscrowd": 1, "area": 800, "segmentation": mask},
        {"bbox": [9, 9, 3, 3], "category_id": 7},
    ]
    annotations = [{"id": i, "image_id": 1 + i % 2, "iscrowd": 0, **row} for i, row in enumerate(rows)]
    return [json.dumps({"images": images, "categories": categories, "annotations": annotations}).encode()]


def yamls() -> list[bytes]:
    """Return YAMLs with a folder, a list, an annotation file, names as a list, dict and number, and all tags."""
    return [
        b"path: .\ntrain: images\nval: images\nnc: 2\nnames: [cat, dog]\n",
        b"# a comment\nval:\n  - images\n  - list.txt\nnames:\n  0: cat\n  1: dog\n",
        b"path: ''\nval: images\nannotations: {val: coco.json}\nnames: ['cat', \"dog\"]\n",
        b"a: &a [images]\nval: *a\nnc: 2\nbase: &b {x: 1}\nmore:\n  <<: *b\n",
        b"val: !!str images\nnc: !!int 2\nnames: !!seq [cat, dog]\na: !!float 1.5\nb: !!timestamp 2001-12-14 21:59:43\n"
        b"c: !!bool yes\nd: !!null ~\ne: !!binary aGk=\nf: !!omap [x: 1]\ng: !!set {x}\nh: !!pairs [x: 1]\ni: 1:30\n",
    ]


def hyperparameters() -> list[bytes]:
    """Return hyperparameters: all of a preset, a few, and in the notation that YAML 1.1 reads as text."""
    from yolov7_deploy.training.hyperparameters import PRESETS, format_hyperparameters

    return [format_hyperparameters(PRESETS["p5"]).encode(), b"lr0: 0.02\nmosaic: 0.5\n", b"lr0: 1e-3\nanchors: 3\n"]


def labels() -> list[bytes]:
    """Return labels: a box, a polygon, a repeated line and a box of zero area."""
    return [
        b"0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.9 0.1 0.9 0.9\n0 0.5 0.5 0.25 0.25\n1 0.5 0.5 0 0.1\n",
        b"1 0.2 0.3 0.1 0.2\r\n\r\n0 0.00001 0.5 0.00001 1.00001\r\n",
    ]


def source_lists() -> list[bytes]:
    """Return source lists with images, a folder, a pattern, URLs, a camera and comments."""
    return [
        b"# images\nimages/1.png\nimages\nimages/*.png\n\n./images/2.png\n",
        b"\xff\xfei\0m\0a\0g\0e\0s\0\\\0*\0",
        b"\xef\xbb\xbfimages/1.png\r\nrtsp://user:secret@host/stream\r\n0\r\nhttp://host/a.jpg\r\n",
    ]


# --- engines ----------------------------------------------------------------------------------------------------------

_OLD_TENSOR = {"Name": "images", "Dimensions": [1, 3, SIDE, SIDE], "Format/Datatype": "Row major linear FP32"}
_NEW_TENSOR = {"Name": "p3", "Dimensions": [1, 21, 8, 8], "Format": "HWC8", "DataType": "Half"}
INSPECTIONS: tuple[dict[str, object], ...] = (
    {
        "Layers": [
            {"Name": "a + b", "LayerType": "CaskConvolution", "Inputs": [_OLD_TENSOR], "Outputs": [_OLD_TENSOR],
             "Weights": {"Type": "Half", "Count": 432}, "Bias": {"Type": "Half", "Count": 16}, "TacticValue": "0x1"},
            {"Name": "nms", "LayerType": "PluginV2", "Inputs": [_OLD_TENSOR], "Outputs": [], "PluginType": "Y7NMS"},
        ],
        "Bindings": ["images", "num_dets", "images [profile 1]"],
    },
    {
        "Layers": [
            {"Name": "c", "LayerType": "kgen", "Inputs": [_NEW_TENSOR], "Outputs": [_NEW_TENSOR], "Constants": []},
            {"Name": "Reformatting CopyNode", "LayerType": "Reformat", "Inputs": [_NEW_TENSOR], "Outputs": []},
        ],
        "I/O Tensors": [{**_NEW_TENSOR, "Profiles": [{"Min": [1], "Opt": [2], "Max": [4]}]}],
    },
    {"Layers": ["one", "two"], "Bindings": ["images"]},
)  # fmt: skip


_LISTED = "[ { Name: t, Dimensions: [1,3,8,8], Strides: [1], StrideOrder: [0], Datatype: Int8, Format: (NHWC) Major }]"
LISTING = "Layers:\n" + 3 * (
    f"Name: c_myl0_1, LayerType: correlation, Inputs: {_LISTED}, Constants: {_LISTED}, Outputs: {_LISTED}, "
    "TacticName: , StreamId: 0, Metadata: [ONNX Layer: c]\n"
)


def plans() -> list[bytes]:
    """Return plans with the header of TensorRT and of TensorRT-RTX, and a body that this package does not read."""
    body = bytes(range(256)) * 2
    versions = ((b"ftrt", bytes((10, 3, 0, 26))), (b"vtrt", bytes((1, 7, 1, 0))))
    size = (32 + len(body)).to_bytes(8, "little")
    return [tag + bytes(12) + size + version + bytes(4) + body for tag, version in versions]


def records() -> list[bytes]:
    """Return build records with every inspection, with a parsed network, and without either."""
    from yolov7_deploy._serialization import sha256_hex
    from yolov7_deploy.tensorrt.build_record import EngineRecord, EngineTensor, InputShape, NetworkLayer, PluginUse

    metadata = ModelMetadata.from_json(metadata_texts()[1].decode())
    shape = (1, 3, SIDE, SIDE)
    layers = (NetworkLayer(name="conv", type="CONVOLUTION", precision="fp16"),)
    files = []
    for i, text in enumerate((*map(json.dumps, INSPECTIONS), "")):
        plan = plans()[0]
        record = EngineRecord(
            metadata=metadata, plan_bytes=len(plan), plan_sha256=sha256_hex(plan),
            product="tensorrt", tensorrt="10.3.0.26",
            inspector=text, listing="" if text else LISTING, network_layers=layers if i else (),
            targets=("8.6", "8.9"), notes=("a note",),
            plugin=PluginUse(path="/usr/lib/liby7_plugin.so", version="1", abi="v3") if i % 2 else None,
            shapes=(InputShape(name="images", min=shape, opt=shape, max=shape),),
            inputs=(EngineTensor(name="images", dtype="float32", shape=shape),),
        )  # fmt: skip
        files.append(record.to_json().encode())
    return files


_DESCRIPTION = {
    "name": "Y7NMS", "abi": "v3", "version": "1", "kernels_abi": 1,
    "compute_capabilities": [86, 89], "exact": [], "ptx": [120], "cuda": "13.0", "headers": "10.14",
}  # fmt: skip


def plugin_libraries(folder: Path) -> list[bytes]:
    """Return a library with only the description of our plugin, or without a compiler only its header."""
    compiler = shutil.which("cc")
    if compiler is None:
        return [b"\x7fELF\x02\x01\x01" + bytes(57)]
    source, library = folder / "plugin.c", folder / "plugin.so"
    text = json.dumps(json.dumps(_DESCRIPTION))
    source.write_text(f"const char* y7_plugin_description(void) {{ return {text}; }}\n")
    command = [compiler, "-shared", "-fPIC", "-nostdlib", "-s", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return [library.read_bytes()]
