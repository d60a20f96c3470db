"""The memory mode and the GPUs of a stack, from the flags and what is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cli.errors import UsageProblem
from cli.stack.gpus import choose_gpus, choose_vae_gpus, parse_mode, require_plan, usable
from cli.stack.weights import clips_of, sizes_of
from shared.allocations import RANKS_OF
from shared.memory.choose import DeviceFacts
from shared.memory.estimate import estimate_text_encoder
from shared.memory.modes import RECIPES, TextEncoderPlace, VramMode
from shared.memory.sizes import TextEncoderSizes
from shared.memory.stack import FUSION, TEXT_ENCODER, VAE, StackMemory, StackWish, plan_largest


@dataclass(frozen=True)
class DeviceFlags:
    """The values of the flags about devices and memory."""

    device: str = "auto"
    text_encoder_device: str = "auto"
    gpus: str = "auto"
    plan: str = "auto"
    vae_gpus: str = "auto"
    vram_mode: str = "auto"


@dataclass(frozen=True)
class DeviceChoice:
    """The same, resolved; fields of StackOptions."""

    device: str
    text_encoder_device: str
    gpus: int
    vae_gpus: int | None
    plan: str
    vram_mode: VramMode
    memory: StackMemory | None


def check_flags(flags: DeviceFlags, gpus: Sequence[DeviceFacts]) -> StackWish:
    """What is wished for, as far as it can be told without weights.

    Args:
        flags: of the command.
        gpus: of this machine.

    Raises:
        UsageProblem: one of the flags is wrong.
    """
    mode = parse_mode(flags.vram_mode)
    if mode is VramMode.ALL_GPU and not usable(gpus, flags.device):
        raise UsageProblem("--vram-mode all_gpu needs a GPU, and there is none to use; see `ovi doctor`")
    plan = require_plan(flags.plan)
    num_gpus = choose_gpus(flags.gpus, flags.device, plan, gpus)
    num_vae_gpus = choose_vae_gpus(flags.vae_gpus, flags.device, gpus)
    if mode is not VramMode.AUTO and RECIPES[mode].takes_turns:
        for flag, wanted, several in (
            ("--plan", plan, plan == "fsdp" or RANKS_OF.get(plan, 1) > 1),
            ("--gpus", num_gpus, (num_gpus or 1) > 1),
            ("--vae-gpus", num_vae_gpus, (num_vae_gpus or 1) > 1),
        ):
            if several:
                what = f"--vram-mode {mode.value} is for one GPU, got {flag} {wanted}"
                raise UsageProblem(f"{what}; with several, use standard or all_gpu")
    # One that was put somewhere by name is not placed by the plan.
    elsewhere = flags.text_encoder_device != "auto"
    return StackWish(mode, plan, num_gpus, num_vae_gpus, elsewhere)


def choose_devices(
    flags: DeviceFlags, gpus: Sequence[DeviceFacts], checkpoints: Path, say: Callable[[str], object]
) -> DeviceChoice:
    """What runs where, such that it fits.

    Args:
        flags: of the command.
        gpus: of this machine.
        checkpoints: folder whose models are served.
        say: told, in a line each, what was chosen and what does not fit.

    Raises:
        UsageProblem: a flag is wrong.
        OutOfMemory: not even the smallest clip fits; with the numbers.
    """
    wish = check_flags(flags, gpus)
    allowed = usable(gpus, flags.device)
    if not allowed:
        mode = VramMode.STANDARD if wish.mode is VramMode.AUTO else wish.mode
        given = (flags.device, flags.text_encoder_device, wish.num_gpus or 1, wish.num_vae_gpus, wish.allocation)
        return DeviceChoice(*given, vram_mode=mode, memory=None)
    sizes = sizes_of(checkpoints)
    left = [_beside_text_encoder(gpu, flags.text_encoder_device, sizes.text_encoder) for gpu in allowed]
    memory, notes = plan_largest(left, sizes, clips_of(checkpoints), wish)
    for line in (memory.explanation, *notes):
        say(line)
    # Of several only those that are used are shown to the services, see cli.stack.plan.
    device = f"cuda:{memory.gpus[0]}" if len(memory.gpus) == 1 else "cuda"
    text_encoder_device = device if memory.devices[TEXT_ENCODER] else "cpu"
    return DeviceChoice(
        device=device,
        text_encoder_device=flags.text_encoder_device if wish.text_encoder_on_cpu else text_encoder_device,
        gpus=len(memory.devices[FUSION]),
        vae_gpus=len(memory.devices[VAE]),
        plan=memory.allocation,
        vram_mode=memory.mode,
        memory=memory,
    )


def _beside_text_encoder(gpu: DeviceFacts, device: str, sizes: TextEncoderSizes) -> DeviceFacts:
    """What is left of a GPU on which the text encoder was put by name."""
    if gpu.name != ("cuda:0" if device == "cuda" else device):
        return gpu
    need = estimate_text_encoder(sizes, TextEncoderPlace.RESIDENT).total
    return replace(gpu, free_bytes=max(0, gpu.free_bytes - need))
