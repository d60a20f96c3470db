"""Devices and memory of the whole stack: asked of the stages, and switched on all of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from ovi.common.v1 import system_pb2 as pb
from services.gateway.memory import StageDevices, combined_plan, host_of, merged_devices, named_key
from services.gateway.stages import FusionClient, StageClients, SystemClient
from shared.errors import FailedPrecondition, InvalidRequest, OutOfMemory, OviError, Unavailable
from shared.logging import get_logger
from shared.memory.choose import candidates
from shared.memory.device_state import DeviceState
from shared.memory.watcher import Sight
from shared.system_proto import vram_mode_to_proto

log = get_logger(__name__)


class StackSystem:
    """All stages as one system."""

    def __init__(self, clients: StageClients) -> None:
        self._clients = clients
        self._switching = asyncio.Lock()
        self.answers: tuple[StageDevices, ...] = ()
        """Of the last look, stage by stage."""
        self.devices: dict[str, DeviceState] = {}
        """Of the last look, by key."""

    async def look(self) -> Sight:
        """The devices of the stages that answer; the others are missing, with the reason."""
        stages = self._stages()
        found = await asyncio.gather(*(client.devices() for client in stages.values()), return_exceptions=True)
        answers, missing = [], {}
        for (label, client), devices in zip(stages.items(), found, strict=True):
            if isinstance(devices, OviError):
                missing[label] = f"devices of the {client.name} service are left out: {devices.message}"
            elif isinstance(devices, BaseException):
                raise devices
            else:
                answers.append(StageDevices(label, host_of(client.address), devices))
        self.answers = tuple(answers)
        self.devices = merged_devices(answers)
        return Sight(tuple(self.devices.values()), missing)

    async def plan(self, request: pb.GetPlanRequest) -> pb.MemoryPlan:
        """What a clip would take of the stack. An unspecified mode is the one that the fusion service chooses.

        Raises:
            InvalidRequest: a stage does not have the mode, model or size.
            Unavailable: a stage is away.
        """
        stages = self._whole()
        fusion, *others = stages.values()
        wish = pb.GetPlanRequest()
        wish.CopyFrom(request)
        chosen = await fusion.plan(wish, wait_for_ready=True)
        wish.vram_mode = chosen.vram_mode
        plans = await asyncio.gather(*(client.plan(wish, wait_for_ready=True) for client in others))
        return self._combined(dict(zip(stages, [chosen, *plans], strict=True)), stages)

    async def set_mode(self, request: pb.SetModeRequest) -> pb.MemoryPlan:
        """Switch every stage. Nothing is switched if the plan of one of them does not fit.

        Raises:
            OutOfMemory: it does not fit; with the numbers.
            InvalidRequest: a stage does not have the mode or model.
            Unavailable: a stage is away.
            FailedPrecondition: a stage refused when others had been switched already; names them.
        """
        async with self._switching:
            stages = self._whole()
            plan = await self._fitting(request)
            plans: dict[str, pb.MemoryPlan] = {}
            for label, client in stages.items():
                # Only the fusion service has variants.
                model = request.model if client.name == FusionClient.name else ""
                try:
                    plans[label] = await client.set_mode(pb.SetModeRequest(vram_mode=plan.vram_mode, model=model))
                except OviError as error:
                    if not plans:
                        raise
                    done = ", ".join(plans)
                    what = f"the {label} service was not switched ({error.message}), but {done} was"
                    raise FailedPrecondition(f"{what}; ask again, or for another mode") from None
            mode = pb.VramMode.Name(plan.vram_mode)
            log.info("mode switched", vram_mode=mode, model=request.model)
            return self._combined(plans, stages)

    async def _fitting(self, request: pb.SetModeRequest) -> pb.MemoryPlan:
        """The plan to switch to: of the mode that was named, else of the best one that the whole stack has memory for.

        Raises:
            OutOfMemory: none fits; with the numbers.
            InvalidRequest: the mode that was named, or the model, cannot be had.
        """
        if request.vram_mode != pb.VRAM_MODE_UNSPECIFIED:
            plans = [await self.plan(pb.GetPlanRequest(vram_mode=request.vram_mode, model=request.model))]
        else:
            present = await self.plan(pb.GetPlanRequest(model=request.model))
            device = self.devices.get(present.device)
            plans = []
            for mode in candidates(device.facts if device is not None else None):
                wish = pb.GetPlanRequest(vram_mode=vram_mode_to_proto(mode), model=request.model)
                # Not every mode can be had on a CPU, or on several GPUs.
                with contextlib.suppress(InvalidRequest):
                    plans.append(await self.plan(wish))
        fitting = next((plan for plan in plans if plan.fits), None)
        if fitting is None:
            raise OutOfMemory(f"nothing was switched: {plans[-1].explanation}")
        return fitting

    def _stages(self) -> dict[str, SystemClient]:
        """Every worker, in the order in which they are switched: what can fail for want of memory comes first."""
        pools = (self._clients.fusion, self._clients.vae, self._clients.text_encoder)
        stages: dict[str, SystemClient] = {}
        for worker in (worker for pool in pools for worker in pool.workers):
            # Further workers of a stage are told apart by their addresses.
            label = worker.name if worker.name not in stages else f"{worker.name} {worker.address}"
            stages[label] = worker.system
        return stages

    def _whole(self) -> dict[str, SystemClient]:
        """The same, for what takes a worker of each stage.

        Raises:
            Unavailable: a stage has none.
        """
        if missing := [pool.name for pool in self._clients.by_stage.values() if not pool.workers]:
            raise Unavailable(f"no {' and no '.join(missing)} service is known yet")
        return self._stages()

    def _combined(self, plans: Mapping[str, pb.MemoryPlan], stages: Mapping[str, SystemClient]) -> pb.MemoryPlan:
        for label, plan in plans.items():
            if plan.device and plan.device not in self.devices:
                plan.device = named_key(host_of(stages[label].address), plan.device)
        return combined_plan(plans, self.devices)
