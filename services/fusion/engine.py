"""The work of the fusion service: variants on disk, one model on the device, sampling runs."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from services.fusion.checkpoint import FusionFile
from services.fusion.holder import ModelHolder
from services.fusion.memory.chunks import chunked, in_turn
from services.fusion.model.fusion import FusionModel
from services.fusion.ops import Execution, select_ops
from services.fusion.parallel.agreement import bind_agreement
from services.fusion.parallel.groups import Groups
from services.fusion.parallel.parallelize import make_predictor
from services.fusion.planner import MemoryPlanner, explain
from services.fusion.request import RunInputs, RunSpec, ServedVariant
from services.fusion.sampling.denoise import (
    Conditions,
    Latents,
    Predictor,
    RunState,
    StepDone,
    denoise,
    draw_noise,
)
from shared.device_memory import freed, peak_gib, reset_peak
from shared.errors import CheckpointError, InvalidRequest, OutOfMemory
from shared.logging import get_logger
from shared.memory.choose import FusionPlan
from shared.memory.modes import RECIPES, VramMode, WeightFormat
from shared.sampling_options import SamplingOptions
from shared.shapes import common_sizes
from shared.variants import VARIANTS

log = get_logger(__name__)


@dataclass(frozen=True)
class ModeLowered:
    """Memory ran out; the run begins again in this mode."""

    mode: VramMode
    reason: str


class FusionEngine:
    """Holds at most one variant, in one memory mode; a run of another one, or in another mode, loads that first.

    `load`, `set_mode` and `denoise` are called on one thread only, the device's.
    """

    def __init__(
        self,
        checkpoints: Path,
        device: torch.device,
        dtype: torch.dtype,
        execution: Execution | None = None,
        groups: Groups | None = None,
        *,
        vram_mode: VramMode = VramMode.STANDARD,
        memory_bytes: int | None = None,
    ) -> None:
        """
        Args:
            checkpoints: folder in the released layout.
            device: where the model runs.
            dtype: arithmetic of the model.
            execution: how passes are computed; None for the default.
            groups: ranks that share every run; None if this process is alone.
            vram_mode: in which runs are made that do not say; AUTO is decided by `discover`.
            memory_bytes: most that this process may take of the device; None: no more than there is.
        """
        self._checkpoints = checkpoints
        self._device = device
        self._dtype = dtype
        self._groups = groups
        self._bound: tuple[tuple[object, ...], Predictor] | None = None
        self._execution = execution or Execution()
        # cuDNN would otherwise run float32 convolutions in TF32.
        torch.backends.cudnn.allow_tf32 = False
        self.ops = select_ops(device, dtype, self._execution.kernels)
        self._holder = ModelHolder(device, dtype, groups, packed=self.ops.fused)
        self._loaded_mode = VramMode.AUTO
        self.planner = MemoryPlanner(device, dtype, groups, memory_bytes)
        self.mode = vram_mode
        """In which runs are made that do not say."""
        self.served: dict[str, ServedVariant] = {}
        """Variants that can be run, by id."""
        self.problems: dict[str, str] = {}
        """Why a variant whose file is there cannot be run, by id."""

    def forget(self) -> None:
        """Hold no variant."""
        self._bound = None
        self._holder.forget()

    @property
    def loaded_id(self) -> str | None:
        """Variant that is loaded."""
        return self._holder.model

    @property
    def loaded_mode(self) -> VramMode:
        """Mode in which it is loaded; AUTO: none is."""
        return VramMode.AUTO if self._holder.model is None else self._loaded_mode

    def discover(self) -> None:
        """Check the header of every variant's file that is in the folder, and choose a mode; see `settle`.

        Raises:
            CheckpointError: no file is there, or none fits.
            OutOfMemory: in the mode, or in every one, not even the smallest variant fits.
        """
        for variant in VARIANTS.values():
            path = self._checkpoints / variant.file
            if not path.is_file():
                continue
            try:
                file = FusionFile.open(path)
                self._require_heads(file)
                self.served[variant.id] = ServedVariant(variant, file, file.fingerprint())
            except CheckpointError as error:
                log.error("variant cannot be served", model=variant.id, reason=error.message)
                self.problems[variant.id] = error.message
        if not self.served:
            files = ", ".join(variant.file for variant in VARIANTS.values())
            why = "; ".join(self.problems.values()) or f"none of {files} is there; see `ovi models check`"
            raise CheckpointError(f"{self._checkpoints}: no fusion model can be served: {why}")
        self.mode = self.planner.settle(self.mode, list(self.served.values()))
        for served in self.served.values():
            with contextlib.suppress(OutOfMemory):  # said above; its jobs are refused with the numbers
                log.info("memory mode", plan=explain(self.plan(served.variant.id), served))

    def _require_heads(self, file: FusionFile) -> None:
        degree = self._groups.sequence.size if self._groups is not None else 1
        if file.config.num_heads % degree:
            what = f"{file.config.num_heads} heads cannot be shared by {degree} ranks"
            raise CheckpointError(f"{file.header.path}: {what}; use another number of GPUs")

    def variant(self, model: str) -> ServedVariant:
        """The served variant of this id.

        Raises:
            InvalidRequest: unknown, or its file is not there.
            CheckpointError: its file is damaged.
        """
        if model in self.problems:
            raise CheckpointError(self.problems[model])
        if model not in self.served:
            raise InvalidRequest.of("model", f"got {model[:100]!r}, allowed is one of {sorted(self.served)}")
        return self.served[model]

    @property
    def arithmetic(self) -> str:
        """Of the products in the present mode, in words."""
        name = str(self._dtype).removeprefix("torch.")
        weights = self._weights(RECIPES[self.mode].weights)
        return f"{name} arithmetic" if weights is WeightFormat.NATIVE else f"held in {weights.value}, {name} arithmetic"

    def plan(self, model: str, mode: VramMode = VramMode.AUTO) -> FusionPlan:
        """What a served variant takes.

        Args:
            model: its id.
            mode: AUTO: the present one.

        Raises:
            OutOfMemory: it does not fit; the message has the numbers and the mode that would fit.
        """
        plan = self.planner.plan(self.served[model], self.mode if mode is VramMode.AUTO else mode)
        return replace(plan, layout=replace(plan.layout, weights=self._weights(plan.layout.weights)))

    def _weights(self, of_mode: WeightFormat) -> WeightFormat:
        """What `--weights` says counts in modes that say nothing."""
        return self._execution.weights if of_mode is WeightFormat.NATIVE else of_mode

    def load(self, model: str, mode: VramMode = VramMode.AUTO) -> FusionModel:
        """The model of this variant; the one before is let go of first.

        Raises:
            CheckpointError: the file's values cannot be read.
            OutOfMemory: see `plan`.
        """
        plan = self.plan(model, mode)
        hosted = RECIPES[plan.mode].takes_turns
        if not self._holder.holds(model, plan.layout, hosted=hosted):
            self._bound = None
        network = self._holder.load(model, self.served[model].file, plan.layout, hosted=hosted)
        self._loaded_mode = plan.mode
        return network

    def set_mode(self, mode: VramMode, model: str) -> FusionPlan:
        """Make a mode the present one, and load a variant in it; what holds then.

        Args:
            mode: AUTO: the best that fits all variants.
            model: a served one.

        Raises:
            OutOfMemory: it does not fit; nothing has changed.
            CheckpointError: the file's values cannot be read; the mode has changed, nothing is loaded.
        """
        mode = self.planner.settle(mode, [self.served[model]])
        self.mode = mode
        self.load(model)
        self._end_turn(mode)
        return self.plan(model)

    def warm_up(self, model: str) -> None:
        """One guided step on noise, so that kernels are compiled and chosen before the first job; on CUDA only.

        Raises:
            CheckpointError: the variant's values cannot be read.
        """
        if self._device.type != "cuda":
            return
        start = time.perf_counter()
        served = self.served[model]
        height, width = common_sizes(served.video_area)[0]
        rows = torch.zeros(1, served.file.config.text_dim)
        spec = RunSpec(model, height, width, SamplingOptions(num_inference_steps=1, slg_layer=0))
        for _ in self.denoise(spec, RunInputs(rows, rows, rows, None)):
            pass
        log.info("warmed up", model=model, seconds=round(time.perf_counter() - start, 3))

    def identity(self, spec: RunSpec, inputs: RunInputs, mode: VramMode) -> dict[str, str]:
        """What decides the latents of a run to the bit, by name.

        Args:
            spec: of the run, checked.
            inputs: of the run.
            mode: in which it is made, not AUTO.

        Raises:
            OutOfMemory: see `plan`.
        """
        served, layout = self.served[spec.model], self.plan(spec.model, mode).layout
        checksum = hashlib.sha256()
        for tensor in (inputs.prompt_LC, inputs.video_negative_LC, inputs.audio_negative_LC, inputs.first_frame_C1HW):
            if tensor is not None:
                checksum.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
                checksum.update(memoryview(tensor.contiguous().view(torch.uint8).numpy()))  # type: ignore[arg-type]
            checksum.update(b"|")
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        sequence, guidance = (self._groups.sequence.size, self._groups.guidance.size) if self._groups else (1, 1)
        return {
            "version": f"ovi-serve {version('ovi-serve')}, torch {torch.__version__}",
            "model": f"{spec.model} {served.fingerprint}",
            "size": f"{spec.height}x{spec.width}",
            **{name: str(value) for name, value in asdict(spec.options).items()},
            "inputs": checksum.hexdigest(),
            "weights": layout.weights.value,
            "arithmetic": f"{self._dtype}, {self.ops.name}, chunks of {layout.token_chunk}",
            "plan": f"guidance {guidance} x sequence {sequence}",
            "device": device,
        }

    def denoise(
        self, spec: RunSpec, inputs: RunInputs, mode: VramMode = VramMode.AUTO, start: RunState | None = None
    ) -> Generator[StepDone | ModeLowered | Latents, None, None]:
        """Run a checked spec: a StepDone after each step, the latents (on the CPU, float32) last.

        A run whose memory runs out is begun again once, in the next mode that takes less and is estimated to fit.

        Args:
            spec: of the run.
            inputs: of the run.
            mode: in which it is made; AUTO: what the spec says.
            start: where a run of the same `identity` was; None: at the noise.

        Raises:
            CheckpointError: the variant's values cannot be read.
            OutOfMemory: no mode fits that the run may be made in.
        """
        if mode is VramMode.AUTO:
            mode = self.mode if spec.vram_mode is VramMode.AUTO else spec.vram_mode
        try:
            yield from self._denoise(spec, inputs, mode, start)
            return
        except torch.OutOfMemoryError as error:
            self._bound = None  # what recorded passes hold may be what the next job lacks
            if self._groups is not None:
                raise
            reason = str(error).splitlines()[0]
        # Here nothing holds the frames of the run any more.
        lower = self.planner.lower(self.served[spec.model], spec.vram_mode, mode, reason)
        self.forget()
        log.warning("memory ran out; the run begins again", mode=mode.value, lower=lower.value, reason=reason)
        yield ModeLowered(lower, reason)
        yield from self._denoise(spec, inputs, lower, None)

    def _denoise(
        self, spec: RunSpec, inputs: RunInputs, mode: VramMode, start: RunState | None
    ) -> Iterator[StepDone | Latents]:
        served = self.served[spec.model]
        network = self.load(spec.model, mode)
        begun_s = time.perf_counter()
        reset_peak(self._device)
        video_shape = served.video_shape(spec.height, spec.width)
        noise = draw_noise(video_shape.as_tuple(), served.audio_shape.as_tuple(), spec.options.seed)
        try:
            predict, conditions = self._prepare(network, noise, spec, inputs, mode)
            noise = Latents(noise.video_CFHW.to(self._device), noise.audio_SC.to(self._device))
            agree = bind_agreement(self._groups)
            # Unnamed, so that the run can let go of it.
            for event in denoise(predict, noise, conditions, spec.options, agree, start and start.to(self._device)):
                if isinstance(event, StepDone):
                    seconds = round(event.seconds, 4)
                    log.debug("step", index=event.index, total=event.total, seconds=seconds, reused=event.reused)
                    yield event
                else:
                    latents = Latents(event.video_CFHW.cpu(), event.audio_SC.cpu())
                    seconds = round(time.perf_counter() - begun_s, 3)
                    peak = peak_gib(self._device)
                    log.info("denoised", model=spec.model, mode=mode.value, seconds=seconds, peak_device_gib=peak)
                    yield latents
        finally:
            predict = conditions = None  # type: ignore[assignment]
            self._end_turn(mode)

    def _end_turn(self, mode: VramMode) -> None:
        """Leave the device to the other stages, as far as the mode says."""
        if RECIPES[mode].takes_turns:
            self._bound = None
            self._holder.release()
        elif mode is VramMode.ALL_GPU:
            log.info("memory freed", **freed(self._device))

    @torch.inference_mode()
    def _prepare(
        self, network: FusionModel, noise: Latents, spec: RunSpec, inputs: RunInputs, mode: VramMode
    ) -> tuple[Predictor, Conditions]:
        _, frames, height, width = noise.video_CFHW.shape
        video_shape = (frames, height, width)
        prompt_LC = inputs.prompt_LC.to(self._device)
        texts = [(prompt_LC, prompt_LC)]
        if spec.options.needs_negative_pass:
            assert inputs.video_negative_LC is not None and inputs.audio_negative_LC is not None, "check_run saw them"
            texts.append((inputs.video_negative_LC.to(self._device), inputs.audio_negative_LC.to(self._device)))
        prompt, *negative = network.encode_texts(texts)
        first = inputs.first_frame_C1HW
        conditions = Conditions(
            prompt=prompt,
            negative=negative[0] if negative else None,
            first_frame_CHW=None if first is None else first[:, 0].to(self._device, torch.float32),
        )
        return self._predictor(network, video_shape, len(noise.audio_SC), self.plan(spec.model, mode)), conditions

    def _predictor(
        self, network: FusionModel, video_shape: tuple[int, int, int], audio_length: int, plan: FusionPlan
    ) -> Predictor:
        """The model's passes for one shape; kept until another shape or variant comes, with what was recorded."""
        token_chunk, saves = plan.layout.token_chunk, RECIPES[plan.mode].takes_turns
        kind = (*video_shape, audio_length, token_chunk, saves)
        if self._bound is None or self._bound[0] != kind:
            self._bound = None
            rope = network.rope_tables(video_shape, audio_length).to(self._device)
            ops = in_turn(self.ops.ops) if saves else self.ops.ops
            ops = ops if token_chunk is None else chunked(ops, token_chunk)
            predictor = make_predictor(network, rope, ops, self._groups, graphs=self._execution.graphs)
            self._bound = (kind, predictor)
        return self._bound[1]
