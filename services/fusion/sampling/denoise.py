"""The sampling loop: predict, guide, step both solvers, yield progress (arXiv 2510.01284, section 3)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from services.fusion.model.fusion import BlockLoop, Branch, RopeTables, TextCache, run_all
from services.fusion.model.operations import Ops
from services.fusion.sampling.solvers import FlowSolver
from services.fusion.sampling.step_cache import Agree, StepCache, alone
from shared.sampling_options import SamplingOptions


@dataclass(frozen=True)
class Latents:
    """The latents (C, F, H, W) and (S, C), float32."""

    video_CFHW: torch.Tensor
    audio_SC: torch.Tensor


@dataclass(frozen=True)
class RunState:
    """Everything that the rest of a run depends on besides what it was started with."""

    steps_done: int
    steps_reused: int
    """Of them, by the step cache."""
    latents: Latents
    video_history: Mapping[str, torch.Tensor]
    """Of the solver, see FlowSolver."""
    audio_history: Mapping[str, torch.Tensor]

    def to(self, device: torch.device) -> RunState:
        """The same on a device."""

        def moved(history: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(device) for name, tensor in history.items()}

        latents = Latents(self.latents.video_CFHW.to(device), self.latents.audio_SC.to(device))
        histories = moved(self.video_history), moved(self.audio_history)
        return RunState(self.steps_done, self.steps_reused, latents, *histories)


@dataclass(frozen=True)
class StepDone:
    """A finished solver step: 1-based index, number of steps, noise level before it, seconds it took."""

    index: int
    total: int
    sigma: float
    seconds: float
    reused: bool = False
    """Most blocks' work was that of an earlier step, see StepCache."""
    state: RunState | None = field(default=None, repr=False, compare=False)
    """From here the run can be continued exactly: after this step, or with a step cache before it. None after the last
    step and after a reused one. Its tensors are the run's own, on the device."""


@dataclass(frozen=True)
class Conditions:
    """What a run is conditioned on, on the device."""

    prompt: TextCache
    negative: TextCache | None
    """None only where options.needs_negative_pass is False."""
    first_frame_CHW: torch.Tensor | None
    """Latent of the given picture; None for text to video."""


class Forward(Protocol):
    """The model for one shape."""

    def __call__(
        self,
        latents: Latents,
        timestep: torch.Tensor,
        branches: Sequence[Branch],
        *,
        clean_first_frame: bool,
        run_blocks: BlockLoop = run_all,
    ) -> list[Latents]:
        """Velocities of each branch, of the latents' shapes, float32."""
        ...


class Predictor(Protocol):
    """What a step asks of the model."""

    def __call__(
        self,
        latents: Latents,
        timestep: torch.Tensor,
        conditions: Conditions,
        *,
        skip_layer: int,
        run_blocks: BlockLoop = run_all,
    ) -> tuple[Latents, Latents | None]:
        """The prompt's velocities and, unless there is no negative, the negative ones without block `skip_layer`."""
        ...


def draw_noise(video_shape: tuple[int, ...], audio_shape: tuple[int, ...], seed: int) -> Latents:
    """Standard normal noise from two CPU generators with the same seed, so that a seed means the same on any device."""
    video, audio = (
        torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for shape in (video_shape, audio_shape)
    )
    return Latents(video, audio)


def guided(positive: Latents, negative: Latents, options: SamplingOptions) -> Latents:
    """neg + scale * (pos - neg), with a scale for each modality."""
    return Latents(
        torch.lerp(negative.video_CFHW, positive.video_CFHW, options.video_guidance_scale),
        torch.lerp(negative.audio_SC, positive.audio_SC, options.audio_guidance_scale),
    )


def with_first_frame(latents: Latents, first_frame_CHW: torch.Tensor | None) -> Latents:
    """The latents with video frame 0 replaced by the given picture's, if there is one."""
    if first_frame_CHW is None:
        return latents
    video_CFHW = latents.video_CFHW.clone()
    video_CFHW[:, 0] = first_frame_CHW
    return Latents(video_CFHW, latents.audio_SC)


@torch.inference_mode()
def denoise(
    predict: Predictor,
    noise: Latents,
    conditions: Conditions,
    options: SamplingOptions,
    agree: Agree = alone,
    start: RunState | None = None,
) -> Iterator[StepDone | Latents]:
    """Yield a StepDone after every step and the final Latents last; stops cleanly at any yield.

    Args:
        predict: the model.
        noise: initial latents on the device, float32.
        conditions: texts and first picture.
        options: solver, steps, guidance, step cache; the seed is spent already.
        agree: of the ranks that share the run.
        start: where an equal run was, on the device; its steps are not made again. None: at the noise.
    """
    start = start or RunState(0, 0, noise, {}, {})
    first, latents, steps_reused = start.steps_done, start.latents, start.steps_reused
    solver_args = (options.solver, options.num_inference_steps, options.flow_shift)
    video_solver, audio_solver = FlowSolver(*solver_args), FlowSolver(*solver_args)
    video_solver.restore(start.steps_done, start.video_history)
    audio_solver.restore(start.steps_done, start.audio_history)
    del start
    timesteps = torch.tensor(video_solver.timesteps, device=noise.video_CFHW.device)
    cache = StepCache(options.step_cache_threshold, agree) if options.step_cache_threshold else None
    run_blocks = cache.run if cache is not None else run_all
    last = options.num_inference_steps - 1

    def state(steps_done: int) -> RunState:
        return RunState(steps_done, steps_reused, latents, video_solver.history(), audio_solver.history())

    for index in range(first, options.num_inference_steps):
        begun_s = time.perf_counter()
        latents = with_first_frame(latents, conditions.first_frame_CHW)
        before = None
        if cache is not None:
            # What the cache holds is not part of a state: a run goes on with a step that was computed without it.
            before = state(index)
            cache.begin_step(must_compute=index in (first, last))
        given = (latents, timesteps[index], conditions)
        velocity, negative = predict(*given, skip_layer=options.slg_layer, run_blocks=run_blocks)
        if negative is not None:
            velocity = guided(velocity, negative, options)
        latents = Latents(
            video_solver.step(velocity.video_CFHW, latents.video_CFHW),
            audio_solver.step(velocity.audio_SC, latents.audio_SC),
        )
        if latents.video_CFHW.is_cuda:
            torch.cuda.synchronize(latents.video_CFHW.device)
        seconds = time.perf_counter() - begun_s
        reused = cache is not None and cache.reused
        steps_reused += reused
        resumable = None if index == last or reused else before or state(index + 1)
        yield StepDone(index + 1, last + 1, video_solver.sigmas[index], seconds, reused, resumable)
    yield with_first_frame(latents, conditions.first_frame_CHW)


def bind_forward(model: torch.nn.Module, rope: RopeTables, ops: Ops) -> Forward:
    """A model as a Forward for one shape."""

    def forward(
        latents: Latents,
        timestep: torch.Tensor,
        branches: Sequence[Branch],
        *,
        clean_first_frame: bool,
        run_blocks: BlockLoop = run_all,
    ) -> list[Latents]:
        given = (latents.video_CFHW, latents.audio_SC, timestep, branches, rope, ops)
        velocities = model(*given, clean_first_frame=clean_first_frame, run_blocks=run_blocks)
        return [Latents(*velocity) for velocity in velocities]

    return forward


def bind_guidance(forward: Forward) -> Predictor:
    """A Predictor that makes all passes here."""

    def predict(
        latents: Latents,
        timestep: torch.Tensor,
        conditions: Conditions,
        *,
        skip_layer: int,
        run_blocks: BlockLoop = run_all,
    ) -> tuple[Latents, Latents | None]:
        branches = [Branch(conditions.prompt)]
        if conditions.negative is not None:
            branches.append(Branch(conditions.negative, skip_layer))
        clean = conditions.first_frame_CHW is not None
        made = forward(latents, timestep, branches, clean_first_frame=clean, run_blocks=run_blocks)
        positive, *negative = made
        return positive, negative[0] if negative else None

    return predict
