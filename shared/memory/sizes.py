"""Widths and weight bytes of the networks, as far as memory depends on them. No torch: commands import this."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shared.shapes import AudioLatentShape, VideoLatentShape, common_sizes
from shared.variants import Variant

_PATCH_AREA = 4
"""Latent pixels of a video token."""
_AUDIO_KERNEL = 7
"""Rows that the audio stem's convolutions see."""
AUDIO_STEM_LAYERS = 3
"""Of the audio stem's gated convolutions, which are large."""
_SQUARES_PER_TOWER = 8
"""Wide matrices of dim x dim in a tower's block: q, k, v, o; then q, o, k_fusion, v_fusion."""


@dataclass(frozen=True)
class FusionSizes:
    """The fusion model. Bytes are those at the arithmetic's precision."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    """Fused blocks."""
    text_len: int
    """Rows a prompt is padded to."""
    wide_params_per_block: int
    """Values of the layers that are quantized, of both towers: projections and feed-forward, without biases."""
    wide_rows_per_block: int
    """Rows of their matrices; each has a scale where they are quantized."""
    text_bytes_per_block: int
    """What makes a prompt's keys and values, once a job."""
    text_bytes: int
    """Embedding of prompts, once a job."""
    block_bytes_rest: int
    """Everything else of a fused block, the text's part included: biases, norms, modulation."""
    other_bytes: int
    """Outside of blocks: stems, heads, and the embedding of prompts, too."""
    audio_stem_bytes: int
    """Of those, the audio stem's gated convolutions."""
    itemsize: int
    """Bytes of a value in the arithmetic's precision."""

    @classmethod
    def of_widths(
        cls,
        *,
        dim: int,
        ffn_dim: int,
        freq_dim: int,
        text_dim: int,
        num_heads: int,
        num_layers: int,
        text_len: int,
        video_channels: int = 48,
        audio_channels: int = 20,
        itemsize: int = 2,
    ) -> FusionSizes:
        """Of a model of these widths; names as in services.fusion.model.config."""
        text = 2 * (dim * dim + dim) + dim
        biases = 7 * dim + ffn_dim + dim + dim  # q, k, v, o, q, k_fusion, v_fusion; feed-forward in and out; o
        norms = 4 * dim + 2 * 2 * dim  # norm_q, norm_k, norm_q, norm_k_fusion; norm3 and pre_attn_norm_fusion
        rest = text + biases + norms + 6 * dim
        embedding = (text_dim * dim + dim) + (dim * dim + dim)
        time = (freq_dim * dim + dim) + 7 * (dim * dim + dim)
        video, audio = video_channels * _PATCH_AREA, audio_channels
        heads = sum(dim * out + out + 2 * dim for out in (video, audio))
        hidden = -(-(2 * 4 * dim // 3) // 256) * 256
        audio_stem = AUDIO_STEM_LAYERS * _AUDIO_KERNEL * dim * hidden
        stems = (video * dim + dim) + (_AUDIO_KERNEL * audio * dim + dim) + audio_stem
        return cls(
            dim=dim,
            ffn_dim=ffn_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            text_len=text_len,
            wide_params_per_block=2 * (_SQUARES_PER_TOWER * dim * dim + 2 * dim * ffn_dim),
            wide_rows_per_block=2 * (_SQUARES_PER_TOWER * dim + ffn_dim + dim),
            text_bytes_per_block=2 * text * itemsize,
            block_bytes_rest=2 * rest * itemsize,
            text_bytes=2 * embedding * itemsize,
            other_bytes=(2 * (embedding + time) + heads + stems) * itemsize,
            audio_stem_bytes=audio_stem * itemsize,
            itemsize=itemsize,
        )


RELEASED_FUSION = FusionSizes.of_widths(
    dim=3072, ffn_dim=14336, freq_dim=256, text_dim=4096, num_heads=24, num_layers=30, text_len=512
)
"""Ovi 11B in bfloat16."""


@dataclass(frozen=True)
class VaeSizes:
    """The networks of the VAE service."""

    decoder_bytes: int
    """Of the video decoder as the fused operations lay it out."""
    encoder_bytes: int
    """Of the video encoder."""
    sound_bytes: int
    """Of audio VAE and vocoder, float32."""
    decoder_dim: int
    """Channels of the decoder's last level."""
    itemsize: int
    """Bytes of a value of the video networks."""
    file_bytes: int
    """Of the video VAE's weight file."""

    @property
    def total_bytes(self) -> int:
        """Of all weights."""
        return self.decoder_bytes + self.encoder_bytes + self.sound_bytes

    def scaled(self, part: float) -> VaeSizes:
        """About those of networks whose weights are so many times as large."""
        return VaeSizes(
            decoder_bytes=int(self.decoder_bytes * part),
            encoder_bytes=int(self.encoder_bytes * part),
            sound_bytes=int(self.sound_bytes * part),
            decoder_dim=round(self.decoder_dim * part**0.5),
            itemsize=self.itemsize,
            file_bytes=int(self.file_bytes * part),
        )


RELEASED_VAE = VaeSizes(
    decoder_bytes=1_297_667_192,
    encoder_bytes=299_274_176,
    sound_bytes=1_135_437_868,
    decoder_dim=256,
    itemsize=2,
    file_bytes=2_818_754_672,
)
"""Wan2.2 VAE in bfloat16, MMAudio VAE, BigVGAN."""


@dataclass(frozen=True)
class TextEncoderSizes:
    """The text encoder."""

    layer_bytes: int
    num_layers: int
    embedding_bytes: int
    """Of the token embedding, of which a prompt reads a row a token."""
    other_bytes: int
    """The last norm."""
    dim: int
    num_heads: int
    max_tokens: int

    @property
    def total_bytes(self) -> int:
        """Of all weights."""
        return self.num_layers * self.layer_bytes + self.embedding_bytes + self.other_bytes

    def scaled(self, part: float) -> TextEncoderSizes:
        """About those of an encoder whose weights are so many times as large."""
        return replace(
            self,
            layer_bytes=int(self.layer_bytes * part),
            embedding_bytes=int(self.embedding_bytes * part),
            other_bytes=int(self.other_bytes * part),
        )

    @classmethod
    def of_widths(
        cls,
        *,
        vocab_size: int,
        dim: int,
        dim_attn: int,
        dim_ffn: int,
        num_heads: int,
        num_layers: int,
        num_buckets: int,
        max_tokens: int = 512,
        itemsize: int = 2,
    ) -> TextEncoderSizes:
        """Of a umT5 encoder of these widths; names as in services.text_encoder.config."""
        layer = 4 * dim * dim_attn + 3 * dim * dim_ffn + 2 * dim + num_buckets * num_heads
        return cls(
            layer_bytes=layer * itemsize,
            num_layers=num_layers,
            embedding_bytes=vocab_size * dim * itemsize,
            other_bytes=dim * itemsize,
            dim=dim,
            num_heads=num_heads,
            max_tokens=max_tokens,
        )


RELEASED_TEXT_ENCODER = TextEncoderSizes.of_widths(
    vocab_size=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24, num_buckets=32
)
"""umT5-XXL in bfloat16."""


@dataclass(frozen=True)
class StackSizes:
    """The networks of all stages."""

    fusion: FusionSizes
    vae: VaeSizes
    text_encoder: TextEncoderSizes


RELEASED = StackSizes(RELEASED_FUSION, RELEASED_VAE, RELEASED_TEXT_ENCODER)


@dataclass(frozen=True)
class ClipTokens:
    """What a step of a clip computes."""

    video: int
    """Tokens of the video tower."""
    audio: int
    """Tokens of the audio tower."""
    passes: int
    """2 with guidance, 1 without."""

    @classmethod
    def of_clip(cls, num_frames: int, height: int, width: int, *, audio_length: int, passes: int = 2) -> ClipTokens:
        """Of a clip of this many frames of height x width pixels and rows of sound.

        Raises:
            ValueError: see VideoLatentShape.from_pixels.
        """
        latent = VideoLatentShape.from_pixels(num_frames, height, width)
        return cls(latent.frames * latent.height * latent.width // _PATCH_AREA, audio_length, passes)

    @classmethod
    def of_seconds(cls, seconds: int, height: int, width: int, *, passes: int = 2) -> ClipTokens:
        """Of a clip of 5 or 10 s; see `of_clip`."""
        audio_length = AudioLatentShape.from_seconds(seconds).length
        return cls.of_clip(24 * seconds + 1, height, width, audio_length=audio_length, passes=passes)


@dataclass(frozen=True)
class ClipShape:
    """A clip as every stage sees it."""

    name: str
    """For people, for example "960x960_10s"."""
    tokens: ClipTokens
    height: int
    """Pixels."""
    width: int

    @classmethod
    def largest_of(cls, variant: Variant, video_area: int | None = None) -> ClipShape:
        """The usual shape of a variant that takes most, with guidance.

        Args:
            variant: of the fusion model.
            video_area: pixels of a frame, if its checkpoint says otherwise.
        """
        height, width = max(common_sizes(video_area or variant.video_area), key=lambda size: size[0] * size[1])
        return cls(variant.id, ClipTokens.of_seconds(variant.seconds, height, width), height, width)
