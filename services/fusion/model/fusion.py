"""The fusion model: two towers of equal depth whose blocks attend to each other (arXiv 2510.01284, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from services.fusion.model.block import FusedBlock, Half, Stream, TowerBlock
from services.fusion.model.config import PATCH_AREA, FusionConfig
from services.fusion.model.layers import (
    Affine,
    Rope,
    audio_rope,
    linear_fp32,
    sinusoid,
    video_rope,
)
from services.fusion.model.operations import Ops, TextKV, Together, affine_norm

AUDIO_KERNEL = 7
TEXT_STRIDE = 64
"""TextKV.bound is 1 less than a multiple of this, to leave room for a row of padding."""


class TextCache(NamedTuple):
    """Keys and values of one prompt for every block: made once a job."""

    video: tuple[TextKV, ...]
    audio: tuple[TextKV, ...]


class EmbeddedText(NamedTuple):
    """A prompt as a tower's blocks see it, padded to text_len rows; see TextKV."""

    rows_LD: torch.Tensor
    num_rows: torch.Tensor
    bound: int


class RopeTables(NamedTuple):
    """Rotations of both towers' tokens: made once a shape."""

    video: Rope
    audio: Rope

    def to(self, device: torch.device) -> RopeTables:
        """The same tables on a device."""
        return RopeTables(*(Rope(table.rotation.to(device)) for table in self))


class Tokens(NamedTuple):
    """Tokens of both towers."""

    video_TD: torch.Tensor
    audio_SD: torch.Tensor


BlockCall = Callable[[Tokens], Tokens]
"""One fused block, bound to all it needs besides the tokens."""


class Pass(NamedTuple):
    """A pass that is about to be made."""

    tokens: Tokens
    blocks: Iterator[BlockCall | None]
    """In order, each to be called when it comes; None: left out, which the first one never is."""


BlockLoop = Callable[[list[Pass]], list[Tokens]]
"""Makes the passes of a step, which it takes out of the list; the tokens of each after its last block."""


def run_all(passes: list[Pass]) -> list[Tokens]:
    """The plain BlockLoop: every pass goes through a block before the next block is needed."""
    tokens, blocks = [each.tokens for each in passes], [each.blocks for each in passes]
    passes.clear()  # so that nothing holds the first tokens any more
    # Not zip: it keeps the first calls until the third come, and with them the half block that they share.
    while calls := [call for each in blocks for call in islice(each, 1)]:
        for index, call in enumerate(calls):
            if call is not None:
                tokens[index] = call(tokens[index])
    return tokens


class Branch(NamedTuple):
    """What tells a pass over the latents of a step from another: the prompt's, or the negative prompts'."""

    text: TextCache
    skip_layer: int = 0
    """Block left out (skip-layer guidance); 0 leaves none out."""


class TimeRows(NamedTuple):
    """Time rows of a step, float32: (R, D) for the heads, (R, 6, D) for the blocks."""

    video_RD: torch.Tensor
    video_R6D: torch.Tensor
    audio_RD: torch.Tensor
    audio_R6D: torch.Tensor


class Head(nn.Module):
    """Modulated norm and projection from tokens to latent values."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, x_TD: torch.Tensor, time_RD: torch.Tensor, clean: int) -> torch.Tensor:
        """(T, D) -> (T, out)."""
        shift_RD, scale_RD = (self.modulation.float() + time_RD.unsqueeze(1)).unbind(1)
        return self.head(affine_norm(x_TD, Affine(1 + scale_RD, shift_RD), clean))


class RowConv(nn.Conv1d):
    """A 1-d convolution of kernel 7 along rows, as one product with windows of them: no weight is rearranged for it."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool) -> None:
        super().__init__(in_dim, out_dim, AUDIO_KERNEL, padding=AUDIO_KERNEL // 2, bias=bias)

    def forward(self, x_SC: torch.Tensor) -> torch.Tensor:
        """(S, in) -> (S, out)."""
        pad = AUDIO_KERNEL // 2
        windows_SCK = F.pad(x_SC, (0, 0, pad, pad)).unfold(0, AUDIO_KERNEL, 1)
        return F.linear(windows_SCK.flatten(1), self.weight.flatten(1), self.bias)


class GatedConv(nn.Module):
    """w2(silu(w1 x) * w3 x), without bias."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = RowConv(dim, hidden_dim, bias=False)
        self.w2 = RowConv(hidden_dim, dim, bias=False)
        self.w3 = RowConv(dim, hidden_dim, bias=False)

    def forward(self, x_SD: torch.Tensor) -> torch.Tensor:
        """(S, D) -> (S, D)."""
        return self.w2(F.silu(self.w1(x_SD)) * self.w3(x_SD))


class Tower(nn.Module):
    """The parts both towers have."""

    def __init__(self, config: FusionConfig, out_dim: int) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(TowerBlock(config) for _ in range(config.num_layers))
        self.head = Head(dim, out_dim)

    def embed_text(self, text_LC: torch.Tensor) -> EmbeddedText:
        """A prompt (L, text_dim), zero-padded to text_len rows."""
        rows, text_len = len(text_LC), self.config.text_len
        embedded_LD = self.text_embedding(F.pad(text_LC, (0, 0, 0, text_len - rows)))
        num_rows = torch.tensor(rows, dtype=torch.int32, device=text_LC.device)
        return EmbeddedText(embedded_LD, num_rows, min(rows + TEXT_STRIDE - 1 - rows % TEXT_STRIDE, text_len))

    def text_kv(self, index: int, text: EmbeddedText) -> TextKV:
        """A block's keys and values of a prompt."""
        block = cast("TowerBlock", self.blocks[index])
        return TextKV(*block.cross_attn.text_kv(text.rows_LD), text.num_rows, text.bound)

    def time_rows(self, timestep_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R,) timesteps -> (R, D) for the head and (R, 6, D) for the blocks, float32."""
        x = linear_fp32(self.time_embedding[0], sinusoid(timestep_R, self.config.freq_dim))
        time_RD = linear_fp32(self.time_embedding[2], F.silu(x))
        return time_RD, linear_fp32(self.time_projection[1], F.silu(time_RD)).unflatten(-1, (6, -1))


class VideoTower(Tower):
    """Tokens are (1, 2, 2) patches of the latent, in (F, H, W) order."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config, config.video_channels * PATCH_AREA)
        self.patch_embedding = nn.Conv3d(config.video_channels, config.dim, (1, 2, 2), stride=(1, 2, 2))

    def embed(self, latent_CFHW: torch.Tensor) -> torch.Tensor:
        """(C, F, H, W) -> (T, D). A convolution whose kernel is its stride is a product with the patches."""
        patches = latent_CFHW.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
        patches_TC = patches.permute(1, 2, 4, 0, 3, 5).flatten(3).flatten(0, 2)
        weight = self.patch_embedding.weight
        return F.linear(patches_TC.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def unpatch(self, values_TP: torch.Tensor, shape_CFHW: torch.Size) -> torch.Tensor:
        """(T, 2*2*C) -> a latent of this shape."""
        _, frames, height, width = shape_CFHW
        patches = values_TP.view(frames, height // 2, width // 2, 2, 2, -1)
        return patches.permute(5, 0, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class AudioTower(Tower):
    """Tokens are the latent rows; the input sees seven neighbours."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config, config.audio_channels)
        self.patch_embedding = nn.Sequential(
            RowConv(config.audio_channels, config.dim, bias=True),
            nn.SiLU(),
            GatedConv(config.dim, config.audio_mlp_dim),
        )

    def embed(self, latent_SC: torch.Tensor) -> torch.Tensor:
        """(S, C) -> (S, D)."""
        return self.patch_embedding(latent_SC.to(self.head.head.weight.dtype))


class FusionModel(nn.Module):
    """Predicts the flow velocity of a video and an audio latent together.

    Parameter names are those of the released checkpoints. `fused_blocks` pairs the towers' blocks; replacing its
    entries is how compiling, sharding or streaming is applied from outside.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        self.video_model = VideoTower(config)
        self.audio_model = AudioTower(config)
        pairs = zip(self.video_model.blocks, self.audio_model.blocks, strict=True)
        self.shares_first_half = True
        """Block 0 up to the text is computed once for all branches, which changes no value; a switch for measuring."""
        self.fused_blocks: list[nn.Module] = [
            FusedBlock(cast("TowerBlock", video), cast("TowerBlock", audio)) for video, audio in pairs
        ]

    def encode_texts(self, texts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[TextCache]:
        """Keys and values of every block for each pair of texts: the rows (L <= text_len, text_dim) that the video
        tower attends to, and those of the audio tower. Each block is used once, for all of them.
        """
        dtype = self.video_model.head.head.weight.dtype
        towers = (self.video_model, self.audio_model)
        embedded = [
            [tower.embed_text(rows_LC.to(dtype)) for tower, rows_LC in zip(towers, pair, strict=True)] for pair in texts
        ]
        made = [
            [[tower.text_kv(index, text) for tower, text in zip(towers, pair, strict=True)] for pair in embedded]
            for index in range(self.config.num_layers)
        ]
        return [TextCache(*zip(*(block[prompt] for block in made), strict=True)) for prompt in range(len(texts))]

    def rope_tables(self, video_shape: tuple[int, int, int], audio_length: int) -> RopeTables:
        """Rotations for latents (C, *video_shape) and (audio_length, C), on the CPU."""
        frames, height, width = video_shape
        head_dim = self.config.head_dim
        return RopeTables(video_rope(frames, height // 2, width // 2, head_dim), audio_rope(audio_length, head_dim))

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
        """One prediction for each branch.

        Args:
            video_CFHW: noisy video latent; H and W even.
            audio_SC: noisy audio latent.
            timestep: scalar tensor, 0..1000, on the latents' device.
            branches: passes to make; what comes before the text is made once for all.
            rope: from `rope_tables`, on the latents' device.
            ops: implementations of the block's operations, see `Ops`.
            clean_first_frame: latent frame 0 is a given picture; its tokens have timestep 0.
            run_blocks: how the passes go through the blocks.

        Returns:
            Velocities of the latents' shapes, float32.
        """
        per_frame = video_CFHW.shape[2] * video_CFHW.shape[3] // PATCH_AREA
        time = self.time_rows(timestep, clean_first_frame=clean_first_frame)
        values = self.transform(
            Tokens(self.video_model.embed(video_CFHW), self.audio_model.embed(audio_SC)),
            time,
            per_frame if clean_first_frame else 0,
            branches,
            rope,
            ops,
            run_blocks,
        )
        return [
            (self.video_model.unpatch(video_TP, video_CFHW.shape).float(), audio_out_SC.float())
            for video_TP, audio_out_SC in values
        ]

    def time_rows(self, timestep: torch.Tensor, *, clean_first_frame: bool) -> TimeRows:
        """The modulation's time rows of a step; the video tower has two where its first frame is clean."""
        timestep_1 = timestep.reshape(1)
        timestep_R = torch.cat([torch.zeros_like(timestep_1), timestep_1]) if clean_first_frame else timestep_1
        return TimeRows(*self.video_model.time_rows(timestep_R), *self.audio_model.time_rows(timestep_1))

    def transform(
        self,
        tokens: Tokens,
        time: TimeRows,
        clean: int,
        branches: Sequence[Branch],
        rope: RopeTables,
        ops: Ops,
        run_blocks: BlockLoop = run_all,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Blocks and heads: tokens to values (T, 4 C) and (S, C) of each branch.

        Args:
            tokens: of the latents; the video's may be a run of them, if `ops` and `rope` are made for it.
            time: from `time_rows`.
            clean: how many of the first video tokens have timestep 0.
            branches: passes to make.
            rope: of these tokens.
            ops: implementations of the blocks' operations.
            run_blocks: how the passes go through the blocks.
        """
        streams = Stream(time.video_R6D, clean, rope.video, ops.video), Stream(time.audio_R6D, 0, rope.audio, ops.audio)
        half: Half | None = None
        if len(branches) > 1 and self.shares_first_half:
            half = cast("FusedBlock", self.fused_blocks[0]).begin(*tokens, *streams, ops.together)
        passes = [Pass(tokens, self._block_calls(branch, streams, ops.together, half)) for branch in branches]
        del half, tokens  # the passes let go of them after their first block
        return [
            (self.video_model.head(video_TD, time.video_RD, clean), self.audio_model.head(audio_SD, time.audio_RD, 0))
            for video_TD, audio_SD in run_blocks(passes)
        ]

    def _block_calls(
        self, branch: Branch, streams: tuple[Stream, Stream], together: Together, half: Half | None
    ) -> Iterator[BlockCall | None]:
        """The blocks of a branch; the first one goes on from `half` if that is there."""
        for index, module in enumerate(self.fused_blocks):
            block = cast("FusedBlock", module)
            rest = (*streams, branch.text.video[index], branch.text.audio[index], together)
            if index and index == branch.skip_layer:
                yield None
            elif half is not None:
                yield partial(_finish, block, half, rest)
                half = None
            else:
                yield partial(_run, block, rest)


_Rest = tuple[Stream, Stream, TextKV, TextKV, Together]


def _run(block: FusedBlock, rest: _Rest, tokens: Tokens) -> Tokens:
    return Tokens(*block(*tokens, *rest))


def _finish(block: FusedBlock, half: Half, rest: _Rest, _tokens: Tokens) -> Tokens:
    return Tokens(*block.finish(half, *rest))
