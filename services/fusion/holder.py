"""The variant that is loaded, and where its weights are."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import torch

from services.fusion.checkpoint import FusionFile
from services.fusion.memory.loading import load_streamed
from services.fusion.model.fusion import FusionModel
from services.fusion.packing import pack_projections
from services.fusion.parallel.fsdp import load_sharded
from services.fusion.parallel.groups import Groups
from services.fusion.quantization import quantize
from shared.logging import get_logger
from shared.memory.estimate import FusionLayout
from shared.memory.streaming import UnitStream

log = get_logger(__name__)


@dataclass(frozen=True)
class _Held:
    model: str
    layout: FusionLayout
    network: FusionModel
    stream: UnitStream | None
    """None: all weights stay on the device."""


class ModelHolder:
    """Holds at most one variant. All methods are called on the device's thread."""

    def __init__(self, device: torch.device, dtype: torch.dtype, groups: Groups | None, *, packed: bool) -> None:
        """
        Args:
            device: where the model runs.
            dtype: arithmetic of the model.
            groups: ranks that share every run; None if this process is alone.
            packed: projections of the same tokens lie side by side.
        """
        self._device = device
        self._dtype = dtype
        self._weights_mesh = groups.weights if groups is not None else None
        self._packed = packed
        self._held: _Held | None = None

    @property
    def model(self) -> str | None:
        """The variant held."""
        return self._held.model if self._held else None

    def holds(self, model: str, layout: FusionLayout, *, hosted: bool) -> bool:
        """Whether `load` has nothing to do."""
        held = self._held
        return held is not None and (held.model, held.layout, held.stream is not None) == (model, layout, hosted)

    def load(self, model: str, file: FusionFile, layout: FusionLayout, *, hosted: bool) -> FusionModel:
        """A variant, laid out so; another one is let go of first.

        Args:
            model: id of the variant.
            file: of it.
            layout: format of the weights, and which stay on the device.
            hosted: weights are in host memory, and on the device until `release` only.

        Raises:
            CheckpointError: the file's values cannot be read.
        """
        if not self.holds(model, layout, hosted=hosted):
            self.forget()
            start = time.perf_counter()
            self._held = self._read(model, file, layout, hosted=hosted)
            self._empty_cache()  # what was only needed to quantize and pack
            seconds = round(time.perf_counter() - start, 3)
            weights = layout.weights.value
            log.info("model loaded", model=model, seconds=seconds, weights=weights, hosted=hosted)
        assert self._held is not None
        return self._held.network

    def release(self) -> None:
        """Give the device back, if the weights are in host memory."""
        if self._held is not None and self._held.stream is not None:
            self._held.stream.release()
            self._empty_cache()

    def forget(self) -> None:
        """Hold nothing."""
        if self._held is not None and self._held.stream is not None:
            self._held.stream.close()
        self._held = None
        gc.collect()  # a sharded or streamed model refers to itself
        self._empty_cache()

    def _empty_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _read(self, model: str, file: FusionFile, layout: FusionLayout, *, hosted: bool) -> _Held:
        if hosted:
            network, stream = load_streamed(file, self._device, self._dtype, layout, packed=self._packed)
            return _Held(model, layout, network, stream)
        if self._weights_mesh is not None:
            return _Held(model, layout, load_sharded(file, self._weights_mesh, self._device, self._dtype), None)
        network = file.load(self._device, self._dtype)
        quantize(network, layout.weights)
        if self._packed:
            pack_projections(network)
        return _Held(model, layout, network, None)
