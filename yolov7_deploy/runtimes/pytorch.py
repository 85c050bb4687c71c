"""Runs a checkpoint with PyTorch: the fused network, and NMS on the host.

The time that the paper reports, PyTorch in FP16 on a GPU without NMS, is `engine_ms` here.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from yolov7_deploy._process import call_after_fork, gpu_fork_error, never_free
from yolov7_deploy._text import get_logger
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.errors import DeviceError, UsageError, is_out_of_memory
from yolov7_deploy.hardware.gpu import parse_device
from yolov7_deploy.image import FloatArray, Image, Letterbox, to_network_input
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import postprocess
from yolov7_deploy.runtimes.base import IntermediateOutputs, RuntimeResult, TimingBreakdown, check_multiple
from yolov7_deploy.runtimes.pytorch_network import (
    Capture,
    CapturedGraph,
    CapturedGraphPool,
    GraphCapturer,
    Size,
    TorchNetwork,
    capture_graph,
    first_line,
)

logger = get_logger(__name__)

# Captured graphs at the same time, for different input sizes or threads. Each holds its activations in GPU memory.
MAX_GRAPHS = 8
_GPU_LIBRARIES = ("CUDA", "cuDNN", "CUDNN", "CUBLAS")


class PytorchRuntime:
    """A fused model on a device: FP16 and one CUDA graph per input size on a GPU, FP32 elsewhere.

    Args:
        model: A fused model in float32; it is converted in place and belongs to the runtime from then on.
        metadata: Its metadata.
        device: `auto` (a GPU if torch sees one), `cpu`, `cuda` or `cuda:N`.
        half: Use FP16; `None` uses it on a GPU only.
        capture: How to capture the forward passes of `CapturedGraph`. `None` captures CUDA graphs on a GPU, and runs
            without captured graphs on a CPU.
    """

    max_batch_size: int | None = None
    name = "pytorch"
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
        torch_device = _torch_device(device)
        self._on_gpu = torch_device.type == "cuda"
        self._half = self._on_gpu if half is None else half
        self.device = str(torch_device)
        self.metadata = replace(metadata, precision="fp16" if self._half else "fp32")
        try:
            self._opened: TorchNetwork | None = TorchNetwork(model, torch_device, half=self._half)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceError(
                f"The weights do not fit into the memory of {self.device}: {first_line(error)}", fix=self._memory_fix()
            ) from error
        self._capturer = GraphCapturer(capture or capture_graph)
        uses_graphs = self._on_gpu or capture is not None
        self._graphs = CapturedGraphPool(self._new_graph, limit=MAX_GRAPHS) if uses_graphs else None
        self._is_inherited = False
        self._threads = torch.get_num_threads()
        call_after_fork(self)

    @classmethod
    def open(
        cls, path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None
    ) -> PytorchRuntime:
        """Load a checkpoint; see `open_runtime`. Any multiple of the stride is accepted as size, and FP16 on a GPU.

        Weights that were trained for INT8 compute what their INT8 file computes, in FP32.
        """
        torch_device = _torch_device(device)
        if half and torch_device.type != "cuda":
            raise UsageError(
                f"FP16 needs a GPU; on {torch_device} torch runs it slower than FP32.",
                fix="--no-half, or --device cuda:0",
            )
        checkpoint = load_checkpoint(path)
        metadata = checkpoint.metadata
        check_multiple(input_hw, metadata)
        if checkpoint.quantization is None:
            return cls(fuse(build_model(checkpoint)), metadata, device=str(torch_device), half=half)
        from yolov7_deploy.precision.fake_quantize import load_fake_quantized  # imports onnx

        if half:
            raise UsageError(
                f"{path.name} was trained for INT8, whose rounding PyTorch emulates in FP32.", fix="Leave --half out."
            )
        return cls(load_fake_quantized(checkpoint), metadata, device=str(torch_device), half=False)

    @property
    def runtime_info(self) -> tuple[tuple[str, str], ...]:
        """See `Runtime.runtime_info`."""
        info = [("memory layout", "channels last"), ("decode", "float32"), ("NMS", "host")]
        if self._graphs is None:
            return (*info, ("threads", str(torch.get_num_threads())))
        info += [("CUDA graph", "on" if self._capturer.available else "failed"), ("upload", "uint8, page-locked")]
        if not self._half:
            info.append(("convolutions", "TF32" if torch.backends.cudnn.allow_tf32 else "float32"))
        return (*info, ("cuDNN autotuning", "on" if torch.backends.cudnn.benchmark else "off"))

    @property
    def _network(self) -> TorchNetwork:
        network = self._opened
        if network is None:
            raise UsageError("This model is closed.", fix="Open a new Detector, or keep it open longer.")
        return network

    def infer(
        self,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool = False,
    ) -> RuntimeResult:
        """See `Runtime.infer`. With captured graphs, only a `timed` call measures its stages.

        Stages are wall time with an idle device at both ends, as in the official program. `engine_ms` is what the paper
        measures: forward pass and decoding, from a prepared input on the device to boxes that stay on it. Only the
        anchors that can become detections are downloaded; selecting them is part of `download_ms`.

        Raises:
            DeviceError: Out of memory, the GPU failed, or the parent process opened the model on a GPU.
            UsageError: The model is closed.
        """
        if self._is_inherited:
            self._check_inherited()
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
                        fix="Restart the program. If it fails again, y7 doctor shows the GPU and its driver.",
                    ) from error
            # Here the failed call has released its tensors. Idle graphs are freed before the call is repeated.
            if not self._free_idle_graphs():
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
        if self._graphs is None:
            outputs, timing = self._run_eager(canvases)
        else:
            size = (len(images), *letterboxes[0].canvas_hw)
            outputs, timing = self._run_captured(self._graphs, size, canvases, thresholds.conf, timed=timed)
        downloaded = time.perf_counter()
        detections = [postprocess(output, thresholds) for output in outputs]
        timing = replace(
            timing,
            preprocess_ms=timing.preprocess_ms + letterbox_ms,
            postprocess_ms=(time.perf_counter() - downloaded) * 1e3,
        )
        return RuntimeResult(
            detections=detections,
            preprocess_ms=timing.preprocess_ms,
            inference_ms=timing.upload_ms + timing.engine_ms + timing.download_ms,
            postprocess_ms=timing.postprocess_ms,
            timing=timing if timed or self._graphs is None else None,
        )

    def _run_eager(self, canvases: Sequence[Image]) -> tuple[list[FloatArray], TimingBreakdown]:
        """Return the decoded output of each canvas."""
        network, marks = self._network, [time.perf_counter()]
        images = torch.from_numpy(to_network_input(canvases)).to(network.device, network.dtype)
        marks.append(time.perf_counter())
        with torch.inference_mode():
            decoded = network.predict(images).cpu().numpy()
        marks.append(time.perf_counter())
        layout, engine = ((after - before) * 1e3 for before, after in pairwise(marks))
        return list(decoded), TimingBreakdown(
            preprocess_ms=layout, upload_ms=0.0, engine_ms=engine, download_ms=0.0, postprocess_ms=0.0
        )

    def _run_captured(
        self, graphs: CapturedGraphPool, size: Size, canvases: Sequence[Image], conf: float, *, timed: bool
    ) -> tuple[list[FloatArray], TimingBreakdown]:
        """Return each canvas's candidates; without `timed`, times are those of queueing the work, not of doing it."""
        marks = [time.perf_counter()]

        def mark() -> None:
            if timed:
                graph.synchronize()
            marks.append(time.perf_counter())

        with graphs.acquire(size) as graph, graph.on_stream():
            graph.upload(canvases)
            mark()
            graph.prepare()
            mark()
            decoded = graph.run()
            mark()
            rows = graph.download(decoded, conf)
            mark()
        upload, layout, engine, download = ((after - before) * 1e3 for before, after in pairwise(marks))
        return rows, TimingBreakdown(
            preprocess_ms=layout, upload_ms=upload, engine_ms=engine, download_ms=download, postprocess_ms=0.0
        )

    def stages(self, canvas: Image) -> IntermediateOutputs:
        """Return the intermediate outputs for one canvas."""
        network = self._network
        with torch.inference_mode():
            images = network.empty_input(1, (canvas.shape[0], canvas.shape[1]))
            maps = network.maps(network.prepare(torch.from_numpy(canvas)[None].to(network.device), images))
            decoded = network.decode(maps)
        return IntermediateOutputs(heads=[x[0].float().cpu().numpy() for x in maps], decoded=decoded[0].cpu().numpy())

    def close(self) -> None:
        """Free the network, graphs and buffers; those in use are freed at the end of their call."""
        if self._is_inherited and self._on_gpu:
            return
        if self._graphs is not None:
            self._graphs.close()
        self._opened = None
        if self._on_gpu:
            torch.cuda.empty_cache()

    def after_fork(self) -> None:
        """Give up the GPU in this child process. On a CPU the model is usable, with one thread."""
        self._is_inherited = True
        if self._on_gpu:
            never_free(self)
        elif self._graphs is not None:
            self._graphs = CapturedGraphPool(self._new_graph, limit=MAX_GRAPHS)

    def _check_inherited(self) -> None:
        if self._on_gpu:
            raise gpu_fork_error(self.device)
        self._is_inherited = False
        if torch.get_num_threads() < self._threads:
            logger.warning(
                "PyTorch uses one thread in this process, because it was forked from one that uses %d. For more, start "
                "processes with multiprocessing.get_context('spawn').",
                self._threads,
            )

    def _free_idle_graphs(self) -> int:
        freed = self._graphs.free_idle() if self._graphs else 0
        if self._on_gpu:
            torch.cuda.empty_cache()
        return freed

    def _memory_fix(self) -> str:
        more = ", or use FP16" if self._on_gpu and not self._half else ""
        return f"Use a smaller --batch or --img, or end other programs on this device{more}."

    def _new_graph(self, size: Size) -> CapturedGraph:
        return CapturedGraph(self._network, size, capture=self._capturer)


def _use_one_thread() -> None:
    """Keep PyTorch in a child process of `os.fork` from waiting for the OpenMP threads of its parent for ever.

    PyTorch does the same in the workers of its DataLoader.
    """
    torch.set_num_threads(1)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_use_one_thread)


def _torch_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    name = str(parse_device(name))  # `0` becomes `cuda:0`
    try:
        return torch.empty(0, device=torch.device(name)).device  # turns `cuda` into `cuda:N`
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"torch {torch.__version__} has no device {name!r} here: {first_line(error)}", fix="--device cpu"
        ) from error
