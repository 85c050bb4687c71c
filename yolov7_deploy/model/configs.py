"""The eight architectures of the paper, with the official layer numbers.

Layer numbers follow from the order in which rows are added, so they equal the official ones, and with them the
checkpoint keys `model.N.…`.
"""

from __future__ import annotations

from yolov7_deploy._text import suggest
from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.ablations import ABLATIONS
from yolov7_deploy.model.layer_table import IMAGE, P5_ANCHORS, P6_ANCHORS, Anchors, BuiltTable, LayerTable, Variant
from yolov7_deploy.model.scaling import P5Config, P6Config

_TINY_ANCHORS: Anchors = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)

CONFIGS: dict[str, P5Config | P6Config] = {
    "yolov7": P5Config(stem=32, depth=4, stages=(256, 512, 1024, 1024), dense_neck=True, head="RepConv"),
    "yolov7x": P5Config(stem=40, depth=6, stages=(320, 640, 1280, 1280)),
    # The auxiliary branches of W6 are as wide as those of E6.
    "yolov7-w6": P6Config(
        base=64, depth=4, down="Conv", stages=(128, 256, 512, 768, 1024), neck=(512, 384, 256, 128),
        lead=(256, 512, 768, 1024), auxiliary=(320, 640, 960, 1280),
    ),
    "yolov7-e6": P6Config(
        base=80, depth=6, down="DownC", stages=(160, 320, 640, 960, 1280), neck=(640, 480, 320, 160),
        lead=(320, 640, 960, 1280),
    ),
    "yolov7-d6": P6Config(
        base=96, depth=8, down="DownC", stages=(192, 384, 768, 1152, 1536), neck=(768, 576, 384, 192),
        lead=(384, 768, 1152, 1536),
    ),
    "yolov7-e6e": P6Config(
        base=80, depth=6, down="DownC", stages=(160, 320, 640, 960, 1280), neck=(640, 480, 320, 160),
        lead=(320, 640, 960, 1280), extended=True,
    ),
}  # fmt: skip


def _tiny() -> BuiltTable:
    t = LayerTable()
    t.add("Conv", 32, IMAGE, kernel=3, stride=2)
    t.conv(64, 3, 2)
    stages = [t.elan(32, 32, 2, 64, every=1)]
    for width in (64, 128, 256):
        t.pool()
        stages.append(t.elan(width, width, 2, 2 * width, every=1))
    bypass = t.conv(256, source=stages[3])
    start = t.conv(256, source=stages[3])
    pools = [t.add("SP", 256, start, kernel=kernel) for kernel in (5, 9, 13)]
    t.concat(*pools[::-1], start)
    t.concat(t.conv(256), bypass)
    p5 = t.conv(256)
    t.top_down(128, stages[2])
    p4 = t.elan(64, 64, 2, 128, every=1)
    t.top_down(64, stages[1])
    outs = [t.elan(32, 32, 2, 64, every=1)]
    for width, lateral in ((128, p4), (256, p5)):
        t.concat(t.conv(width, 3, 2), lateral)
        outs.append(t.elan(width // 2, width // 2, 2, width, every=1))
    return t, [t.conv(c, 3, source=s) for c, s in zip((128, 256, 512), outs, strict=True)], []


def _of_config(name: str, config: P5Config | P6Config) -> Variant:
    anchors, size = (P5_ANCHORS, 640) if isinstance(config, P5Config) else (P6_ANCHORS, 1280)
    return Variant(name=name, activation="silu", anchors=anchors, size=size, build_table=config.build_table)


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(name="yolov7-tiny", activation="leaky", anchors=_TINY_ANCHORS, size=640, build_table=_tiny),
        Variant(name="yolov7-tiny-silu", activation="silu", anchors=_TINY_ANCHORS, size=640, build_table=_tiny),
        *(_of_config(name, config) for name, config in CONFIGS.items()),
    )
}


def find_variant(name: str) -> Variant:
    """Return the variant with this official name, or the network of an ablation.

    Raises:
        UsageError: There is none.
    """
    variant = VARIANTS.get(name) or ABLATIONS.get(name)
    if variant is None:
        raise UsageError(f"{name!r} is not a YOLOv7 variant.", fix=suggest(name, [*VARIANTS, *ABLATIONS]))
    return variant
