"""The engine on several ranks: rank 0 leads, the others follow it step by step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch

from services.fusion.engine import FusionEngine
from services.fusion.model.fusion import FusionModel
from services.fusion.ops import Execution
from services.fusion.parallel.groups import Groups
from services.fusion.request import RunInputs, RunSpec
from services.fusion.sampling.denoise import Latents, StepDone
from shared.errors import CheckpointError
from shared.group.control import Command, ControlChannel
from shared.group.ranks import EXIT_GROUP_FAILED, Fellowship
from shared.logging import get_logger
from shared.sampling_options import SamplingOptions, Solver

log = get_logger(__name__)

_LOAD, _RUN, _STOP = "load", "run", "stop"


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
    ) -> None:
        """
        Args:
            checkpoints: folder in the released layout.
            device: of this rank.
            dtype: arithmetic of the model.
            execution: how passes are computed.
            groups: both axes of the plan.
            fellowship: with the other ranks.
        """
        super().__init__(checkpoints, device, dtype, execution, groups)
        self._fellowship = fellowship
        self._channel = fellowship.channel

    def load(self, model: str) -> FusionModel:
        """See FusionEngine.load; on all ranks."""
        if self._loaded is None or self._loaded[0] != model:
            self._channel.send(Command(_LOAD, {"model": model}, {}))
            load_together(super().load, model, self._channel)
        return super().load(model)

    def denoise(self, spec: RunSpec, inputs: RunInputs) -> Iterator[StepDone | Latents]:
        """See FusionEngine.denoise; on all ranks. Whether a next step is taken is decided here, once a step."""
        self.load(spec.model)
        self._channel.send(Command(_RUN, _spec_to_json(spec), _tensors_of(inputs)))
        try:
            for event in super().denoise(spec, inputs):
                wanted = False
                try:
                    yield event
                    wanted = True
                finally:
                    if isinstance(event, StepDone):
                        self._channel.go_on(wanted)
        except Exception as error:
            log.error("the group has failed and ends", exc_info=error)
            os._exit(EXIT_GROUP_FAILED)

    def stop_followers(self) -> None:
        """Let the other ranks end, and leave the group."""
        self._fellowship.part()
        self._channel.send(Command(_STOP, {}, {}))
        self._fellowship.leave()


def follow(engine: FusionEngine, fellowship: Fellowship) -> None:
    """On every rank but 0: do what rank 0 says until it says stop, then leave the group.

    Raises:
        RuntimeError: rank 0 is gone, or a collective failed; the process should end.
    """
    channel = fellowship.channel
    while (command := channel.receive()).kind != _STOP:
        if command.kind == _LOAD:
            _load_or_note(engine, command.fields["model"], channel)
        else:
            for event in engine.denoise(_spec_from_json(command.fields), RunInputs(**command.tensors)):  # type: ignore[arg-type]
                if isinstance(event, StepDone) and not channel.go_on():
                    break
    fellowship.leave()


def load_together(load: Callable[[str], FusionModel], model: str, channel: ControlChannel) -> None:
    """Load on this rank and learn whether all ranks could.

    Raises:
        CheckpointError: this rank or another could not.
    """
    try:
        load(model)
    except CheckpointError:
        channel.agree(False)
        raise
    if not channel.agree(True):
        raise CheckpointError(f"{model} could not be loaded on every rank; the logs of the ranks say why")


def _load_or_note(engine: FusionEngine, model: str, channel: ControlChannel) -> None:
    """A follower whose file is damaged lives on: rank 0 has told the caller."""
    try:
        load_together(engine.load, model, channel)
    except CheckpointError as error:
        log.error("model cannot be loaded", model=model, reason=error.message)


def _tensors_of(inputs: RunInputs) -> dict[str, torch.Tensor | None]:
    return {field.name: getattr(inputs, field.name) for field in fields(inputs)}


def _spec_to_json(spec: RunSpec) -> dict[str, object]:
    content = asdict(spec)
    content["options"]["solver"] = spec.options.solver.value
    return content


def _spec_from_json(content: dict[str, object]) -> RunSpec:
    options = dict(content.pop("options"))  # type: ignore[call-overload]
    options["solver"] = Solver(options["solver"])
    return RunSpec(options=SamplingOptions(**options), **content)  # type: ignore[arg-type]
