"""Memory of a whole stack: which mode, which GPUs, how much of them for each stage. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shared.allocations import MAX_VAE_RANKS, RANKS_FOR_24_HEADS, RANKS_OF, allocation_of, degrees
from shared.errors import OutOfMemory
from shared.memory.choose import (
    DeviceFacts,
    FusionPlan,
    Subject,
    TextEncoderPlan,
    VaePlan,
    candidates,
    gib,
    least_fusion,
    least_vae,
    plan_fusion,
    plan_vae,
)
from shared.memory.estimate import Components, estimate_text_encoder, fusion_weight_bytes
from shared.memory.modes import LOWER, RECIPES, TextEncoderPlace, VramMode
from shared.memory.sizes import ClipShape, StackSizes

FUSION, VAE, TEXT_ENCODER = "fusion", "vae", "text_encoder"
SPARE_PART = 0.02
"""Of free memory, that is left alone: drivers and displays take some as they like."""


@dataclass(frozen=True)
class StackWish:
    """What a stack is asked to be."""

    mode: VramMode = VramMode.AUTO
    allocation: str = "auto"
    """One of shared.allocations.ALLOCATIONS."""
    num_gpus: int | None = None
    """Of the fusion service; None: as many as are of use."""
    num_vae_gpus: int | None = None
    """Of the VAE service; None: those of the fusion service, at most MAX_VAE_RANKS."""
    text_encoder_on_cpu: bool = False
    """Whatever the mode says."""


@dataclass(frozen=True)
class StackMemory:
    """What was decided."""

    mode: VramMode
    """Never AUTO."""
    allocation: str
    devices: Mapping[str, tuple[int, ...]]
    """GPUs of each stage by number, one a rank; none: it runs on the CPU."""
    budgets: Mapping[str, int]
    """Bytes that the allocator of each stage's processes may reserve; a stage on the CPU has none."""
    fusion: FusionPlan
    vae: VaePlan
    text_encoder: TextEncoderPlan
    total_bytes: int
    """Most bytes of the first GPU at once: all contexts, and all stages or, where they take turns, the largest."""
    available_bytes: int
    """What may be used of it."""
    least_bytes: int
    """What the mode takes of it at least, everything that can give way having given way."""
    host_bytes: int
    """Weights that the stages keep in host memory, in all."""
    explanation: str
    """In one line: what was chosen and why."""

    @property
    def gpus(self) -> tuple[int, ...]:
        """Every GPU that is used, rank 0's first."""
        return max(self.devices.values(), key=len)

    @property
    def components(self) -> Mapping[str, Components]:
        """Of each stage on the first GPU."""
        return {
            FUSION: self.fusion.components,
            VAE: self.vae.components,
            TEXT_ENCODER: self.text_encoder.components,
        }


def plan_stack(
    devices: Sequence[DeviceFacts], sizes: StackSizes, clips: Sequence[ClipShape], wish: StackWish = StackWish()
) -> StackMemory:
    """The mode and the GPUs of a stack, such that every clip fits.

    GPUs with most free memory come first; where any number will do, those that are too small are left out.

    Args:
        devices: GPUs that may be used, at least as many as are wished for.
        sizes: of the networks.
        clips: that shall be made, at least one.
        wish: what was asked for.

    Raises:
        OutOfMemory: nothing fits; with the numbers.
        ValueError: the mode is for one GPU, and several are asked for.
    """
    # What others use changes all the time: by whole GiB, so that equal GPUs stay in order.
    emptiest = sorted(devices, key=lambda device: (-(device.free_bytes // 2**30), device.index))
    modes = candidates(emptiest[0]) if wish.mode is VramMode.AUTO else (wish.mode,)
    refused: list[_Case] = []
    for mode in modes:
        attempts = [_Case(emptiest, sizes, clips, mode, spread) for spread in _spreads(wish, mode, len(devices))]
        for case in attempts:
            if case.fits:
                plan = replace(case.plan(), least_bytes=min(each.least_bytes(0) for each in attempts))
                return _explained(plan, case, refused)
        refused += attempts[-1:]
    if not refused:
        raise ValueError(f"{wish.mode.value} is for one GPU; with several, use standard or all_gpu")
    raise _refusal(refused[-1], wish)


def plan_largest(
    devices: Sequence[DeviceFacts], sizes: StackSizes, clips: Sequence[ClipShape], wish: StackWish = StackWish()
) -> tuple[StackMemory, list[str]]:
    """`plan_stack` for the largest clip that fits, and what is to be said of those that do not.

    AUTO keeps to a lossless mode if any clip can be made in one: those that cannot are left to who names a lossy mode.

    Raises:
        OutOfMemory: not even the smallest clip fits; with the numbers.
    """
    by_size = sorted(clips, key=lambda clip: clip.tokens.video)
    lossy: tuple[StackMemory, list[str]] | None = None
    notes: list[str] = []
    while by_size:
        try:
            plan = plan_stack(devices, sizes, by_size, wish)
        except OutOfMemory as error:
            if len(by_size) == 1 and lossy is None:
                raise
            notes = [f"{by_size[-1].name} is not offered: {error.message}", *notes]
        else:
            if RECIPES[plan.mode].lossless or wish.mode is not VramMode.AUTO:
                return plan, notes
            lossy = lossy or (plan, notes)
            notes = [f"{by_size[-1].name} needs a lossy mode; for jobs that name it: {plan.mode.value}", *notes]
        by_size.pop()
    assert lossy is not None
    return lossy


@dataclass(frozen=True)
class _Spread:
    """One way to spread a stack over GPUs."""

    allocation: str
    num_gpus: int
    num_vae_gpus: int
    text_encoder: TextEncoderPlace

    @property
    def tiles(self) -> bool:
        """Pictures may be decoded in tiles: not those that several GPUs share already, and not before the text encoder
        gives way.
        """
        return self.num_vae_gpus == 1 and self.text_encoder is not TextEncoderPlace.RESIDENT


def _spreads(wish: StackWish, mode: VramMode, num_devices: int) -> Iterator[_Spread]:
    """Best first."""
    recipe = RECIPES[mode]
    named = wish.mode is not VramMode.AUTO
    for allocation, num_gpus in _allocations(wish, mode, num_devices):
        # Its layers may pass through the GPU in every mode: the same values, a part of a second later. On a CPU prompts
        # take seconds: that is for what was named, AUTO has better on one GPU.
        places = [recipe.text_encoder] if not wish.text_encoder_on_cpu else []
        if mode is VramMode.STANDARD and places:
            places.append(TextEncoderPlace.STREAMED)
        if not places or (mode is not VramMode.ALL_GPU and (named or num_gpus > 1)):
            places.append(TextEncoderPlace.CPU)
        for place in dict.fromkeys(places):
            yield _Spread(allocation, num_gpus, wish.num_vae_gpus or min(num_gpus, MAX_VAE_RANKS), place)


def _allocations(wish: StackWish, mode: VramMode, num_devices: int) -> list[tuple[str, int]]:
    """(allocation, GPUs), best first; modes that take turns are for one GPU."""
    if wish.allocation in RANKS_OF:
        counts = [RANKS_OF[wish.allocation]]
    else:
        counts = [wish.num_gpus] if wish.num_gpus else [n for n in reversed(RANKS_FOR_24_HEADS) if n <= num_devices]
    single = [("single", count) for count in counts if count == 1 and wish.allocation != "fsdp"]
    if RECIPES[mode].takes_turns:
        return single if wish.num_vae_gpus in (None, 1) else []
    several = [count for count in counts if count > 1]
    whole = [(allocation_of(count), count) for count in several if wish.allocation != "fsdp"]
    shared = [("fsdp", count) for count in several if wish.allocation in ("auto", "fsdp")]
    return [*whole, *shared, *single]


@dataclass(frozen=True)
class _Case:
    """A mode on some GPUs."""

    devices: Sequence[DeviceFacts]
    sizes: StackSizes
    clips: Sequence[ClipShape]
    mode: VramMode
    spread: _Spread

    @property
    def fits(self) -> bool:
        """On every GPU."""
        return all(self.least_bytes(place) <= self.usable_bytes(place) for place in range(self.num_places))

    @property
    def num_places(self) -> int:
        """GPUs that are used."""
        return max(self.spread.num_gpus, self.spread.num_vae_gpus)

    @property
    def clip(self) -> ClipShape:
        """The one with most tokens."""
        return max(self.clips, key=lambda clip: clip.tokens.video)

    @property
    def picture(self) -> tuple[int, int]:
        """The largest, (height, width)."""
        return max(((clip.height, clip.width) for clip in self.clips), key=lambda size: size[0] * size[1])

    def usable_bytes(self, place: int) -> int:
        """Of a GPU."""
        return int(self.devices[place].free_bytes * (1 - SPARE_PART))

    def least_bytes(self, place: int) -> int:
        """What this takes of a GPU at least."""
        least = self._least()
        return self._together({stage: least[stage] for stage in self._stages(place)})

    def plan(self) -> StackMemory:
        """Everything, if it fits."""
        room = {stage: min(self._room(place, stage) for place in self._places(stage)) for stage in self._stages(0)}
        subject = Subject(self.clip.name, self.devices[0].name)
        fusion = plan_fusion(
            self.sizes.fusion, self.clip.tokens, self.mode, room[FUSION], **self._degrees(), subject=subject
        )
        if not RECIPES[self.mode].takes_turns:
            room[VAE] += self._least()[FUSION].reserved - fusion.components.reserved
        vae = plan_vae(
            self.sizes.vae,
            *self.picture,
            self.mode,
            room[VAE],
            ranks=self.spread.num_vae_gpus,
            tiles=self.spread.tiles,
            subject=subject,
        )
        text = TextEncoderPlan(self.mode, self.spread.text_encoder, self._least()[TEXT_ENCODER], room.get(TEXT_ENCODER))
        taken = {FUSION: fusion.components, VAE: vae.components, TEXT_ENCODER: text.components}
        needs = {stage: taken[stage].reserved for stage in self._stages(0)}
        return StackMemory(
            mode=self.mode,
            allocation=self.spread.allocation,
            devices={stage: tuple(self.devices[place].index for place in self._places(stage)) for stage in taken},
            budgets=room if RECIPES[self.mode].takes_turns else self._shares(needs),
            fusion=fusion,
            vae=vae,
            text_encoder=text,
            total_bytes=self._together({stage: taken[stage] for stage in needs}),
            available_bytes=self.usable_bytes(0),
            least_bytes=0,
            host_bytes=self._host_bytes(),
            explanation="",
        )

    def _together(self, stages: Mapping[str, Components]) -> int:
        """What stages take of a GPU that they share: all contexts, and all else at once or, in turns, the most."""
        together = max if RECIPES[self.mode].takes_turns else sum
        return sum(each.context for each in stages.values()) + together(each.reserved for each in stages.values())

    def _room_beside_contexts(self, place: int) -> int:
        least = self._least()
        return self.usable_bytes(place) - sum(least[stage].context for stage in self._stages(place))

    def _host_bytes(self) -> int:
        recipe, spread = RECIPES[self.mode], self.spread
        # A CPU computes in float32.
        copies = {TextEncoderPlace.RESIDENT: 0, TextEncoderPlace.STREAMED: 1, TextEncoderPlace.CPU: 2}
        total = copies[spread.text_encoder] * self.sizes.text_encoder.total_bytes
        if recipe.takes_turns:
            total += fusion_weight_bytes(self.sizes.fusion, recipe.weights)
            total += spread.num_vae_gpus * self.sizes.vae.total_bytes
        return total

    def _degrees(self) -> dict[str, int]:
        guidance, sequence = degrees(self.spread.num_gpus)
        shared = self.spread.num_gpus if self.spread.allocation == "fsdp" else 1
        return {"guidance_degree": guidance, "sequence_degree": sequence, "weights_degree": shared}

    def _least(self) -> dict[str, Components]:
        ranks = self.spread.num_vae_gpus
        return {
            FUSION: least_fusion(self.sizes.fusion, self.clip.tokens, self.mode, **self._degrees()),
            VAE: least_vae(self.sizes.vae, *self.picture, self.mode, ranks=ranks, tiles=self.spread.tiles),
            TEXT_ENCODER: estimate_text_encoder(self.sizes.text_encoder, self.spread.text_encoder),
        }

    def _places(self, stage: str) -> range:
        """Which of the GPUs a stage uses."""
        on_device = self.spread.text_encoder is not TextEncoderPlace.CPU
        counts = {FUSION: self.spread.num_gpus, VAE: self.spread.num_vae_gpus, TEXT_ENCODER: int(on_device)}
        return range(counts[stage])

    def _stages(self, place: int) -> list[str]:
        """Which stages use a GPU."""
        return [stage for stage in (FUSION, VAE, TEXT_ENCODER) if place in self._places(stage)]

    def _room(self, place: int, stage: str) -> int:
        """What a stage may take of a GPU if the others take the least."""
        least = self._least()
        room = self._room_beside_contexts(place)
        if RECIPES[self.mode].takes_turns:
            return room
        return room - sum(least[other].reserved for other in self._stages(place) if other != stage)

    def _shares(self, needs: Mapping[str, int]) -> dict[str, int]:
        """Of stages that are there at the same time: what is left over goes to each by what it needs."""
        parts = []
        for place in range(self.num_places):
            parts.append(self._room_beside_contexts(place) / sum(needs[stage] for stage in self._stages(place)))
        return {stage: int(need * min(parts)) for stage, need in needs.items()}


def _explained(plan: StackMemory, case: _Case, refused: Sequence[_Case]) -> StackMemory:
    recipe = RECIPES[plan.mode]
    names = ", ".join(f"cuda:{index}" for index in plan.devices[FUSION])
    what = [f"{plan.mode.value} on {names}" + (f" ({plan.allocation})" if len(plan.devices[FUSION]) > 1 else "")]
    what.append("lossless weights" if recipe.lossless else f"LOSSY: {recipe.weights.value} weights")
    if recipe.takes_turns:
        layers = case.sizes.fusion.num_layers
        what.append(f"stages take turns, {plan.fusion.layout.num_resident} of {layers} blocks stay on the device")
    else:
        what.append("everything stays on the device")
        passes = plan.text_encoder.place is TextEncoderPlace.STREAMED
        what[-1] += " but the text encoder, whose layers pass through it" if passes else ""
    what += ["text encoder on the CPU"] if plan.text_encoder.place is TextEncoderPlace.CPU else []
    what += ["pictures decoded in tiles"] if plan.vae.layout.tile_latent_side is not None else []
    takes = f"{gib(plan.total_bytes)} of {gib(plan.available_bytes)} for {case.clip.name}"
    why = "".join(f"; {other.mode.value} needs {gib(other.least_bytes(0))}" for other in refused)
    return replace(plan, explanation=f"{', '.join(what)}: {takes}{why}")


def _refusal(case: _Case, wish: StackWish) -> OutOfMemory:
    """What the last case lacks where it lacks most, and the first lower mode that would fit."""
    place = max(range(case.num_places), key=lambda place: case.least_bytes(place) - case.usable_bytes(place))
    need, there = gib(case.least_bytes(place)), gib(case.usable_bytes(place))
    what = f"{case.mode.value} needs {need} on {case.devices[place].name} for {case.clip.name}, {there} may be used"
    for mode in LOWER[case.mode]:
        lower = replace(wish, mode=mode)
        if RECIPES[mode].takes_turns:
            lower = replace(lower, allocation="auto", num_gpus=None, num_vae_gpus=None)
        for spread in _spreads(lower, mode, len(case.devices)):
            other = replace(case, mode=mode, spread=spread)
            if other.fits:
                on_one = " on one GPU" if case.num_places > other.num_places else ""
                return OutOfMemory(f"{what}; {mode.value} fits{on_one} ({gib(other.least_bytes(0))})")
    return OutOfMemory(f"{what}; no mode fits")
