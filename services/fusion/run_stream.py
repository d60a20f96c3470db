"""From the events of a run on the device to the messages of its call; checkpoints are made beside the run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from ovi.fusion.v1 import fusion_pb2 as pb
from services.fusion.engine import ModeLowered
from services.fusion.sampling.control import RunBegun, RunControl, RunPaused, StateGiven
from services.fusion.sampling.denoise import Latents, StepDone
from services.fusion.sampling.run_file import Identity, pack
from shared.errors import ResourceExhausted
from shared.logging import get_logger
from shared.memory.modes import VramMode
from shared.system_proto import vram_mode_to_proto
from shared.tensors.service import TensorServer
from shared.tensors.store import Lease

log = get_logger(__name__)

Event = StepDone | ModeLowered | Latents | RunBegun | StateGiven | RunPaused


class RunStream:
    """The messages of one Denoise call."""

    def __init__(
        self,
        tensors: TensorServer,
        control: RunControl,
        mode: VramMode,
        identify: Callable[[VramMode], Identity],
        begun: pb.Begun,
    ) -> None:
        """
        Args:
            tensors: offers what the run makes.
            control: of the run; left when the messages end.
            mode: in which the run is made at first.
            identify: gives the identity of the run in a mode, see `run_file`; called in a thread.
            begun: the first message.
        """
        self._tensors = tensors
        self._control = control
        self._mode = mode
        self._identify = identify
        self._begun = begun
        self._offered = ""
        """Id of the last checkpoint; empty if it is to outlive the call."""

    async def messages(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[pb.DenoiseResponse, None]:
        """The messages, as they come.

        Args:
            events: of the run; the caller closes them.

        Raises:
            OviError: what `events` raises.
        """
        upcoming = asyncio.create_task(_next(events))
        packing: asyncio.Task[pb.DenoiseResponse | None] | None = None
        try:
            while True:
                under_way = {upcoming} if packing is None else {upcoming, packing}
                await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                event = upcoming.result() if upcoming.done() else None
                # Two states meet only where a pause comes right after a checkpoint.
                if packing is not None and (packing.done() or isinstance(event, StateGiven | RunPaused)):
                    await asyncio.wait({packing})
                    if (checkpoint := packing.result()) is not None:
                        yield checkpoint
                    packing = None
                if not upcoming.done():
                    continue
                if event is None:
                    return
                if isinstance(event, StateGiven):
                    packing = asyncio.create_task(self._checkpoint(event, self._mode))
                else:
                    yield self._message(event)
                upcoming = asyncio.create_task(_next(events))
        finally:
            self._control.leave()
            upcoming.cancel()
            await asyncio.wait({upcoming} if packing is None else {upcoming, packing})
            if not upcoming.cancelled():
                upcoming.exception()  # raised above, if it mattered
            self._tensors.store.release(self._offered)

    async def _checkpoint(self, given: StateGiven, mode: VramMode) -> pb.DenoiseResponse | None:
        """Pack a state of a run in this mode and offer it; None if there is no room for it."""
        store, settle = self._tensors.store, given.settled.set

        def offer() -> Lease:
            return store.put(pack(given.state, self._identify(mode), mode), on_end=settle)

        try:
            lease = await asyncio.to_thread(offer)
        except ResourceExhausted as error:
            log.warning("a checkpoint was left out", steps_done=given.state.steps_done, reason=error.message)
            settle()
            return None
        self._offered = lease.tensor_id
        state = self._tensors.publish(lease)
        return pb.DenoiseResponse(checkpoint=pb.Checkpoint(state=state, steps_done=given.state.steps_done))

    def _message(self, event: StepDone | ModeLowered | Latents | RunBegun | RunPaused) -> pb.DenoiseResponse:
        if isinstance(event, StepDone):
            return pb.DenoiseResponse(step=_step(event))
        if isinstance(event, RunBegun):
            return pb.DenoiseResponse(begun=self._begun)
        if isinstance(event, ModeLowered):
            self._mode = event.mode
            lowered = pb.ModeLowered(vram_mode=vram_mode_to_proto(event.mode), reason=event.reason)
            return pb.DenoiseResponse(mode_lowered=lowered)
        if isinstance(event, RunPaused):
            self._offered = ""
            return pb.DenoiseResponse(paused=pb.Paused())
        store, publish = self._tensors.store, self._tensors.publish
        video, audio = publish(store.put(event.video_CFHW)), publish(store.put(event.audio_SC))
        mode = vram_mode_to_proto(self._mode)
        return pb.DenoiseResponse(result=pb.Result(video_latent=video, audio_latent=audio, vram_mode=mode))


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)


def _step(event: StepDone) -> pb.Step:
    return pb.Step(index=event.index, total=event.total, sigma=event.sigma, seconds=event.seconds, reused=event.reused)
