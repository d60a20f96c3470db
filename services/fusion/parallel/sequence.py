"""Sequence parallelism: video tokens spread over ranks, audio tokens and text on every rank.

Three collectives a block: video self-attention trades tokens for heads and back (Ulysses, arXiv 2309.14509), and audio
queries attend to each rank's video tokens, merged exactly by their log-sum-exp. Video queries to text and audio
need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from services.fusion.model.config import PATCH_AREA
from services.fusion.model.fusion import BlockLoop, Branch, FusionModel, RopeTables, Tokens, run_all
from services.fusion.model.layers import Rope
from services.fusion.model.operations import Ops, TowerOps
from services.fusion.parallel.groups import Group
from services.fusion.parallel.plan import shard_sizes


class UlyssesAttention:
    """Attention among all video tokens, of which each rank brings its own and gets its own back."""

    def __init__(self, ops: TowerOps, group: Group, sizes: list[int]) -> None:
        """
        Args:
            ops: attention on one rank, and what packs heads.
            group: ranks that share the tokens.
            sizes: tokens of each.
        """
        self._ops = ops
        self._group = group
        self._sizes = sizes

    def __call__(self, q_TNK: torch.Tensor, k_TNK: torch.Tensor, v_TNK: torch.Tensor) -> torch.Tensor:
        """(own tokens, all heads) -> the same; in between, all tokens and this rank's heads."""
        degree, sizes = self._group.size, self._sizes
        own, num_heads, head_dim = q_TNK.shape
        heads = num_heads // degree
        row = heads * head_dim
        sent_PT3NK = self._ops.pack_heads(q_TNK, k_TNK, v_TNK, degree)
        received = self._group.exchange(sent_PT3NK, [own * 3 * row] * degree, [size * 3 * row for size in sizes])
        q, k, v = received.view(sum(sizes), 3, heads, head_dim).unbind(1)
        out_TNK = self._ops.self_attention(q, k, v).contiguous()
        returned = self._group.exchange(out_TNK, [size * row for size in sizes], [own * row] * degree)
        return self._ops.unpack_heads(returned.view(degree, own, heads, head_dim))


class SplitKeyAttention:
    """Attention of the same queries on every rank to keys and values that are spread over the ranks."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(self, q_SNK: torch.Tensor, k_TNK: torch.Tensor, v_TNK: torch.Tensor) -> torch.Tensor:
        """(S, N, K) -> the same: attention to the own part, then the parts merged by their shares of the softmax."""
        out_SNK, lse_SN = attention_with_lse(q_SNK, k_TNK, v_TNK)
        parts = self._group.gather(torch.cat([out_SNK.float(), lse_SN.unsqueeze(-1)], dim=-1))
        out_PSNK, lse_PSN1 = parts[..., :-1], parts[..., -1:]
        return (out_PSNK * torch.softmax(lse_PSN1, dim=0)).sum(0).type_as(q_SNK)


def attention_with_lse(
    q_SNK: torch.Tensor, k_TNK: torch.Tensor, v_TNK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unmasked attention and the log-sum-exp of each query's scores, (S, N, K) and (S, N) float32."""
    if q_SNK.is_cuda and q_SNK.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_SNK, k_TNK, v_TNK))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out[0].transpose(0, 1), lse[0].T
    scores_NST = torch.einsum("snk,tnk->nst", q_SNK, k_TNK).float() * q_SNK.shape[-1] ** -0.5
    lse_NS = torch.logsumexp(scores_NST, dim=-1)
    weights_NST = torch.exp(scores_NST - lse_NS.unsqueeze(-1)).type_as(v_TNK)
    return torch.einsum("nst,tnk->snk", weights_NST, v_TNK), lse_NS.T


class SequenceParallelModel(nn.Module):
    """A FusionModel whose video tokens are spread over a group; same arguments, same results on every rank."""

    def __init__(self, model: FusionModel, group: Group) -> None:
        super().__init__()
        self.model = model
        self._group = group

    def forward(
        self,
        video_CFHW: torch.Tensor,
        audio_SC: torch.Tensor,
        timestep: torch.Tensor,
        branches: Sequence[Branch],
        rope: RopeTables,
        ops: Ops,
        *,
        clean_first_frame: bool = False,
        run_blocks: BlockLoop = run_all,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See FusionModel.forward."""
        model, group = self.model, self._group
        _, frames, height, width = video_CFHW.shape
        per_frame = height * width // PATCH_AREA
        sizes = shard_sizes(frames * per_frame, group.size)
        start = sum(sizes[: group.index])
        own = slice(start, start + sizes[group.index])
        clean = per_frame if clean_first_frame else 0
        time = model.time_rows(timestep, clean_first_frame=clean_first_frame)
        values = model.transform(
            Tokens(model.video_model.embed(video_CFHW)[own], model.audio_model.embed(audio_SC)),
            time,
            min(max(clean - start, 0), sizes[group.index]),
            branches,
            RopeTables(Rope(rope.video.rotation[own]), rope.audio),
            ops._replace(
                video=replace(ops.video, self_attention=UlyssesAttention(ops.video, group, sizes)),
                audio=replace(ops.audio, other_attention=SplitKeyAttention(group)),
            ),
            run_blocks,
        )
        velocities = []
        for video_TP, audio_out_SC in values:
            video_CFHW_out = model.video_model.unpatch(group.gather_rows(video_TP, sizes), video_CFHW.shape)
            # Every rank computed the audio; the first one's is everybody's, so that the ranks can never drift apart.
            velocities.append((video_CFHW_out.float(), group.gather(audio_out_SC)[0].float()))
        return velocities
