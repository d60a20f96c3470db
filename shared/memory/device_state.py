"""What is known of a device. No torch: the gateway and commands speak of devices, too."""

from __future__ import annotations

from dataclasses import dataclass

from shared.memory.choose import GIB, DeviceFacts


@dataclass(frozen=True)
class DeviceState:
    """A device and what its memory holds now."""

    name: str
    """As PyTorch calls it in this process, for example "cuda:0"."""
    model: str
    """Of the hardware, for example "NVIDIA H200"."""
    uuid: str
    """The same for every process that uses this device; empty for a CPU and where nobody tells one."""
    backend: str
    """"cuda", "rocm" or "cpu"."""
    total_bytes: int
    """What programs can have: without what driver and firmware keep for themselves."""
    free_bytes: int
    """What nobody has; on a host, what can be had without swapping."""
    own_bytes: int
    """What this process's allocator has reserved; of a CPU, what this process holds."""
    others_bytes: int
    """What other processes have. Where the driver does not tell it apart, this process's context is among it."""
    capability: str = ""
    """Compute capability, for example "9.0"; empty for a CPU."""
    unified: bool = False
    """True for a GPU whose memory is the host's."""
    utilization: float | None = None
    """Busy part of the last moments, 0 to 1; None where nobody tells."""
    links: tuple[str, ...] = ()
    """To the other GPUs of this host, for example "cuda:1 NVLink"."""

    @property
    def key(self) -> str:
        """What tells this device from the others of its host."""
        return self.uuid or self.name

    @property
    def used_part(self) -> float:
        """0 for empty, 1 for full."""
        return 1 - self.free_bytes / self.total_bytes if self.total_bytes else 0.0

    @property
    def facts(self) -> DeviceFacts | None:
        """What a choice of mode depends on; None for a CPU."""
        if self.backend == "cpu":
            return None
        return DeviceFacts(self.name, self.total_bytes, self.free_bytes, self.capability, self.unified)

    def fullness(self) -> str:
        """How full it is, in words with the numbers."""
        used, total = (size / GIB for size in (self.total_bytes - self.free_bytes, self.total_bytes))
        own, others = self.own_bytes / GIB, self.others_bytes / GIB
        who = f"{self.name} {self.model} ({self.uuid})" if self.uuid else f"{self.name} {self.model}"
        return (
            f"{who} is {self.used_part:.0%} full: {used:.1f} of {total:.1f} GiB used,"
            f" {own:.1f} by ovi-serve, {others:.1f} by others"
        )
