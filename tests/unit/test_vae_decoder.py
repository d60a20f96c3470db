"""The video decoder against diffusers' own, whatever the step, and in stripes against the whole picture."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from services.vae.model.video_decoder import VideoDecoder
from services.vae.model.video_layers import Ops, ReferenceOps
from services.vae.model.video_vae import wan_network
from tests.vae_checkpoint import SMALL_VIDEO_VAE

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""For pictures in [-1, 1] in float32: sums of a few hundred products, some 40 layers deep, in another order."""


def random_network(seed: int = 0) -> Any:
    """diffusers' network at small widths; activations stay near unit size."""
    network: Any = wan_network(SMALL_VIDEO_VAE)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(False)
        parameter.normal_(generator=generator)
        if name.endswith("gamma"):
            parameter.mul_(0.1).add_(1.0)
        else:
            parameter.mul_(0.1 if name.endswith("bias") else parameter[0].numel() ** -0.5)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> Any:
    return random_network()


def latent(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(frames, height, width, 48, generator=torch.Generator().manual_seed(frames))


def by_diffusers(network: Any, latent_FHWC: torch.Tensor) -> torch.Tensor:
    """Pictures (f, H, W, 3) by diffusers' decoder and its own feature cache, a latent frame at a time."""
    latent_BCFHW = network.post_quant_conv(latent_FHWC.permute(3, 0, 1, 2)[None])
    num_convs = sum(isinstance(module, torch.nn.Conv3d) for module in network.decoder.modules())
    cache: list[torch.Tensor | None] = [None] * num_convs
    pictures = []
    for index, frame in enumerate(latent_BCFHW.split(1, dim=2)):
        patches = network.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
        pictures.append(unpatchify(patches, patch_size=2).clamp(-1, 1)[0].permute(1, 2, 3, 0))
    return torch.cat(pictures)


def decode(network: Any, ops: Ops, latent_FHWC: torch.Tensor, stripe: Any = None) -> torch.Tensor:
    decoder = VideoDecoder(network, ops, CPU, torch.float32)
    return torch.cat(list(decoder.stream(latent_FHWC, torch.float32, stripe)))


class LockStep:
    """Stripes of one picture as threads; what one gives, all see when the last has given."""

    def __init__(self, heights: list[int]) -> None:
        self._heights = heights
        self._given: list[Any] = [None] * len(heights)
        self._barrier = threading.Barrier(len(heights), timeout=60)

    def trade(self, index: int, mine: Any) -> list[Any]:
        self._given[index] = mine
        self._barrier.wait()
        all_given = list(self._given)
        self._barrier.wait()
        return all_given

    def run(self, work: Callable[[Any, torch.Tensor], torch.Tensor], latent_FHWC: torch.Tensor) -> torch.Tensor:
        """The rows of all stripes' results, from the top."""
        parts = latent_FHWC.split(self._heights, dim=1)
        stripes = [LockStepStripe(self, index) for index in range(len(parts))]

        def one(stripe: LockStepStripe, part: torch.Tensor) -> torch.Tensor:
            try:
                return work(stripe, part)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(parts)) as pool:
            return torch.cat(list(pool.map(one, stripes, parts)), dim=1)


class LockStepStripe:
    """One of them; see `video_layers.Stripe`."""

    def __init__(self, picture: LockStep, index: int) -> None:
        self._picture = picture
        self._index = index

    def fill_halo(self, x_NHWC: torch.Tensor) -> None:
        edges = self._picture.trade(self._index, (x_NHWC[:, 1].clone(), x_NHWC[:, -2].clone()))
        zeros = torch.zeros_like(x_NHWC[:, 0])
        x_NHWC[:, 0] = edges[self._index - 1][1] if self._index else zeros
        x_NHWC[:, -1] = edges[self._index + 1][0] if self._index + 1 < len(edges) else zeros

    def gather_rows(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._picture.trade(self._index, x_NHWC), dim=1)


@pytest.mark.parametrize("shape", [(1, 2, 3), (4, 3, 2)])
def test_pictures_are_those_of_diffusers(network: Any, shape: tuple[int, int, int]) -> None:
    expected = by_diffusers(network, latent(*shape))
    ours = decode(network, ReferenceOps(), latent(*shape))
    assert ours.shape == (4 * shape[0] - 3, 16 * shape[1], 16 * shape[2], 3)
    assert expected.std() > 0.1, "the pictures are not flat"
    assert (ours - expected).abs().max() < TOLERANCE


def test_levels_are_the_pixels_rounded(network: Any) -> None:
    decoder = VideoDecoder(network, ReferenceOps(), CPU, torch.float32)
    for pixels, levels in zip(
        decoder.stream(latent(3, 2, 2), torch.float32), decoder.stream(latent(3, 2, 2), torch.uint8), strict=True
    ):
        assert levels.dtype == torch.uint8
        assert (levels.float() - (pixels + 1) * 127.5).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("heights", [[1, 3], [2, 1, 2]])
def test_stripes_make_the_whole_picture(network: Any, heights: list[int]) -> None:
    """Stripes of different heights, their halo rows traded in memory."""
    whole = latent(3, sum(heights), 2)
    striped = LockStep(heights).run(lambda stripe, part: decode(network, ReferenceOps(), part, stripe), whole)
    assert (striped - decode(network, ReferenceOps(), whole)).abs().max() < TOLERANCE
