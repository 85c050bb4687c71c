"""The eight architectures of the paper as tables of layers with the official layer numbers.

A table is built from a few patterns of the paper: `elan` (section 3.1, figure 2c), `transition` (the downsampling
between stages), the top-down and bottom-up halves of the neck. Layer numbers follow from the order in which rows are
added, so they equal the official ones, and with them the checkpoint keys `model.N.…`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from yolov7_deploy._text import suggest
from yolov7_deploy.errors import UsageError

IMAGE = -1  # source index of the network input

Anchors = tuple[tuple[tuple[float, float], ...], ...]

_TINY_ANCHORS: Anchors = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
_P5_ANCHORS: Anchors = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
_P6_ANCHORS: Anchors = (
    ((19, 27), (44, 40), (38, 94)),
    ((96, 68), (86, 152), (180, 137)),
    ((140, 301), (303, 264), (238, 542)),
    ((436, 615), (739, 380), (925, 792)),
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One row of a table. `sources` are layer numbers in concatenation order; `IMAGE` is the network input.

    `kind` is the official class name: Conv, RepConv, SPPCSPC, DownC, MP, SP, Concat, Shortcut, Upsample, ReOrg, and
    the heads Detect, IDetect, IAuxDetect (lead sources first, then auxiliary ones; `c_out` is unused there).
    """

    index: int
    kind: str
    c_in: tuple[int, ...]
    c_out: int
    kernel: int
    stride: int
    sources: tuple[int, ...]


@dataclass
class _Table:
    """Builder of a layer table; every method returns the number of the last row it added."""

    rows: list[Layer] = field(default_factory=list)

    @property
    def last(self) -> int:
        return len(self.rows) - 1

    def add(self, kind: str, c_out: int, *sources: int, kernel: int = 1, stride: int = 1) -> int:
        at = sources or (self.last,)
        c_in = tuple(3 if i == IMAGE else self.rows[i].c_out for i in at)
        self.rows.append(Layer(len(self.rows), kind, c_in, c_out, kernel, stride, at))
        return self.last

    def conv(self, c_out: int, kernel: int = 1, stride: int = 1, source: int | None = None) -> int:
        return self.add("Conv", c_out, *(() if source is None else (source,)), kernel=kernel, stride=stride)

    def pool(self, source: int | None = None) -> int:
        at = self.last if source is None else source
        return self.add("MP", self.rows[at].c_out, at, kernel=2, stride=2)

    def concat(self, *sources: int) -> int:
        return self.add("Concat", sum(self.rows[i].c_out for i in sources), *sources)

    def upsample(self) -> int:
        return self.add("Upsample", self.rows[self.last].c_out)

    def elan(self, entry: int, width: int, depth: int, c_out: int, *, every: int, source: int | None = None) -> int:
        """Add an ELAN: two 1x1 convolutions, then a chain of `depth` 3x3 ones; every `every`-th is aggregated."""
        at = self.last if source is None else source
        bypass = self.conv(entry, source=at)
        start = self.conv(entry, source=at)
        chain = [self.conv(width, 3) for _ in range(depth)]
        self.concat(*chain[::-1][::every], start, bypass)
        return self.conv(c_out)

    def extended_elan(self, entry: int, width: int, depth: int, c_out: int, *, every: int) -> int:
        """Add the E-ELAN of E6E: the sum of two ELAN branches on the same input (paper section 3.1)."""
        source = self.last
        first = self.elan(entry, width, depth, c_out, every=every)
        second = self.elan(entry, width, depth, c_out, every=every, source=source)
        return self.add("Shortcut", c_out, second, first)

    def transition(self, width: int, *lateral: int) -> int:
        """Halve the resolution (v7 and X): max-pool and strided convolution in parallel, then lateral maps if any."""
        source = self.last
        self.pool()
        pooled = self.conv(width)
        self.conv(width, source=source)
        strided = self.conv(width, 3, 2)
        return self.concat(strided, pooled, *lateral)

    def top_down(self, width: int, lateral: int) -> int:
        """Add a top-down step of the neck: 1x1 convolution, upsampling, concatenation to the backbone's lateral map."""
        self.conv(width)
        up = self.upsample()
        side = self.conv(width, source=lateral)
        return self.concat(side, up)


def _tiny() -> tuple[_Table, list[int], list[int]]:
    t = _Table()
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


def _p5(
    *, stem: int, depth: int, stages: tuple[int, ...], neck_every: int, head: str
) -> tuple[_Table, list[int], list[int]]:
    """Build v7 or X. The neck of v7 halves the chain's width and aggregates all of it; X repeats its backbone block."""
    t = _Table()
    t.add("Conv", stem, IMAGE, kernel=3)
    for width, stride in ((2 * stem, 2), (2 * stem, 1), (4 * stem, 2)):
        t.conv(width, 3, stride)
    laterals = [t.elan(64, 64, depth, stages[0], every=2)]
    for entry, c_out in zip((128, 256, 256), stages[1:], strict=True):
        t.transition(t.rows[t.last].c_out // 2)
        laterals.append(t.elan(entry, entry, depth, c_out, every=2))
    spp = stages[3] // 2
    p5 = t.add("SPPCSPC", spp)

    def block(entry: int, c_out: int) -> int:
        return t.elan(entry, entry // (2 if neck_every == 1 else 1), depth, c_out, every=neck_every)

    t.top_down(spp // 2, laterals[2])
    p4 = block(256, spp // 2)
    t.top_down(spp // 4, laterals[1])
    outs = [block(128, spp // 4)]
    for width, entry, lateral in ((spp // 4, 256, p4), (spp // 2, 512, p5)):
        t.transition(width, lateral)
        outs.append(block(entry, 2 * width))
    leads = [t.add(head, 2 * t.rows[s].c_out, s, kernel=3) for s in outs]
    return t, leads, []


def _p6(
    *,
    base: int,
    depth: int,
    down: str,
    stages: tuple[int, ...],
    neck: tuple[int, ...],
    lead: tuple[int, ...],
    aux: tuple[int, ...],
    extended: bool = False,
) -> tuple[_Table, list[int], list[int]]:
    """Build W6, E6, D6 or E6E: space-to-depth stem, five stages, four levels; return lead and auxiliary rows."""
    t = _Table()
    stage: Callable[..., int] = t.extended_elan if extended else t.elan

    def reduce(c_out: int) -> int:
        return t.add(down, c_out, kernel=3, stride=2)

    t.add("ReOrg", 12, IMAGE)
    t.conv(base, 3)
    laterals = []
    for entry, c_out in zip((64, 128, 256, 384, 512), stages, strict=True):
        reduce(c_out)
        laterals.append(stage(entry, entry, depth, c_out, every=2))
    pyramid = [t.add("SPPCSPC", neck[0])]
    for entry, c_out, lateral in zip((384, 256, 128), neck[1:], laterals[3:0:-1], strict=True):
        t.top_down(c_out, lateral)
        pyramid.append(stage(entry, entry // 2, depth, c_out, every=1))
    # The partial auxiliary head of E6E (table 8) reads the second branch, before the Shortcut.
    aux_sources = [p - 1 if extended and i else p for i, p in enumerate(pyramid)][::-1]
    outs = [pyramid[3]]
    for entry, c_out, lateral in zip((256, 384, 512), neck[2::-1], pyramid[2::-1], strict=True):
        t.concat(reduce(c_out), lateral)
        outs.append(stage(entry, entry // 2, depth, c_out, every=1))
    leads = [t.conv(c, 3, source=s) for c, s in zip(lead, outs, strict=True)]
    return t, leads, [t.conv(c, 3, source=s) for c, s in zip(aux, aux_sources, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One architecture: the builder of its table, and what the table does not contain.

    Attributes:
        name: Official name.
        activation: `silu` or `leaky` (LeakyReLU 0.1), after every convolution with BatchNorm.
        anchors: Per level three (width, height) in input pixels.
        size: Input size of the paper's tables.
    """

    name: str
    activation: str
    anchors: Anchors
    size: int
    build_table: Callable[[], tuple[_Table, list[int], list[int]]]

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per cell of each level."""
        return tuple(8 << level for level in range(len(self.anchors)))

    @property
    def has_auxiliary(self) -> bool:
        """True if the training form has auxiliary heads (the P6 models)."""
        return len(self.anchors) == 4

    def layers(self, *, training: bool, full_auxiliary: bool = False) -> tuple[Layer, ...]:
        """Return the table in training form (implicit knowledge, auxiliary branches) or deploy form.

        With `full_auxiliary` the auxiliary branches of E6E read the sum of both E-ELAN branches instead of the second
        one alone (table 8: auxiliary head against partial auxiliary head); other variants have no such difference.
        """
        return _layers(self.name, training, full_auxiliary)


@lru_cache(maxsize=32)
def _layers(name: str, training: bool, full_auxiliary: bool) -> tuple[Layer, ...]:
    table, leads, aux = VARIANTS[name].build_table()
    for row in aux if full_auxiliary else ():
        following = table.rows[table.rows[row].sources[0] + 1]
        if following.kind == "Shortcut":
            table.rows[row] = replace(table.rows[row], sources=(following.index,))
    if not training:
        del table.rows[len(table.rows) - len(aux) :]
        aux = []
    kind = ("IAuxDetect" if aux else "IDetect") if training else "Detect"
    table.add(kind, 0, *leads, *aux)
    return tuple(table.rows)


_W6_STAGES, _E6_STAGES = (128, 256, 512, 768, 1024), (160, 320, 640, 960, 1280)
_AUX = (320, 640, 960, 1280)

VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(name="yolov7-tiny", activation="leaky", anchors=_TINY_ANCHORS, size=640, build_table=_tiny),
        Variant(name="yolov7-tiny-silu", activation="silu", anchors=_TINY_ANCHORS, size=640, build_table=_tiny),
        Variant(
            name="yolov7", activation="silu", anchors=_P5_ANCHORS, size=640,
            build_table=lambda: _p5(stem=32, depth=4, stages=(256, 512, 1024, 1024), neck_every=1, head="RepConv"),
        ),
        Variant(
            name="yolov7x", activation="silu", anchors=_P5_ANCHORS, size=640,
            build_table=lambda: _p5(stem=40, depth=6, stages=(320, 640, 1280, 1280), neck_every=2, head="Conv"),
        ),
        Variant(
            name="yolov7-w6", activation="silu", anchors=_P6_ANCHORS, size=1280,
            build_table=lambda: _p6(base=64, depth=4, down="Conv", stages=_W6_STAGES, neck=(512, 384, 256, 128),
                            lead=(256, 512, 768, 1024), aux=_AUX),
        ),
        Variant(
            name="yolov7-e6", activation="silu", anchors=_P6_ANCHORS, size=1280,
            build_table=lambda: _p6(base=80, depth=6, down="DownC", stages=_E6_STAGES, neck=(640, 480, 320, 160),
                            lead=_AUX, aux=_AUX),
        ),
        Variant(
            name="yolov7-d6", activation="silu", anchors=_P6_ANCHORS, size=1280,
            build_table=lambda: _p6(base=96, depth=8, down="DownC", stages=(192, 384, 768, 1152, 1536),
                            neck=(768, 576, 384, 192), lead=(384, 768, 1152, 1536), aux=(384, 768, 1152, 1536)),
        ),
        Variant(
            name="yolov7-e6e", activation="silu", anchors=_P6_ANCHORS, size=1280,
            build_table=lambda: _p6(base=80, depth=6, down="DownC", stages=_E6_STAGES, neck=(640, 480, 320, 160),
                            lead=_AUX, aux=_AUX, extended=True),
        ),
    )
}  # fmt: skip


def find_variant(name: str) -> Variant:
    """Return the variant with this official name.

    Raises:
        UsageError: There is none.
    """
    if name not in VARIANTS:
        raise UsageError(f"{name!r} is not a YOLOv7 variant.", fix=suggest(name, VARIANTS))
    return VARIANTS[name]
