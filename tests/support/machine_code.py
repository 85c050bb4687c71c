"""The machine code of the CUDA kernels: its instructions, and what must not be among them."""

from __future__ import annotations

import re
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.support.tensorrt_wheels import downloaded_wheel

# Not older than nvcc. It does not know Volta, and PyPI has none that does.
DISASSEMBLER, FIRST_DISASSEMBLED = "nvidia_cuda_nvdisasm==13.5.37", 75
# The kernels of each file, by name and type: float32, float16 and uint8.
KERNELS = {
    "nms.cu": {f"{name}<{kind}>" for name in ("select", "suppress") for kind in ("float", "half")},
    "letterbox.cu": {f"letterbox<{kind}>" for kind in ("float", "half", "uint8")},
}
# No fused multiply-add in the file of NMS, as in plugins/CMakeLists.txt.
OPTIONS = {"nms.cu": ("-fmad=false",), "letterbox.cu": ()}
# From this architecture on, `suppress` starts while `select` ends: instructions of griddepcontrol.
FIRST_OVERLAPPING, WAIT, ALLOW_NEXT = 90, "ACQBULK", "PREEXIT"
THRESHOLDS = 4  # 32-bit inputs of NMS beside the head maps: conf, iou, multi_label, class_agnostic

_TYPES = {"f": "float", "6__half": "half", "h": "uint8"}
_MANGLED = re.compile(r"\d+(select|suppress|letterbox)I(\w+?)EEv")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_RESOURCES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def unpacked(requirement: str, *, wheels: Path, folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Return the files of a wheel with one of the suffixes, unpacked; or skip the test if pip cannot download it."""
    with zipfile.ZipFile(downloaded_wheel(requirement, wheels)) as archive:
        names = [name for name in archive.namelist() if name.endswith(tuple(suffixes))]
        return [Path(archive.extract(name, folder)) for name in names]


def unpacked_disassembler(*, wheels: Path, folder: Path) -> Path:
    """Return the program nvdisasm, or skip the test if pip cannot download it."""
    (program,) = unpacked(DISASSEMBLER, wheels=wheels, folder=folder, suffixes=("bin/nvdisasm",))
    program.chmod(0o755)
    return program


def spills(compiler_output: str) -> list[tuple[str, ...]]:
    """Return the bytes of stack frame, spill stores and spill loads of each kernel, as `ptxas -v` printed them."""
    return _RESOURCES.findall(compiler_output)


def instructions(disassembler: Path, cubin: Path) -> dict[str, Counter[str]]:
    """Return how often each kernel of the file has each instruction, with its modifiers: `{"select<half>": ...}`.

    The instructions of a kernel are in the order in which they first occur.
    """
    text = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\w+):", text, flags=re.MULTILINE)
    return {
        _readable(mangled): Counter(_INSTRUCTION.findall(body))
        for mangled, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def _readable(mangled: str) -> str:
    found = _MANGLED.search(mangled)
    return f"{found[1]}<{_TYPES[found[2]]}>" if found else mangled


def local_memory(counts: Counter[str]) -> set[str]:
    """Return the instructions that access local memory, where spilled registers and indexed arrays are."""
    return {name for name in counts if name.split(".")[0] in ("LDL", "STL")}


def loads_before_wait(counts: Counter[str]) -> set[str]:
    """Return the loads of memory that other blocks write which precede the wait for the kernel before; see below."""
    before = list(counts)[: list(counts).index(WAIT)]
    return {name for name in before if name.startswith(("LD.", "LDG")) and "CONSTANT" not in name.split(".")}


def unsafe_constant_loads(kernel: str, counts: Counter[str]) -> Counter[str]:
    """Return the loads of an NMS kernel through the cache for constants that do not read its inputs.

    That cache does not see what other blocks write during the kernel: the list of keys (64 bits), its counter, and the
    outputs (boxes of 128 bits, the others of 32 bits). The inputs are the head maps and four thresholds of 32 bits. So
    no such load is wider than 32 bits, and with head maps of 16 bits all but the thresholds have 16 bits.
    """
    constant = Counter({name: n for name, n in counts.items() if "CONSTANT" in name.split(".")})
    wide = Counter({name: n for name, n in constant.items() if {"64", "128", "256"} & set(name.split("."))})
    words = Counter({name: n for name, n in constant.items() if "U16" not in name.split(".")}) - wide
    return wide + words if "half" in kernel and words.total() > THRESHOLDS else wide
