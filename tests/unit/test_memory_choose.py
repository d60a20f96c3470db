"""Layouts for a budget, refusals, and the mode and GPUs of a whole stack."""

from __future__ import annotations

import pytest

from shared.errors import OutOfMemory
from shared.memory.choose import (
    DeviceFacts,
    Subject,
    choose_mode,
    least_fusion,
    plan_fusion,
    plan_text_encoder,
    plan_vae,
)
from shared.memory.estimate import (
    FUSION_CONTEXT_BYTES,
    TEXT_ENCODER_CONTEXT_BYTES,
    VAE_CONTEXT_BYTES,
    FusionLayout,
    estimate_fusion,
)
from shared.memory.modes import RECIPES, TextEncoderPlace, VramMode, WeightFormat
from shared.memory.sizes import RELEASED, RELEASED_FUSION, RELEASED_TEXT_ENCODER, RELEASED_VAE, ClipShape
from shared.memory.stack import FUSION, SPARE_PART, TEXT_ENCODER, VAE, StackMemory, StackWish, plan_largest, plan_stack
from shared.variants import VARIANTS

GIB = 2**30
CLIPS = [ClipShape.largest_of(VARIANTS[name]) for name in ("720x720_5s", "960x960_5s", "960x960_10s")]
LARGEST = CLIPS[-1]
MODES = [mode for mode in VramMode if mode is not VramMode.AUTO]
STREAMING = [VramMode.STREAMED, VramMode.FP8_OFFLOAD, VramMode.ULTRA_LOW]


def cards(*free_gib: float, unified: bool = False) -> list[DeviceFacts]:
    return [
        DeviceFacts(f"cuda:{index}", int(free * GIB), int(free * GIB), "9.0", unified)
        for index, free in enumerate(free_gib)
    ]


@pytest.mark.parametrize("mode", STREAMING)
def test_more_memory_never_keeps_fewer_blocks(mode: VramMode) -> None:
    least = least_fusion(RELEASED_FUSION, LARGEST.tokens, mode).reserved
    kept, chunk = 0, 1
    for budget in range(least, 30 * GIB, GIB // 4):
        plan = plan_fusion(RELEASED_FUSION, LARGEST.tokens, mode, budget)
        assert plan.components.reserved <= budget
        more = plan.layout.token_chunk or 10**9
        assert more >= chunk, "nor does it cut the work into smaller pieces"
        if more == chunk:
            assert plan.layout.num_resident >= kept
        kept, chunk = plan.layout.num_resident, more
    assert (kept, chunk) == (30, 10**9)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_planned_is_what_is_estimated(mode: VramMode) -> None:
    plan = plan_fusion(RELEASED_FUSION, LARGEST.tokens, mode, 40 * GIB)
    hosted = RECIPES[mode].takes_turns
    assert plan.components == estimate_fusion(RELEASED_FUSION, LARGEST.tokens, plan.layout, hosted=hosted)
    assert plan.layout.weights is RECIPES[mode].weights and plan.layout.num_resident == 30


@pytest.mark.parametrize("mode", MODES)
def test_a_budget_that_lacks_a_twentieth_is_refused_with_the_numbers(mode: VramMode) -> None:
    need = least_fusion(RELEASED_FUSION, LARGEST.tokens, mode).reserved
    budget = need * 95 // 100
    with pytest.raises(OutOfMemory) as caught:
        plan_fusion(RELEASED_FUSION, LARGEST.tokens, mode, budget, subject=Subject("960x960_10s", "cuda:0"))
    numbers = f"{mode.value} needs {need / GIB:.1f} GiB on cuda:0 for 960x960_10s, {budget / GIB:.1f} GiB may be used; "
    assert caught.value.message.startswith(numbers)
    fitting = caught.value.message.removeprefix(numbers).partition(" fits")[0]
    if fitting == "no mode":
        assert mode in (VramMode.ULTRA_LOW, VramMode.FP8_OFFLOAD, VramMode.STREAMED)
    else:
        plan_fusion(RELEASED_FUSION, LARGEST.tokens, VramMode(fitting), budget)
    assert plan_fusion(RELEASED_FUSION, LARGEST.tokens, mode, need).layout.token_chunk is not None


def test_without_a_limit_a_mode_that_streams_does_so() -> None:
    kept = {mode: plan_fusion(RELEASED_FUSION, LARGEST.tokens, mode, None).layout for mode in MODES}
    assert {mode for mode, layout in kept.items() if layout.num_resident < 30} == set(STREAMING)
    assert all(layout.token_chunk is None for layout in kept.values())


def test_resident_blocks_are_spread() -> None:
    for resident in range(31):
        blocks = sorted(FusionLayout(WeightFormat.NATIVE, resident, None, keep_ends=False).resident_blocks(30))
        assert len(blocks) == resident
        gaps = [after - before for before, after in zip([-1, *blocks], [*blocks, 30], strict=True)]
        assert max(gaps) - min(gaps) <= 1 + max(gaps) // 2
    ends = FusionLayout(WeightFormat.FP8, 5, None, keep_ends=True).resident_blocks(30)
    assert {0, 29} < ends and len(ends) == 5
    with pytest.raises(ValueError, match="num_resident must be 2 to 30, got 1"):
        FusionLayout(WeightFormat.FP8, 1, None, keep_ends=True).resident_blocks(30)


def test_pictures_are_tiled_only_where_nothing_else_fits() -> None:
    seen = []
    for budget in range(21, 3, -1):
        layout = plan_vae(RELEASED_VAE, 960, 960, VramMode.STREAMED, budget * GIB).layout
        seen.append((layout.latent_frames_per_step, layout.tile_latent_side or 1000))
    assert seen == sorted(seen, reverse=True) and seen[0] == (2, 1000) and seen[-1][1] < 32
    with pytest.raises(OutOfMemory, match=r"decoder needs \d+\.\d GiB on cuda:1 for a clip, 9\.0 GiB may be used"):
        plan_vae(RELEASED_VAE, 960, 960, VramMode.STANDARD, 9 * GIB, tiles=False, subject=Subject("a clip", "cuda:1"))


def test_the_text_encoder_is_where_its_mode_puts_it() -> None:
    assert plan_text_encoder(RELEASED_TEXT_ENCODER, VramMode.STREAMED, 3 * GIB).place is TextEncoderPlace.STREAMED
    assert plan_text_encoder(RELEASED_TEXT_ENCODER, VramMode.ULTRA_LOW, 0).place is TextEncoderPlace.CPU
    with pytest.raises(OutOfMemory, match=r"standard needs 1\d\.\d GiB .* 9\.0 GiB may be used; streamed fits"):
        plan_text_encoder(RELEASED_TEXT_ENCODER, VramMode.STANDARD, 9 * GIB)


@pytest.mark.parametrize(
    ("gib", "mode"),
    [(40, VramMode.STANDARD), (20, VramMode.STREAMED), (90, VramMode.ALL_GPU)],
)
def test_a_service_alone_chooses_by_its_own_need(gib: int, mode: VramMode) -> None:
    (device,) = cards(gib)
    plan = choose_mode(device, lambda mode: plan_fusion(RELEASED_FUSION, LARGEST.tokens, mode, gib * GIB))
    assert plan.mode is mode


def check_fits(plan: StackMemory, devices: list[DeviceFacts]) -> None:
    """The stages' budgets cover their needs and are not more than each GPU has."""
    plans = {FUSION: plan.fusion, VAE: plan.vae, TEXT_ENCODER: plan.text_encoder}
    on_gpus = {stage for stage, places in plan.devices.items() if places}
    assert set(plan.budgets) == on_gpus
    for stage in on_gpus:
        assert plans[stage].components.reserved <= plan.budgets[stage]
    for device in devices:
        here = [stage for stage in on_gpus if device.index in plan.devices[stage]]
        together = max if RECIPES[plan.mode].takes_turns else sum
        if here:
            contexts = sum(plans[stage].components.context for stage in here)
            assert contexts + together(plan.budgets[stage] for stage in here) <= device.free_bytes


@pytest.mark.parametrize("mode", list(VramMode))
@pytest.mark.parametrize("free_gib", [(7.6,), (11.6,), (23.5,), (47,), (79,), (140, 140), (23.5,) * 4, (6, 79)])
def test_a_plan_fits(mode: VramMode, free_gib: tuple[float, ...]) -> None:
    devices = cards(*free_gib)
    for clip in CLIPS:
        try:
            plan = plan_stack(devices, RELEASED, [clip], StackWish(mode))
        except OutOfMemory as error:
            assert "may be used; " in error.message and f"for {clip.name}" in error.message
            continue
        check_fits(plan, devices)
        assert plan.mode is mode or mode is VramMode.AUTO
        assert plan.total_bytes <= plan.available_bytes
        assert plan.explanation.startswith(f"{plan.mode.value} on cuda:")
        assert ("LOSSY" in plan.explanation) != RECIPES[plan.mode].lossless


@pytest.mark.parametrize("clip", CLIPS, ids=[clip.name for clip in CLIPS])
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_5_percent_too_small_is_refused_with_the_numbers_and_what_would_fit(mode, clip) -> None:
    least = plan_stack(cards(140), RELEASED, [clip], StackWish(mode)).least_bytes
    need = least / GIB / (1 - SPARE_PART)
    plan_stack(cards(need * 1.001), RELEASED, [clip], StackWish(mode))
    with pytest.raises(OutOfMemory) as caught:
        plan_stack(cards(need * 0.95), RELEASED, [clip], StackWish(mode))
    said = (
        f"{mode.value} needs {least / GIB:.1f} GiB on cuda:0 for {clip.name}, {0.95 * least / GIB:.1f} GiB may be used"
    )
    assert caught.value.message.startswith(f"{said}; ")
    assert (" fits (" in caught.value.message) == (mode is not VramMode.ULTRA_LOW)


@pytest.mark.parametrize(
    ("free_gib", "unified", "mode"),
    [
        (7.6, False, VramMode.STREAMED),
        (11.6, False, VramMode.STREAMED),
        (23.5, False, VramMode.STREAMED),
        (31.4, False, VramMode.STREAMED),
        (47.6, False, VramMode.STANDARD),
        (70, False, VramMode.STANDARD),
        (79.0, False, VramMode.ALL_GPU),
        (60, True, VramMode.ALL_GPU),
        (20, True, VramMode.STREAMED),
    ],
)
def test_what_auto_chooses_for_a_card(free_gib: float, unified: bool, mode: VramMode) -> None:
    plan, _ = plan_largest(cards(free_gib, unified=unified), RELEASED, CLIPS)
    assert plan.mode is mode
    if mode is VramMode.STREAMED:
        assert " needs " in plan.explanation, "it says what the better mode lacks"


def test_auto_takes_a_lossy_mode_only_if_no_clip_can_be_made_without() -> None:
    budget = least_fusion(RELEASED_FUSION, CLIPS[0].tokens, VramMode.STREAMED).reserved
    contexts = FUSION_CONTEXT_BYTES + VAE_CONTEXT_BYTES + TEXT_ENCODER_CONTEXT_BYTES
    lossless = (budget + contexts) / GIB / 0.98 + 0.1
    plan, notes = plan_largest(cards(lossless), RELEASED, CLIPS)
    assert plan.mode is VramMode.STREAMED
    assert [note.partition(" ")[0] for note in notes] == ["960x960_5s", "960x960_10s"]
    assert all("is not offered: ultra_low needs" in note or "needs a lossy mode" in note for note in notes)
    plan, notes = plan_largest(cards(lossless - 0.4), RELEASED, CLIPS)
    assert plan.mode is VramMode.ULTRA_LOW and "LOSSY: int8 weights" in plan.explanation
    with pytest.raises(OutOfMemory, match=r"^ultra_low needs .* for 720x720_5s, 2\.9 GiB may be used; no mode fits$"):
        plan_largest(cards(3), RELEASED, CLIPS)


def test_the_gpu_with_most_free_memory_is_taken() -> None:
    devices = cards(24, 50, 40)
    plan = plan_stack(devices, RELEASED, CLIPS, StackWish(allocation="single"))
    assert set(plan.devices.values()) == {(1,)}


@pytest.mark.parametrize(
    ("free_gib", "allocation", "gpus"),
    [
        ((139,) * 8, "multi_8", tuple(range(8))),
        ((139,) * 5, "multi_4", (0, 1, 2, 3)),
        ((139, 8, 139), "multi_2", (0, 2)),
        ((139, 139, 139), "auto", (0, 1, 2)),
        ((23.5,) * 4, "fsdp", (0, 1, 2, 3)),
        ((11, 23.5), "single", (1,)),
        ((8, 70), "single", (1,)),
    ],
)
def test_several_gpus(free_gib: tuple[float, ...], allocation: str, gpus: tuple[int, ...]) -> None:
    devices = cards(*free_gib)
    plan = plan_stack(devices, RELEASED, CLIPS)
    assert plan.allocation == allocation and plan.devices[FUSION] == gpus
    check_fits(plan, devices)


def test_where_several_are_asked_for_all_must_fit() -> None:
    assert plan_stack(cards(*(47,) * 4), RELEASED, CLIPS, StackWish(num_gpus=4)).allocation == "multi_4"
    assert plan_stack(cards(*(23.5,) * 4), RELEASED, CLIPS, StackWish(num_gpus=4)).allocation == "fsdp"
    wish = StackWish(VramMode.STANDARD, num_gpus=2)
    with pytest.raises(
        OutOfMemory, match=r"standard needs \d+\.\d GiB on cuda:1 for 960x960_10s, 7\.8 GiB may be used"
    ):
        plan_stack(cards(79, 8), RELEASED, CLIPS, wish)


def test_modes_that_take_turns_are_for_one_gpu() -> None:
    devices = cards(23.5, 23.5)
    for mode in (VramMode.FP8, *STREAMING):
        plan = plan_stack(devices, RELEASED, CLIPS, StackWish(mode))
        assert plan.devices[FUSION] == (0,) and plan.host_bytes > 11 * GIB
        with pytest.raises(ValueError, match=f"{mode.value} is for one GPU"):
            plan_stack(devices, RELEASED, CLIPS, StackWish(mode, num_gpus=2))


def test_more_gpus_for_the_vae_than_for_fusion() -> None:
    devices = cards(79, 79, 79)
    plan = plan_stack(devices, RELEASED, CLIPS, StackWish(num_gpus=1, num_vae_gpus=3))
    assert (plan.devices[FUSION], plan.devices[VAE], plan.gpus) == ((0,), (0, 1, 2), (0, 1, 2))
    check_fits(plan, devices)


def test_standard_lets_the_text_encoder_give_way_before_pictures_are_cut() -> None:
    wish = StackWish(VramMode.STANDARD)
    roomy, tight, tighter = (plan_stack(cards(free), RELEASED, CLIPS, wish) for free in (60, 48, 36))
    places = [plan.text_encoder.place for plan in (roomy, tight, tighter)]
    assert places == [TextEncoderPlace.RESIDENT, TextEncoderPlace.STREAMED, TextEncoderPlace.STREAMED]
    assert [plan.vae.layout.tile_latent_side is None for plan in (roomy, tight, tighter)] == [True, True, False]
    assert tight.total_bytes <= 48 * GIB and tighter.total_bytes <= 36 * GIB
    assert plan_stack(cards(60), RELEASED, CLIPS, StackWish(VramMode.ALL_GPU)).text_encoder.place is places[0]
    with pytest.raises(OutOfMemory):
        plan_stack(cards(48), RELEASED, CLIPS, StackWish(VramMode.ALL_GPU))
