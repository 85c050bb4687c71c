"""The loaders under fuzz test, and the child process that runs their cases.

Run one case:  python -m tests.fuzz.fuzz_targets LOADER --first 17 --count 1 --keep DAMAGED_FILE
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import itertools
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz import container_mutations, fuzz_seeds, mutations
from yolov7_deploy._text import printable
from yolov7_deploy.errors import Y7Error

HANG_S = 60  # the process is stopped
MAX_CPU_S = 10  # of one case; far more than any loader needs for these small files
EXTRA_BYTES = 2**30  # address space that all cases of one loader may use beyond that of the valid files
OUT_OF_MEMORY = ("bad_alloc", "nsufficient memory", "failed to allocate", "not enough memory")
FRAMES = 12


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loader under test.

    Attributes:
        seeds: Returns valid files.
        mutate: Returns a damaged file.
        load: Opens the file at a path and uses the result; may raise only `Y7Error`.
        suffix: Suffix of the file.
        stem: Path of the damaged file in the folder of the campaign, without suffix.
        weight: Number of cases relative to 100 of another loader.
        prepare: Writes other files to the folder first.
    """

    seeds: Callable[[Path], list[bytes]]
    mutate: mutations.Mutator
    load: Callable[[Path], object]
    suffix: str
    stem: str = "damaged"
    weight: int = 100
    prepare: Callable[[Path], None] = lambda folder: None


# --- loading files -----------------------------------------------------------------------------------------


def _checkpoint(path: Path) -> None:
    from yolov7_deploy.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    _check_metadata(checkpoint.metadata)
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.tensors.values())


def _quantization(path: Path) -> None:
    from yolov7_deploy.checkpoint.loader import load_quantization

    quantization = load_quantization(path)
    if quantization is not None:
        assert type(quantization).from_json(quantization.to_json()) == quantization
        scales = np.array([one.scale for one in quantization.ranges], np.float32)
        assert bool(np.all(np.isfinite(1 / scales))) and bool(np.all(scales > 0))
        np.array([one.zero for one in quantization.ranges], np.uint8 if quantization.target == "cpu" else np.int8)
        np.array([largest for _, largest in quantization.amax], np.float32)


def _metadata(path: Path) -> None:
    from yolov7_deploy.metadata import ModelMetadata

    _check_metadata(ModelMetadata.from_json(path.read_bytes().decode("utf-8", "surrogateescape")))


def _check_metadata(metadata: Any) -> None:
    """Use metadata as its readers do."""
    from yolov7_deploy.cli.info import _metadata_text
    from yolov7_deploy.metadata import ModelMetadata

    assert ModelMetadata.from_json(metadata.to_json()) == metadata
    _metadata_text(metadata).encode()
    hash(metadata)
    assert max(*metadata.default_hw, metadata.stride) < 2**20


def _onnx_model(path: Path) -> None:
    from yolov7_deploy.onnx_export.onnx_model import OnnxModel

    model = OnnxModel.load(path)
    _check_metadata(model.metadata)


def _info(path: Path, *, layers: bool = False) -> None:
    from yolov7_deploy.cli.info import info

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        info(str(path), json_path=os.devnull, layers=layers)
    assert printable(printed.getvalue()) == printed.getvalue(), "the text would change the terminal"


def _detector(path: Path) -> None:
    """Open every file, and run those that ONNX's checker accepts.

    ONNX Runtime opens some invalid graphs and crashes when they run, for example with a Constant in the function body
    whose value has another type than declared (case 6508). A loader cannot detect that without the checker, which is
    not installed in production.
    """
    import onnx

    from yolov7_deploy.detector import Detector

    with Detector(path, device="cpu") as detector:
        try:
            onnx.checker.check_model(path, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, UnicodeDecodeError, ValueError):
            return
        if max(detector.input_hw) <= 4 * fuzz_seeds.SIDE:
            # NumPy warns about weights that are no longer finite.
            warnings.simplefilter("ignore", RuntimeWarning)
            detector(fuzz_seeds.make_image()).filter(conf=0.3)
            warnings.simplefilter("error", RuntimeWarning)


def _image(path: Path) -> None:
    from yolov7_deploy.image import read_image, read_image_hw

    try:
        read_image_hw(path)
    finally:
        image = read_image(path)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size


def _source(path: Path) -> None:
    from yolov7_deploy.sources import open_source

    with open_source(path) as source:
        _ = source.total
        for frame in itertools.islice(source, FRAMES):
            assert frame.image.dtype == np.uint8 and frame.image.ndim == 3 and frame.image.shape[2] == 3


def _list(path: Path) -> None:
    from yolov7_deploy.sources import open_source

    for on_error in ("skip", "raise"):
        source = open_source(path, on_error=on_error)
        _ = source.paths
        if not source.is_live and all("://" not in shown for shown in source.paths):
            list(itertools.islice(source, FRAMES))


def _dataset(path: Path) -> None:
    from yolov7_deploy.datasets import open_dataset

    root = path.parent if path.suffix != ".txt" else path.parent.parent
    dataset = open_dataset(root / "data.yaml" if path.suffix == ".txt" else path)
    for sample in itertools.islice(dataset, 4):
        assert len(sample.boxes) == len(sample.class_ids) == len(sample.crowd) == len(sample.polygons)
    dataset.box_counts()
    json.dumps(dataset.ground_truth(range(min(4, len(dataset)))), allow_nan=False)
    "".join((*dataset.class_names, *dataset.problems)).encode()


def _hyperparameters(path: Path) -> None:
    from yolov7_deploy.training.hyperparameters import format_hyperparameters, read_hyperparameters

    format_hyperparameters(read_hyperparameters(str(path))).encode()


def _with_images(folder: Path) -> None:
    """Write two images, their labels, a list of them, an annotation file and a YAML."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number in (1, 2):
        (folder / "images" / f"{number}.png").write_bytes(fuzz_seeds.encoded(".png", fuzz_seeds.make_image()))
        (folder / "labels" / f"{number}.txt").write_bytes(fuzz_seeds.labels()[0])
    (folder / "list.txt").write_text("./images/1.png\nimages/2.png\n")
    (folder / "coco.json").write_bytes(fuzz_seeds.coco_documents()[0])
    (folder / "data.yaml").write_bytes(fuzz_seeds.yamls()[0])


def _engine(path: Path) -> None:
    """Load an engine whose plan or build record is damaged."""
    from yolov7_deploy.tensorrt.engine import Engine

    engine = path.with_suffix("") if path.suffix == ".json" else path
    loaded = Engine.load(engine)
    if loaded.record is not None:
        _check_metadata(loaded.record.metadata)
        assert type(loaded.record).from_json(loaded.record.to_json()) == loaded.record
    for layers in (False, True):
        _info(engine, layers=layers)


def _plugin(path: Path) -> None:
    from yolov7_deploy.tensorrt.plugin_library import describe_plugin

    library = describe_plugin(path)
    f"{library} {library.runs_on(86)}".encode()


def _mutate_library(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change the library's description, truncated or padded to the same length, or any bytes."""
    start = data.find(b'{"name"')
    if start < 0 or rng.random() < 0.5:
        return mutations.mutate_bytes(rng, data, others)
    stop = data.index(b"\0", start)
    description = mutations.mutate_json(rng, data[start:stop], ())
    return data[:start] + description[: stop - start].ljust(stop - start) + data[stop:]


def _with_plan(folder: Path) -> None:
    (folder / "damaged.engine").write_bytes(fuzz_seeds.plans()[0])


def _mutate_record(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change the record, or the inspector's document or layer listing in it."""
    document = json.loads(data)
    key, mutate = ("inspector", mutations.mutate_json) if document["inspector"] else ("listing", mutations.mutate_bytes)
    if rng.random() < 0.5 or not document[key]:
        return mutations.mutate_json(rng, data, others)
    text = mutate(rng, document[key].encode(), ())
    return json.dumps({**document, key: text.decode("utf-8", "replace")}).encode()


def _mutate_onnx(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change messages of a graph and its metadata, or any bytes."""
    if rng.random() < 0.35:
        return mutations.mutate_bytes(rng, data, others)
    import onnx

    proto = onnx.load_model_from_string(data)
    if proto.metadata_props and rng.random() < 0.2:
        entry = proto.metadata_props[0]
        entry.value = mutations.mutate_json(rng, entry.value.encode(), ()).decode("utf-8", "replace")
    for _ in range(rng.choice((1, 1, 2, 4))):
        container_mutations.changed_message(rng, proto)
    return proto.SerializeToString()


TARGETS = {
    "torch": Target(
        seeds=fuzz_seeds.checkpoints, mutate=container_mutations.mutate_zip, load=_checkpoint, suffix=".pt"
    ),
    "safetensors": Target(
        seeds=fuzz_seeds.safetensors_files,
        mutate=container_mutations.mutate_safetensors,
        load=_checkpoint,
        suffix=".safetensors",
    ),
    "quantization": Target(
        seeds=fuzz_seeds.int8_weights,
        mutate=container_mutations.mutate_quantization,
        load=_quantization,
        suffix=".safetensors",
        weight=20,
    ),
    "metadata": Target(
        seeds=lambda _: fuzz_seeds.metadata_texts(), mutate=mutations.mutate_json, load=_metadata, suffix=".json"
    ),
    "onnx-model": Target(seeds=lambda _: fuzz_seeds.graphs(), mutate=_mutate_onnx, load=_onnx_model, suffix=".onnx"),
    "onnx-info": Target(seeds=lambda _: fuzz_seeds.graphs(), mutate=_mutate_onnx, load=_info, suffix=".onnx"),
    "detector": Target(
        seeds=lambda _: fuzz_seeds.graphs(), mutate=_mutate_onnx, load=_detector, weight=40, suffix=".onnx"
    ),
    "image": Target(
        seeds=lambda _: fuzz_seeds.images(), mutate=container_mutations.mutate_image, load=_image, suffix=".png"
    ),
    "video": Target(seeds=fuzz_seeds.videos, mutate=container_mutations.mutate_image, load=_source, suffix=".mp4"),
    "list": Target(
        seeds=lambda _: fuzz_seeds.source_lists(),
        mutate=mutations.mutate_text,
        load=_list,
        suffix=".txt",
        prepare=_with_images,
    ),
    "yaml": Target(
        seeds=lambda _: fuzz_seeds.yamls(),
        mutate=mutations.mutate_yaml,
        load=_dataset,
        weight=40,
        suffix=".yaml",
        prepare=_with_images,
    ),
    "hyperparameters": Target(
        seeds=lambda _: fuzz_seeds.hyperparameters(),
        mutate=mutations.mutate_yaml,
        load=_hyperparameters,
        weight=40,
        suffix=".yaml",
    ),
    "coco": Target(
        seeds=lambda _: fuzz_seeds.coco_documents(),
        mutate=mutations.mutate_json,
        load=_dataset,
        suffix=".json",
        prepare=_with_images,
    ),
    "engine": Target(seeds=lambda _: fuzz_seeds.plans(), mutate=mutations.mutate_bytes, load=_engine, suffix=".engine"),
    "record": Target(
        seeds=lambda _: fuzz_seeds.records(),
        mutate=_mutate_record,
        load=_engine,
        weight=40,
        suffix=".engine.json",
        prepare=_with_plan,
    ),
    "plugin": Target(seeds=fuzz_seeds.plugin_libraries, mutate=_mutate_library, load=_plugin, suffix=".so", weight=10),
    "labels": Target(
        seeds=lambda _: fuzz_seeds.labels(),
        mutate=mutations.mutate_text,
        load=_dataset,
        suffix=".txt",
        stem="labels/1",
        prepare=_with_images,
    ),
}


# --- the child process ------------------------------------------------------------------------------------------------


def damaged(name: str, case: int, seeds: Sequence[bytes]) -> bytes:
    """Return the file of a case, which depends only on the case number and the valid files."""
    rng = random.Random(f"{name}:{case}")
    return TARGETS[name].mutate(rng, rng.choice(seeds), seeds)


def find_fault(error: Exception) -> str:
    """Return what is wrong with the error about a file; empty if nothing is."""
    if not isinstance(error, Y7Error):
        return "".join(traceback.format_exception(error))[-3000:]
    if not error.message or not error.fix:
        return f"{type(error).__name__} without a message or without a fix: {error}"
    if printable(str(error)) != str(error):
        return f"{type(error).__name__} that would change the terminal: {str(error)!r:.500}"
    if len(str(error)) > 5000:
        text = str(error)
        return f"{type(error).__name__} of {len(text)} characters: {text[:200]}...{text[-200:]}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or any(words in str(cause) for words in OUT_OF_MEMORY):
            return f"all memory was used before the file was refused: {error}"
        cause = cause.__cause__
    return ""


def campaign(name: str, *, first: int, count: int, folder: Path, keep: Path | None) -> None:
    """Load the cases first..first+count-1; write the number of each before it runs, and faults after it.

    Valid files are loaded first: at least one must be accepted, and their address space is not counted.
    """
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(dir=folder) as home:
        seeds = target.seeds(Path(home))
    warnings.simplefilter("error")
    target.prepare(folder)
    os.chdir(folder)
    path = folder / f"{target.stem}{target.suffix}"
    accepted = 0
    for seed in seeds:
        path.write_bytes(seed)
        try:
            target.load(path)
            accepted += 1
        except Y7Error as error:
            assert not find_fault(error), find_fault(error)
    assert accepted, "no valid file is accepted, so damaged files would prove nothing"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, resource.RLIM_INFINITY))
    with (folder / "current").open("w") as current, (folder / "findings").open("a") as findings:
        for case in range(first, first + count):
            content = damaged(name, case, seeds)
            os.pwrite(current.fileno(), f"{case:12d}".encode(), 0)
            if keep is not None:
                keep.write_bytes(content)
            path.write_bytes(content)
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            start = time.process_time()
            try:
                target.load(path)
                fault = ""
            except Exception as error:  # noqa: BLE001 - every error is a result
                fault = find_fault(error)
            faulthandler.cancel_dump_traceback_later()
            seconds = time.process_time() - start
            if not fault and seconds > MAX_CPU_S:
                fault = f"it took {seconds:.1f} s"
            if fault:
                findings.write(json.dumps([case, fault]) + "\n")
                findings.flush()
        os.pwrite(current.fileno(), b"done        ", 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=TARGETS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    keep = options.keep and options.keep.absolute()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        campaign(options.name, first=options.first, count=options.count, folder=folder, keep=keep)
        if options.folder is None:
            sys.stdout.write((folder / "findings").read_text() or "no finding\n")


if __name__ == "__main__":
    faulthandler.enable()
    main()
