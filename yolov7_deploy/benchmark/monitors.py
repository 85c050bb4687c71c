"""What is read beside the clock while a row is measured: power, clocks and memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from yolov7_deploy.benchmark.report import Energy
from yolov7_deploy.hardware.clocks import Clocks, ClockWatch, open_clock_watch
from yolov7_deploy.hardware.memory import gpu_memory_used, host_peak_bytes
from yolov7_deploy.hardware.power import PowerMeter, open_power_meter

IDLE_S = 1.0


@dataclass(kw_only=True, slots=True)
class Reading:
    """What was read while a block of work ran; filled when it has ended."""

    watts: float | None = None
    samples: int = 0
    clocks: Clocks | None = None


class Meters:
    """The meters of a device.

    Args:
        device: `cpu` or `cuda:N`.
        gpu_bytes_before: In use on the GPU before the model was loaded; `None` where that is not known.
    """

    def __init__(self, device: str, *, gpu_bytes_before: int | None = None) -> None:
        self._device = device
        self._gpu_before, self._gpu_peak = gpu_bytes_before, 0
        meter = open_power_meter(device)
        self._meter: PowerMeter | None = None if isinstance(meter, str) else meter
        self._why_not = meter if isinstance(meter, str) else ""
        self.idle_watts: float | None = None

    def read_idle(self) -> None:
        """Measures for a second with nothing running."""
        if self._meter is not None:
            with self._meter:
                time.sleep(IDLE_S)
            self.idle_watts = self._meter.mean_watts if self._meter.samples else None

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reading]:
        """Reads while the block runs."""
        reading = Reading()
        watch: ClockWatch | None = open_clock_watch(self._device)
        with contextlib.ExitStack() as running:
            for meter in (self._meter, watch):
                if meter is not None:
                    running.enter_context(meter)
            yield reading
        if self._meter is not None and self._meter.samples:
            reading.watts, reading.samples = self._meter.mean_watts, self._meter.samples
        if watch is not None:
            reading.clocks = watch.state

    def energy(self, reading: Reading, *, images_per_second: float) -> tuple[Energy | None, str]:
        """The reading as energy, or why there is none."""
        if self._meter is None:
            return None, self._why_not
        if reading.watts is None:
            return None, f"{self._meter.source} told too little in this time: --duration gives it more."
        energy = Energy(
            source=self._meter.source,
            watts=reading.watts,
            idle_watts=self.idle_watts,
            joules_per_image=reading.watts / images_per_second,
            samples=reading.samples,
        )
        return energy, ""

    def look_at_memory(self) -> tuple[int, int | None]:
        """Highest memory of this process, and the highest seen so far on the GPU above what was there before."""
        if self._gpu_before is not None:
            used = gpu_memory_used(self._device)
            self._gpu_peak = max(self._gpu_peak, (used or 0) - self._gpu_before)
        return host_peak_bytes(), None if self._gpu_before is None else self._gpu_peak
