"""Runs a checkpoint through the fused reference model; NMS is the reference one on the host.

What the paper times as the network, PyTorch in half precision on a GPU without NMS, is the engine span here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.errors import DeviceError, UsageError
from yolov7_deploy.image import FloatArray, Image, Letterbox, to_network_input
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import postprocess
from yolov7_deploy.runtimes.base import IntermediateOutputs, RawDetections, RuntimeResult, TimingBreakdown
from yolov7_deploy.runtimes.torch_cuda_graphs import (
    Capture,
    CapturedGraph,
    CapturedGraphPool,
    Graphs,
    Size,
    capture_graph,
    first_line,
    is_out_of_memory,
)
from yolov7_deploy.runtimes.torch_network import TorchNetwork

# Sizes of input, or threads at one size, that are ready at once. Each holds its activations in GPU memory.
MOST_LANES = 8
_GPU_LIBRARIES = ("CUDA", "cuDNN", "CUDNN", "CUBLAS")


class PytorchBackend:
    """A fused model on a device: half precision and a CUDA graph for each size of input on a GPU, float32 elsewhere.

    Args:
        model: A fused model in float32; it becomes the backend's, which converts it in place.
        info: Its metadata.
        device: `auto` (a GPU where torch sees one), `cpu`, `cuda` or `cuda:N`.
        half: Half precision; `None` is on a GPU only.
        capture: Runs the network in lanes, and how their forwards become repeatable; `None` is lanes with CUDA graphs
            on a GPU, and no lanes where the device works in the host's own memory.
    """

    max_batch_size: int | None = None
    takes_gpu_arrays = False

    def __init__(
        self,
        model: Yolov7,
        metadata: ModelMetadata,
        *,
        device: str = "cpu",
        half: bool | None = None,
        capture: Capture | None = None,
    ) -> None:
        place = _torch_device(device)
        self._on_gpu = place.type == "cuda"
        self._half = self._on_gpu if half is None else half
        self.device = str(place)
        self.metadata = replace(metadata, precision="fp16" if self._half else "fp32")
        try:
            self._network = TorchNetwork(model, place, half=self._half)
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceError(
                f"The weights do not fit into the memory of {place}: {first_line(error)}", fix=self._memory_fix()
            ) from error
        self._graphs = Graphs(capture or capture_graph)
        in_lanes = self._on_gpu or capture is not None
        self._lanes = CapturedGraphPool(self._new_lane, most=MOST_LANES) if in_lanes else None

    @classmethod
    def open(
        cls, path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None
    ) -> PytorchBackend:
        """See `open_backend`; any size that the stride divides is accepted, and half precision on a GPU."""
        place = _torch_device(device)
        if half and place.type != "cuda":
            raise UsageError(
                f"Half precision needs a GPU; on {place} torch runs it slower than float32.",
                fix="--no-half, or --device cuda:0",
            )
        checkpoint = load_checkpoint(path)
        metadata = checkpoint.metadata
        if input_hw is not None and any(side < 1 or side % metadata.stride for side in input_hw):
            up = [max(1, -(-side // metadata.stride)) * metadata.stride for side in input_hw]
            raise UsageError(
                f"An input of {input_hw[0]}x{input_hw[1]} is no multiple of this model's stride {metadata.stride}.",
                fix=f"--img {up[0]},{up[1]}",
            )
        return cls(fuse(build_model(checkpoint)), metadata, device=str(place), half=half)

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """See `Backend.runtime_info`."""
        found = [("memory layout", "channels last"), ("decode", "float32"), ("NMS", "host")]
        if self._lanes is None:
            return (*found, ("threads", str(torch.get_num_threads())))
        found += [("CUDA graph", "on" if self._graphs.work else "failed"), ("upload", "uint8, page-locked")]
        if not self._half:
            found.append(("convolutions", "TF32" if torch.backends.cudnn.allow_tf32 else "float32"))
        return (*found, ("cuDNN autotuning", "on" if torch.backends.cudnn.benchmark else "off"))

    def infer(
        self,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool = False,
    ) -> RuntimeResult:
        """See `Backend.infer`. In lanes only a `timed` call has spans.

        Spans are wall time with the device idle at both ends, as the official program measures. The engine span is what
        the paper calls the network: forward and decoding, of a prepared input that is on the device, to boxes that stay
        there. What is downloaded are the anchors that can become detections; finding them is part of that span.

        Raises:
            DeviceError: Out of memory, or the GPU failed.
        """
        while True:
            try:
                return self._infer(images, letterboxes, thresholds, timed=timed)
            except RuntimeError as error:
                reason = first_line(error)
                if not is_out_of_memory(error):
                    if not self._on_gpu or not any(library in reason for library in _GPU_LIBRARIES):
                        raise
                    raise DeviceError(
                        f"{self.device} failed: {reason}",
                        fix="Start the program again; if it stays, y7 doctor shows the GPU, its driver and libraries.",
                    ) from error
            # Only out here has the failed call let go of its tensors. Lanes that are not in use make room first.
            if not self._give_up_lanes():
                height, width = letterboxes[0].canvas_hw
                raise DeviceError(
                    f"{len(images)} images of {height}x{width} need more memory than {self.device} has: {reason}",
                    fix=self._memory_fix(),
                )

    def _infer(
        self, images: Sequence[Image], letterboxes: Sequence[Letterbox], thresholds: Thresholds, *, timed: bool
    ) -> RuntimeResult:
        started = time.perf_counter()
        canvases = [letterbox.apply(image) for image, letterbox in zip(images, letterboxes, strict=True)]
        letterbox_ms = (time.perf_counter() - started) * 1e3
        if self._lanes is None:
            rows, spans = self._run_here(canvases)
        else:
            size = (len(images), *letterboxes[0].canvas_hw)
            rows, spans = self._run_in_lane(self._lanes, size, canvases, thresholds.conf, timed=timed)
        fetched = time.perf_counter()
        found = [_found(of_image, thresholds) for of_image in rows]
        spans = replace(
            spans,
            preprocess_ms=spans.preprocess_ms + letterbox_ms,
            postprocess_ms=(time.perf_counter() - fetched) * 1e3,
        )
        return RuntimeResult(
            found=found,
            preprocess_ms=spans.preprocess_ms,
            inference_ms=spans.upload_ms + spans.engine_ms + spans.download_ms,
            postprocess_ms=spans.postprocess_ms,
            spans=spans if timed or self._lanes is None else None,
        )

    def _run_here(self, canvases: Sequence[Image]) -> tuple[list[FloatArray], TimingBreakdown]:
        """Canvases to decoded outputs, in the host's memory."""
        marks = [time.perf_counter()]
        images = torch.from_numpy(to_network_input(canvases)).to(self._network.device, self._network.dtype)
        marks.append(time.perf_counter())
        with torch.inference_mode():
            decoded = self._network.predict(images).cpu().numpy()
        marks.append(time.perf_counter())
        layout, engine = ((after - before) * 1e3 for before, after in pairwise(marks))
        return list(decoded), TimingBreakdown(
            preprocess_ms=layout, upload_ms=0.0, engine_ms=engine, download_ms=0.0, postprocess_ms=0.0
        )

    def _run_in_lane(
        self, lanes: CapturedGraphPool, size: Size, canvases: Sequence[Image], conf: float, *, timed: bool
    ) -> tuple[list[FloatArray], TimingBreakdown]:
        """Canvases to the candidates among decoded outputs; the spans are true only if it was `timed`."""
        marks = [time.perf_counter()]

        def mark() -> None:
            if timed:
                lane.wait()
            marks.append(time.perf_counter())

        with lanes.taken(size) as lane, lane.on_stream():
            lane.stage(canvases)
            mark()
            lane.prepare()
            mark()
            decoded = lane.run()
            mark()
            rows = lane.fetch(decoded, conf)
            mark()
        stage, layout, engine, fetch = ((after - before) * 1e3 for before, after in pairwise(marks))
        return rows, TimingBreakdown(
            preprocess_ms=layout, upload_ms=stage, engine_ms=engine, download_ms=fetch, postprocess_ms=0.0
        )

    def stages(self, canvas: Image) -> IntermediateOutputs:
        """What the network makes of one canvas on the way to its detections."""
        network = self._network
        with torch.inference_mode():
            images = network.empty_input(1, (canvas.shape[0], canvas.shape[1]))
            maps = network.maps(network.prepare(torch.from_numpy(canvas)[None].to(network.device), images))
            decoded = network.decode(maps)
        return IntermediateOutputs(heads=[x[0].float().cpu().numpy() for x in maps], decoded=decoded[0].cpu().numpy())

    def close(self) -> None:
        """Frees buffers and graphs; the weights go with the object."""
        if self._lanes is not None:
            self._lanes.close()
        self._give_up_lanes()

    def _give_up_lanes(self) -> int:
        freed = self._lanes.give_up() if self._lanes else 0
        if self._on_gpu:
            torch.cuda.empty_cache()
        return freed

    def _memory_fix(self) -> str:
        more = ", or take half precision" if self._on_gpu and not self._half else ""
        return f"Take a smaller --batch or --img, or end other programs on this device{more}."

    def _new_lane(self, size: Size) -> CapturedGraph:
        return CapturedGraph(self._network, size, capture=self._graphs)


def _torch_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if name.isdigit():
        name = f"cuda:{name}"
    try:
        return torch.empty(0, device=torch.device(name)).device  # `cuda` has become `cuda:N`
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"torch {torch.__version__} has no device {name!r} here: {first_line(error)}", fix="--device cpu"
        ) from error


def _found(output: FloatArray, thresholds: Thresholds) -> RawDetections:
    boxes, scores, class_ids = postprocess(output, thresholds)
    return RawDetections(boxes=boxes, scores=scores, class_ids=class_ids)
