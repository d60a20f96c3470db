"""From a network to what a step asks for: its passes, spread over the ranks there are, recorded where that pays."""

from __future__ import annotations

from services.fusion.model.fusion import FusionModel, RopeTables
from services.fusion.model.operations import Ops
from services.fusion.parallel.groups import Groups
from services.fusion.parallel.guidance import bind_split_guidance
from services.fusion.parallel.sequence import SequenceParallelModel
from services.fusion.sampling.denoise import Forward, Predictor, bind_forward, bind_guidance
from services.fusion.sampling.graphs import GraphedForward


def make_predictor(
    network: FusionModel, rope: RopeTables, ops: Ops, groups: Groups | None, *, graphs: bool | None = None
) -> Predictor:
    """The Predictor of one shape.

    Args:
        network: on the device.
        rope: of the shape, on the device.
        ops: implementations of the blocks' operations.
        groups: ranks that share every run; None if this process is alone.
        graphs: record steps as CUDA graphs, which needs CUDA and weights that stay where they are; None: where it pays,
            which is where ranks share a pass. The kernels of a whole pass are long enough to hide their launches.
    """
    spread = groups is not None and groups.sequence.size > 1
    if graphs is None:
        graphs = groups is not None and spread and groups.weights is None and rope.video.rotation.is_cuda
    model = SequenceParallelModel(network, groups.sequence) if groups is not None and spread else network
    forward: Forward = bind_forward(model, rope, ops)
    if graphs:
        forward = GraphedForward(forward)
    if groups is not None and groups.guidance.size > 1:
        return bind_split_guidance(forward, groups.guidance)
    return bind_guidance(forward)
