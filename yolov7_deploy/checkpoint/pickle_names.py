"""The names a YOLOv7 checkpoint may ask for, and what each may be used for. Every other name is refused.

None of them is imported: the reader puts stand-ins in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["module", "storage", "call", "inert"]


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A class or function on the stack: its dotted name, and the one thing that may be done with it.

    `module` may be instantiated without arguments, `storage` may stand in a persistent id, `call` may be called
    (by a function of ours), `inert` may be called and gives a value nobody looks into.
    """

    name: str
    role: Role


_MODULES = {
    "models.yolo": "Model Detect IDetect IAuxDetect IBin IKeypoint MT",
    "models.common": "Conv Concat MP SP SPPCSPC RepConv ReOrg DownC Shortcut ImplicitA ImplicitM ImplicitC Chuncat "
    "Foldcut SPP SPPF Focus Contract Expand DWConv GhostConv RobustConv RobustConv2 Stem Bottleneck BottleneckCSPA "
    "BottleneckCSPB BottleneckCSPC RepConv_OREPA autoShape NMS Classify",
    "models.experimental": "CrossConv Sum MixConv2d Ensemble End2End ONNX_ORT ONNX_TRT ORT_NMS TRT_NMS",
    "torch.nn.modules.container": "Sequential ModuleList ModuleDict",
    "torch.nn.modules.conv": "Conv2d ConvTranspose2d",
    "torch.nn.modules.batchnorm": "BatchNorm2d SyncBatchNorm",
    "torch.nn.modules.activation": "SiLU LeakyReLU ReLU ReLU6 Hardswish Mish Sigmoid GELU",
    "torch.nn.modules.pooling": "MaxPool2d AvgPool2d AdaptiveAvgPool2d",
    "torch.nn.modules.upsampling": "Upsample UpsamplingNearest2d",
    "torch.nn.modules.linear": "Identity Linear",
    "torch.nn.modules.padding": "ZeroPad2d",
    "torch.nn.modules.dropout": "Dropout Dropout2d",
    "torch.nn.parallel.data_parallel": "DataParallel",
    "torch.nn.parallel.distributed": "DistributedDataParallel",
}
_STORAGES = {
    "torch": "HalfStorage FloatStorage DoubleStorage BFloat16Storage LongStorage IntStorage ShortStorage CharStorage "
    "ByteStorage BoolStorage"
}
_INERT = {
    "numpy": "ndarray dtype",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "_codecs": "encode",
    "torch": "device",
    "pathlib": "PosixPath WindowsPath",
    "pathlib._local": "PosixPath WindowsPath",
}
_CALLS = {
    "collections": "OrderedDict",
    "builtins": "set frozenset",
    "__builtin__": "set frozenset",
    "torch": "Size",
    "torch._utils": "_rebuild_tensor _rebuild_tensor_v2 _rebuild_parameter _rebuild_parameter_with_state",
}


def _table() -> dict[tuple[str, str], GlobalName]:
    roles: tuple[tuple[dict[str, str], Role], ...] = (
        (_MODULES, "module"),
        (_STORAGES, "storage"),
        (_INERT, "inert"),
        (_CALLS, "call"),
    )
    return {
        (module, name): GlobalName(f"{module}.{name}", role)
        for names, role in roles
        for module, listed in names.items()
        for name in listed.split()
    }


KNOWN_NAMES = _table()
