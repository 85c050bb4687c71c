"""The power monitors of a Jetson as its kernel shows them: INA3221 chips, three rails each, and Thor's INA238.

JetPack 5 and later have the mainline driver, with millivolts and milliamperes under hwmon and channels from 1
(kernel.org, hwmon/ina3221). JetPack 4 has NVIDIA's `ina3221x`, with milliwatts under iio and channels from 0. Files
are readable by everybody on a board as NVIDIA ships it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.hardware.jetson import ROOT
from yolov7_deploy.hardware.sampling import read_number, read_word

# Channels 4 to 6 of the mainline driver are shunt voltages and 7 is their sum: no rails.
_CHANNELS = ("1", "2", "3")
_UNUSED = ("", "NC")
INA238 = "VIN"  # what tegrastats calls the rail of Thor's second chip, which has no label


@dataclass(frozen=True, kw_only=True, slots=True)
class Rail:
    """One rail.

    Attributes:
        name: As its board labels it, `VDD_IN`.
        files: Whose numbers are multiplied.
        watts: Of a product of one.
    """

    name: str
    files: tuple[Path, ...]
    watts: float

    def read_w(self) -> float | None:
        """Power now; `None` where the sensor does not answer."""
        product = self.watts
        for path in self.files:
            number = read_number(path)
            if number is None:
                return None
            product *= number
        return product


def read_rails(root: Path = ROOT) -> dict[str, Rail]:
    """The rails by name that answer now; none on other machines."""
    chips = root / "sys/bus/i2c/drivers"
    found = []
    for label in sorted(chips.glob("ina3221/*/hwmon/hwmon*/in*_label")):
        channel = re.fullmatch(r"in(\d+)_label", label.name)
        if channel and channel[1] in _CHANNELS:
            files = (label.with_name(f"in{channel[1]}_input"), label.with_name(f"curr{channel[1]}_input"))
            found.append(Rail(name=read_word(label), files=files, watts=1e-6))
    for label in sorted(chips.glob("ina3221x/*/iio*device*/rail_name_*")):
        power = label.with_name(f"in_power{label.name.removeprefix('rail_name_')}_input")
        found.append(Rail(name=read_word(label), files=(power,), watts=1e-3))
    for kind in sorted((root / "sys/class/hwmon").glob("hwmon*/name")):
        if read_word(kind) == "ina238":
            found.append(Rail(name=INA238, files=(kind.with_name("power1_input"),), watts=1e-6))
    return {rail.name: rail for rail in found if rail.name not in _UNUSED and rail.read_w() is not None}
