"""Detection from answers as drivers give them, and the watcher over a source that the test steers."""

from __future__ import annotations

import asyncio
import inspect
import os
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch

from shared.errors import Unavailable
from shared.memory.choose import DeviceFacts
from shared.memory.device_state import DeviceState
from shared.memory.devices import Devices, TorchCuda
from shared.memory.watcher import DeviceWatcher, Look, Sight, own_devices

GIB = 2**30
H200, H100, SPARK = "NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA GB10"
NVLINKED = {(0, 1), (1, 0)}


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__({3: "Not Supported", 9: "Driver Not Loaded", 15: "GPU is lost"}[value])
        self.value = value


class RecordedNvml:
    """Answers like pynvml. Two H200 with NVLink and a third behind the other socket, unless told otherwise."""

    NVMLError = NvmlError
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0
    NVML_TOPOLOGY_MULTIPLE = 20
    NVML_TOPOLOGY_SYSTEM = 50
    nvmlMemory_v2 = 33554472

    def __init__(self, models=(H200, H200, H200), *, missing: bool = False) -> None:
        self.models = models
        self.missing = missing
        self.lost = False
        self.processes = [SimpleNamespace(pid=1, usedGpuMemory=7 * GIB)]
        self.calls: list[str] = []

    def nvmlInit(self) -> None:
        if self.missing:
            raise NvmlError(9)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.models)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return self.models[handle]

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{uuid_of(handle)}"

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return (12, 1) if self.models[handle] == SPARK else (9, 0)

    def nvmlDeviceGetMemoryInfo(self, handle, version):
        assert version == self.nvmlMemory_v2, "the first version counts the driver's own as used"
        if self.lost:
            raise NvmlError(15)
        if self.models[handle] == SPARK:
            raise NvmlError(3)
        return SimpleNamespace(total=140 * GIB, reserved=GIB // 2, free=130 * GIB, used=9 * GIB + GIB // 2)

    def nvmlDeviceGetUtilizationRates(self, handle):
        if self.models[handle] == SPARK:
            raise NvmlError(3)
        return SimpleNamespace(gpu=37, memory=5)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle):
        return self.processes

    def nvmlDeviceGetP2PStatus(self, here, there, index):
        assert index == self.NVML_P2P_CAPS_INDEX_NVLINK
        return self.NVML_P2P_STATUS_OK if (here, there) in NVLINKED else 3

    def nvmlDeviceGetTopologyCommonAncestor(self, here, there):
        return 50 if 2 in (here, there) else 10


def uuid_of(index: int) -> str:
    return f"{index}a4b8c1e-0000-1111-2222-3333444455{index}6"


class RecordedCuda:
    """Answers like torch.cuda; a context is made where the real one would make it."""

    def __init__(self, order=(0, 1, 2), *, initialized: bool = False) -> None:
        self.order = order
        self.initialized = initialized
        self.contexts = 0
        self.reserved = dict.fromkeys(range(len(order)), 3 * GIB)

    def device_count(self) -> int:
        return len(self.order)

    def is_initialized(self) -> bool:
        return self.initialized

    def get_device_properties(self, device):
        return SimpleNamespace(
            name="of torch", uuid=uuid_of(self.order[device]), major=9, minor=4, is_integrated=1, total_memory=64 * GIB
        )

    def mem_get_info(self, device):
        self.contexts += 1
        return 40 * GIB, 64 * GIB

    def memory_reserved(self, device):
        return self.reserved.get(device, 0)


def looked(nvml, cuda, environment=None, *, hip=False) -> tuple[DeviceState, ...]:
    return Devices(nvml=nvml, cuda=cuda, hip=hip, environment=environment or {}).look()


def test_driver_tells_everything_without_a_context():
    cuda = RecordedCuda()
    first, second, third, host = looked(RecordedNvml(), cuda)
    assert first == DeviceState(
        name="cuda:0",
        model=H200,
        uuid=f"GPU-{uuid_of(0)}",
        backend="cuda",
        total_bytes=139 * GIB + GIB // 2,
        free_bytes=130 * GIB,
        own_bytes=0,
        others_bytes=9 * GIB + GIB // 2,
        capability="9.0",
        unified=False,
        utilization=0.37,
        links=("cuda:1 NVLink", "cuda:2 PCIe across sockets"),
    )
    assert second.links == ("cuda:0 NVLink", "cuda:2 PCIe across sockets") and third.name == "cuda:2"
    assert host.backend == "cpu" and cuda.contexts == 0


def test_what_is_asked_exists_in_the_drivers_library_and_in_torch():
    for name in (name for name in vars(RecordedNvml) if name.lower().startswith("nvml")):
        real, recorded = getattr(pynvml, name), getattr(RecordedNvml, name)
        if isinstance(recorded, int):
            assert real == recorded, name
        elif name != "NVMLError":
            taken = list(inspect.signature(real).parameters)
            assert len(taken) == len(inspect.signature(recorded).parameters) - 1, name
    for name in (name for name in vars(TorchCuda) if not name.startswith("_")):
        assert callable(getattr(torch.cuda, name)), name


def test_own_memory_is_nobody_elses():
    nvml = RecordedNvml(models=(H200,))
    cuda = RecordedCuda(order=(0,), initialized=True)
    assert looked(nvml, cuda)[0].own_bytes == 3 * GIB
    assert looked(nvml, cuda)[0].others_bytes == 6 * GIB + GIB // 2, "the driver knows this process by another number"
    nvml.processes.append(SimpleNamespace(pid=os.getpid(), usedGpuMemory=4 * GIB))
    assert looked(nvml, cuda)[0].others_bytes == 5 * GIB + GIB // 2, "its context is its own, too"
    nvml.processes[-1].usedGpuMemory = None
    assert looked(nvml, cuda)[0].others_bytes == 6 * GIB + GIB // 2, "some drivers tell no number"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("2,0", [2, 0]),
        (f"GPU-{uuid_of(1)}", [1]),
        ("GPU-1a4b", [1]),
        ("1,7,0", [1]),
        ("", []),
        ("-1", []),
    ],
)
def test_visible_devices_are_in_cudas_order(visible, expected):
    cuda = RecordedCuda(order=tuple(expected))
    *gpus, _ = looked(RecordedNvml(), cuda, {"CUDA_VISIBLE_DEVICES": visible})
    assert [gpu.uuid for gpu in gpus] == [f"GPU-{uuid_of(index)}" for index in expected]
    assert [gpu.name for gpu in gpus] == [f"cuda:{place}" for place in range(len(expected))]
    assert cuda.contexts == 0


def test_links_are_named_by_the_visible_names():
    *gpus, _ = looked(RecordedNvml(), RecordedCuda(order=(2, 0)), {"CUDA_VISIBLE_DEVICES": "2,0"})
    assert gpus[0].links == ("cuda:1 PCIe across sockets",) and gpus[1].links == ("cuda:0 PCIe across sockets",)


def test_cards_that_differ_are_in_the_order_that_cuda_says():
    nvml, cuda = RecordedNvml(models=(H100, H200)), RecordedCuda(order=(1, 0))
    assert [gpu.model for gpu in looked(nvml, cuda)[:2]] == [H200, H100]
    by_bus = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert [gpu.model for gpu in looked(nvml, cuda, by_bus)[:2]] == [H100, H200]
    assert cuda.contexts == 0


def test_a_gpu_that_shares_the_hosts_memory_is_unified():
    gpu, host = looked(RecordedNvml(models=(SPARK,)), RecordedCuda(order=(0,)))
    assert gpu.unified and not host.unified and gpu.capability == "12.1" and gpu.utilization is None
    assert gpu.total_bytes == psutil.virtual_memory().total == host.total_bytes
    assert 0 < gpu.free_bytes < gpu.total_bytes


def test_without_a_driver_library_torch_tells_what_it_can_and_the_reason_is_logged_once(capfd):
    cuda = RecordedCuda(order=(1,))
    devices = Devices(nvml=RecordedNvml(missing=True), cuda=cuda, hip=False, environment={})
    assert devices.look()[0] == replace(devices.look()[0], model="of torch", uuid=f"GPU-{uuid_of(1)}", backend="cuda")
    assert devices.look()[0].free_bytes == 40 * GIB and devices.look()[0].utilization is None
    said = "".join(capfd.readouterr())
    assert said.count("the driver cannot be asked") == 1 and said.count("Driver Not Loaded") == 1


def test_a_service_makes_no_context_to_look():
    cuda = RecordedCuda(order=(0, 1))
    devices = Devices(nvml=RecordedNvml(missing=True), cuda=cuda, hip=False, environment={})
    assert [one.name for one in devices.look(make_contexts=False)] == ["cpu"] and cuda.contexts == 0
    cuda.initialized, cuda.reserved = True, {1: 3 * GIB}
    assert [one.name for one in devices.look(make_contexts=False)] == ["cuda:1", "cpu"] and cuda.contexts == 1
    cuda.reserved = {}
    assert [one.name for one in devices.look(make_contexts=False)] == ["cuda:1", "cpu"], "its context is still there"
    asyncio.run(own_devices(devices)())
    assert cuda.contexts == 3


def test_a_driver_that_stops_is_done_without(capfd):
    nvml = RecordedNvml()
    devices = Devices(nvml=nvml, cuda=RecordedCuda(), hip=False, environment={})
    assert devices.look()[0].model == H200
    nvml.lost = True
    assert [gpu.model for gpu in devices.look()[:3]] == ["of torch"] * 3
    assert len(devices.look()) == 4
    assert "".join(capfd.readouterr()).count("GPU is lost") == 1


def test_rocm_is_told_by_torch_alone():
    class Untouched:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked of NVIDIA's driver")

    gpu = looked(Untouched(), RecordedCuda(order=(0,), initialized=True), hip=True)[0]
    assert gpu.backend == "rocm" and gpu.unified and gpu.uuid == uuid_of(0) and gpu.capability == "9.4"
    assert (gpu.own_bytes, gpu.others_bytes) == (3 * GIB, 21 * GIB)


def test_facts_are_those_a_choice_depends_on():
    gpu, host = looked(RecordedNvml(models=(H200,)), RecordedCuda(order=(0,)))
    assert (
        gpu.facts == DeviceFacts("cuda:0", 139 * GIB + GIB // 2, 130 * GIB, "9.0", unified=False) and host.facts is None
    )


def test_this_machine():
    *gpus, host = Devices().look()
    assert len(gpus) == torch.cuda.device_count()
    assert host.name == "cpu" and host.model and host.uuid == ""
    memory = psutil.virtual_memory()
    assert host.total_bytes == memory.total and abs(host.free_bytes - memory.available) < memory.total // 10
    assert 0 < host.own_bytes < host.total_bytes


def device(free_part: float, name: str = "cuda:0") -> DeviceState:
    total = 100 * GIB
    return DeviceState(name, H200, f"GPU-{name}", "cuda", total, int(free_part * total), 0, 0)


class Steered:
    """A source; each look waits until the test puts what is seen."""

    def __init__(self) -> None:
        self.sights: asyncio.Queue[Sight] = asyncio.Queue()
        self.taken = 0

    def put(self, *devices: DeviceState, **missing: str) -> None:
        self.sights.put_nowait(Sight(devices, missing))

    async def __call__(self) -> Sight:
        sight = await self.sights.get()
        self.taken += 1
        return sight


def test_a_rise_is_warned_of_once():
    async def run() -> None:
        source = Steered()
        watcher = DeviceWatcher(source, interval_s=0)
        source.put(device(0.5))
        await watcher.start()
        looks = watcher.looks()
        assert (await anext(looks)).warnings == {}
        told = []
        for free_part in (0.09, 0.05, 0.12, 0.09, 0.16, 0.09, 0.11):
            source.put(device(free_part), device(0.9, "cuda:1"))
            told.append(list((await anext(looks)).warnings.values()))
        assert [len(warnings) for warnings in told] == [1, 0, 0, 0, 0, 1, 0]
        assert "91% full: 91.0 of 100.0 GiB used" in told[0][0] and "cuda:0" in told[0][0]
        assert watcher.num_warnings == 2 and watcher.latest is not None
        await watcher.stop()

    asyncio.run(run())


def test_a_slow_reader_gets_the_newest_look_and_no_warning_is_lost():
    async def run() -> None:
        source = Steered()
        watcher = DeviceWatcher(source, interval_s=0)
        source.put(device(0.5))
        await watcher.start()
        slow, quick = watcher.looks(), watcher.looks()
        assert (await anext(slow)).devices == (await anext(quick)).devices == (device(0.5),)
        for free_part in (0.05, 0.4, 0.3):
            source.put(device(free_part))
            assert (await anext(quick)).devices == (device(free_part),)
        look = await anext(slow)
        assert look.devices == (device(0.3),) and len(look.warnings) == 1
        source.put(device(0.2))
        assert (await anext(slow)).warnings == {}
        late: Look = await anext(watcher.looks())
        assert late.devices == (device(0.2),), "the latest look comes at once"
        await watcher.stop()

    asyncio.run(run())


def test_what_is_missing_is_told_for_as_long_as_it_lasts():
    async def run() -> None:
        source = Steered()
        watcher = DeviceWatcher(source, interval_s=0)
        source.put(vae="is away")
        await watcher.start()
        looks = watcher.looks()
        assert (await anext(looks)).warnings == {"vae": "is away"}
        source.put(vae="is away")
        assert (await anext(looks)).warnings == {"vae": "is away"} and watcher.num_warnings == 0
        source.put()
        assert (await anext(looks)).warnings == {}
        await watcher.stop()

    asyncio.run(run())


def test_a_stopped_watcher_sends_its_readers_away():
    async def run() -> None:
        source = Steered()
        watcher = DeviceWatcher(source, interval_s=0)
        with pytest.raises(Unavailable, match="not watched yet"):
            await anext(watcher.looks())
        source.put(device(0.5))
        await watcher.start()
        looks = watcher.looks()
        await anext(looks)
        waiting = asyncio.ensure_future(anext(looks))
        await asyncio.sleep(0)  # it waits now
        await watcher.stop()
        with pytest.raises(Unavailable, match="draining"):
            await waiting
        with pytest.raises(Unavailable, match="draining"):
            await anext(watcher.looks())

    asyncio.run(run())


def test_a_source_that_breaks_ends_the_watch_loudly(capfd):
    async def run() -> None:
        source = Steered()
        source.put(device(0.5))
        watcher = DeviceWatcher(source, interval_s=0)
        await watcher.start()
        looks = watcher.looks()
        await anext(looks)
        source.sights.put_nowait(None)  # type: ignore[arg-type]
        with pytest.raises(Unavailable):
            await anext(looks)
        await watcher.stop()

    asyncio.run(run())
    assert "not watched any more" in "".join(capfd.readouterr())
