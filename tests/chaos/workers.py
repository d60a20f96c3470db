"""One scripted stage as a process that can be killed: `python -m tests.chaos.workers --port N --stage S --log FILE`.

The fusion stage takes its time for every step, gives checkpoints out, and notes in the log what it begins and does. The
VAE makes clips that can be played.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from ovi.fusion.v1 import fusion_pb2
from services.fusion.sampling.control import RunControl, StateGiven
from services.fusion.sampling.denoise import Latents, RunState, StepDone
from shared.logging import configure_logging
from shared.tensors.store import Lease, TensorStore
from tests.chaos.clips import encoded
from tests.grpc.scripted_stages import DenoiseCall, ScriptedFusion, ScriptedTextEncoder, ScriptedVae

STEP_S = 0.03
TRAVEL_S = 0.1
"""Until a tensor arrives: without being waited for, a checkpoint would be some steps late, as one of 169 MB can be."""
_NOTHING = Latents(torch.zeros(0), torch.zeros(0))


class FarAwayStore(TensorStore):
    """From which tensors take their time."""

    def get(self, tensor_id: str) -> Lease:
        """After a while."""
        time.sleep(TRAVEL_S)
        return super().get(tensor_id)


class PacedFusion(ScriptedFusion):
    """Denoises by the clock, steered as the real one is; its clips depend on the seed alone."""

    log = -1
    store_type = FarAwayStore

    def _events(self, call: DenoiseCall) -> Iterator[fusion_pb2.DenoiseResponse]:
        events = super()._events(call)
        begun = next(events)
        call.commands.put("finish")
        self._note("begin", call, begun.begun.steps_done)
        yield begun
        control = RunControl(call.request.checkpoint_steps)
        call.on_over = control.leave
        if call.ended.is_set():
            return
        for event in control.steer(self._paced(call, events), begun.begun.steps_done):
            if isinstance(event, fusion_pb2.DenoiseResponse):
                yield event
            elif isinstance(event, StepDone):
                step = fusion_pb2.Step(index=event.index, total=event.total, sigma=event.sigma, seconds=event.seconds)
                yield fusion_pb2.DenoiseResponse(step=step)
            elif isinstance(event, StateGiven):
                checkpoint = self.checkpoint(event.state.steps_done, event.settled.set)
                yield fusion_pb2.DenoiseResponse(checkpoint=checkpoint)

    def _paced(
        self, call: DenoiseCall, events: Iterator[fusion_pb2.DenoiseResponse]
    ) -> Generator[fusion_pb2.DenoiseResponse | StepDone, None, None]:
        for event in events:
            if event.WhichOneof("event") != "step":
                yield event
                continue
            step = event.step
            if call.ended.wait(STEP_S):
                return
            self._note("step", call, step.index)
            state = RunState(step.index, 0, _NOTHING, {}, {}) if step.index < step.total else None
            yield StepDone(step.index, step.total, step.sigma, step.seconds, state=state)

    def _note(self, what: str, call: DenoiseCall, index: int) -> None:
        # A short write to a file that is appended to is never torn.
        os.write(self.log, f"{what} {call.request.options.seed} {index}\n".encode())


class PlayableVae(ScriptedVae):
    """Its clips can be played."""

    chunk_bytes = 8 << 10

    def made_of(self, video: torch.Tensor, audio: torch.Tensor) -> bytes:
        return encoded(video, audio)


_KINDS = {"text_encoder": ScriptedTextEncoder, "fusion": PacedFusion, "vae": PlayableVae}


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--stage", choices=_KINDS, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    configure_logging(args.stage, level="warning")
    PacedFusion.log = os.open(args.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    stage = _KINDS[args.stage]()
    if args.port:
        stage.stop()
        stage.port = args.port
        stage.start()
    sys.stderr.write(json.dumps({"event": "listening", "address": stage.address}) + "\n")
    sys.stderr.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
