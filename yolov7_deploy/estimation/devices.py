"""Peak performance of GPUs from public data sheets: the devices that a speed can be estimated for.

Peaks are dense and at the maximum clock. (Data sheets often print twice the value, for structured sparsity, which
YOLOv7 does not have. A board with a low power limit, such as a T4 with 70 W, runs far below its maximum clock.) The
FP16 peak of GeForce boards is with FP16 accumulation. Data sheets of Jetson modules print one sum over GPU and DLA, so
their peaks are derived:

    peak = multiprocessors * operations per clock and multiprocessor * maximum GPU clock

With tensor cores that is 1024 FP16 operations on Volta (Xavier), 2048 on Ampere (Orin), 8192 on Blackwell (Thor), and
twice as many for INT8; FP32 has two for each of 64, 128 and 128 cores. AGX Orin has 85 dense INT8 TOPS by this formula,
which agrees with the 170 sparse TOPS of its data sheet.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from yolov7_deploy.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU, or one Jetson module in one power mode.

    Attributes:
        name: Name on the command line: `v100`, `orin-nx`.
        title: Name of the manufacturer.
        multiprocessors: Number of streaming multiprocessors.
        fp16_tflops: Dense FP16 peak of the tensor cores, 10^12 operations per second.
        int8_tops: Dense INT8 peak; `None` where tensor cores do not support it or no figure is public.
        tf32_tflops: Dense TF32 peak; `None` before Ampere, and where no data sheet has it.
        fp32_tflops: FP32 peak without tensor cores.
        gb_per_s: Memory bandwidth, 10^9 bytes per second.
        l2_mb: L2 cache, 10^6 bytes.
        source: Source of the numbers.
        note: Remark for the reader; empty for most.
    """

    name: str
    title: str
    multiprocessors: int
    fp16_tflops: float
    int8_tops: float | None
    tf32_tflops: float | None
    fp32_tflops: float
    gb_per_s: float
    l2_mb: float
    source: str
    note: str = ""


def _board(
    name: str,
    title: str,
    multiprocessors: int,
    peaks: tuple[float, float | None, float | None, float],
    gb_per_s: float,
    l2_mb: float,
    source: str,
    note: str = "",
) -> Device:
    """Return a board whose data sheet prints its peaks: FP16, INT8, TF32, FP32."""
    fp16, int8, tf32, fp32 = peaks
    return Device(
        name=name,
        title=f"NVIDIA {title}",
        multiprocessors=multiprocessors,
        fp16_tflops=fp16,
        int8_tops=int8,
        tf32_tflops=tf32,
        fp32_tflops=fp32,
        gb_per_s=gb_per_s,
        l2_mb=l2_mb,
        source=f"{source} data sheet" if not source.endswith("whitepaper") else source,
        note=note,
    )


_XAVIER, _ORIN, _THOR = 1024, 2048, 8192  # FP16 operations per clock and multiprocessor


def _module(
    name: str,
    title: str,
    multiprocessors: int,
    generation: int,
    clock_ghz: float,
    gb_per_s: float,
    l2_mb: float,
    note: str = "",
) -> Device:
    """Return a Jetson module, with peaks derived from its clock."""
    rate = multiprocessors * clock_ghz / 1e3
    return Device(
        name=name,
        title=f"NVIDIA Jetson {title}",
        multiprocessors=multiprocessors,
        fp16_tflops=round(generation * rate, 2),
        # Thor's data sheet prints FP4 and FP8, not INT8.
        int8_tops=None if generation == _THOR else round(2 * generation * rate, 2),
        # Half the FP16 rate on Ampere; Volta has no TF32.
        tf32_tflops=round(generation * rate / 2, 2) if generation == _ORIN else None,
        fp32_tflops=round((128 if generation == _XAVIER else 256) * rate, 2),
        gb_per_s=gb_per_s,
        l2_mb=l2_mb,
        source=f"NVIDIA Jetson {title.split(' (')[0]} module data sheet ({clock_ghz:g} GHz)",
        note=note,
    )


_VOLTA = "NVIDIA V100"
_ADA, _AMPERE = "NVIDIA Ada GPU architecture whitepaper", "NVIDIA Ampere GA102 GPU architecture whitepaper"
_ASSUMED = "the paper does not state which V100 it used; SXM2 is assumed"
_POWER = "70 W: it cannot keep its maximum clock under load"
_SUPER = "Super mode of JetPack 6.2"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _board("v100", "Tesla V100 SXM2", 80, (125, None, None, 15.7), 900, 6, _VOLTA, _ASSUMED),
        _board("v100-pcie", "Tesla V100 PCIe", 80, (112, None, None, 14), 900, 6, _VOLTA),
        _board("t4", "T4", 40, (65, 130, None, 8.1), 320, 4, "NVIDIA T4", _POWER),
        _board("a10", "A10", 72, (125, 250, 62.5, 31.2), 600, 6, "NVIDIA A10"),
        _board("a30", "A30", 56, (165, 330, 82, 10.3), 933, 24, "NVIDIA A30"),
        _board("a100", "A100 SXM 80 GB", 108, (312, 624, 156, 19.5), 2039, 40, "NVIDIA A100"),
        _board("a100-40gb", "A100 40 GB", 108, (312, 624, 156, 19.5), 1555, 40, "NVIDIA A100"),
        _board("l4", "L4", 58, (121, 242.5, 60, 30.3), 300, 48, "NVIDIA L4", _POWER.replace("70", "72")),
        _board("l40s", "L40S", 142, (362, 733, 183, 91.6), 864, 96, "NVIDIA L40S"),
        _board("h100", "H100 SXM", 132, (989.5, 1979, 494.5, 67), 3350, 50, "NVIDIA H100"),
        _board("h100-pcie", "H100 PCIe", 114, (756.5, 1513, 378, 51), 2000, 50, "NVIDIA H100"),
        _board("h200", "H200 SXM", 132, (989.5, 1979, 494.5, 67), 4800, 50, "NVIDIA H200"),
        _board("rtx-3080", "GeForce RTX 3080", 68, (119, 238, 29.8, 29.8), 760, 5, _AMPERE),
        _board("rtx-3090", "GeForce RTX 3090", 82, (142, 284, 35.6, 35.6), 936, 6, _AMPERE),
        _board("rtx-4080", "GeForce RTX 4080", 76, (194.9, 389.9, 48.7, 48.7), 716.8, 64, _ADA),
        _board("rtx-4090", "GeForce RTX 4090", 128, (330.3, 660.6, 82.6, 82.6), 1008, 72, _ADA),
        _module("xavier-nx", "Xavier NX", 6, _XAVIER, 1.1, 59.7, 0.5),
        _module("agx-xavier", "AGX Xavier", 8, _XAVIER, 1.377, 136.5, 0.5),
        _module("orin-nano", "Orin Nano 8 GB", 8, _ORIN, 0.625, 68, 2),
        _module("orin-nano-super", "Orin Nano 8 GB (Super)", 8, _ORIN, 1.02, 102, 2, _SUPER),
        _module("orin-nano-4gb", "Orin Nano 4 GB", 4, _ORIN, 0.625, 34, 2),
        _module("orin-nano-4gb-super", "Orin Nano 4 GB (Super)", 4, _ORIN, 1.02, 51, 2, _SUPER),
        _module("orin-nx", "Orin NX 16 GB", 8, _ORIN, 0.918, 102.4, 2),
        _module("orin-nx-super", "Orin NX 16 GB (Super)", 8, _ORIN, 1.173, 102.4, 2, _SUPER),
        _module("orin-nx-8gb", "Orin NX 8 GB", 8, _ORIN, 0.765, 102.4, 2),
        _module("orin-nx-8gb-super", "Orin NX 8 GB (Super)", 8, _ORIN, 1.173, 102.4, 2, _SUPER),
        _module("agx-orin", "AGX Orin 64 GB", 16, _ORIN, 1.3, 204.8, 4),
        _module("agx-orin-32gb", "AGX Orin 32 GB", 14, _ORIN, 0.93, 204.8, 4),
        _module("agx-thor", "AGX Thor T5000", 20, _THOR, 1.57, 273, 32),
    )
}

# Words around a name that are ignored, and other names of the same device.
_IGNORED = re.compile(r"\b(nvidia|jetson|tesla|geforce|sxm[0-9]?)\b")
_ALIASES = {
    "orin": "agx-orin",
    "orin-agx": "agx-orin",
    "orin-nano-8gb": "orin-nano",
    "orin-nx-16gb": "orin-nx",
    "thor": "agx-thor",
    "xavier": "agx-xavier",
    "3080": "rtx-3080",
    "3090": "rtx-3090",
    "4080": "rtx-4080",
    "4090": "rtx-4090",
}


def find_device(name: str) -> Device:
    """Return the device of this name, ignoring case, spaces and brand names (`Jetson Orin NX`).

    Raises:
        UsageError: The device is unknown.
    """
    words = _IGNORED.sub(" ", re.sub(r"[\s_-]+", " ", name.lower())).split()
    key = "-".join(words)
    key = re.sub(r"^rtx-?(?=\d)", "rtx-", _ALIASES.get(key, key))
    if key in DEVICES:
        return DEVICES[key]
    close = difflib.get_close_matches(key, [*DEVICES, *_ALIASES], n=3)
    suggestions = list(dict.fromkeys(_ALIASES.get(found, found) for found in close))
    guess = f"Did you mean {' or '.join(suggestions)}? " if suggestions else ""
    raise UsageError(f"The device {name!r} is unknown.", fix=f"{guess}One of: {', '.join(DEVICES)}")
