"""One fused block: self-attention in both towers, then attention to text and to the other tower, then feed-forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from services.fusion.model.config import FusionConfig
from services.fusion.model.layers import EPS, Affine, Modulation, ModulationTable, RMSNorm, Rope
from services.fusion.model.operations import TextKV, Together, TowerOps


class Stream(NamedTuple):
    """What a block needs of one tower besides its tokens."""

    time_R6D: torch.Tensor
    """Time rows of the modulation, float32; R = 2 where the first `clean` tokens have a time of their own."""
    clean: int
    rope: Rope
    ops: TowerOps


class SelfAttention(nn.Module):
    """Attention of a tower to itself; q and k RMS-normed over all heads, then rotated."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x_TD: torch.Tensor, rope: Rope, ops: TowerOps) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        (out_TD,) = ops.linears((self.o,), self._attend(x_TD, rope, ops).flatten(1))
        return out_TD

    def _attend(self, x_TD: torch.Tensor, rope: Rope, ops: TowerOps) -> torch.Tensor:
        q_TD, k_TD, v_TD = ops.linears((self.q, self.k, self.v), x_TD)
        q_TNK = ops.norm_rope(q_TD, self.norm_q.weight, rope, self.num_heads)
        k_TNK = ops.norm_rope(k_TD, self.norm_k.weight, rope, self.num_heads)
        del q_TD, k_TD  # attention needs the memory
        return ops.self_attention(q_TNK, k_TNK, v_TD.unflatten(-1, (self.num_heads, -1)))


class CrossFusion(nn.Module):
    """Attention of one tower to its text and to the other tower with one query and one output projection."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o, self.k_fusion, self.v_fusion = (nn.Linear(dim, dim) for _ in range(6))
        self.norm_q, self.norm_k, self.norm_k_fusion = (RMSNorm(dim) for _ in range(3))
        self.pre_attn_norm_fusion = nn.LayerNorm(dim, eps=EPS)

    def text_kv(self, text_LD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (L, N, K) of the embedded text (L, D)."""
        heads = (self.num_heads, -1)
        return self.norm_k(self.k(text_LD)).unflatten(-1, heads), self.v(text_LD).unflatten(-1, heads)

    def forward(
        self,
        x_TD: torch.Tensor,
        rope: Rope,
        text: TextKV,
        other_SD: torch.Tensor,
        other_rope: Rope,
        ops: TowerOps,
    ) -> torch.Tensor:
        """(T, D) -> (T, D), of tokens after norm3; `other_SD` are the other tower's after pre_attn_norm_fusion."""
        attended_TNK = self._attend(x_TD, rope, text, other_SD, other_rope, ops)
        (out_TD,) = ops.linears((self.o,), attended_TNK.flatten(1))
        return out_TD

    def _attend(
        self,
        x_TD: torch.Tensor,
        rope: Rope,
        text: TextKV,
        other_SD: torch.Tensor,
        other_rope: Rope,
        ops: TowerOps,
    ) -> torch.Tensor:
        (q_TD,) = ops.linears((self.q,), x_TD)
        q_TNK, rotated_q_TNK = ops.norm_and_rope(q_TD, self.norm_q.weight, rope, self.num_heads)
        k_SD, v_SD = ops.linears((self.k_fusion, self.v_fusion), other_SD)
        k_SNK = ops.norm_rope(k_SD, self.norm_k_fusion.weight, other_rope, self.num_heads)
        del q_TD, k_SD  # attention needs the memory
        return ops.attend_jointly(q_TNK, text, rotated_q_TNK, (k_SNK, v_SD.unflatten(-1, (self.num_heads, -1))))


class TowerBlock(nn.Module):
    """One tower's share of a fused block."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        dim = config.dim
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.cross_attn = CrossFusion(config)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = ModulationTable(6, dim)

    def modulations(self, stream: Stream) -> tuple[Modulation, Modulation]:
        """Of the self-attention and of the feed-forward."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(stream.time_R6D).unbind(1)
        return Modulation(shift1, scale1, gate1), Modulation(shift2, scale2, gate2)

    def attend_self(
        self, x_TD: torch.Tensor, modulation: Modulation, stream: Stream, readers: tuple[nn.LayerNorm, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """x + gate * SelfAttn(modulated LN(x)), and its norms for those who read it next."""
        norms, clean = stream.ops.residual_norms, stream.clean
        x_TD, (y_TD,) = norms(x_TD, None, None, clean, (modulation.affine,))
        attended_TD = self.self_attn(y_TD, stream.rope, stream.ops)
        return norms(x_TD, attended_TD, modulation.gate_RD, clean, tuple(Affine.of(norm) for norm in readers))

    def attend_others(
        self,
        x_TD: torch.Tensor,
        normed_TD: torch.Tensor,
        modulation: Modulation,
        stream: Stream,
        text: TextKV,
        other_SD: torch.Tensor,
        other_rope: Rope,
    ) -> torch.Tensor:
        """x + CrossFusion(norm3(x)), then x + gate * FFN(modulated LN(x))."""
        ops, clean = stream.ops, stream.clean
        fused_TD = self.cross_attn(normed_TD, stream.rope, text, other_SD, other_rope, ops)
        x_TD, (y_TD,) = ops.residual_norms(x_TD, fused_TD, None, clean, (modulation.affine,))
        del fused_TD  # the feed-forward needs the memory
        y_TD = ops.feed_forward(self.ffn[0], self.ffn[2], y_TD)
        x_TD, _ = ops.residual_norms(x_TD, y_TD, modulation.gate_RD, clean, ())
        return x_TD


class Half(NamedTuple):
    """Both towers in the middle of a block: after their self-attention, before they meet the text."""

    video_TD: torch.Tensor
    video_normed_TD: torch.Tensor
    """After the video tower's norm3."""
    video_for_audio_TD: torch.Tensor
    """After the audio tower's pre_attn_norm_fusion."""
    video_modulation: Modulation
    """Of the feed-forward."""
    audio_SD: torch.Tensor
    audio_normed_SD: torch.Tensor
    audio_for_video_SD: torch.Tensor
    audio_modulation: Modulation


class FusedBlock(nn.Module):
    """Block i of both towers; the unit that is compiled, sharded or streamed from outside."""

    def __init__(self, video: TowerBlock, audio: TowerBlock) -> None:
        super().__init__()
        self.video = video
        self.audio = audio

    def forward(
        self,
        video_TD: torch.Tensor,
        audio_SD: torch.Tensor,
        video_stream: Stream,
        audio_stream: Stream,
        video_text: TextKV,
        audio_text: TextKV,
        together: Together,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(video tokens, audio tokens) -> the same, one block later; each tower sees the other's state before it."""
        half = self.begin(video_TD, audio_SD, video_stream, audio_stream, together)
        return self.finish(half, video_stream, audio_stream, video_text, audio_text, together)

    def begin(
        self,
        video_TD: torch.Tensor,
        audio_SD: torch.Tensor,
        video_stream: Stream,
        audio_stream: Stream,
        together: Together,
    ) -> Half:
        """What comes before the text."""
        video, audio = self.video, self.audio
        video_mod1, video_mod2 = video.modulations(video_stream)
        audio_mod1, audio_mod2 = audio.modulations(audio_stream)
        (video_TD, (video_normed_TD, for_audio_TD)), (audio_SD, (audio_normed_SD, for_video_SD)) = together(
            lambda: video.attend_self(
                video_TD, video_mod1, video_stream, (video.norm3, audio.cross_attn.pre_attn_norm_fusion)
            ),
            lambda: audio.attend_self(
                audio_SD, audio_mod1, audio_stream, (audio.norm3, video.cross_attn.pre_attn_norm_fusion)
            ),
        )
        return Half(
            video_TD,
            video_normed_TD,
            for_audio_TD,
            video_mod2,
            audio_SD,
            audio_normed_SD,
            for_video_SD,
            audio_mod2,
        )

    def finish(
        self,
        half: Half,
        video_stream: Stream,
        audio_stream: Stream,
        video_text: TextKV,
        audio_text: TextKV,
        together: Together,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rest."""
        return together(
            lambda: self.video.attend_others(
                half.video_TD,
                half.video_normed_TD,
                half.video_modulation,
                video_stream,
                video_text,
                half.audio_for_video_SD,
                audio_stream.rope,
            ),
            lambda: self.audio.attend_others(
                half.audio_SD,
                half.audio_normed_SD,
                half.audio_modulation,
                audio_stream,
                audio_text,
                half.video_for_audio_TD,
                video_stream.rope,
            ),
        )
