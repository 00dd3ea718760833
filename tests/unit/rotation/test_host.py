"""State put away and brought back: the same numbers elsewhere, in memory that is kept.

Here a CPU stands for the device, so that moving is copying; on a GPU the same code copies between device and host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftune.rotation.host import HostMemory
from ftune.rotation.optimizer import RotatingOptimizer
from ftune.rotation.part import Part
from ftune.rotation.plans import Turns


def test_tensors_of_other_devices_stay_where_they_are() -> None:
    host, tensor = HostMemory("cuda"), torch.ones(3)
    assert host.put_away(tensor, ("a",)) is tensor
    assert host.bring_back(tensor, ("a",)) is tensor
    host.settle()


def test_what_comes_back_is_what_went() -> None:
    host = HostMemory("cpu")
    state = {"step": 3, "moment": torch.arange(4.0), "nested": [{"factor": torch.ones(2, dtype=torch.uint8)}, None]}
    away = {key: host.put_away(value, (key,)) for key, value in state.items()}
    assert away["moment"].data_ptr() != state["moment"].data_ptr()
    assert away["step"] == 3
    assert torch.equal(away["moment"], state["moment"])
    assert torch.equal(away["nested"][0]["factor"], state["nested"][0]["factor"])
    assert away["nested"][1] is None
    again = host.put_away(torch.zeros(4), ("moment",))
    assert again.data_ptr() == away["moment"].data_ptr(), "pinned memory is used again"
    assert host.put_away(torch.zeros(5), ("moment",)).numel() == 5


@pytest.mark.parametrize("with_masters", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_steps_do_not_feel_it(with_masters: bool, resumed: bool) -> None:
    dtype = torch.bfloat16 if with_masters else torch.float32

    def run(device_type: str) -> list[torch.Tensor]:
        noise = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(5, 4, generator=noise).to(dtype)) for _ in range(3)]

        def made() -> RotatingOptimizer:
            parts = [
                Part(str(n), [{"params": [w], "weight_decay": 0.1}], torch.optim.AdamW, with_masters=with_masters)
                for n, w in enumerate(weights)
            ]
            for part in parts:
                part.host = HostMemory(device_type)
            return RotatingOptimizer(parts, Turns([(0,), (1,), (2,)]), asleep="host")

        optimizer = made()
        for step in range(12):
            if resumed and step == 7:
                saved: dict[str, Any] = optimizer.state_dict()
                optimizer = made()
                optimizer.load_state_dict(saved)
            for weight in weights:
                gradient = torch.randn(5, 4, generator=noise).to(dtype)
                weight.grad = gradient if weight.requires_grad else None
            optimizer.step()
        return weights

    for moved, still in zip(run("cpu"), run("cuda"), strict=True):
        assert torch.equal(moved, still)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_only_the_moving_state_is_on_the_device() -> None:
    weights = [torch.nn.Parameter(torch.ones(1024, device="cuda")) for _ in range(3)]
    parts = [Part(str(n), [{"params": [w]}], torch.optim.AdamW, with_masters=False) for n, w in enumerate(weights)]
    optimizer = RotatingOptimizer(parts, Turns([(0,), (1,), (2,)]), asleep="host")
    for _ in range(9):
        for weight in weights:
            weight.grad = torch.ones_like(weight) if weight.requires_grad else None
        optimizer.step()
        assert not any(tensor.is_cuda for part in parts for tensor in part.state_tensors())
    assert all(tensor.is_pinned() for part in parts for tensor in part.state_tensors() if tensor.numel() > 1)
    alone = torch.nn.Parameter(torch.ones(1024, device="cuda"))
    reference = torch.optim.AdamW([alone])
    for _ in range(3):
        alone.grad = torch.ones_like(alone)
        reference.step()
    assert all(torch.equal(weight, alone) for weight in weights)
