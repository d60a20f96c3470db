"""Weights in host memory that come to the device as they are needed, two units ahead of the computing.

Units come in an order that is known: some at the beginning of a piece of work, then those of a step, again and again.
Units that may stay are copied once a turn, the others pass through a ring of buffers. Copies run on a stream of their
own; the two streams wait for each other by events, the host never does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from shared.memory.host import HostBuffer

AHEAD = 2
"""Units on their way while one is computed with."""
NUM_SLOTS = AHEAD + 1

Mark = Any
"""A point in the work of a device that something can wait for."""


class Lane(Protocol):
    """Copies to a device, beside its computing."""

    def mark(self) -> Mark:
        """What has been asked of the computing so far."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark) -> Mark:
        """Begin a copy that starts after `after`; its end."""
        ...

    def wait(self, mark: Mark) -> None:
        """Have the computing wait."""
        ...


class CudaLane:
    """A copy stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        """See Lane."""
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        """See Lane; `source` is pinned."""
        self._copies.wait_event(after)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        return self._copies.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        """See Lane."""
        torch.cuda.current_stream(self._device).wait_event(mark)


class ImmediateLane:
    """Copies that are over when they have begun: for a CPU."""

    def mark(self) -> None:
        """See Lane."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: None) -> None:
        """See Lane."""
        target.copy_(source)

    def wait(self, mark: None) -> None:
        """See Lane."""


@dataclass(frozen=True)
class HostUnit:
    """A unit's parameters and buffers by name, and their values in host memory."""

    tensors: dict[str, torch.Tensor]
    values: HostBuffer

    def point_to(self, views: dict[str, torch.Tensor]) -> None:
        """Let the model see these values."""
        for name, tensor in self.tensors.items():
            tensor.data = views[name]


class _Place:
    """Memory of the device that holds one unit at a time."""

    def __init__(self, num_bytes: int, device: torch.device, lane: Lane) -> None:
        # Not under inference mode, whatever the caller does: parameters shall be views of it.
        with torch.inference_mode(False):
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._lane = lane
        self._views: dict[int, dict[str, torch.Tensor]] = {}
        self._free = lane.mark()
        self._ready: Mark = None
        self.position: int | None = None
        """Of the unit it holds or is getting."""

    def fetch(self, position: int, unit: HostUnit) -> None:
        """Begin to copy a unit, once the computing with the one before is over."""
        source = unit.values.bytes
        self._ready = self._lane.copy(self._memory[: len(source)], source, self._free)
        self.position = position

    def show(self, unit: HostUnit) -> None:
        """Have the computing wait for the unit, and let the model see it."""
        assert self.position is not None
        self._lane.wait(self._ready)
        if self.position not in self._views:
            with torch.inference_mode(False):
                self._views[self.position] = unit.values.views(self._memory)
        unit.point_to(self._views[self.position])

    def left(self) -> None:
        """What was asked of the computing so far is all that needs the unit."""
        self._free = self._lane.mark()


class UnitStream:
    """Brings every unit to the device before it is used. All methods are called on the device's thread."""

    def __init__(
        self,
        units: Sequence[HostUnit],
        *,
        first_of_step: int,
        resident: Collection[int],
        device: torch.device,
        lane: Lane | None = None,
    ) -> None:
        """
        Args:
            units: in order: those of the beginning, then those of a step.
            first_of_step: position of the first unit of a step, which follows the last one, too.
            resident: positions of the units that stay until `release`.
            device: where they are computed with.
            lane: for copies; None: the one of the device.
        """
        self._units = units
        self._first_of_step = first_of_step
        self._resident = frozenset(resident)
        self._device = device
        self._lane: Lane = lane or (CudaLane(device) if device.type == "cuda" else ImmediateLane())
        streamed = [unit.values.num_bytes for position, unit in enumerate(units) if position not in self._resident]
        self._slot_bytes = max(streamed, default=0)
        self._num_slots = min(NUM_SLOTS, len(streamed))
        self._ring: list[_Place] = []
        self._places: dict[int, _Place] = {}
        """Of resident units that are on the device."""
        self._present: int | None = None
        self.num_copies = 0
        """Units copied so far."""

    @property
    def device_bytes(self) -> int:
        """Most bytes of the device that all of it takes."""
        kept = sum(self._units[position].values.num_bytes for position in self._resident)
        return kept + self._num_slots * self._slot_bytes

    def enter(self, position: int) -> None:
        """Before anything of a unit is used."""
        if position == self._present:
            return
        if self._present is not None:
            self._place_of(self._present).left()
        place = self._fetched(position, keep=())
        place.show(self._units[position])
        self._present = position
        ahead = list(self._following(position))
        for index, following in enumerate(ahead):
            self._fetched(following, keep=(position, *ahead[:index]))

    def release(self) -> None:
        """Give the device's memory back; the next `enter` begins anew."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for unit in self._units:
            unit.point_to(unit.values.views(unit.values.bytes))
        self._ring, self._places, self._present = [], {}, None

    def close(self) -> None:
        """Release, and give the host's memory back; the model has no weights from then on."""
        self.release()
        for unit in self._units:
            for tensor in unit.tensors.values():
                tensor.data = torch.empty(0, dtype=tensor.dtype)
            unit.values.close()

    def _following(self, position: int) -> Iterator[int]:
        """The units to have on their way: the next AHEAD of those that are streamed, and the resident ones between."""
        streamed = 0
        for _ in range(len(self._units) - 1):
            position = position + 1 if position + 1 < len(self._units) else self._first_of_step
            if streamed == AHEAD or position == self._present:
                return
            streamed += position not in self._resident
            yield position

    def _place_of(self, position: int) -> _Place:
        if position in self._resident:
            return self._places[position]
        return next(place for place in self._ring if place.position == position)

    def _fetched(self, position: int, keep: Collection[int]) -> _Place:
        """Where a unit is or is coming to; `keep` are units that must not make room for it."""
        unit = self._units[position]
        if position in self._resident:
            if position not in self._places:
                self._places[position] = self._filled(_Place(unit.values.num_bytes, self._device, self._lane), position)
            return self._places[position]
        for place in self._ring:
            if place.position == position:
                return place
        if len(self._ring) < self._num_slots:
            self._ring.append(_Place(self._slot_bytes, self._device, self._lane))
            return self._filled(self._ring[-1], position)
        # The one that was fetched longest ago; the ring keeps that order.
        place = next(place for place in self._ring if place.position not in keep)
        self._ring.remove(place)
        self._ring.append(place)
        return self._filled(place, position)

    def _filled(self, place: _Place, position: int) -> _Place:
        place.fetch(position, self._units[position])
        self.num_copies += 1
        return place
