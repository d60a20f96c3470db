"""Stages that do what a test tells them, step by step: peers of the gateway that speak the real protocol.

Tensors travel through the project's own store, server and resolver, and a "clip" is a hash of the latents it was made
of, so that a test sees whether the right bytes reached the right place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import google_crc32c
import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from safetensors.torch import save

from ovi.common.v1 import generation_pb2, system_pb2, system_pb2_grpc, tensor_pb2
from ovi.fusion.v1 import fusion_pb2, fusion_pb2_grpc
from ovi.text_encoder.v1 import text_encoder_pb2, text_encoder_pb2_grpc
from ovi.vae.v1 import vae_pb2, vae_pb2_grpc
from shared.errors import OviError, Unavailable
from shared.grpc_server import status_of
from shared.tensors.framing import value_bytes
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver

MODEL = "720x720_5s"
AREA = 64 * 64
NUM_FRAMES = 121
WAIT_S = 60.0
"""Longest that a test waits for anything."""
_MAX_BYTES = 1 << 26


def latents_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the scripted fusion service makes of a seed: (48, 31, 4, 4) and (157, 20)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(48, 31, 4, 4, generator=generator), torch.randn(157, 20, generator=generator)


def clip_of(seed: int) -> bytes:
    """What the scripted VAE service makes of the latents of a seed; more than one chunk of a download."""
    return _clip(*latents_of(seed))


def _clip(video: torch.Tensor, audio: torch.Tensor) -> bytes:
    digest = hashlib.sha256(bytes(value_bytes(video.contiguous())) + bytes(value_bytes(audio.contiguous()))).digest()
    return digest * 50_000


class _Producer:
    """A stage's data port; `lose` forgets every tensor, as a restart does."""

    def __init__(self, store_type: type[TensorStore]) -> None:
        self.store = store_type(lease_s=600, max_bytes=1 << 28)
        self.server = TensorServer(self.store, host="127.0.0.1", port=0, advertise_host="127.0.0.1")
        self._ids: list[str] = []

    def publish(self, tensor: torch.Tensor, on_end: Callable[[], None] = lambda: None) -> tensor_pb2.TensorRef:
        lease = self.store.put(tensor, on_end=on_end)
        self._ids.append(lease.tensor_id)
        return self.server.publish(lease)

    def lose(self) -> None:
        for tensor_id in self._ids:
            self.store.release(tensor_id)


class ScriptedSystem(system_pb2_grpc.SystemServiceServicer):
    """Devices and memory of a stage as a test puts them; at first everything fits."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.reset()

    def reset(self) -> None:
        """As it was at first."""
        gpu = {"name": "cuda:0", "model": "script", "uuid": "GPU-0", "backend": "cuda"}
        self.devices = [system_pb2.Device(**gpu, total_bytes=80, free_bytes=60)]
        self.available_bytes = 50
        self.total_bytes = dict.fromkeys(system_pb2.VramMode.values(), 10)
        """What a clip takes, by mode."""
        self.mode: system_pb2.VramMode.ValueType = system_pb2.VRAM_MODE_STANDARD
        """The present one, and the choice where none is named."""
        self.plans: list[system_pb2.GetPlanRequest] = []
        self.switches: list[system_pb2.SetModeRequest] = []
        self.refusal: OviError | None = None
        """With which switches are refused."""
        self.worker = system_pb2.Worker()
        """What it tells of itself, its stage apart."""
        self.draining = False
        """True: it refuses to tell, as a service that drains does."""

    def GetDevices(self, request, context):
        return system_pb2.GetDevicesResponse(devices=self.devices)

    def GetPlan(self, request, context):
        self.plans.append(request)
        return system_pb2.GetPlanResponse(plan=self._plan(request.vram_mode or self.mode))

    def SetMode(self, request, context):
        with _told(context):
            self.switches.append(request)
            if self.refusal is not None:
                raise self.refusal
            self.mode = request.vram_mode
            return system_pb2.SetModeResponse(plan=self._plan(self.mode))

    def ListWorkers(self, request, context):
        with _told(context):
            if self.draining:
                raise Unavailable("the service is draining; try again soon")
            worker = system_pb2.Worker(stage=self.stage)
            worker.MergeFrom(self.worker)
            return system_pb2.ListWorkersResponse(workers=[worker])

    def _plan(self, mode: system_pb2.VramMode.ValueType) -> system_pb2.MemoryPlan:
        total = self.total_bytes[mode]
        name = system_pb2.VramMode.Name(mode)
        return system_pb2.MemoryPlan(
            vram_mode=mode,
            allocation="single",
            component_bytes={"weights": total - 1, "CUDA context": 1},
            total_bytes=total,
            available_bytes=self.available_bytes,
            fits=total <= self.available_bytes,
            explanation=f"{name} takes {total} of {self.available_bytes}",
            device=self.devices[0].uuid,
        )


class _Stage:
    """A server that can be stopped as a killed process is, and started again at the same address."""

    name: str
    store_type = TensorStore
    host = "127.0.0.1"
    first_port = 0
    """0: any free one."""

    def __init__(self) -> None:
        self.producer = _Producer(self.store_type)
        self.resolver = TensorResolver.over_grpc()
        self.system = ScriptedSystem(self.name)
        self._server: grpc.Server | None = None
        self.port = self.first_port
        self.start()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def add_to(self, server: grpc.Server) -> None:
        raise AssertionError("each stage adds its own servicer")

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(16))
        self.add_to(self._server)
        system_pb2_grpc.add_SystemServiceServicer_to_server(self.system, self._server)
        servicer = health.HealthServicer()
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        self.port = self._server.add_insecure_port(f"{self.host}:{self.port}")
        self._server.start()

    def stop(self) -> None:
        """Cut every call under way and refuse connections."""
        assert self._server is not None
        self._server.stop(0).wait()

    def close(self) -> None:
        self.stop()
        self.resolver.close()
        self.producer.server.stop(0)

    def fetch(self, ref: tensor_pb2.TensorRef, name: str) -> torch.Tensor:
        return self.resolver.fetch(ref, field=name, max_bytes=_MAX_BYTES)


@contextlib.contextmanager
def _told(context: grpc.ServicerContext) -> Iterator[None]:
    """Errors by the table."""
    try:
        yield
    except OviError as error:
        context.abort_with_status(status_of(error))


class ScriptedTextEncoder(_Stage, text_encoder_pb2_grpc.TextEncoderServiceServicer):
    """Rows that depend on the text alone; notes every call."""

    name = "text_encoder"

    def __init__(self) -> None:
        self.requests: list[text_encoder_pb2.EncodeRequest] = []
        super().__init__()

    def add_to(self, server: grpc.Server) -> None:
        text_encoder_pb2_grpc.add_TextEncoderServiceServicer_to_server(self, server)

    def Encode(self, request, context):
        self.requests.append(request)
        embeddings = [
            text_encoder_pb2.Embedding(tensor=self.producer.publish(rows_of(text)), cleaned_prompt=text)
            for text in request.prompts
        ]
        return text_encoder_pb2.EncodeResponse(embeddings=embeddings)


def rows_of(text: str) -> torch.Tensor:
    """(2, 32) rows of a text."""
    digest = hashlib.sha512(text.encode()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8).float().reshape(2, 32)


@dataclass
class DenoiseCall:
    """A Denoise call under way; the test says what it does next."""

    request: fusion_pb2.DenoiseRequest
    inputs: dict[str, torch.Tensor]
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when the call is over, however it ended."""
    commands: queue.Queue[str | OviError | fusion_pb2.ModeLowered | fusion_pb2.Checkpoint] = field(
        default_factory=queue.Queue
    )
    on_over: Callable[[], None] = lambda: None
    """Called at the end, too."""

    def step(self) -> None:
        """Finish the next step."""
        self.commands.put("step")

    def finish(self) -> None:
        """Finish all steps that are left and give the result."""
        self.commands.put("finish")

    def lower(self, mode: system_pb2.VramMode.ValueType, reason: str) -> None:
        """Begin again in another mode."""
        self.commands.put(fusion_pb2.ModeLowered(vram_mode=mode, reason=reason))

    def keep(self, checkpoint: fusion_pb2.Checkpoint) -> None:
        """Give a checkpoint out."""
        self.commands.put(checkpoint)

    def pause(self) -> None:
        """Stop for now."""
        self.commands.put("pause")

    def fail(self, error: OviError) -> None:
        """End the call with an error."""
        self.commands.put(error)

    def over(self) -> None:
        self.ended.set()
        self.on_over()
        self.commands.put("over")


class ScriptedFusion(_Stage, fusion_pb2_grpc.FusionServiceServicer):
    """Denoises when told to; with `automatic` set, at once."""

    name = "fusion"

    def __init__(self) -> None:
        self.calls: queue.Queue[DenoiseCall] = queue.Queue()
        self.automatic = True
        self.refusals: queue.Queue[OviError] = queue.Queue()
        """Errors with which the next calls are refused."""
        self.refused_checkpoint = ""
        """Why no checkpoint is of use; empty: all are."""
        self.pauses: queue.Queue[str] = queue.Queue()
        """Names of runs that were to be paused."""
        self.knows_runs = True
        super().__init__()

    def add_to(self, server: grpc.Server) -> None:
        fusion_pb2_grpc.add_FusionServiceServicer_to_server(self, server)

    def next_call(self) -> DenoiseCall:
        """The next Denoise call, when it comes."""
        return self.calls.get(timeout=WAIT_S)

    def checkpoint(self, steps_done: int, on_end: Callable[[], None] = lambda: None) -> fusion_pb2.Checkpoint:
        """A checkpoint that is kept here until it is released; then `on_end` is called."""
        state = self.producer.publish(checkpoint_of(steps_done), on_end)
        return fusion_pb2.Checkpoint(state=state, steps_done=steps_done)

    def PauseRun(self, request, context):
        self.pauses.put(request.run_id)
        return fusion_pb2.PauseRunResponse(running=self.knows_runs)

    def Denoise(self, request, context):
        with _told(context):
            if self.system.draining:
                raise Unavailable("the service is draining; try again soon")
            with contextlib.suppress(queue.Empty):
                raise self.refusals.get_nowait()
            names = [field.name for field, _ in request.ListFields() if field.name in _INPUTS]
            inputs = {name: self.fetch(getattr(request, name), name) for name in names}
            call = DenoiseCall(request, inputs)
            context.add_callback(call.over)
            if self.automatic:
                call.finish()
            self.calls.put(call)
            yield from self._events(call)

    def _events(self, call: DenoiseCall) -> Iterator[fusion_pb2.DenoiseResponse]:
        total = call.request.options.num_inference_steps
        index, finishing = 0, False
        begun = fusion_pb2.Begun()
        if "checkpoint" in call.inputs:
            begun.checkpoint_refused = self.refused_checkpoint
            begun.steps_done = index = 0 if self.refused_checkpoint else steps_of(call.inputs["checkpoint"])
        yield fusion_pb2.DenoiseResponse(begun=begun)
        mode = call.request.vram_mode or self.system.mode
        while index < total:
            command = "step" if finishing else call.commands.get(timeout=WAIT_S)
            if command == "over":
                return
            if isinstance(command, OviError):
                raise command
            if isinstance(command, fusion_pb2.ModeLowered):
                index, mode = 0, command.vram_mode
                yield fusion_pb2.DenoiseResponse(mode_lowered=command)
                continue
            if isinstance(command, fusion_pb2.Checkpoint):
                yield fusion_pb2.DenoiseResponse(checkpoint=command)
                continue
            if command == "pause":
                yield fusion_pb2.DenoiseResponse(paused=fusion_pb2.Paused())
                return
            if command == "finish":
                finishing = True
                continue
            index += 1
            yield fusion_pb2.DenoiseResponse(
                step=fusion_pb2.Step(
                    index=index,
                    total=total,
                    sigma=1 - (index - 1) / total,
                    seconds=0.01,
                    reused=1 < index < total and call.request.options.step_cache_threshold > 0,
                )
            )
        video, audio = (self.producer.publish(tensor) for tensor in latents_of(call.request.options.seed))
        result = fusion_pb2.Result(video_latent=video, audio_latent=audio, vram_mode=mode)
        yield fusion_pb2.DenoiseResponse(result=result)

    def DescribeModel(self, request, context):
        variant = fusion_pb2.Variant(
            id=MODEL,
            loaded=True,
            video_area=AREA,
            sizes=[generation_pb2.Size(height=64, width=64)],
            num_frames=NUM_FRAMES,
            fps=24,
            audio_latent_length=157,
            num_layers=12,
            text_dim=32,
            prompt_format=generation_pb2.PROMPT_FORMAT_AUDCAP_TAGS,
            precision="float32",
            fingerprint="0123456789abcdef",
        )
        broken = fusion_pb2.Variant(id="960x960_5s", problem="model_960x960.safetensors is truncated")
        return fusion_pb2.DescribeModelResponse(
            variants=[variant, broken],
            device="script",
            kernels="none",
            memory=system_pb2.MemoryPlan(vram_mode=self.system.mode),
        )


_INPUTS = ("prompt", "video_negative", "audio_negative", "first_frame_latent", "checkpoint")


def checkpoint_of(steps_done: int) -> torch.Tensor:
    """A file that says after how many steps it was made."""
    file = save({"state": torch.full((3,), float(steps_done))}, metadata={"steps_done": str(steps_done)})
    return torch.frombuffer(bytearray(file), dtype=torch.uint8)


def steps_of(file: torch.Tensor) -> int:
    """What a file of `checkpoint_of` says."""
    content = bytes(file.numpy())
    return int(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["steps_done"])


class ScriptedVae(_Stage, vae_pb2_grpc.VaeServiceServicer):
    """Clips that depend on the latents alone; notes every call."""

    name = "vae"
    chunk_bytes = 1 << 20

    def __init__(self) -> None:
        self.decodes: list[vae_pb2.DecodeClipRequest] = []
        self.pictures: list[tuple[int, int, bytes]] = []
        self.allowed = threading.Event()
        """Clear to hold decodes back."""
        self.allowed.set()
        self.damage = False
        """True: the summary disagrees with the bytes."""
        self.clip: bytes | None = None
        """Given for every job; None: a clip that tells its latents."""
        super().__init__()

    def add_to(self, server: grpc.Server) -> None:
        vae_pb2_grpc.add_VaeServiceServicer_to_server(self, server)

    def EncodeImage(self, request_iterator, context):
        parts = list(request_iterator)
        size = parts[0].size
        self.pictures.append((size.height, size.width, b"".join(part.chunk for part in parts[1:])))
        latent = torch.full((48, 1, size.height // 16, size.width // 16), 0.5)
        return vae_pb2.EncodeImageResponse(latent=self.producer.publish(latent))

    def made_of(self, video: torch.Tensor, audio: torch.Tensor) -> bytes:
        """The clip of these latents."""
        return _clip(video, audio)

    def DecodeClip(self, request, context):
        with _told(context):
            self.decodes.append(request)
            video, audio = self.fetch(request.video_latent, "video_latent"), self.fetch(request.audio_latent, "audio")
            clip = self.made_of(video, audio) if self.clip is None else self.clip
            yield vae_pb2.DecodeClipResponse(progress=vae_pb2.DecodeProgress(frames_done=60, frames_total=NUM_FRAMES))
            self.allowed.wait(WAIT_S)
            for start in range(0, len(clip), self.chunk_bytes):
                yield vae_pb2.DecodeClipResponse(chunk=clip[start : start + self.chunk_bytes])
            summary = vae_pb2.ClipSummary(
                num_bytes=len(clip),
                crc32c=google_crc32c.value(clip) ^ self.damage,
                num_frames=NUM_FRAMES,
                size=generation_pb2.Size(height=64, width=64),
                num_samples=80_384,
                sample_rate_hz=16_000,
            )
            yield vae_pb2.DecodeClipResponse(summary=summary)


@dataclass
class ScriptedStages:
    """All three."""

    text_encoder: ScriptedTextEncoder
    fusion: ScriptedFusion
    vae: ScriptedVae

    @property
    def flags(self) -> list[str]:
        """Flags that point a gateway at these stages."""
        return [
            *("--text-encoder", self.text_encoder.address),
            *("--fusion", self.fusion.address),
            *("--vae", self.vae.address),
        ]


@contextlib.contextmanager
def scripted_stages() -> Iterator[ScriptedStages]:
    """Running stages, closed at the end."""
    with contextlib.ExitStack() as stack:
        stages = []
        for kind in (ScriptedTextEncoder, ScriptedFusion, ScriptedVae):
            stages.append(kind())
            stack.callback(stages[-1].close)
        yield ScriptedStages(*stages)
