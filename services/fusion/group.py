"""The engine on several ranks: rank 0 leads, the others follow it step by step."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from services.fusion.engine import FusionEngine, ModeLowered
from services.fusion.model.fusion import FusionModel
from services.fusion.ops import Execution
from services.fusion.parallel.groups import Groups, make_groups
from services.fusion.parallel.plan import ParallelPlan
from services.fusion.request import RunInputs, RunSpec
from services.fusion.sampling.denoise import Latents, RunState, StepDone
from services.fusion.sampling.run_file import state_of, tensors_of
from shared.errors import CheckpointError, FailedPrecondition
from shared.group.control import Command, ControlChannel
from shared.group.ranks import Fellowship
from shared.group.steps import follow as follow_commands
from shared.group.steps import follow_steps, lead, load_together, stop_followers
from shared.logging import get_logger
from shared.memory.choose import FusionPlan
from shared.memory.modes import VramMode
from shared.sampling_options import SamplingOptions, Solver

log = get_logger(__name__)

_PLAN, _LOAD, _RUN = "plan", "load", "run"
_START = "start."
"""Before the names of the tensors of the state from which a run goes on."""


def share_plan(plan: ParallelPlan, channel: ControlChannel) -> Groups:
    """The groups of rank 0's plan, which counts on every rank, whatever the flags and the memory there are."""
    if channel.rank == 0:
        channel.send(Command(_PLAN, asdict(plan), {}))
    else:
        plan = ParallelPlan(**channel.receive().fields)
    return make_groups(plan)


class LeadingEngine(FusionEngine):
    """Rank 0's engine: everything that touches the model is done by all ranks together.

    A failure between the first and the last collective of a run cannot be undone on the other ranks; it ends the group.
    """

    def __init__(
        self,
        checkpoints: Path,
        device: torch.device,
        dtype: torch.dtype,
        execution: Execution,
        groups: Groups,
        fellowship: Fellowship,
        vram_mode: VramMode = VramMode.STANDARD,
        memory_bytes: int | None = None,
    ) -> None:
        """
        Args:
            checkpoints: folder in the released layout.
            device: of this rank.
            dtype: arithmetic of the model.
            execution: how passes are computed.
            groups: both axes of the plan.
            fellowship: with the other ranks.
            vram_mode: see FusionEngine.
            memory_bytes: see there.
        """
        super().__init__(checkpoints, device, dtype, execution, groups, vram_mode=vram_mode, memory_bytes=memory_bytes)
        self._fellowship = fellowship
        self._num_ranks = groups.guidance.size * groups.sequence.size
        self._channel = fellowship.channel

    def load(self, model: str, mode: VramMode = VramMode.AUTO) -> FusionModel:
        """See FusionEngine.load; on all ranks."""
        if self.loaded_id != model:
            self._channel.send(Command(_LOAD, {"model": model}, {}))
            try:
                return load_together(partial(super().load, model, mode), model, self._channel)
            except CheckpointError:
                # It may be here and nowhere else; the next run of it must ask all ranks again.
                self.forget()
                raise
        return super().load(model, mode)

    def set_mode(self, mode: VramMode, model: str) -> FusionPlan:
        """Not with several ranks: only modes in which everything stays where it is are for them.

        Raises:
            FailedPrecondition: always.
        """
        raise FailedPrecondition(
            f"the fusion service runs on {self._num_ranks} GPUs, whose mode is chosen at the start;"
            " start it again with another --vram-mode or --gpus"
        )

    def denoise(
        self, spec: RunSpec, inputs: RunInputs, mode: VramMode = VramMode.AUTO, start: RunState | None = None
    ) -> Generator[StepDone | ModeLowered | Latents, None, None]:
        """See FusionEngine.denoise; on all ranks. Whether a next step is taken is decided here, once a step."""
        self.load(spec.model)
        return lead(self._channel, _run_command(spec, inputs, start), super().denoise(spec, inputs, mode, start))

    def stop_followers(self) -> None:
        """Let the other ranks end, and leave the group."""
        stop_followers(self._fellowship)


def follow(engine: FusionEngine, fellowship: Fellowship) -> None:
    """On every rank but 0: do what rank 0 says until it says stop, then leave the group.

    Raises:
        RuntimeError: rank 0 is gone, or a collective failed; the process should end.
    """
    channel = fellowship.channel

    def load(command: Command) -> None:
        """If the file is damaged, live on: rank 0 tells the caller."""
        model = command.fields["model"]
        try:
            load_together(partial(engine.load, model), model, channel)
        except CheckpointError as error:
            log.error("model cannot be loaded", model=model, reason=error.message)

    def run(command: Command) -> None:
        spec, inputs, start = _run_of(command)
        follow_steps(channel, engine.denoise(spec, inputs, start=start))

    follow_commands(fellowship, {_LOAD: load, _RUN: run})


def _run_command(spec: RunSpec, inputs: RunInputs, start: RunState | None) -> Command:
    tensors = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    content: dict[str, Any] = {"spec": _spec_to_json(spec), "start": None}
    if start is not None:
        content["start"] = [start.steps_done, start.steps_reused]
        tensors |= {_START + name: tensor for name, tensor in tensors_of(start).items()}
    return Command(_RUN, content, tensors)


def _run_of(command: Command) -> tuple[RunSpec, RunInputs, RunState | None]:
    kept = {name.removeprefix(_START): t for name, t in command.tensors.items() if name.startswith(_START)}
    inputs = {name: t for name, t in command.tensors.items() if not name.startswith(_START)}
    start = None
    if command.fields["start"] is not None:
        steps_done, steps_reused = command.fields["start"]
        start = state_of(steps_done, steps_reused, kept)  # type: ignore[arg-type]
    return _spec_from_json(command.fields["spec"]), RunInputs(**inputs), start  # type: ignore[arg-type]


def _spec_to_json(spec: RunSpec) -> dict[str, object]:
    content = asdict(spec)
    content["options"]["solver"] = spec.options.solver.value
    content["vram_mode"] = spec.vram_mode.value
    return content


def _spec_from_json(content: dict[str, object]) -> RunSpec:
    options = dict(content.pop("options"))  # type: ignore[call-overload]
    options["solver"] = Solver(options["solver"])
    content["vram_mode"] = VramMode(content["vram_mode"])
    return RunSpec(options=SamplingOptions(**options), **content)  # type: ignore[arg-type]
