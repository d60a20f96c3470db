"""Workers as protobuf, and what they say of themselves."""

from __future__ import annotations

from ovi.common.v1 import system_pb2 as pb
from services.gateway.workers.choosing import Report, WorkerState
from services.gateway.workers.replicas import WorkerSource, WorkerView
from shared.system_proto import vram_mode_from_proto, vram_mode_to_proto

_SOURCES = {
    WorkerSource.ADDRESS: pb.WORKER_SOURCE_ADDRESS,
    WorkerSource.NAME: pb.WORKER_SOURCE_NAME,
    WorkerSource.REGISTERED: pb.WORKER_SOURCE_REGISTERED,
}
_STATES = {
    WorkerState.UNKNOWN: pb.WORKER_STATE_UNSPECIFIED,
    WorkerState.SERVING: pb.WORKER_STATE_SERVING,
    WorkerState.NOT_SERVING: pb.WORKER_STATE_NOT_SERVING,
    WorkerState.UNREACHABLE: pb.WORKER_STATE_UNREACHABLE,
}


def report_from_proto(worker: pb.Worker) -> Report:
    """What a worker says of itself.

    Raises:
        InvalidRequest: a mode that has no name here.
    """
    return Report(
        stage=worker.stage,
        models=tuple(worker.models),
        loaded_model=worker.loaded_model,
        loaded_mode=vram_mode_from_proto(worker.loaded_vram_mode, field="loaded_vram_mode"),
        loaded_loras=tuple(worker.loaded_loras),
        mode=vram_mode_from_proto(worker.vram_mode, field="vram_mode"),
        allocation=worker.allocation,
        device=worker.device,
        free_bytes=worker.free_bytes,
        total_bytes=worker.total_bytes,
        num_pending=worker.num_pending,
        num_cut=worker.num_cut,
        cut_s=worker.cut_s,
    )


def worker_to_proto(view: WorkerView, *, shows_jobs: bool) -> pb.Worker:
    """A worker as the gateway sees it.

    Args:
        view: of it.
        shows_jobs: whether the caller may know of everybody's jobs.
    """
    told = view.report or Report(view.stage)
    return pb.Worker(
        stage=view.stage,
        address=view.address,
        source=_SOURCES[view.source],
        state=_STATES[view.state],
        reason=view.reason,
        models=told.models,
        loaded_model=told.loaded_model,
        loaded_vram_mode=vram_mode_to_proto(told.loaded_mode),
        loaded_loras=told.loaded_loras,
        vram_mode=vram_mode_to_proto(told.mode),
        allocation=told.allocation,
        device=told.device,
        free_bytes=told.free_bytes,
        total_bytes=told.total_bytes,
        num_pending=view.num_pending,
        num_cut=told.num_cut,
        cut_s=told.cut_s,
        job_ids=view.job_ids if shows_jobs else (),
        passed_over_s=view.passed_over_s,
    )
