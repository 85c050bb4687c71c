"""Layer tables: the rows of an architecture, the blocks they are built from, and the variant that a table belongs to.

A table is built from a few patterns of the paper: `elan` (section 3.1, figure 2c), `transition` (the downsampling
between stages), the top-down half of the neck. Layer numbers follow from the order in which rows are added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

IMAGE = -1  # source index of the network input

Anchors = tuple[tuple[tuple[float, float], ...], ...]

P5_ANCHORS: Anchors = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
P6_ANCHORS: Anchors = (
    ((19, 27), (44, 40), (38, 94)),
    ((96, 68), (86, 152), (180, 137)),
    ((140, 301), (303, 264), (238, 542)),
    ((436, 615), (739, 380), (925, 792)),
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One row of a table. `sources` are layer numbers in concatenation order; `IMAGE` is the network input.

    `kind` is the official class name: Conv, RepConv, SPPCSPC, DownC, MP, SP, Concat, Shortcut, Upsample, ReOrg, and the
    heads Detect, IDetect, IAuxDetect (lead sources first, then auxiliary ones; `c_out` is unused there); or RepConvN,
    a RepConv without identity branch.
    """

    index: int
    kind: str
    c_in: tuple[int, ...]
    c_out: int
    kernel: int
    stride: int
    sources: tuple[int, ...]


@dataclass
class LayerTable:
    """Builder of a layer table; every method returns the number of the last row it added."""

    rows: list[Layer] = field(default_factory=list)

    @property
    def last(self) -> int:
        """Number of the last row."""
        return len(self.rows) - 1

    def add(self, kind: str, c_out: int, *sources: int, kernel: int = 1, stride: int = 1) -> int:
        """Add a row that reads `sources`, by default the last row."""
        at = sources or (self.last,)
        c_in = tuple(3 if i == IMAGE else self.rows[i].c_out for i in at)
        self.rows.append(Layer(len(self.rows), kind, c_in, c_out, kernel, stride, at))
        return self.last

    def conv(self, c_out: int, kernel: int = 1, stride: int = 1, source: int | None = None) -> int:
        """Add a convolution with BatchNorm and activation."""
        return self.add("Conv", c_out, *(() if source is None else (source,)), kernel=kernel, stride=stride)

    def pool(self, source: int | None = None) -> int:
        """Add a max-pooling that halves the resolution."""
        at = self.last if source is None else source
        return self.add("MP", self.rows[at].c_out, at, kernel=2, stride=2)

    def concat(self, *sources: int) -> int:
        """Add a concatenation along the channels."""
        return self.add("Concat", sum(self.rows[i].c_out for i in sources), *sources)

    def upsample(self) -> int:
        """Add an upsampling by two."""
        return self.add("Upsample", self.rows[self.last].c_out)

    def elan(
        self,
        entry: int,
        width: int,
        depth: int,
        c_out: int,
        *,
        every: int,
        source: int | None = None,
        kinds: tuple[str, ...] = ("Conv",),
    ) -> int:
        """Add an ELAN: two 1x1 convolutions, then a chain of `depth` 3x3 ones; every `every`-th is aggregated.

        `kinds` are the kinds of the 3x3 convolutions, repeated along the chain.
        """
        at = self.last if source is None else source
        bypass = self.conv(entry, source=at)
        start = self.conv(entry, source=at)
        chain = [self.add(kinds[i % len(kinds)], width, kernel=3) for i in range(depth)]
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


BuiltTable = tuple[LayerTable, list[int], list[int]]  # the rows, and the numbers of the lead and the auxiliary ones


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
    build_table: Callable[[], BuiltTable]

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per cell of each level."""
        return tuple(8 << level for level in range(len(self.anchors)))

    @property
    def has_auxiliary(self) -> bool:
        """True if the training form has auxiliary heads (the P6 models of the paper)."""
        return self.layers(training=True)[-1].kind == "IAuxDetect"

    def layers(self, *, training: bool, full_auxiliary: bool = False) -> tuple[Layer, ...]:
        """Return the table in training form (implicit knowledge, auxiliary branches) or deploy form.

        With `full_auxiliary` the auxiliary branches of E6E read the sum of both E-ELAN branches instead of the second
        one alone (table 8: auxiliary head against partial auxiliary head); other variants have no such difference.
        """
        return _layers(self, training, full_auxiliary)


@lru_cache(maxsize=64)
def _layers(variant: Variant, training: bool, full_auxiliary: bool) -> tuple[Layer, ...]:
    table, leads, aux = variant.build_table()
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
