"""The released variants of the fusion model: names, files, areas, lengths, prompt forms."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from shared.shapes import AudioLatentShape


class PromptFormat(enum.Enum):
    """How a variant wants sound described in the prompt."""

    AS_IS = "as_is"
    AUDIO_LINE = "audio_line"
    AUDCAP_TAGS = "audcap_tags"


@dataclass(frozen=True)
class Variant:
    """A released variant of the fusion model."""

    id: str
    file: str
    """Path of the weights inside the checkpoint folder."""
    video_area: int
    """Pixels of a frame before rounding; a checkpoint's own metadata may say otherwise."""
    seconds: int
    prompt_format: PromptFormat

    @property
    def num_frames(self) -> int:
        """Frames of a clip: 24 a second and one more."""
        return 24 * self.seconds + 1

    @property
    def audio_shape(self) -> AudioLatentShape:
        """Shape of the audio latent."""
        return AudioLatentShape.from_seconds(self.seconds)


VARIANTS: dict[str, Variant] = {
    v.id: v
    for v in (
        Variant("720x720_5s", "Ovi/model.safetensors", 720 * 720, 5, PromptFormat.AUDCAP_TAGS),
        Variant("960x960_5s", "Ovi/model_960x960.safetensors", 960 * 960, 5, PromptFormat.AUDIO_LINE),
        Variant("960x960_10s", "Ovi/model_960x960_10s.safetensors", 960 * 960, 10, PromptFormat.AUDIO_LINE),
        Variant("720x720_5s_fp8", "Ovi/model_fp8_e4m3fn.safetensors", 720 * 720, 5, PromptFormat.AUDCAP_TAGS),
    )
}

TEXT_ENCODER_FILE = "Wan2.2-TI2V-5B/models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "Wan2.2-TI2V-5B/google/umt5-xxl"
VIDEO_VAE_FILE = "Wan2.2-TI2V-5B/Wan2.2_VAE.pth"
AUDIO_VAE_FILE = "MMAudio/ext_weights/v1-16.pth"
VOCODER_FILE = "MMAudio/ext_weights/best_netG.pt"
