"""A look at the devices every few seconds: subscribers get each, and a device that gets full is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

from shared.errors import Unavailable
from shared.logging import get_logger
from shared.memory.device_state import DeviceState
from shared.memory.devices import Devices

log = get_logger(__name__)

INTERVAL_S = 5.0
FULL_PART = 0.90
"""Used part of a device's memory above which it is warned of."""
RELIEVED_PART = 0.85
"""Below it the next rise is warned of again: a device that stays at the limit is told once."""


@dataclass(frozen=True)
class Sight:
    """What a source sees at once."""

    devices: tuple[DeviceState, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    """What could not be looked at, by name, and why; told with every look for as long as it lasts."""


@dataclass(frozen=True)
class Look:
    """The devices at a moment."""

    time_s: float
    """Unix seconds."""
    devices: tuple[DeviceState, ...]
    warnings: Mapping[str, str]
    """What needs attention, in words, by the name of what it is about. Usually empty."""


Source = Callable[[], Awaitable[Sight]]
"""Takes a look; does not raise."""


def own_devices(devices: Devices) -> Source:
    """The devices of this host as a source, looked at in a thread; a look takes nothing of them."""

    async def look() -> Sight:
        return Sight(await asyncio.to_thread(devices.look, make_contexts=False))

    return look


class _Subscriber:
    """Holds the newest look that was not taken yet, with the warnings of those it replaced."""

    def __init__(self, first: Look) -> None:
        self._unread: Look | None = first
        self.changed = asyncio.Event()
        self.changed.set()

    def tell(self, look: Look) -> None:
        if self._unread is not None:
            look = replace(look, warnings={**self._unread.warnings, **look.warnings})
        self._unread = look
        self.changed.set()

    def take(self) -> Look | None:
        look, self._unread = self._unread, None
        self.changed.clear()
        return look


class DeviceWatcher:
    """Looks at the devices for as long as it runs."""

    def __init__(self, source: Source, *, interval_s: float = INTERVAL_S) -> None:
        """
        Args:
            source: takes a look.
            interval_s: seconds between two looks.
        """
        self._source = source
        self._interval_s = interval_s
        self._latest: Look | None = None
        self._subscribers: set[_Subscriber] = set()
        self._full: set[str] = set()
        self._missing: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self.num_warnings = 0
        """How often a device was found full."""

    @property
    def latest(self) -> Look | None:
        """The last look; None before the first."""
        return self._latest

    async def start(self) -> None:
        """Take the first look, then go on in the background until `stop`."""
        self._note(await self._source())
        self._task = asyncio.create_task(self._watch())
        self._task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Take no further looks and send every subscriber away; a drain need not wait for them."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._send_away()

    async def now(self) -> Sight:
        """A look taken for this call alone."""
        return await self._source()

    async def looks(self) -> AsyncGenerator[Look, None]:
        """The latest look at once, then each; who reads slowly gets the newest.

        Raises:
            Unavailable: the watcher was stopped.
        """
        latest = self._latest
        if latest is None:
            raise Unavailable("the devices are not watched yet; try again soon")
        subscriber = _Subscriber(latest)
        self._subscribers.add(subscriber)
        try:
            while not self._stopped:
                await subscriber.changed.wait()
                look = subscriber.take()
                if look is not None and not self._stopped:
                    yield look
        finally:
            self._subscribers.discard(subscriber)
        raise Unavailable("the service is draining; watch again when it is back")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            self._note(await self._source())

    def _note(self, sight: Sight) -> None:
        warnings = {**sight.missing, **self._rises(sight.devices)}
        for name, why in sight.missing.items():
            if name not in self._missing:
                log.info("devices cannot be looked at", where=name, reason=why)
        self._missing = set(sight.missing)
        look = self._latest = Look(time.time(), sight.devices, warnings)
        for subscriber in self._subscribers:
            subscriber.tell(look)

    def _rises(self, devices: tuple[DeviceState, ...]) -> dict[str, str]:
        """The devices that have got full since the last look."""
        warnings = {}
        for device in devices:
            if device.used_part <= RELIEVED_PART:
                self._full.discard(device.key)
            elif device.used_part > FULL_PART and device.key not in self._full:
                self._full.add(device.key)
                self.num_warnings += 1
                warnings[device.key] = device.fullness()
                log.warning("a device is nearly full", device=device.name, uuid=device.uuid, what=device.fullness())
        return warnings

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the devices are not watched any more", exc_info=error)
            self._stopped = True
            self._send_away()

    def _send_away(self) -> None:
        for subscriber in self._subscribers:
            subscriber.changed.set()
