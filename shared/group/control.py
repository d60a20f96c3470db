"""How rank 0 tells the other ranks what to do: JSON and raw tensors over a CPU group, never a pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_IDLE_TIMEOUT = timedelta(days=365)
"""How long followers wait for work. A leader that dies is noticed at once all the same: its connections close."""
_MAX_COMMAND_BYTES = 1 << 20
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Command:
    """What to do next, with tensors by name (None where there is none)."""

    kind: str
    fields: dict[str, Any]
    tensors: dict[str, torch.Tensor | None]


class ControlChannel:
    """Broadcasts from rank 0; every method is called on all ranks in the same order."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        group = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group

    def send(self, command: Command) -> None:
        """On rank 0: tell the others."""
        specs = {
            name: None if tensor is None else [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in command.tensors.items()
        }
        text = json.dumps({"kind": command.kind, "fields": command.fields, "tensors": specs}).encode()
        self._broadcast(torch.tensor([len(text)], dtype=torch.int64))
        self._broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        for tensor in command.tensors.values():
            if tensor is not None:
                self._broadcast(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8))

    def receive(self) -> Command:
        """On the other ranks: wait for the next command.

        Raises:
            RuntimeError: rank 0 is gone.
        """
        length = int(self._broadcast(torch.zeros(1, dtype=torch.int64)))
        assert 0 < length <= _MAX_COMMAND_BYTES
        message = json.loads(self._broadcast(torch.zeros(length, dtype=torch.uint8)).numpy().tobytes())
        tensors: dict[str, torch.Tensor | None] = {}
        for name, spec in message["tensors"].items():
            if spec is None:
                tensors[name] = None
                continue
            tensor = torch.zeros(spec[1], dtype=_DTYPES[spec[0]])
            self._broadcast(tensor.view(-1).view(torch.uint8))
            tensors[name] = tensor
        return Command(message["kind"], message["fields"], tensors)

    def go_on(self, wanted: bool = True) -> bool:
        """What rank 0 says of the next step: True to take it; the argument of the other ranks is not used."""
        return bool(self._broadcast(torch.tensor([wanted], dtype=torch.uint8)).item())

    def agree(self, well: bool) -> bool:
        """True on every rank if `well` was true on every rank."""
        flag = torch.tensor([well], dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._group)
        return bool(flag.item())

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel():
            dist.broadcast(tensor, src=0, group=self._group)
        return tensor
