"""The audio VAE, its mel front end and the vocoder against `audio_vae.safetensors`, in both weight-norm spellings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from services.vae.checkpoint import load_audio_vae, load_vocoder
from services.vae.model.mel import MelSpectrogram
from services.vae.model.vocoder import Vocoder
from tests.parity.comparison import Comparison, GoldenFile, max_abs_err

FILE = "audio_vae"
_CPU = torch.device("cpu")


def comparisons(golden: Path) -> Iterator[Comparison]:
    """Every output of the file in a folder of golden vectors."""
    file = GoldenFile.read(golden / f"{FILE}.safetensors")
    tensors = file.tensors
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v1-16.pth"
        torch.save(file.weights("vae."), path)
        vae = load_audio_vae(path, _CPU)
    mel = vae.decode(tensors["latent"])
    yield Comparison(FILE, "decode", "mel", max_abs_err(mel, tensors["mel"]))
    weights = file.weights("vocoder.")
    spellings = {
        "nested": {"generator": weights},
        "flat": {f"generator.{key}": value for key, value in weights.items()},
        "weight_g_v": {"generator": {_old_spelling(key): value for key, value in weights.items()}},
    }
    for spelling, content in spellings.items():
        waveform = _vocoder(content)(mel)[:, None]
        yield Comparison(FILE, "decode", f"waveform/{spelling}", max_abs_err(waveform, tensors["waveform"]))
    front_end = MelSpectrogram(vae.config.mel_bins)
    input_mel = front_end(tensors["input_waveform"])
    yield Comparison(FILE, "encode", "input_mel", max_abs_err(input_mel, tensors["input_mel"]))
    encoded = vae.encode(input_mel)
    yield Comparison(FILE, "encode", "encoded_mean", max_abs_err(encoded, tensors["encoded_mean"]))


def _vocoder(content: object) -> Vocoder:
    """Through the loader of the released file, so a file in that layout is written first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "best_netG.pt"
        torch.save(content, path)
        return load_vocoder(path, _CPU)


def _old_spelling(key: str) -> str:
    key = key.replace("parametrizations.weight.original0", "weight_g")
    return key.replace("parametrizations.weight.original1", "weight_v")
