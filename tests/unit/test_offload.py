"""Components: the same values wherever they are, and memory that goes when they leave."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from shared.memory.offload import Component

CPU = torch.device("cpu")


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.second = nn.Linear(4, 4)
        self.second.weight = nn.Parameter(self.second.weight.detach(), requires_grad=False)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.second.weight
        self.register_buffer("mean", torch.randn(4))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.second(self.first(x).movedim(1, -1))) + self.mean


def _component(network: nn.Module) -> Component:
    return Component(dict(network.named_parameters()) | dict(network.named_buffers()), CPU)


def _storages(network: nn.Module) -> list[weakref.ref]:
    return [weakref.ref(value.untyped_storage()) for value in network.state_dict().values()]


def _gone(storages: list[weakref.ref]) -> bool:
    return not any(storage() for storage in storages)


@pytest.mark.parametrize("inference", [True, False])
def test_results_are_the_same_wherever_the_values_are(inference: bool) -> None:
    network, x = _Network(), torch.randn(2, 3, 8, 8)
    expected, strides = network(x), network.first.weight.stride()
    component = _component(network)
    with torch.inference_mode(inference):
        component.to_host()
        for _ in range(2):
            with component.present():
                assert torch.equal(network(x), expected)
                assert network.first.weight.stride() == strides
                assert network.tied.weight.data_ptr() == network.second.weight.data_ptr()
        component.to_device()
        assert torch.equal(network(x), expected)
    assert not component.hosted


def test_memory_of_a_turn_goes_with_it() -> None:
    network = _Network()
    component = _component(network)
    at_first = _storages(network)
    component.to_host()
    assert _gone(at_first), "the values were copied, what held them is free"
    host = _storages(network)
    with component.present():
        turn = _storages(network)
        assert None not in {storage() for storage in (*turn, *host)}
        assert {storage() for storage in turn}.isdisjoint({storage() for storage in host})
    assert _gone(turn)
    component.to_device()
    assert _gone(host)


def test_an_error_ends_a_turn() -> None:
    network = _Network()
    component = _component(network)
    component.to_host()
    with pytest.raises(RuntimeError, match="expected"), component.present():
        turn = _storages(network)
        network(torch.randn(1, 5, 8, 8))
    assert component.hosted
    assert _gone(turn)


def test_a_component_that_stays_is_left_alone() -> None:
    network = _Network()
    component = _component(network)
    before = network.second.weight.data_ptr()
    with component.present():
        assert network.second.weight.data_ptr() == before
    component.to_device()
    assert network.second.weight.data_ptr() == before
