"""Guidance parallelism: the prompt's pass and the negative pass at the same time on two groups of ranks."""

from __future__ import annotations

import torch

from services.fusion.model.fusion import BlockLoop, Branch, run_all
from services.fusion.parallel.groups import Group
from services.fusion.sampling.denoise import Conditions, Forward, Latents, Predictor


def bind_split_guidance(forward: Forward, group: Group) -> Predictor:
    """A Predictor that computes one branch on this rank and trades predictions once a step.

    Args:
        forward: one pass on this rank's branch.
        group: two ranks; index 0 computes the prompt's branch, index 1 the negative one.
    """

    def branch(conditions: Conditions, skip_layer: int) -> Branch:
        if group.index == 1 and conditions.negative is not None:
            return Branch(conditions.negative, skip_layer)
        return Branch(conditions.prompt)

    def predict(
        latents: Latents,
        timestep: torch.Tensor,
        conditions: Conditions,
        *,
        skip_layer: int,
        run_blocks: BlockLoop = run_all,
    ) -> tuple[Latents, Latents | None]:
        clean = conditions.first_frame_CHW is not None
        branches = [branch(conditions, skip_layer)]
        (own,) = forward(latents, timestep, branches, clean_first_frame=clean, run_blocks=run_blocks)
        if conditions.negative is None:
            return own, None
        flat = torch.cat([own.video_CFHW.flatten(), own.audio_SC.flatten()])
        positive, negative = group.gather(flat)

        def unpack(values: torch.Tensor) -> Latents:
            video, audio = values.split([own.video_CFHW.numel(), own.audio_SC.numel()])
            return Latents(video.view_as(own.video_CFHW), audio.view_as(own.audio_SC))

        return unpack(positive), unpack(negative)

    return predict
