"""Who the virtual devices are: drawn from a seeded description, kept as arrays, with no object for a device.

Speed, data and dropout follow from the device's number and the seed alone; so does whether it is there at a time of its
day. What changes is one byte and two numbers a device: busy or not, the version that it trained last, how often.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fl.edge.settings import Settings

MAX_DEVICES: Final = 100_000_000
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)

Devices = npt.NDArray[np.int64]


class Speed(Settings):
    """Seconds that a device needs for a task: log-normal over devices, with this median and spread (of the log)."""

    median_seconds: float = Field(default=60.0, gt=0, le=1e6)
    sigma: float = Field(default=0.7, ge=0, le=4)


class Availability(Settings):
    """When devices are there. In a day of `day_seconds` the share of devices that are there goes as a cosine around
    `mean` by `amplitude`; each device's day begins at an hour of its own within `spread` of a day (time zones)."""

    mean: float = Field(default=0.5, gt=0, le=1)
    amplitude: float = Field(default=0.3, ge=0, le=1)
    day_seconds: float = Field(default=86_400.0, gt=0, le=1e7)
    spread: float = Field(default=0.4, ge=0, le=1)


class PopulationSettings(Settings):
    """The description: how many devices, and what they are like. `dropout`: the part of tasks that never come back."""

    devices: int = Field(ge=1, le=MAX_DEVICES)
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    speed: Speed = Speed()
    availability: Availability = Availability()


def always_there(devices: int, *, median_seconds: float) -> PopulationSettings:
    """Devices of which none sleeps or vanishes."""
    return PopulationSettings(
        devices=devices,
        dropout=0.0,
        speed=Speed(median_seconds=median_seconds, sigma=0.5),
        availability=Availability(mean=1.0, amplitude=0.0),
    )


class Population:
    """The devices 0 to `size` - 1, and what they do now."""

    def __init__(self, settings: PopulationSettings) -> None:
        self.settings = settings
        self.size = settings.devices
        self.busy = np.zeros(self.size, dtype=np.bool_)
        self.last_version = np.zeros(self.size, dtype=np.int32)
        self.contributions = np.zeros(self.size, dtype=np.int32)
        """How many updates of each device were counted."""
        self._generator = np.random.default_rng([settings.seed, 1])

    def seconds(self, devices: Devices) -> npt.NDArray[np.float64]:
        """How long each of these devices needs for a task."""
        speed = self.settings.speed
        radius = np.sqrt(-2 * np.log1p(-self._uniform(devices, 2)))  # Box and Muller 1958
        normal: npt.NDArray[np.float64] = radius * np.cos(2 * np.pi * self._uniform(devices, 5))
        return speed.median_seconds * np.exp(speed.sigma * normal)

    def phase(self, devices: Devices) -> npt.NDArray[np.float64]:
        """Where in the day each of these devices is at time 0, as a part of a day."""
        return (self._uniform(devices, 3) - 0.5) * self.settings.availability.spread

    def are_there(self, devices: Devices, now: float) -> npt.NDArray[np.bool_]:
        """Which of these devices are there at this time; each comes or goes at most once in a 48th of a day."""
        there = self.settings.availability
        day = now / there.day_seconds + self.phase(devices)
        share = there.mean - there.amplitude * np.cos(2 * np.pi * day)
        return self._uniform(devices, (1 << 40) + int(now / there.day_seconds * 48)) < share

    def draw(self, count: int, now: float, version: int, *, again: bool = True) -> Devices:
        """At most `count` different devices that are there, idle, and have not trained this version (or none yet)."""
        before = version if again else 1
        found: list[int] = []
        taken: set[int] = set()
        for _ in range(8):  # in a small or busy population there may not be so many
            lacking = count - len(found)
            if lacking <= 0:
                break
            drawn = self._generator.integers(0, self.size, size=min(4 * lacking + 8, 1 << 20))
            free = drawn[~self.busy[drawn] & (self.last_version[drawn] < before)]
            for device in free[self.are_there(free, now)].tolist():
                if device not in taken:
                    taken.add(device)
                    found.append(device)
        return np.array(found[:count], dtype=np.int64)

    def drops(self, devices: Devices, version: int) -> npt.NDArray[np.bool_]:
        """Which of these devices never report what they now train."""
        return self._uniform(devices, (1 << 20) + version) < self.settings.dropout

    def _uniform(self, devices: Devices, stream: int) -> npt.NDArray[np.float64]:
        """A number in [0, 1) for each device: SplitMix64 (Steele et al. 2014) of seed, stream and device."""
        with np.errstate(over="ignore"):
            x = devices.astype(np.uint64) * _GOLDEN
            x += np.uint64((self.settings.seed << 32) ^ (stream * 0xD1342543DE82EF95 & 0xFFFFFFFFFFFFFFFF))
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
            x ^= x >> np.uint64(31)
        return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
