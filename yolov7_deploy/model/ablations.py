"""The networks of the paper's ablations that are not among its eight models: tables 3, 4 and 5.

They train, fuse and export like the others; weights of them are recognized by the metadata that `y7 train` writes.
Where the paper leaves a choice open, the docstrings say which was made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from yolov7_deploy.model.layer_table import IMAGE, P5_ANCHORS, P6_ANCHORS, BuiltTable, LayerTable, Variant
from yolov7_deploy.model.scaling import P5Config, scale

# The base of table 3, v7-X light. The paper gives its parameters (47.0 M) and GFLOPs (125.5) but not its layers: the
# backbone of v7, with the blocks of the backbone in the neck too ("stack scaling on neck", section 5.1) and plain
# convolutions before the head, has 47.05 M and 125.45 G, and compound scaling makes it X.
V7X_LIGHT = P5Config(stem=32, depth=4, stages=(256, 512, 1024, 1024))

# The base of table 4, 3-S ELAN. Figure 6 shows a block that concatenates every third 3x3 convolution. The paper says
# neither how many such blocks there are nor their widths. Here there are two in place of the two of two convolutions in
# v7-X light, since its AP of 52.3 is between those of v7-X light with 4 and with 8 convolutions (51.7 and 52.7).
ELAN3 = replace(V7X_LIGHT, depth=6, stack=3)

# Figure 6: of three stacked convolutions, those that are RepConv. The first reads a map that is concatenated too, the
# output of the third is concatenated, the second has neither.
FIGURE_6 = {"a": (0, 1, 2), "b": (0, 1), "c": (1,), "d": (0,), "e": (2,)}


def _with_rep_conv(positions: tuple[int, ...], *, kind: str = "RepConv") -> P5Config:
    return replace(ELAN3, kinds=tuple(kind if i in positions else "Conv" for i in range(3)))


# --- CSPDarknet (table 5) ---------------------------------------------------------------------------------------------


class Block(Protocol):
    """Adds a block of c to c channels, with `hidden` in between, and returns its row."""

    def __call__(self, t: LayerTable, c: int, *, hidden: int = 0) -> int:
        """Add the block to a table."""


def dark_block(t: LayerTable, c: int, *, hidden: int = 0, kind: str = "Conv", shortcut: bool = True) -> int:
    """Add a dark block: 1x1 then 3x3 convolution, plus the input (figure 7 a and b).

    In CSPDarknet both have `c` channels; with `hidden` channels in between it is the block of Darknet. The 3x3
    convolution is of kind `kind`.
    """
    source = t.last
    t.conv(hidden or c)
    inner = t.add(kind, c, kernel=3)
    return t.add("Shortcut", c, source, inner) if shortcut else inner


def reversed_dark_block(t: LayerTable, c: int, *, hidden: int = 0, kind: str = "Conv") -> int:
    """Add a reversed dark block: 3x3 then 1x1 convolution, plus the input (figure 7 c and d).

    It costs as much as a dark block, but its 3x3 convolution is not next to the sum, so it may be a RepConv.
    """
    source = t.last
    t.add(kind, hidden or c, kernel=3)
    inner = t.conv(c)
    return t.add("Shortcut", c, source, inner)


def csp_stage(t: LayerTable, c_out: int, count: int, *, block: Block, transition: bool) -> int:
    """Add a stage of CSPDarknet: blocks on half of the channels, the other half passes by, and both are merged.

    With `transition` a 1x1 convolution follows the blocks (YOLOR-CSP); without, the merge does (YOLOR-W6).
    """
    source, half = t.last, c_out // 2
    bypass = t.conv(half, source=source)
    t.conv(half, source=source)
    for _ in range(count):
        block(t, half)
    inner = t.conv(half) if transition else t.last
    t.concat(inner, bypass)
    return t.conv(c_out)


def csp_neck(t: LayerTable, c_out: int, count: int) -> int:
    """Add a block of the neck: a 1x1 convolution, dark blocks without sum, concatenated with a bypass, merged."""
    start = t.conv(c_out)
    for _ in range(count):
        inner = dark_block(t, c_out, shortcut=False)
    bypass = t.conv(c_out, source=start)
    t.concat(inner, bypass)
    return t.conv(c_out)


def _neck(t: LayerTable, laterals: list[int], widths: tuple[int, ...], leads: tuple[int, ...], count: int) -> list[int]:
    """Add the top-down and bottom-up paths; return the rows before the head. `widths` are coarse to fine."""
    pyramid = [t.add("SPPCSPC", widths[0])]
    for width, lateral in zip(widths[1:], laterals[::-1], strict=True):
        t.top_down(width, lateral)
        pyramid.append(csp_neck(t, width, count))
    outs = [pyramid[-1]]
    for width, lateral in zip(widths[-2::-1], pyramid[-2::-1], strict=True):
        t.concat(t.conv(width, 3, 2, source=outs[-1]), lateral)
        outs.append(csp_neck(t, width, count))
    return [t.conv(c, 3, source=s) for c, s in zip(leads, outs, strict=True)]


def yolor_csp(block: Block = dark_block) -> BuiltTable:
    """Return YOLOR-CSP: CSPDarknet-53 and a CSP neck of three levels.

    The blocks of the backbone are `block`; the neck, whose blocks have no sum, stays, as table 5 is about residual
    models. The first stage is a block of Darknet, without the cross-stage half.
    """
    t = LayerTable()
    t.add("Conv", 32, IMAGE, kernel=3)
    t.conv(64, 3, 2)
    block(t, 64, hidden=32)
    stages = []
    for width, count in ((128, 2), (256, 8), (512, 8), (1024, 4)):
        t.conv(width, 3, 2)
        stages.append(csp_stage(t, width, count, block=block, transition=True))
    return t, _neck(t, stages[1:3], (512, 256, 128), (256, 512, 1024), 2), []


def yolor_w6(block: Block = dark_block) -> BuiltTable:
    """Return YOLOR-W6: space-to-depth stem, five CSP stages, a CSP neck of four levels; `block` as in `yolor_csp`."""
    t = LayerTable()
    t.add("ReOrg", 12, IMAGE)
    t.conv(64, 3)
    stages = []
    for width, count in ((128, 3), (256, 7), (512, 7), (768, 3), (1024, 3)):
        t.conv(width, 3, 2)
        stages.append(csp_stage(t, width, count, block=block, transition=False))
    return t, _neck(t, stages[1:4], (512, 384, 256, 128), (256, 512, 768, 1024), 3), []


# --- all of them ------------------------------------------------------------------------------------------------------

_REP_CSP = partial(dark_block, kind="RepConv")
_REP_RCSP = partial(reversed_dark_block, kind="RepConv")


def _p5(name: str, build_table: Callable[[], BuiltTable]) -> Variant:
    return Variant(name=name, activation="silu", anchors=P5_ANCHORS, size=640, build_table=build_table)


def _p6(name: str, build_table: Callable[[], BuiltTable]) -> Variant:
    return Variant(name=name, activation="silu", anchors=P6_ANCHORS, size=1280, build_table=build_table)


ABLATIONS: dict[str, Variant] = {
    v.name: v
    for v in (
        _p5("yolov7x-light", V7X_LIGHT.build_table),
        _p5("yolov7x-width", scale(V7X_LIGHT, width=1.25, block_width=1.25).build_table),
        _p5("yolov7x-depth", scale(V7X_LIGHT, depth=2.0).build_table),
        _p5("yolov7-elan3", ELAN3.build_table),
        *(_p5(f"yolov7-elan3-{name}", _with_rep_conv(at).build_table) for name, at in FIGURE_6.items()),
        # Not in table 4: what section 4.1 recommends for the positions of (a).
        _p5("yolov7-elan3-n", _with_rep_conv(FIGURE_6["a"], kind="RepConvN").build_table),
        _p5("yolor-csp", yolor_csp),
        _p5("yolor-csp-reprcsp", partial(yolor_csp, _REP_RCSP)),
        _p6("yolor-w6", yolor_w6),
        _p6("yolor-w6-repcsp", partial(yolor_w6, _REP_CSP)),
        _p6("yolor-w6-rcsp", partial(yolor_w6, reversed_dark_block)),
        _p6("yolor-w6-reprcsp", partial(yolor_w6, _REP_RCSP)),
    )
}
