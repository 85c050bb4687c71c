"""Reports of the benchmark without a benchmark."""

from __future__ import annotations

from yolov7_deploy.benchmark.report import SPANS, PaperSpeed, SpanTime, SpeedReport, SpeedRow
from yolov7_deploy.paper import paper_row


def speed_report(
    variant="yolov7",
    *,
    engine_ms=300.0,
    end_to_end_ms=305.0,
    machine="AMD EPYC",
    backend="onnxruntime",
    precision="fp32",
    side=640,
    weights="",
    batch=1,
    ap=None,
    ap_source="",
    beside_paper=False,
):
    """A report of one row; spans other than the two take 0.1 ms."""
    times = {"engine": engine_ms, "end_to_end": end_to_end_ms}
    row = SpeedRow(
        batch=batch,
        threads=1,
        calls=100,
        images=100 * batch,
        seconds=end_to_end_ms / 10,
        images_per_second=1000 * batch / end_to_end_ms,
        spans=tuple(_span(name, times.get(name, 0.1)) for name in SPANS),
        warmup_calls=10,
        warmup_s=1.0,
        settled=True,
        host_peak_bytes=2**30,
        gpu_peak_bytes=None,
        energy=None,
        energy_absent="nothing measures power",
    )
    return SpeedReport(
        weights=weights or f"/models/{variant}.onnx",
        weights_sha256="0" * 64,
        variant=variant,
        backend=backend,
        precision=precision,
        nms="host",
        device="cpu",
        machine=machine,
        environment=(),
        input_hw=(side, side),
        frame_hw=(1080, 1920),
        frames="drawn",
        settings=(),
        rows=(row,),
        paper=_paper(variant) if beside_paper else None,
        ap=ap,
        ap_source=ap_source,
    )


def _span(name, ms):
    return SpanTime(name=name, p50=ms, p90=1.1 * ms, p99=1.2 * ms, mean=ms, least=0.9 * ms, blocks=(ms,))


def _paper(variant):
    row = paper_row(variant)
    return PaperSpeed(
        model=row.model,
        size=row.size,
        source=row.source,
        device="V100",
        fps=row.fps,
        batch32_ms=row.batch32_ms,
        ap=row.val.ap,
        span="the network",
    )
