"""Session options that every ONNX Runtime session of this package shares."""

from __future__ import annotations

import onnxruntime

_ERRORS_ONLY = 3


def base_session_options() -> onnxruntime.SessionOptions:
    """Return session options that log errors only and compute INT8 without saturation.

    On x86 CPUs without VNNI, the INT8 kernels of ONNX Runtime add pairs of products in 16 bits, which saturates: an
    output can be off by more than a tenth of its standard deviation. `session.x64quantprecision` selects kernels that
    do not saturate. CPUs with VNNI and float graphs ignore it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY  # it warns about every input with a default, such as our thresholds
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options
