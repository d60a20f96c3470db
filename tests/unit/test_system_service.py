"""SystemService of a stage over a real server: devices, plans and switches as the stage's callables give them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ovi.common.v1 import generation_pb2
from ovi.common.v1 import system_pb2 as pb
from ovi.common.v1 import system_pb2_grpc as pb_grpc
from shared.errors import OutOfMemory
from shared.grpc_server import CallInterceptor, Phase, Readiness
from shared.memory.device_state import DeviceState
from shared.memory.devices import Devices
from shared.memory.modes import VramMode
from shared.memory.watcher import DeviceWatcher, own_devices
from shared.system_proto import device_from_proto, device_to_proto
from shared.system_service import CallCount, PlanWish, system_service

TIMEOUT_S = 20


class Stage:
    """What a stage brings: a plan of its own and a switch."""

    def __init__(self) -> None:
        self.wishes: list[PlanWish] = []
        self.switches: list[tuple[VramMode, str]] = []
        self.calls = CallCount()

    def plan(self, wish: PlanWish) -> pb.MemoryPlan:
        self.wishes.append(wish)
        return pb.MemoryPlan(vram_mode=pb.VRAM_MODE_STREAMED, total_bytes=11, available_bytes=12, fits=True)

    async def set_mode(self, mode: VramMode, model: str) -> pb.MemoryPlan:
        self.switches.append((mode, model))
        if mode is VramMode.ALL_GPU:
            raise OutOfMemory("all_gpu needs 40.0 GiB, 12.0 are free; streamed would fit")
        return pb.MemoryPlan(vram_mode=pb.VRAM_MODE_FP8, fits=True)

    def describe(self) -> pb.Worker:
        return pb.Worker(stage="fusion", num_pending=self.calls.number)


@contextlib.asynccontextmanager
async def serving(
    stage: Stage, *, interval_s: float = 0.05
) -> AsyncIterator[tuple[pb_grpc.SystemServiceStub, DeviceWatcher]]:
    watcher = DeviceWatcher(own_devices(Devices()), interval_s=interval_s)
    service = system_service(watcher, stage.plan, stage.set_mode, stage.describe, device="cpu")
    assert service.full_name == "ovi.common.v1.SystemService"
    readiness = Readiness([service.full_name])
    server = grpc.aio.server(interceptors=[CallInterceptor(readiness)])
    service.add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await watcher.start()
    await readiness.enter(Phase.SERVING)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield pb_grpc.SystemServiceStub(channel), watcher
    await watcher.stop()
    await server.stop(0)


def test_devices_now_and_watched():
    async def run() -> None:
        async with serving(Stage()) as (stub, watcher):
            devices = (await stub.GetDevices(pb.GetDevicesRequest(), timeout=TIMEOUT_S)).devices
            assert devices[-1].name == "cpu" and devices[-1].total_bytes == psutil.virtual_memory().total
            watch = stub.WatchDevices(pb.WatchDevicesRequest(), timeout=TIMEOUT_S)
            looks = [await watch.read() for _ in range(3)]
            assert [look.devices[-1].name for look in looks] == ["cpu"] * 3
            times = [look.time.ToNanoseconds() for look in looks]
            assert times == sorted(set(times)), "a new look each time"
            stopping = asyncio.create_task(watcher.stop())
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                while await watch.read() is not grpc.aio.EOF:
                    pass
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE and "draining" in ended.value.details()
            await stopping

    asyncio.run(run())


def test_the_first_look_does_not_wait_for_the_next():
    async def run() -> None:
        async with serving(Stage(), interval_s=3600) as (stub, _):
            watch = stub.WatchDevices(pb.WatchDevicesRequest(), timeout=TIMEOUT_S)
            assert (await watch.read()).devices
            watch.cancel()

    asyncio.run(run())


def test_a_plan_is_the_stages():
    async def run() -> None:
        stage = Stage()
        async with serving(stage) as (stub, _):
            asked = pb.GetPlanRequest(
                vram_mode=pb.VRAM_MODE_ULTRA_LOW, model="960x960_5s", size=generation_pb2.Size(height=64, width=96)
            )
            answer = await stub.GetPlan(asked, timeout=TIMEOUT_S)
            assert (answer.plan.vram_mode, answer.plan.total_bytes) == (pb.VRAM_MODE_STREAMED, 11)
            assert answer.plan.device == "cpu"
            await stub.GetPlan(pb.GetPlanRequest(), timeout=TIMEOUT_S)
            assert stage.wishes == [
                PlanWish(VramMode.ULTRA_LOW, "960x960_5s", (64, 96)),
                PlanWish(VramMode.AUTO, "", None),
            ]

    asyncio.run(run())


def test_a_switch_is_the_stages_and_a_refusal_keeps_its_numbers():
    async def run() -> None:
        stage = Stage()
        async with serving(stage) as (stub, _):
            wish = pb.SetModeRequest(vram_mode=pb.VRAM_MODE_FP8, model="720x720_5s")
            answer = await stub.SetMode(wish, timeout=TIMEOUT_S)
            assert answer.plan.vram_mode == pb.VRAM_MODE_FP8 and 0 <= answer.seconds < TIMEOUT_S
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.SetMode(pb.SetModeRequest(vram_mode=pb.VRAM_MODE_ALL_GPU), timeout=TIMEOUT_S)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "needs 40.0 GiB" in refused.value.details()
            assert stage.switches == [(VramMode.FP8, "720x720_5s"), (VramMode.ALL_GPU, "")]

    asyncio.run(run())


def test_a_mode_without_a_name_is_refused():
    async def run() -> None:
        async with serving(Stage()) as (stub, _):
            for call in (
                stub.GetPlan(pb.GetPlanRequest(vram_mode=77), timeout=TIMEOUT_S),
                stub.SetMode(pb.SetModeRequest(vram_mode=77), timeout=TIMEOUT_S),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                bad = error_details_pb2.BadRequest()
                assert any(detail.Unpack(bad) for detail in rpc_status.from_call(refused.value).details)
                assert bad.field_violations[0].field == "vram_mode"
                assert "got 77" in bad.field_violations[0].description

    asyncio.run(run())


@pytest.mark.parametrize("utilization", [None, 0.0, 0.25])
def test_a_device_survives_the_wire(utilization):
    device = DeviceState(
        name="cuda:1",
        model="NVIDIA H200",
        uuid="GPU-1",
        backend="cuda",
        total_bytes=2**37,
        free_bytes=2**36,
        own_bytes=3,
        others_bytes=4,
        capability="9.0",
        unified=True,
        utilization=utilization,
        links=("cuda:0 NVLink",),
    )
    assert device_from_proto(pb.Device.FromString(device_to_proto(device).SerializeToString())) == device


def test_a_stage_tells_of_itself_as_a_worker_with_the_memory_of_its_device():
    async def run() -> None:
        stage = Stage()
        async with serving(stage) as (stub, _):
            with stage.calls.counting(), pytest.raises(ValueError, match="ended"), stage.calls.counting():
                (worker,) = (await stub.ListWorkers(pb.ListWorkersRequest(), timeout=TIMEOUT_S)).workers
                assert (worker.stage, worker.num_pending) == ("fusion", 2)
                assert worker.total_bytes == psutil.virtual_memory().total > worker.free_bytes > 0
                assert worker.device == "cpu" and worker.state == pb.WORKER_STATE_UNSPECIFIED
                raise ValueError("ended")
            assert stage.calls.number == 0

    asyncio.run(run())
