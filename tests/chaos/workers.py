"""One scripted stage as a process that can be killed: `python -m tests.chaos.workers --port N --stage S --log FILE`.

The fusion stage takes its time for every step, gives checkpoints out, and notes in the log what it begins and does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ovi.fusion.v1 import fusion_pb2
from tests.grpc.scripted_stages import DenoiseCall, ScriptedFusion, ScriptedTextEncoder, ScriptedVae

STEP_S = 0.03


class PacedFusion(ScriptedFusion):
    """Denoises by the clock; its clips depend on the seed alone, as those of the real one do."""

    log = -1

    def _events(self, call: DenoiseCall) -> Iterator[fusion_pb2.DenoiseResponse]:
        every = call.request.checkpoint_steps
        events = super()._events(call)
        begun = next(events)
        call.commands.put("finish")
        self._note("begin", call, begun.begun.steps_done)
        yield begun
        for event in events:
            if event.WhichOneof("event") == "step":
                if call.ended.wait(STEP_S):
                    return
                self._note("step", call, event.step.index)
                yield event
                if every and event.step.index % every == 0 and event.step.index < event.step.total:
                    yield fusion_pb2.DenoiseResponse(checkpoint=self.checkpoint(event.step.index))
            else:
                yield event

    def _note(self, what: str, call: DenoiseCall, index: int) -> None:
        # A short write to a file that is appended to is never torn.
        os.write(self.log, f"{what} {call.request.options.seed} {index} {time.monotonic():.3f}\n".encode())


_KINDS = {"text_encoder": ScriptedTextEncoder, "fusion": PacedFusion, "vae": ScriptedVae}


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--stage", choices=_KINDS, required=True)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
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
