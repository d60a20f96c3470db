"""The work of the fusion service: variants on disk, one model on the device, sampling runs."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from services.fusion.checkpoint import FusionFile
from services.fusion.model.fusion import FusionModel
from services.fusion.ops import Execution, select_ops
from services.fusion.packing import pack_projections
from services.fusion.parallel.agreement import bind_agreement
from services.fusion.parallel.fsdp import load_sharded
from services.fusion.parallel.groups import Groups
from services.fusion.parallel.parallelize import make_predictor
from services.fusion.quantization import quantize
from services.fusion.request import RunInputs, RunSpec, ServedVariant
from services.fusion.sampling.denoise import (
    Conditions,
    Latents,
    Predictor,
    StepDone,
    denoise,
    draw_noise,
)
from shared.device_memory import peak_gib, reset_peak
from shared.errors import CheckpointError, InvalidRequest
from shared.logging import get_logger
from shared.memory.modes import WeightFormat
from shared.sampling_options import SamplingOptions
from shared.shapes import common_sizes
from shared.variants import VARIANTS

log = get_logger(__name__)


class FusionEngine:
    """Holds at most one variant on the device; a run of another one loads that first.

    `load` and `denoise` are called on one thread only, the device's.
    """

    def __init__(
        self,
        checkpoints: Path,
        device: torch.device,
        dtype: torch.dtype,
        execution: Execution | None = None,
        groups: Groups | None = None,
    ) -> None:
        """
        Args:
            checkpoints: folder in the released layout.
            device: where the model runs.
            dtype: arithmetic of the model.
            execution: how passes are computed; None for the default.
            groups: ranks that share every run; None if this process is alone.
        """
        self._checkpoints = checkpoints
        self._device = device
        self._dtype = dtype
        self._groups = groups
        self._loaded: tuple[str, FusionModel] | None = None
        self._bound: tuple[tuple[int, int, int, int], Predictor] | None = None
        self._execution = execution or Execution()
        # cuDNN would otherwise run float32 convolutions in TF32.
        torch.backends.cudnn.allow_tf32 = False
        self.ops = select_ops(device, dtype, self._execution.kernels)
        self.served: dict[str, ServedVariant] = {}
        """Variants that can be run, by id."""
        self.problems: dict[str, str] = {}
        """Why a variant whose file is there cannot be run, by id."""

    @property
    def loaded_id(self) -> str | None:
        """Variant on the device."""
        return self._loaded[0] if self._loaded else None

    def discover(self) -> None:
        """Check the header of every variant's file that is in the folder.

        Raises:
            CheckpointError: no file is there, or none fits.
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
        """Of the products, in words."""
        name = str(self._dtype).removeprefix("torch.")
        weights = self._execution.weights
        return f"{name} arithmetic" if weights is WeightFormat.NATIVE else f"held in {weights.value}, {name} arithmetic"

    def load(self, model: str) -> FusionModel:
        """The model of this variant on the device; the one before is freed first.

        Raises:
            CheckpointError: the file's values cannot be read.
        """
        if self._loaded and self._loaded[0] == model:
            return self._loaded[1]
        self._loaded = self._bound = None
        gc.collect()  # a sharded model refers to itself
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        start = time.perf_counter()
        network = self._read(self.served[model].file)
        self._loaded = (model, network)
        log.info("model loaded", model=model, seconds=round(time.perf_counter() - start, 3))
        return network

    def _read(self, file: FusionFile) -> FusionModel:
        if self._groups is not None and self._groups.weights is not None:
            return load_sharded(file, self._groups.weights, self._device, self._dtype)
        network = file.load(self._device, self._dtype)
        quantize(network, self._execution.weights)
        if self.ops.fused:
            pack_projections(network)
        return network

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

    def denoise(self, spec: RunSpec, inputs: RunInputs) -> Iterator[StepDone | Latents]:
        """Run a checked spec: a StepDone after each step, the latents (on the CPU, float32) last.

        Raises:
            CheckpointError: the variant's values cannot be read.
        """
        served = self.served[spec.model]
        network = self.load(spec.model)
        start = time.perf_counter()
        reset_peak(self._device)
        video_shape = served.video_shape(spec.height, spec.width)
        noise = draw_noise(video_shape.as_tuple(), served.audio_shape.as_tuple(), spec.options.seed)
        try:
            predict, conditions = self._prepare(network, noise, spec, inputs)
            noise = Latents(noise.video_CFHW.to(self._device), noise.audio_SC.to(self._device))
            for event in denoise(predict, noise, conditions, spec.options, bind_agreement(self._groups)):
                if isinstance(event, StepDone):
                    seconds = round(event.seconds, 4)
                    log.debug("step", index=event.index, total=event.total, seconds=seconds, reused=event.reused)
                    yield event
                else:
                    latents = Latents(event.video_CFHW.cpu(), event.audio_SC.cpu())
                    seconds = round(time.perf_counter() - start, 3)
                    log.info("denoised", model=spec.model, seconds=seconds, peak_device_gib=peak_gib(self._device))
                    yield latents
        except torch.OutOfMemoryError:
            self._bound = None  # what recorded passes hold may be what the next job lacks
            raise

    @torch.inference_mode()
    def _prepare(
        self, network: FusionModel, noise: Latents, spec: RunSpec, inputs: RunInputs
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
        return self._predictor(network, video_shape, len(noise.audio_SC)), conditions

    def _predictor(self, network: FusionModel, video_shape: tuple[int, int, int], audio_length: int) -> Predictor:
        """The model's passes for one shape; kept until another shape or variant comes, with what was recorded."""
        shape = (*video_shape, audio_length)
        if self._bound is None or self._bound[0] != shape:
            self._bound = None
            rope = network.rope_tables(video_shape, audio_length).to(self._device)
            predictor = make_predictor(network, rope, self.ops.ops, self._groups, graphs=self._execution.graphs)
            self._bound = (shape, predictor)
        return self._bound[1]
