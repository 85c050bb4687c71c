"""CUDA 12.9, the last with Volta, compiles the device code of the kernels for V100 and Xavier.

Its compiler is NVRTC, from a wheel of 90 MB. NVRTC has no C library, so the headers that the host code needs are
replaced by a few lines.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path

import pytest

from tests.fakes.emulated_kernels import SOURCES
from tests.support.machine_code import KERNELS, OPTIONS, THRESHOLDS, spills, unpacked
from tests.support.tensorrt_wheels import wheel_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the wheels of CUDA are for Linux"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="CUDA has no wheel for this processor"),
]

NVRTC, HEADERS = "nvidia_cuda_nvrtc_cu12==12.9.86", "nvidia_cuda_runtime_cu12==12.9.79"
SUCCESS = 0
HOST_HEADERS = {
    "stddef.h": "",
    "stdint.h": """
        typedef signed char int8_t; typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef int int32_t;
        typedef unsigned int uint32_t; typedef long long int64_t; typedef unsigned long long uint64_t;
        typedef unsigned long uintptr_t;
        #define INT32_MAX 2147483647
    """,
    "limits.h": "#define UINT_MAX 4294967295u\n",
    # NVRTC always defines __USE_FAST_MATH__, as 0 without that option.
    "cuda_runtime.h": """
        #define CUDART_VERSION 12090
        #undef __USE_FAST_MATH__
        typedef struct CUstream_st* cudaStream_t;
        cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t);
        cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t);
    """,
}


class Nvrtc:
    """NVRTC 12.9 with the headers of its CUDA."""

    def __init__(self, library: Path, headers: Path):
        self._library = ctypes.CDLL(str(library))
        self._include = headers

    def compile(self, source: str, *options: str) -> tuple[str, str]:
        """Return the PTX of a program, which was also compiled to machine code, and what the compiler printed."""
        program = ctypes.c_void_p()
        names, contents = zip(*HOST_HEADERS.items(), strict=True)
        status = self._library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", len(names), _strings(contents), _strings(names)
        )
        assert status == SUCCESS
        includes = (f"-I{SOURCES}", f"-I{self._include}")
        options = (*options, "-DY7_OVERLAP=0")  # its host code needs more of the runtime; Volta cannot overlap
        options = ("--std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v", *includes, *options)
        status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
        printed = self._text(program, "ProgramLog")
        assert status == SUCCESS, printed
        ptx = self._text(program, "PTX")
        assert self._library.nvrtcDestroyProgram(ctypes.byref(program)) == SUCCESS
        return ptx, printed

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        assert getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == SUCCESS
        text = ctypes.create_string_buffer(size.value)
        assert getattr(self._library, f"nvrtcGet{what}")(program, text) == SUCCESS
        return text.value.decode()


def _strings(texts):
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


@pytest.fixture(scope="module")
def nvrtc(tmp_path_factory) -> Nvrtc:
    wheels, folder = wheel_folder(tmp_path_factory), tmp_path_factory.mktemp("nvrtc")
    libraries = unpacked(NVRTC, wheels=wheels, folder=folder, suffixes=("libnvrtc.so.12", "libnvrtc-builtins.so.12.9"))
    headers = unpacked(HEADERS, wheels=wheels, folder=folder, suffixes=(".h", ".hpp"))
    library = next(path for path in libraries if path.name == "libnvrtc.so.12")
    return Nvrtc(library, next(path.parent for path in headers if path.name == "cuda_fp16.h"))


@pytest.mark.parametrize("architecture", ["sm_70", "sm_72"])
@pytest.mark.parametrize("name", KERNELS)
def test_volta_compiles_without_spills_and_stale_loads(nvrtc, architecture, name):
    source = f'#include "{name}"\n'
    ptx, printed = nvrtc.compile(source, f"--gpu-architecture={architecture}", *OPTIONS[name])
    assert f".target {architecture}" in ptx
    assert spills(printed) == [("0", "0", "0")] * len(KERNELS[name]), printed
    assert printed.count(f"for '{architecture}'") == len(KERNELS[name])
    assert not re.search(r"\b(ld|st)\.local", ptx)
    kernels = ptx.split(".entry ")[1:]
    assert len(kernels) == len(KERNELS[name])
    if name == "nms.cu":
        for kernel in kernels:
            assert not stale_loads(kernel)


def stale_loads(kernel: str) -> list[str]:
    """Return the types of the loads through the cache for constants that do not read the inputs of NMS.

    See `unsafe_constant_loads` of the machine code, which no disassembler on PyPI reads for Volta.
    """
    loads = re.findall(r"\bld\.global\.nc\.([\w.]+)", kernel)
    wide = [kind for kind in loads if "64" in kind or kind.startswith("v")]
    words = [kind for kind in loads if "32" in kind and kind not in wide]
    return wide + words if "6__half" in kernel.partition("(")[0] and len(words) > THRESHOLDS else wide


def test_planted_stale_loads_are_found(nvrtc):
    load = "__global__ void planted(const {0}* from, {0}* to) {{ to[threadIdx.x] = __ldg(from + threadIdx.x); }}\n"
    for kind, stale in (("unsigned long long", True), ("float4", True), ("float", False)):
        ptx, _ = nvrtc.compile(load.format(kind), "--gpu-architecture=sm_70")
        assert bool(stale_loads(ptx)) == stale
    with pytest.raises(AssertionError, match="not_declared"):
        nvrtc.compile("__global__ void broken() { not_declared(); }\n", "--gpu-architecture=sm_70")
