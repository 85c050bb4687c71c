"""Remove from a virtual environment what an image does not need to detect: pip, tests, and unused parts of libraries.

python3 docker/trim.py /opt/y7

It prints the size before and after. A pattern that matches nothing is not an error: other versions of a library may not
have these files.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# Relative to site-packages.
UNUSED = (
    "pip",
    "pip-*.dist-info",
    "setuptools",
    "setuptools-*.dist-info",
    "pkg_resources",
    "_distutils_hack",
    "distutils-precedence.pth",
    "wheel",
    "wheel-*.dist-info",
    "numpy/**/tests",
    "numpy/f2py",
    "numpy/distutils",
    "onnx/backend/test",
    "onnx/test",
    "onnxruntime/datasets",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    # Used by C programs only; the Python module contains the same code.
    "onnxruntime/capi/libonnxruntime.so*",
    # Devices that need drivers which the image does not have, and readers of other formats than ONNX.
    "openvino/libs/libopenvino_intel_gpu_plugin.so",
    "openvino/libs/libopenvino_intel_npu*.so",
    "openvino/libs/cache.json",
    "openvino/libs/libopenvino_gguf_frontend.so*",
    "openvino/libs/libopenvino_jax_frontend.so*",
    "openvino/libs/libopenvino_paddle_frontend.so*",
    "openvino/libs/libopenvino_pytorch_frontend.so*",
    "openvino/libs/libopenvino_tensorflow*_frontend.so*",
    "openvino/include",
    "openvino/cmake",
)


def main() -> None:
    (environment,) = map(Path, sys.argv[1:])
    before = size_bytes(environment)
    for path in unused(environment):
        remove(path)
    print(f"{environment}: {before / 1e6:.0f} MB before, {size_bytes(environment) / 1e6:.0f} MB after")


def unused(environment: Path) -> Iterator[Path]:
    """Yield the files and folders that match `UNUSED`, and the programs of pip."""
    for packages in environment.glob("lib*/python3*/site-packages"):
        if not packages.parent.parent.is_symlink():  # lib64 is lib
            yield from (path for pattern in UNUSED for path in sorted(packages.glob(pattern)))
    yield from sorted((environment / "bin").glob("pip*"))


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


if __name__ == "__main__":
    main()
