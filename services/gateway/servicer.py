"""JobService, ModelService, WorkerService and SystemService: protobuf to domain and back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import grpc

from ovi.common.v1 import system_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from services.gateway.artifacts import is_job_id
from services.gateway.auth.caller import current_caller
from services.gateway.auth.grpc_gate import address_of
from services.gateway.engine import GatewayEngine
from services.gateway.messages import filter_from_proto, job_to_proto, model_to_proto, submission_from_proto
from services.gateway.stages import StageClients
from services.gateway.system import StackSystem
from services.gateway.workers.listing import worker_to_proto
from services.gateway.workers.registry import Registry
from shared.errors import InvalidRequest
from shared.generation_proto import size_to_proto
from shared.memory.watcher import DeviceWatcher
from shared.pictures import MAX_PICTURE_BYTES
from shared.system_proto import vram_mode_from_proto
from shared.system_service import DevicesServicer
from shared.tensors.framing import CHUNK_BYTES


class JobServicer(pb_grpc.JobServiceServicer):
    """Makes and manages jobs."""

    def __init__(self, engine: GatewayEngine) -> None:
        self._engine = engine

    async def CreateJob(self, request: pb.CreateJobRequest, context: grpc.aio.ServicerContext) -> pb.CreateJobResponse:
        job = await self._engine.create(submission_from_proto(request), request.parameters)
        return pb.CreateJobResponse(job=job_to_proto(job))

    async def GetJob(self, request: pb.GetJobRequest, context: grpc.aio.ServicerContext) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=job_to_proto(await self._engine.get(_checked_id(request.id))))

    async def ListJobs(self, request: pb.ListJobsRequest, context: grpc.aio.ServicerContext) -> pb.ListJobsResponse:
        page = await self._engine.page(
            page_size=request.page_size, page_token=request.page_token, wanted=filter_from_proto(request)
        )
        return pb.ListJobsResponse(jobs=map(job_to_proto, page.jobs), next_page_token=page.next_page_token)

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchJobResponse]:
        async with contextlib.aclosing(self._engine.watch(_checked_id(request.id))) as jobs:
            async for job in jobs:
                yield pb.WatchJobResponse(job=job_to_proto(job))

    async def CancelJob(self, request: pb.CancelJobRequest, context: grpc.aio.ServicerContext) -> pb.CancelJobResponse:
        return pb.CancelJobResponse(job=job_to_proto(await self._engine.cancel(_checked_id(request.id))))

    async def BatchCreate(
        self, request: pb.BatchCreateRequest, context: grpc.aio.ServicerContext
    ) -> pb.BatchCreateResponse:
        jobs = await self._engine.create_batch(submission_from_proto(request), request)
        return pb.BatchCreateResponse(batch_id=jobs[0].submission.batch_id, job_ids=[job.id for job in jobs])

    async def PauseJob(self, request: pb.PauseJobRequest, context: grpc.aio.ServicerContext) -> pb.PauseJobResponse:
        return pb.PauseJobResponse(job=job_to_proto(await self._engine.pause(_checked_id(request.id))))

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: grpc.aio.ServicerContext) -> pb.ResumeJobResponse:
        return pb.ResumeJobResponse(job=job_to_proto(await self._engine.resume(_checked_id(request.id))))

    async def QueueStats(
        self, request: pb.QueueStatsRequest, context: grpc.aio.ServicerContext
    ) -> pb.QueueStatsResponse:
        counts, stats = await asyncio.gather(self._engine.count_by_state(), self._engine.stats())
        numbers = {state.value: count for state, count in counts.items()}
        return pb.QueueStatsResponse(num_jobs=numbers, wait_seconds=stats.wait_s)

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: grpc.aio.ServicerContext) -> pb.DeleteJobResponse:
        await self._engine.delete(_checked_id(request.id))
        return pb.DeleteJobResponse()

    async def DownloadVideo(
        self, request: pb.DownloadVideoRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DownloadVideoResponse]:
        async for chunk in await self._engine.video(_checked_id(request.id)):
            yield pb.DownloadVideoResponse(chunk=chunk)

    async def UploadImage(
        self, request_iterator: AsyncIterator[pb.UploadImageRequest], context: grpc.aio.ServicerContext
    ) -> pb.UploadImageResponse:
        picture = bytearray()
        async for request in request_iterator:
            if len(request.chunk) > CHUNK_BYTES:
                raise InvalidRequest.of("chunk", f"got {len(request.chunk)} bytes, allowed is at most {CHUNK_BYTES}")
            picture += request.chunk
            if len(picture) > MAX_PICTURE_BYTES:
                what = f"got over {MAX_PICTURE_BYTES} bytes together, allowed is at most that; make the picture smaller"
                raise InvalidRequest.of("chunk", what)
        image = await self._engine.keep_image(bytes(picture))
        return pb.UploadImageResponse(image_id=image.id, size=size_to_proto(image.height, image.width))


class ModelServicer(pb_grpc.ModelServiceServicer):
    """Tells what can be made."""

    def __init__(self, engine: GatewayEngine) -> None:
        self._engine = engine

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[model_to_proto(model) for model in await self._engine.models()])


class StackSystemServicer(DevicesServicer):
    """Devices and memory of the whole stack."""

    def __init__(self, watcher: DeviceWatcher, system: StackSystem, clients: StageClients) -> None:
        super().__init__(watcher)
        self._system = system
        self._clients = clients

    async def GetPlan(
        self, request: system_pb2.GetPlanRequest, context: grpc.aio.ServicerContext
    ) -> system_pb2.GetPlanResponse:
        vram_mode_from_proto(request.vram_mode, field="vram_mode")
        return system_pb2.GetPlanResponse(plan=await self._system.plan(request))

    async def SetMode(
        self, request: system_pb2.SetModeRequest, context: grpc.aio.ServicerContext
    ) -> system_pb2.SetModeResponse:
        vram_mode_from_proto(request.vram_mode, field="vram_mode")
        begun_s = time.monotonic()
        plan = await self._system.set_mode(request)
        return system_pb2.SetModeResponse(plan=plan, seconds=time.monotonic() - begun_s)

    async def ListWorkers(
        self, request: system_pb2.ListWorkersRequest, context: grpc.aio.ServicerContext
    ) -> system_pb2.ListWorkersResponse:
        shows_jobs = current_caller().key_filter is None
        workers = [worker_to_proto(view, shows_jobs=shows_jobs) for view in self._clients.views()]
        return system_pb2.ListWorkersResponse(workers=workers)


class WorkerServicer(pb_grpc.WorkerServiceServicer):
    """Takes registrations of workers."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def RegisterWorker(
        self, request: pb.RegisterWorkerRequest, context: grpc.aio.ServicerContext
    ) -> pb.RegisterWorkerResponse:
        lease_s = self._registry.register(
            request.stage,
            request.address,
            caller_address=address_of(context.peer()),
            key_id=current_caller().key_id,
        )
        return pb.RegisterWorkerResponse(lease_seconds=lease_s)

    async def UnregisterWorker(
        self, request: pb.UnregisterWorkerRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnregisterWorkerResponse:
        self._registry.unregister(request.stage, request.address, key_id=current_caller().key_id)
        return pb.UnregisterWorkerResponse()


def _checked_id(job_id: str) -> str:
    if not is_job_id(job_id):
        raise InvalidRequest.of(
            "id", f"got {job_id[:64]!r}, allowed is job_ and 26 letters and digits, as CreateJob gave"
        )
    return job_id
