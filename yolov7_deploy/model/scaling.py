"""Concatenation-based networks (v7, X, P6 models) as configurations, and their compound scaling (section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isfinite
from typing import ClassVar, TypeVar

from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.layer_table import IMAGE, BuiltTable, LayerTable

Widths = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class P5Config:
    """A network like v7 or X: four stages, three levels; the numbers are channels unless they say otherwise.

    Attributes:
        stem: First convolution; the next three have 2, 2 and 4 times as many.
        depth: 3x3 convolutions of a computational block.
        stack: 3x3 convolutions between two maps that a block of the backbone concatenates.
        blocks: Convolutions in the blocks of the backbone, fine to coarse.
        stages: Outputs of the stages; the transitions and the neck follow from them.
        neck_blocks: 1x1 convolutions in the blocks of the neck, of the three levels.
        dense_neck: The neck halves the width of its 3x3 convolutions and concatenates all of them (v7), or it repeats
            the blocks of the backbone (X).
        kinds: Kinds of the 3x3 convolutions of a block, repeated along its chain.
        head: Kind of the convolutions before the detection head.
    """

    TRANSITION_WIDTHS: ClassVar[tuple[str, ...]] = ("stem", "stages")
    BLOCK_WIDTHS: ClassVar[tuple[str, ...]] = ("blocks", "neck_blocks")

    stem: int
    depth: int
    stack: int = 2
    blocks: Widths = (64, 128, 256, 256)
    stages: Widths
    neck_blocks: Widths = (128, 256, 512)
    dense_neck: bool = False
    kinds: tuple[str, ...] = ("Conv",)
    head: str = "Conv"

    def build_table(self) -> BuiltTable:
        """Return the layer table; the auxiliary rows are empty."""
        t = LayerTable()
        t.add("Conv", self.stem, IMAGE, kernel=3)
        for width, stride in ((2 * self.stem, 2), (2 * self.stem, 1), (4 * self.stem, 2)):
            t.conv(width, 3, stride)
        laterals = [self._stage(t, self.blocks[0], self.stages[0])]
        for entry, c_out in zip(self.blocks[1:], self.stages[1:], strict=True):
            t.transition(t.rows[t.last].c_out // 2)
            laterals.append(self._stage(t, entry, c_out))
        spp = self.stages[3] // 2
        p5 = t.add("SPPCSPC", spp)
        fine, middle, coarse = self.neck_blocks
        t.top_down(spp // 2, laterals[2])
        p4 = self._neck(t, middle, spp // 2)
        t.top_down(spp // 4, laterals[1])
        outs = [self._neck(t, fine, spp // 4)]
        for width, entry, lateral in ((spp // 4, middle, p4), (spp // 2, coarse, p5)):
            t.transition(width, lateral)
            outs.append(self._neck(t, entry, 2 * width))
        leads = [t.add(self.head, 2 * t.rows[s].c_out, s, kernel=3) for s in outs]
        return t, leads, []

    def _stage(self, t: LayerTable, entry: int, c_out: int) -> int:
        return t.elan(entry, entry, self.depth, c_out, every=self.stack, kinds=self.kinds)

    def _neck(self, t: LayerTable, entry: int, c_out: int) -> int:
        if self.dense_neck:
            return t.elan(entry, entry // 2, self.depth, c_out, every=1, kinds=self.kinds)
        return self._stage(t, entry, c_out)


@dataclass(frozen=True, kw_only=True, slots=True)
class P6Config:
    """A network like W6: space-to-depth stem, five stages, four levels; numbers are channels unless they say otherwise.

    Attributes:
        base: Convolution after the space-to-depth.
        depth: 3x3 convolutions of a computational block.
        stack: 3x3 convolutions between two maps that a block of the backbone concatenates.
        down: Kind of the layers that halve the resolution: `Conv` or `DownC`.
        blocks: Convolutions in the blocks of the backbone, fine to coarse.
        stages: Outputs of the five stages.
        neck: Outputs of the neck, coarse to fine.
        neck_blocks: 1x1 convolutions in the blocks of the neck, fine to coarse; the 3x3 ones have half as many.
        lead: Convolutions before the lead heads.
        auxiliary: Convolutions before the auxiliary heads; `None` for those of `lead`.
        extended: E-ELAN, two blocks whose outputs are added, instead of ELAN.
    """

    TRANSITION_WIDTHS: ClassVar[tuple[str, ...]] = ("base", "stages", "neck", "lead")
    BLOCK_WIDTHS: ClassVar[tuple[str, ...]] = ("blocks", "neck_blocks")

    base: int
    depth: int
    stack: int = 2
    down: str
    blocks: Widths = (64, 128, 256, 384, 512)
    stages: Widths
    neck: Widths
    neck_blocks: Widths = (128, 256, 384, 512)
    lead: Widths
    auxiliary: Widths | None = None
    extended: bool = False

    def build_table(self) -> BuiltTable:
        """Return the layer table, and the numbers of its lead and auxiliary rows."""
        t = LayerTable()
        stage: Callable[..., int] = t.extended_elan if self.extended else t.elan
        t.add("ReOrg", 12, IMAGE)
        t.conv(self.base, 3)
        laterals = []
        for entry, c_out in zip(self.blocks, self.stages, strict=True):
            t.add(self.down, c_out, kernel=3, stride=2)
            laterals.append(stage(entry, entry, self.depth, c_out, every=self.stack))
        pyramid = [t.add("SPPCSPC", self.neck[0])]
        for entry, c_out, lateral in zip(self.neck_blocks[2::-1], self.neck[1:], laterals[3:0:-1], strict=True):
            t.top_down(c_out, lateral)
            pyramid.append(stage(entry, entry // 2, self.depth, c_out, every=1))
        # The partial auxiliary head of E6E (table 8) reads the second branch, before the Shortcut.
        auxiliary_sources = [p - 1 if self.extended and i else p for i, p in enumerate(pyramid)][::-1]
        outs = [pyramid[3]]
        for entry, c_out, lateral in zip(self.neck_blocks[1:], self.neck[2::-1], pyramid[2::-1], strict=True):
            t.concat(t.add(self.down, c_out, kernel=3, stride=2), lateral)
            outs.append(stage(entry, entry // 2, self.depth, c_out, every=1))
        leads = [t.conv(c, 3, source=s) for c, s in zip(self.lead, outs, strict=True)]
        auxiliary = self.auxiliary or self.lead
        return t, leads, [t.conv(c, 3, source=s) for c, s in zip(auxiliary, auxiliary_sources, strict=True)]


Config = TypeVar("Config", P5Config, P6Config)


def scale(config: Config, *, depth: float = 1.0, width: float = 1.0, block_width: float = 1.0) -> Config:
    """Return a deeper or wider network: the compound scaling for concatenation-based models (section 3.2, figure 3).

    A deeper computational block concatenates more maps, so its output is wider, and the transition that follows has to
    be widened with it. `depth=1.5, width=1.25` is YOLOv7-X of its base and, but for the downsampling layers (DownC),
    E6 of W6; `depth=2, width=1.5` is D6. The other rows of table 3 are `width=1.25, block_width=1.25` (width only) and
    `depth=2` (depth only).

    The paper does not say what "width of the transition" includes. Here it is every layer outside the computational
    blocks: the stem, the outputs of the blocks, the downsampling layers, SPPCSPC, the neck's 1x1 convolutions and those
    before the heads. This gives the official X, E6 and D6 layer by layer.

    Args:
        config: Configuration of the base; it is not modified.
        depth: Factor of the number of 3x3 convolutions in a block.
        width: Factor of the channels outside the blocks.
        block_width: Factor of the channels inside the blocks, 1 in compound scaling.

    Raises:
        UsageError: The configuration is not concatenation-based, a factor is not positive, a block would not be whole
            stacks of convolutions, or a layer would not have a whole, even number of channels.

    Example:
        >>> from yolov7_deploy.model.configs import CONFIGS
        >>> scale(CONFIGS["yolov7-w6"], depth=1.5, width=1.25).stages
        (160, 320, 640, 960, 1280)
    """
    if not isinstance(config, (P5Config, P6Config)):
        raise UsageError(
            f"A {type(config).__name__} cannot be scaled: it does not describe a concatenation-based network.",
            fix="Pass a P5Config or P6Config, such as  CONFIGS['yolov7-w6']",
        )
    factors = {"depth": depth, "width": width, "block_width": block_width}
    for name, factor in factors.items():
        if not (isfinite(factor) and factor > 0):
            raise UsageError(f"{name} {factor} is not a positive factor.", fix="For example: depth 1.5, width 1.25")
    changes: dict[str, object] = {"depth": _scale_depth(config.depth, depth, stack=config.stack)}
    for names, factor in ((config.TRANSITION_WIDTHS, width), (config.BLOCK_WIDTHS, block_width)):
        changes |= {name: _scale_channels(str(name), getattr(config, name), factor) for name in names}
    if isinstance(config, P6Config) and width != 1:
        changes["auxiliary"] = None
    return replace(config, **changes)  # type: ignore[arg-type]


def _scale_depth(depth: int, factor: float, *, stack: int) -> int:
    scaled = Fraction(factor).limit_denominator(1000) * depth
    if scaled.denominator != 1 or scaled < stack or scaled % stack:
        shallow = max(1, int(scaled) // stack) * stack
        raise UsageError(
            f"A block of {depth} convolutions times {factor:g} is {float(scaled):g}, not whole stacks of {stack}.",
            fix=f"Scale the depth by {shallow}/{depth} or {shallow + stack}/{depth}",
        )
    return int(scaled)


def _scale_channels(name: str, channels: int | Widths, factor: float) -> int | Widths:
    if isinstance(channels, tuple):
        return tuple(_scale_whole(name, c, factor) for c in channels)
    return _scale_whole(name, channels, factor)


def _scale_whole(name: str, channels: int, factor: float) -> int:
    scaled = Fraction(factor).limit_denominator(1000) * channels
    if scaled.denominator != 1 or scaled < 2 or scaled % 2:
        raise UsageError(
            f"{name}: {channels} channels times {factor:g} is {float(scaled):g}, not a whole, even number; the network "
            "has layers of half as many.",
            fix="Scale by a multiple of 1/8: 0.5, 1.25 or 1.5",
        )
    return int(scaled)
