"""SystemService of a stage: its devices, and what memory is planned and used."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from ovi.common.v1 import system_pb2 as pb
from ovi.common.v1 import system_pb2_grpc as pb_grpc
from shared.grpc_server import GrpcService
from shared.memory.device_state import DeviceState
from shared.memory.modes import VramMode
from shared.memory.watcher import DeviceWatcher, Look
from shared.system_proto import device_to_proto, vram_mode_from_proto


@dataclass(frozen=True)
class PlanWish:
    """What is to be planned."""

    mode: VramMode
    """AUTO: the service's choice."""
    model: str
    """Variant; empty: the one that takes most."""
    size: tuple[int, int] | None
    """(height, width) in pixels; None: the square one."""


Plan = Callable[[PlanWish], pb.MemoryPlan]
"""What a wish would take on this stage; quick, loads nothing.

Raises InvalidRequest for a model, size or mode that this stage has not.
"""
SetMode = Callable[[VramMode, str], Awaitable[pb.MemoryPlan]]
"""Switches to a mode (AUTO: chosen by the memory there is) and a variant (empty: the loaded one); what holds then.

Raises InvalidRequest, or OutOfMemory with the numbers where it does not fit; what held before then holds still.
"""

Describe = Callable[[], pb.Worker]
"""What a stage tells of itself as a worker, its device apart; quick."""


class CallCount:
    """Calls that wait at a stage or are under way."""

    def __init__(self) -> None:
        self.number = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Around a call."""
        self.number += 1
        try:
            yield
        finally:
            self.number -= 1


def system_service(
    watcher: DeviceWatcher, plan: Plan, set_mode: SetMode, describe: Describe, *, device: str = ""
) -> GrpcService:
    """SystemService of a stage, for `shared.grpc_server.serve`.

    Args:
        watcher: of this stage's devices; the stage starts it when it loads and stops it when it drains.
        plan: plans on this stage.
        set_mode: switches this stage.
        describe: tells of this stage.
        device: that this stage computes on, as PyTorch calls it; its plans are for it. The gateway takes stages that
            do not say theirs to share one.
    """
    return system_grpc_service(StageSystemServicer(watcher, plan, set_mode, describe, device))


def system_grpc_service(servicer: pb_grpc.SystemServiceServicer) -> GrpcService:
    """Any servicer of SystemService, for `shared.grpc_server.serve`."""
    return GrpcService(
        pb.DESCRIPTOR.services_by_name["SystemService"].full_name,
        lambda server: pb_grpc.add_SystemServiceServicer_to_server(servicer, server),
    )


def look_to_proto(look: Look) -> pb.WatchDevicesResponse:
    """The wire form of a look."""
    time_ = Timestamp(seconds=int(look.time_s), nanos=int(look.time_s % 1 * 1e9))
    devices = map(device_to_proto, look.devices)
    return pb.WatchDevicesResponse(time=time_, devices=devices, warnings=look.warnings.values())


class DevicesServicer(pb_grpc.SystemServiceServicer):
    """The half that stages and gateway have in common: devices, now and watched."""

    def __init__(self, watcher: DeviceWatcher) -> None:
        self._watcher = watcher

    async def GetDevices(
        self, request: pb.GetDevicesRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetDevicesResponse:
        sight = await self._watcher.now()
        return pb.GetDevicesResponse(devices=map(device_to_proto, sight.devices))

    async def WatchDevices(
        self, request: pb.WatchDevicesRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchDevicesResponse]:
        async with contextlib.aclosing(self._watcher.looks()) as looks:
            async for look in looks:
                yield look_to_proto(look)


class StageSystemServicer(DevicesServicer):
    """All of SystemService on one stage."""

    def __init__(self, watcher: DeviceWatcher, plan: Plan, set_mode: SetMode, describe: Describe, device: str) -> None:
        super().__init__(watcher)
        self._describe = describe
        self._device = device
        self._plan = plan
        self._set_mode = set_mode

    async def GetPlan(self, request: pb.GetPlanRequest, context: grpc.aio.ServicerContext) -> pb.GetPlanResponse:
        mode = vram_mode_from_proto(request.vram_mode, field="vram_mode")
        size = (request.size.height, request.size.width) if request.HasField("size") else None
        return pb.GetPlanResponse(plan=self._placed(self._plan(PlanWish(mode, request.model, size))))

    async def SetMode(self, request: pb.SetModeRequest, context: grpc.aio.ServicerContext) -> pb.SetModeResponse:
        mode = vram_mode_from_proto(request.vram_mode, field="vram_mode")
        begun_s = time.monotonic()
        plan = await self._set_mode(mode, request.model)
        return pb.SetModeResponse(plan=self._placed(plan), seconds=time.monotonic() - begun_s)

    async def ListWorkers(
        self, request: pb.ListWorkersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListWorkersResponse:
        worker = self._describe()
        worker.device = self._device
        device = self._own_device()
        if device is not None:
            worker.device, worker.free_bytes, worker.total_bytes = device.key, device.free_bytes, device.total_bytes
        return pb.ListWorkersResponse(workers=[worker])

    def _placed(self, plan: pb.MemoryPlan) -> pb.MemoryPlan:
        """The plan with its device."""
        device = self._own_device()
        plan.device = self._device if device is None else device.key
        return plan

    def _own_device(self) -> DeviceState | None:
        """As it was at the last look."""
        look = self._watcher.latest
        devices = () if look is None else look.devices
        return next((device for device in devices if device.name == self._device), None)
