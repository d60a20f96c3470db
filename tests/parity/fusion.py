"""Golden comparisons of the fusion model, the solvers and whole sampling runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from services.fusion.checkpoint import build, infer_config, layout
from services.fusion.model.fusion import Branch, FusionModel
from services.fusion.ops import Kernels, SelectedOps, select_ops
from services.fusion.packing import pack_projections
from services.fusion.parallel.parallelize import make_predictor
from services.fusion.sampling.denoise import Conditions, Latents, denoise
from services.fusion.sampling.solvers import FlowSolver
from shared.checkpoints import layout_of, require_layout
from shared.sampling_options import SamplingOptions, Solver
from tests.parity.comparison import SCHEDULER_TOLERANCE, Comparison, GoldenFile, max_abs_err


@dataclass(frozen=True)
class Place:
    """Where the model runs, in float32, and with which implementations of its operations."""

    device: torch.device
    kernels: Kernels

    @property
    def selected(self) -> SelectedOps:
        """The operations."""
        return select_ops(self.device, torch.float32, self.kernels)


CPU = Place(torch.device("cpu"), Kernels.REFERENCE)


def _model(path: Path, place: Place) -> FusionModel:
    torch.backends.cudnn.allow_tf32 = False  # as the engine does
    golden = GoldenFile.read(path)
    weights = golden.weights("weights.")
    widths = golden.json("video_config")
    config = infer_config(layout_of(weights), path, num_heads=widths["num_heads"], text_len=widths["text_len"])
    require_layout(path, layout_of(weights), layout(config))
    model = build(config, {key: weight.to(place.device) for key, weight in weights.items()})
    if place.selected.fused:
        pack_projections(model)
    return model


@torch.inference_mode()
def model_comparisons(golden: Path, place: Place = CPU) -> Iterator[Comparison]:
    """Every forward case of fusion.safetensors."""
    path = golden / "fusion.safetensors"
    file, model = GoldenFile.read(path), _model(path, place)
    for index, case in enumerate(file.json("cases")):
        name = f"case{index}"
        names = ("video_latent", "audio_latent", "video_context", "audio_context")
        inputs = {key: file.tensors[f"{name}.{key}"].to(place.device) for key in names}
        (text,) = model.encode_texts([(inputs["video_context"], inputs["audio_context"])])
        _, frames, height, width = inputs["video_latent"].shape
        (outputs,) = model(
            inputs["video_latent"],
            inputs["audio_latent"],
            torch.tensor(case["timestep"], device=place.device),
            [Branch(text, case["slg_layer"])],
            model.rope_tables((frames, height, width), len(inputs["audio_latent"])).to(place.device),
            place.selected.ops,
            clean_first_frame=case["first_frame_is_clean"],
        )
        for output, ours in zip(("video_out", "audio_out"), outputs, strict=True):
            yield Comparison("fusion", name, output, max_abs_err(ours.cpu(), file.tensors[f"{name}.{output}"]))


def scheduler_comparisons(golden: Path) -> Iterator[Comparison]:
    """Timesteps, noise levels and every step of the toy trajectories of schedulers.safetensors."""
    file = GoldenFile.read(golden / "schedulers.safetensors")
    matrix = file.tensors["matrix"]
    for index, case in enumerate(file.json("cases")):
        solver = FlowSolver(Solver(case["solver"]), case["steps"], case["shift"])
        sample = file.tensors["x0"]
        steps = []
        for timestep in solver.timesteps:
            velocity = torch.einsum("ij,bjk->bik", matrix, sample) + torch.sin(torch.tensor(timestep) / 200)
            sample = solver.step(velocity, sample)
            steps.append(sample)
        ours = {
            "sigmas": torch.tensor(solver.sigmas, dtype=torch.float64),
            "timesteps": torch.tensor(solver.timesteps, dtype=torch.float64),
            "trajectory": torch.stack(steps),
        }
        for output, value in ours.items():
            error = max_abs_err(value, file.tensors[f"case{index}.{output}"])
            yield Comparison("schedulers", f"case{index}", output, error, SCHEDULER_TOLERANCE)


@torch.inference_mode()
def pipeline_comparisons(golden: Path, place: Place = CPU) -> Iterator[Comparison]:
    """Whole sampling runs of pipeline.safetensors, from given noise to final latents."""
    file = GoldenFile.read(golden / "pipeline.safetensors")
    model = _model(golden / file.metadata["weights"], place)
    for index, case in enumerate(file.json("cases")):
        name = f"case{index}"
        tensors = {
            key.removeprefix(f"{name}."): value.to(place.device)
            for key, value in file.tensors.items()
            if key.startswith(f"{name}.")
        }
        options = SamplingOptions(
            num_inference_steps=case["steps"],
            video_guidance_scale=case["video_guidance_scale"],
            audio_guidance_scale=case["audio_guidance_scale"],
            flow_shift=case["shift"],
            solver=Solver(case["solver"]),
            slg_layer=case["slg_layer"],
        )
        texts = [("prompt", "prompt"), ("video_negative", "audio_negative")]
        conditions = Conditions(
            *model.encode_texts([(tensors[video], tensors[audio]) for video, audio in texts]),
            first_frame_CHW=tensors["first_frame_latent"][:, 0] if case["i2v"] else None,
        )
        _, frames, height, width = tensors["video_noise"].shape
        rope = model.rope_tables((frames, height, width), len(tensors["audio_noise"])).to(place.device)
        noise = Latents(tensors["video_noise"], tensors["audio_noise"])
        graphs = place.device.type == "cuda"
        predict = make_predictor(model, rope, place.selected.ops, None, graphs=graphs)
        *_, final = denoise(predict, noise, conditions, options)
        if not isinstance(final, Latents):
            raise TypeError("a run must end with its latents")
        yield Comparison("pipeline", name, "video_latent", max_abs_err(final.video_CFHW, tensors["video_latent"]))
        yield Comparison("pipeline", name, "audio_latent", max_abs_err(final.audio_SC, tensors["audio_latent"]))


def comparisons(golden: Path, place: Place = CPU) -> Iterator[Comparison]:
    """All of the above."""
    yield from model_comparisons(golden, place)
    yield from scheduler_comparisons(golden)
    yield from pipeline_comparisons(golden, place)
