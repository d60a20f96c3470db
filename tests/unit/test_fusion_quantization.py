"""Wide layers in fp8 and int8: which they are, how far off they may be, packing, what they take."""

from __future__ import annotations

import math

import pytest
import torch

from services.fusion.engine import FusionEngine
from services.fusion.model.block import TowerBlock
from services.fusion.model.fusion import FusionModel
from services.fusion.ops import Execution
from services.fusion.packing import joint_rows, pack_block
from services.fusion.quantization import (
    QuantizedLinear,
    is_quantized,
    quantize,
    quantize_block,
    quantize_rows,
    quantize_rows_int8,
)
from services.fusion.request import RunInputs, RunSpec
from services.fusion.sampling.denoise import Latents
from shared.memory.modes import WeightFormat
from shared.sampling_options import SamplingOptions
from tests.fusion_checkpoint import SMALL as CHECKPOINT
from tests.fusion_checkpoint import write_variant
from tests.interpreted_fusion_kernels import normal
from tests.live_bytes import LiveBytes
from tests.unit.test_fusion_kernels import SMALL, small_model

QUANTIZED = (WeightFormat.FP8, WeightFormat.INT8)
LOSSES = {WeightFormat.NATIVE: 0.0, WeightFormat.INT8: 0.02, WeightFormat.FP8: 0.05}
"""Largest relative error of a tiny model's latents after two steps. Rows of 48 normal values: int8 is off by 0.29 of a
step of 2.3 / 127 standard deviations, 0.5 %; fp8 with 3 bits after the point by up to 1/16 of each value, 2.6 % rms."""


def _replaced(block: TowerBlock) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, QuantizedLinear)}


def _block(model: FusionModel, index: int) -> TowerBlock:
    block = model.video_model.blocks[index]
    assert isinstance(block, TowerBlock)
    return block


def _linear(dim: int, out: int, seed: int) -> torch.nn.Linear:
    layer = torch.nn.Linear(dim, out)
    with torch.no_grad():
        # Rows of very different sizes: a scale for the whole weight would lose the small ones.
        layer.weight.copy_(normal(out, dim, seed=seed) * torch.logspace(-4, 4, out).unsqueeze(1))
        layer.bias.zero_()
    return layer


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (WeightFormat.NATIVE, [False, False, False, False]),
        (WeightFormat.FP8, [False, True, True, False]),
        (WeightFormat.INT8, [True, True, True, True]),
    ],
)
def test_which_blocks_are_quantized(weights, expected) -> None:
    assert [is_quantized(index, 4, weights) for index in range(4)] == expected


@pytest.mark.parametrize("weights", QUANTIZED)
def test_the_wide_layers_and_no_others_are_replaced(weights) -> None:
    model = small_model()
    quantize(model, weights)
    for tower in (model.video_model, model.audio_model):
        for index, block in enumerate(tower.blocks):
            names = {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2"}
            names |= {"cross_attn.q", "cross_attn.o", "cross_attn.k_fusion", "cross_attn.v_fusion"}
            assert set(_replaced(block)) == (names if is_quantized(index, SMALL.num_layers, weights) else set())


@pytest.mark.parametrize("weights", QUANTIZED)
def test_a_block_by_itself_is_quantized_as_in_the_model(weights) -> None:
    model, alone = small_model(), _block(small_model(), 1)
    quantize(model, weights)
    quantize_block(alone, weights)
    expected = _block(model, 1).state_dict()
    found = alone.state_dict()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value.view(torch.uint8), expected[key].view(torch.uint8)), key


@pytest.mark.parametrize("weights", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_weights_take_the_bytes_they_should(weights, dtype) -> None:
    block = _block(small_model(dtype), 1)
    before = sum(value.nbytes for value in block.state_dict().values())
    quantize_block(block, weights)
    after = sum(value.nbytes for value in block.state_dict().values())
    rows = 9 * SMALL.dim + SMALL.ffn_dim
    values = 8 * SMALL.dim**2 + 2 * SMALL.dim * SMALL.ffn_dim
    assert after == before - values * (dtype.itemsize - 1) + 4 * rows


def test_int8_weights_are_off_by_half_a_step_at_most() -> None:
    weight = _linear(64, 33, seed=1).weight.detach()
    values, scale_O1 = quantize_rows_int8(weight)
    assert values.dtype is torch.int8
    assert torch.equal(values.abs().amax(1), torch.full((33,), 127, dtype=torch.int8)), "symmetric, the range used"
    assert torch.equal(scale_O1, weight.abs().amax(1, keepdim=True) / 127)
    error = (values.double() * scale_O1 - weight.double()).abs()
    assert bool((error <= scale_O1.double() * 0.5001).all())
    assert float(error.max()) > 0


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
def test_an_int8_product_is_within_its_bound(dtype, rounding) -> None:
    dim, layer, x = 512, _linear(512, 40, seed=1), normal(23, 512, seed=2).to(dtype)
    exact = x.double() @ layer.weight.detach().double().T
    ours = QuantizedLinear(layer.to(dtype), WeightFormat.INT8)(x).double()
    layer_TO = x.double().abs() @ layer.weight.detach().double().abs().T
    half_step_O = layer.weight.detach().double().abs().amax(1) / 254
    # |error| <= half a step for each input, and each weight rounded on arrival, once more when it is scaled back;
    # the result once, and sums in float32.
    bound = x.double().abs().sum(1, keepdim=True) * half_step_O * (1 + 2 * rounding)
    bound += layer_TO * (2 * rounding + dim * 2**-24) + exact.abs() * rounding
    error = (ours - exact).abs()
    assert bool((error <= bound).all())
    # Errors of the inputs are independent: the rms is sqrt(dim / 12) steps, far below the sum.
    steps = error / (2 * half_step_O)
    assert 0.5 * math.sqrt(dim / 12) < float(steps.pow(2).mean().sqrt()) < 2 * math.sqrt(dim / 12)


@pytest.mark.parametrize("weights", QUANTIZED)
def test_rows_of_zeros_stay_zero(weights) -> None:
    layer = _linear(16, 6, seed=1)
    with torch.no_grad():
        layer.weight[2] = 0
        layer.bias[2] = 3
    out = QuantizedLinear(layer, weights)(normal(5, 16, seed=2))
    assert torch.equal(out[:, 2], torch.full((5,), 3.0))
    assert bool(out.isfinite().all())


def test_fp8_layers_are_near_their_origin() -> None:
    layer = torch.nn.Linear(64, 32)
    x = normal(9, 64, seed=2)
    ours, expected = QuantizedLinear(layer, WeightFormat.FP8)(x), layer(x)
    # e4m3 has 3 bits after the point: each weight is off by up to 1/16 of itself, errors of 64 products average out.
    assert 0 < (ours - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("weights", QUANTIZED)
def test_8_bit_values_are_exact_in_bfloat16(weights) -> None:
    quantizer = quantize_rows if weights is WeightFormat.FP8 else quantize_rows_int8
    values, _ = quantizer(normal(40, 300, seed=1))
    assert torch.equal(values.to(torch.bfloat16).double(), values.double())


@pytest.mark.parametrize("weights", QUANTIZED)
def test_a_weight_is_scaled_back_into_one_copy(weights) -> None:
    with torch.device("meta"):
        layer = QuantizedLinear(torch.nn.Linear(64, 96), weights)
    with LiveBytes() as live:
        layer.weight_in(torch.bfloat16)
    assert live.peak == 64 * 96 * 2


@pytest.mark.parametrize("weights", QUANTIZED)
def test_packed_projections_are_one_product_of_the_same_values(weights) -> None:
    block = _block(small_model(), 1)
    quantize_block(block, weights)
    own = block.self_attn
    layers, x = (own.q, own.k, own.v), normal(7, SMALL.dim, seed=4)
    assert joint_rows([layer.weight for layer in layers]) is None
    apart = [layer(x) for layer in layers]
    expected = {key: value.clone() for key, value in block.state_dict().items()}
    pack_block(block)
    for key, value in block.state_dict().items():
        assert torch.equal(value.view(torch.uint8), expected[key].view(torch.uint8)), key
    weight, scale_O1, bias = (
        joint_rows([getattr(layer, name) for layer in layers]) for name in vars(own.q)["_buffers"]
    )
    assert weight is not None and scale_O1 is not None and bias is not None
    joint = x.double() @ (weight.double() * scale_O1).T + bias
    # Sums of 48 products of order 1.
    torch.testing.assert_close(joint.float(), torch.cat(apart, dim=1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("weights", WeightFormat)
def test_the_loss_of_a_run_is_that_of_its_weights_and_is_said(tmp_path, weights) -> None:
    model = "720x720_5s"
    write_variant(tmp_path, model)

    def run(execution: Execution) -> tuple[Latents, str]:
        engine = FusionEngine(tmp_path, torch.device("cpu"), torch.float32, execution)
        engine.discover()
        prompt = torch.randn(5, CHECKPOINT.text_dim, generator=torch.Generator().manual_seed(3))
        spec = RunSpec(model, 64, 64, SamplingOptions(2, 1.0, 1.0, slg_layer=0))
        *_, latents = engine.denoise(spec, RunInputs(prompt, None, None, None))
        assert isinstance(latents, Latents)
        return latents, engine.arithmetic

    (exact, _), (ours, said) = run(Execution()), run(Execution(weights=weights))
    assert (weights.value in said) == (weights is not WeightFormat.NATIVE)
    pairs = ((ours.video_CFHW, exact.video_CFHW), (ours.audio_SC, exact.audio_SC))
    loss = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    assert loss <= LOSSES[weights]
    assert (loss > 0) == (weights is not WeightFormat.NATIVE)
