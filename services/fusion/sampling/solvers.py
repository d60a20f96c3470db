"""The three flow solvers: diffusers' schedulers on the exact noise levels Ovi was released with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from shared.sampling_options import Solver

_TRAIN_STEPS = 1000
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": _TRAIN_STEPS}


def _shifted(base: np.ndarray, shift: float) -> np.ndarray:
    return shift * base / (1 + (shift - 1) * base)


class FlowSolver:
    """Integrates one latent from noise; keeps the history its order needs, so one instance serves one run."""

    def __init__(self, solver: Solver, num_inference_steps: int, flow_shift: float) -> None:
        """
        Args:
            solver: which.
            num_inference_steps: steps, at least 1.
            flow_shift: shift of the noise levels, sigma' = shift * sigma / (1 + (shift - 1) * sigma).
        """
        self._solver = solver
        self._scheduler = _SCHEDULERS[solver](num_inference_steps, flow_shift)
        self._scheduler.set_begin_index(0)
        self.sigmas: list[float] = self._scheduler.sigmas.tolist()
        """Noise level before each step, and 0 at the end."""
        self.timesteps: list[float] = self._scheduler.timesteps.tolist()
        """What the model is told before each step, 0 to 1000."""
        self._index = 0

    def step(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The sample one noise level lower; both tensors of one shape, float32."""
        timestep = self._scheduler.timesteps[self._index]
        self._index += 1
        (sample,) = self._scheduler.step(velocity[None], timestep, sample[None], return_dict=False)
        return sample[0]

    def history(self) -> dict[str, torch.Tensor]:
        """What the next step reads of earlier ones besides the sample: tensors of its shape, float32, by name."""
        scheduler, reads = self._scheduler, _READS[self._solver]
        outputs = range(1, min(reads.num_outputs, self._index) + 1)
        tensors = {_output(age): scheduler.model_outputs[-age][0] for age in outputs}
        if reads.last_sample and self._index:
            tensors[_LAST_SAMPLE] = scheduler.last_sample[0]
        return tensors

    def restore(self, steps_done: int, history: Mapping[str, torch.Tensor]) -> None:
        """Go on where an equal solver was; only for one that has made no step.

        Args:
            steps_done: by that one, fewer than all.
            history: its own after them, on the sample's device; has the names of `history_names`.
        """
        assert self._index == 0 and 0 <= steps_done < len(self.timesteps)
        scheduler = self._scheduler
        self._index = steps_done
        scheduler.set_begin_index(steps_done)
        for age in range(1, _ORDER + 1):
            if _output(age) in history:
                scheduler.model_outputs[-age] = history[_output(age)][None]
        if _LAST_SAMPLE in history:
            scheduler.last_sample = history[_LAST_SAMPLE][None]
        if self._solver is not Solver.EULER:
            # The order grows with the first steps, and falls in the last one, which has not been made.
            scheduler.lower_order_nums = scheduler.this_order = min(_ORDER, steps_done)


def history_names(solver: Solver, steps_done: int) -> frozenset[str]:
    """Names of the tensors that `FlowSolver.history` has after so many steps."""
    reads = _READS[solver]
    names = {_output(age) for age in range(1, min(reads.num_outputs, steps_done) + 1)}
    return frozenset(names | {_LAST_SAMPLE} if reads.last_sample and steps_done else names)


_ORDER = 2
"""Of both multistep solvers."""
_LAST_SAMPLE = "last_sample"


def _output(age: int) -> str:
    """The model's output, 1: of the last step."""
    return f"model_output_{age}"


class _Reads(NamedTuple):
    """What a step reads of earlier ones."""

    num_outputs: int
    last_sample: bool
    """UniPC corrects the sample it predicted from."""


_READS = {Solver.UNIPC: _Reads(2, True), Solver.DPMPP: _Reads(1, False), Solver.EULER: _Reads(0, False)}


def _with_sigmas(scheduler: Any, base: np.ndarray, flow_shift: float) -> Any:
    """Replace the grid diffusers computes, which differs slightly, by ours; timesteps are truncated to integers."""
    sigmas = _shifted(base, flow_shift)
    scheduler.set_timesteps(len(sigmas))
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
    scheduler.timesteps = torch.from_numpy((sigmas * _TRAIN_STEPS).astype(np.int64))
    return scheduler


def _unipc(steps: int, flow_shift: float) -> Any:
    scheduler = UniPCMultistepScheduler(**_FLOW, solver_order=2, solver_type="bh2", predict_x0=True)
    return _with_sigmas(scheduler, np.linspace(1 - 1 / _TRAIN_STEPS, 0, steps + 1)[:-1], flow_shift)


def _dpmpp(steps: int, flow_shift: float) -> Any:
    scheduler = DPMSolverMultistepScheduler(
        **_FLOW, solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint"
    )
    return _with_sigmas(scheduler, np.linspace(1, 0, steps + 1)[:-1], flow_shift)


def _euler(steps: int, flow_shift: float) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=_TRAIN_STEPS, shift=flow_shift)
    scheduler.set_timesteps(steps)
    return scheduler


_SCHEDULERS = {Solver.UNIPC: _unipc, Solver.DPMPP: _dpmpp, Solver.EULER: _euler}
