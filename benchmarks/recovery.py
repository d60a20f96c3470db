"""Break a run in the middle of a step, in several ways, and time how the stack comes back.

`python -m benchmarks.recovery --checkpoints DIR [--gpus N] [--run 720x720_5s:20] [--bound-s 180] [--save]`
`... --device cpu --gpus 2` does it with ranks on the CPU; the tiny checkpoint will do.

Starts the stack of `ovi up` on free ports. Each fault meets a job that has done some steps (`--steps-before`; with more
than the checkpoint interval it goes on from a checkpoint); afterwards the service must serve, the job must have ended
as it should, with the latents of an undisturbed job if it made any, and another job must be made, each within the
bound. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import psutil
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file

from benchmarks.common import describe_run, result_path, save_result
from benchmarks.stack import Run, create, watch
from cli.stack.gpus import gpus_for
from cli.stack.memory import DeviceFlags, choose_devices
from cli.stack.plan import ServiceSpec, StackOptions, plan_stack
from cli.stack.stack import STACK_FILE, Stack, locked_data_dir, read_stack_file
from ovi.fusion.v1 import fusion_pb2, fusion_pb2_grpc
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc

ROOT = Path(__file__).parent.parent
SHORT_STEPS = 2
"""Of the job that follows each fault."""
_POLL_S = 0.02
_RPC_TIMEOUT_S = 5.0
_ENDED = (pb.JOB_STATE_COMPLETED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)


@dataclass(frozen=True)
class Recovery:
    """What followed a fault; seconds since it was caused."""

    fault: str
    ranks: int
    seen_s: float
    """The job told of it: a new attempt, or its end."""
    serving_s: float
    """Fusion served: by new processes where it had to restart, with nothing left of the job where it had not."""
    ended_s: float
    """The job had ended."""
    state: str
    attempts: int
    new_processes: bool
    """Every rank is another process than before."""
    same_latents: bool | None
    """The latents are those of an undisturbed job, to the bit; None if there are none."""


@dataclass(frozen=True)
class Expected:
    """How a fault has to end."""

    state: str
    attempts: int
    new_processes: bool


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in the middle of a step."""

    name: str
    cause: Callable[[Bench, str], None]
    """Causes it; given the job's id."""
    expected: Expected


class Bench:
    """A running stack and how to break it."""

    def __init__(
        self, stack: Stack, run: Run, steps_before: int, flag: Path, bound_s: float, channels: contextlib.ExitStack
    ) -> None:
        """
        Args:
            stack: serving.
            run: the job that meets each fault.
            steps_before: how many steps it has done then.
            flag: see benchmarks.faulty_fusion.
            bound_s: longest that anything may take.
            channels: where connections are kept.
        """
        self.run, self.steps_before, self.flag, self.bound_s = run, steps_before, flag, bound_s
        self._data_dir, self.ranks = stack.plan.options.data_dir, stack.plan.options.gpus
        address = next(spec.address for spec in stack.plan.stages if spec.name == "fusion")
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]
        fusion = channels.enter_context(grpc.insecure_channel(address, options=options))
        self.jobs = pb_grpc.JobServiceStub(channels.enter_context(grpc.insecure_channel(stack.plan.grpc_address)))
        self._health, self._fusion = health_pb2_grpc.HealthStub(fusion), fusion_pb2_grpc.FusionServiceStub(fusion)
        self._undisturbed: dict[str, torch.Tensor] = {}

    def processes(self) -> dict[int, psutil.Process]:
        """The processes of the fusion service by rank."""
        described = read_stack_file(self._data_dir)
        found: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.Error):
            service = psutil.Process(described["services"]["fusion"]["pid"] if described else 0)
            if self.ranks == 1:
                return {0: service}
            for child in service.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    found[int(child.environ().get("RANK", "-1"))] = child
        return {rank: process for rank, process in found.items() if rank >= 0}

    def serves(self) -> bool:
        """True if fusion says that it does."""
        try:
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=_RPC_TIMEOUT_S)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def is_idle(self) -> bool:
        """True if fusion has no run."""
        answer = self._fusion.DescribeModel(fusion_pb2.DescribeModelRequest(), timeout=_RPC_TIMEOUT_S)
        return bool(answer.num_pending == 0)

    def kill(self, rank: int) -> None:
        """SIGKILL a rank."""
        os.kill(self.processes()[rank].pid, signal.SIGKILL)

    def exhaust(self, rank: int) -> None:
        """Let a rank run out of memory in its next step."""
        self.flag.with_suffix(".new").write_text(str(rank))
        self.flag.with_suffix(".new").replace(self.flag)

    def cancel(self, job_id: str) -> None:
        """Cancel a job."""
        self.jobs.CancelJob(pb.CancelJobRequest(id=job_id), timeout=self.bound_s)

    def warm_up(self) -> None:
        """Make the run undisturbed, and keep its latents to compare with."""
        self._undisturbed = self._latents(watch(self.jobs, create(self.jobs, self.run), self.bound_s).id)

    def _latents(self, job_id: str) -> dict[str, torch.Tensor]:
        (file,) = self._data_dir.glob(f"**/{job_id}/latents.safetensors")
        return load_file(file)

    def _has_undisturbed_latents(self, job_id: str) -> bool:
        ours = self._latents(job_id)
        return all(torch.equal(ours[name], tensor) for name, tensor in self._undisturbed.items())

    def suffer(self, fault: Fault) -> Recovery:
        """Cause a fault in the middle of a job and wait for the end of all that follows."""
        before = {process.pid for process in self.processes().values()}
        job_id = create(self.jobs, self.run)
        states = self._states(job_id)
        done = next(
            job
            for job in states
            if job.progress.stage == pb.JOB_STAGE_DENOISE and job.progress.done >= self.steps_before
        )
        start = time.perf_counter()
        with ThreadPoolExecutor(1) as other:
            fault.cause(self, job_id)
            ready = other.submit(self._until_ready, before, fault.expected.new_processes)
            seen_s = None
            for job in states:
                if seen_s is None and (job.attempts > done.attempts or job.state in _ENDED):
                    seen_s = time.perf_counter() - start
            ended_s = time.perf_counter() - start
            serving_s = ready.result() - start
        assert seen_s is not None, "the last state of a watched job is its end"
        state = pb.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
        new = before.isdisjoint(process.pid for process in self.processes().values())
        return Recovery(
            fault.name,
            self.ranks,
            round(seen_s, 2),
            round(serving_s, 2),
            round(ended_s, 2),
            state,
            job.attempts,
            new,
            self._has_undisturbed_latents(job_id) if job.state == pb.JOB_STATE_COMPLETED else None,
        )

    def _states(self, job_id: str) -> Iterator[pb.Job]:
        for answer in self.jobs.WatchJob(pb.WatchJobRequest(id=job_id), timeout=self.bound_s):
            yield answer.job

    def _until_ready(self, before: set[int], new_processes: bool) -> float:
        """When (perf_counter) fusion served: with new processes, or idle with the old ones.

        Raises:
            TimeoutError: not within the bound.
        """
        deadline = time.perf_counter() + self.bound_s
        while time.perf_counter() < deadline:
            now = self.processes()
            if new_processes:
                ready = len(now) == self.ranks and before.isdisjoint(process.pid for process in now.values())
            else:
                ready = self.is_idle()
            if ready and self.serves():
                return time.perf_counter()
            time.sleep(_POLL_S)
        raise TimeoutError(f"fusion did not serve again within {self.bound_s:g} s")


def faults(ranks: int) -> list[Fault]:
    """What can go wrong on this number of ranks."""
    again = Expected("completed", 2, new_processes=True)
    last = ranks - 1
    found = [Fault("rank 0 killed", lambda bench, _: bench.kill(0), again)]
    if ranks > 1:
        found.append(Fault(f"rank {last} killed", lambda bench, _: bench.kill(last), again))
    # Alone, a service that ran out of memory says so and lives on; the same call would fail again.
    memory = again if ranks > 1 else Expected("failed", 1, new_processes=False)
    found.append(Fault(f"rank {last} out of memory", lambda bench, _: bench.exhaust(last), memory))
    cancelled = Expected("cancelled", 1, new_processes=False)
    found.append(Fault("cancelled", lambda bench, job_id: bench.cancel(job_id), cancelled))
    return found


def with_fault(spec: ServiceSpec, flag: Path) -> ServiceSpec:
    """The fusion service's process with the fault put in."""
    place = spec.command.index("services.fusion")
    command = (*spec.command[:place], "benchmarks.faulty_fusion", "--fault-file", str(flag), *spec.command[place + 1 :])
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return replace(spec, command=command, environment=spec.environment | {"PYTHONPATH": path})


@contextlib.asynccontextmanager
async def faulty_stack(options: StackOptions, flag: Path) -> AsyncIterator[Stack]:
    """`running_stack`, its fusion service with the fault put in."""
    with locked_data_dir(options.data_dir), contextlib.ExitStack() as at_end:
        flag.unlink(missing_ok=True)
        plan = plan_stack(options)
        at_end.callback((options.data_dir / STACK_FILE).unlink, missing_ok=True)
        at_end.callback(plan.close)
        plan.stages = tuple(with_fault(spec, flag) if spec.name == "fusion" else spec for spec in plan.stages)
        stack = Stack(plan, lambda change: None)
        try:
            await stack.start()
            yield stack
        finally:
            await stack.stop()


def check(recovery: Recovery, expected: Expected, bound_s: float) -> str:
    """What is wrong; empty if nothing is."""
    found = Expected(recovery.state, recovery.attempts, recovery.new_processes)
    if found != expected:
        return f"{recovery.fault}: expected {expected}, found {found}"
    if recovery.same_latents is False:
        return f"{recovery.fault}: the latents differ from those of an undisturbed job"
    longest = max(recovery.seen_s, recovery.serving_s, recovery.ended_s)
    return f"{recovery.fault}: took {longest:g} s, the bound is {bound_s:g} s" if longest > bound_s else ""


def measure_all(bench: Bench) -> tuple[list[Recovery], list[str]]:
    """Every fault, each followed by an ordinary job; what was measured, and what is wrong."""
    recoveries, wrong = [], []
    short = replace(bench.run, steps=SHORT_STEPS)
    bench.warm_up()
    for fault in faults(bench.ranks):
        recovery = bench.suffer(fault)
        recoveries.append(recovery)
        sys.stdout.write(f"{recovery}\n")
        sys.stdout.flush()
        wrong.append(check(recovery, fault.expected, bench.bound_s))
        watch(bench.jobs, create(bench.jobs, short), bench.bound_s)
    return recoveries, [words for words in wrong if words]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoints", type=Path, required=True)
    add("--data-dir", type=Path, default=Path("data/benchmark"))
    add("--run", default="720x720_5s:20", help="MODEL:STEPS of the job that meets each fault (default: %(default)s)")
    add("--steps-before", type=int, default=2, help="steps it has done when the fault comes (default: %(default)s)")
    add("--device", default="auto", help="of fusion and vae: auto, cpu, cuda")
    add("--gpus", default="auto", help="of the fusion service; ranks with --device cpu")
    add("--bound-s", type=float, default=180.0, help="longest that anything may take (default: %(default)s)")
    add("--save", action="store_true", help="keep the result in benchmarks/results")
    add("--json", type=Path, help="keep the result in this file")
    return parser


async def main() -> None:
    """Measure and print."""
    args = _parser().parse_args()
    folders = (args.data_dir.resolve(), args.checkpoints.resolve())
    flags = DeviceFlags(args.device, gpus=args.gpus)
    choice = choose_devices(flags, gpus_for(args.device), folders[1], lambda line: sys.stdout.write(f"{line}\n"))
    options = StackOptions(*folders, grpc_port=0, http_port=0, **vars(choice))
    flag = options.data_dir / "out_of_memory"
    async with faulty_stack(options, flag) as stack:
        with contextlib.ExitStack() as channels:
            bench = Bench(stack, Run.parse(args.run), args.steps_before, flag, args.bound_s, channels)
            recoveries, wrong = await asyncio.to_thread(measure_all, bench)
    if args.save or args.json:
        cuda = torch.cuda.is_available() and args.device != "cpu"
        described = describe_run("recovery", torch.device("cuda" if cuda else "cpu"), choice.gpus, args)
        save_result(args.json or result_path(described), described, recoveries)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    asyncio.run(main())
