"""State that was saved in so many parts, read back in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ftune import plugin
from ftune.errors import RunError
from ftune.fused.adafactor import AdafactorRule
from ftune.fused.kept import RuleOptimizer
from ftune.sharding.state import name_of, read_state, write_state

SHAPES = ((7, 6), (5,), (4, 3, 2))


def weights() -> list[nn.Parameter]:
    noise = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=noise)) for shape in SHAPES]


def gradients() -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=noise) for shape in SHAPES]


def adamw(moved: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": moved[:1]}, {"params": moved[1:], "weight_decay": 0.0}], lr=1e-2)


def adafactor(moved: list[torch.Tensor]) -> torch.optim.Optimizer:
    rule = AdafactorRule(eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, scale_parameter=False)
    groups = [{"params": moved[:1]}, {"params": moved[1:]}]
    return RuleOptimizer(groups, rule, learning_rate=1e-2, seed=0)


def stepped(made: Any, moved: list[nn.Parameter], slopes: list[torch.Tensor]) -> torch.optim.Optimizer:
    optimizer = made(moved)
    for _ in range(3):
        for weight, slope in zip(moved, slopes, strict=True):
            weight.grad = slope.clone()
        optimizer.step()
    return optimizer  # type: ignore[no-any-return]


def parts_of(whole: list[nn.Parameter], rank: int, ranks: int) -> list[torch.Tensor]:
    """Return what stands for a rank's rows of whole weights, which `torch.chunk` cuts."""
    found: list[torch.Tensor] = []
    for weight in whole:
        chunks = weight.detach().chunk(ranks)
        rows = nn.Parameter((chunks[rank] if rank < len(chunks) else weight.detach()[:0]).clone())
        rows.copy_of = weight  # type: ignore[attr-defined]
        found.append(rows)
    return found


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize(("name", "made"), [("adamw_torch", adamw), ("adalomo", adafactor)])
def test_parts_become_the_whole_and_other_parts(name: str, made: Any, ranks: int, tmp_path: Path) -> None:
    """What is cut by hand from whole state is put together again, bit for bit, and cut anew."""
    facts, whole = plugin.optimizer(name), weights()
    optimizer = stepped(made, whole, gradients())
    state = optimizer.state_dict()
    for rank in range(ranks):
        part = {**state, "state": {}}
        for number, weight in enumerate(whole):
            entries = {}
            for key, value in state["state"][number].items():
                cut = isinstance(value, torch.Tensor) and value.dim() > 0
                cut = cut and not (weight.dim() == 2 and key == "exp_avg_sq_col")
                chunks = value.chunk(ranks) if cut else ()
                entries[key] = (chunks[rank] if rank < len(chunks) else value[:0]).clone() if cut else value
            part["state"][number] = entries
        torch.save(part, tmp_path / name_of(rank, ranks))
    back = read_state(optimizer, facts, tmp_path, rank=0, ranks=1, mapped=False)
    assert same(back["state"], state["state"])
    other = ranks + 1
    for rank in range(other):
        standing = made(parts_of(whole, rank, other))
        standing.load_state_dict(read_state(standing, facts, tmp_path, rank=rank, ranks=other, mapped=False))
        for rows in standing.param_groups[0]["params"]:
            for key, value in standing.state[rows].items():
                expected = state["state"][0][key]
                if isinstance(value, torch.Tensor) and value.dim() > 0 and key != "exp_avg_sq_col":
                    chunks = expected.chunk(other)
                    expected = chunks[rank] if rank < len(chunks) else expected[:0]
                assert same(value, expected)


def test_the_same_number_of_ranks_reads_what_it_wrote(tmp_path: Path) -> None:
    facts, whole = plugin.optimizer("adamw_8bit"), weights()
    written = [stepped(adamw, parts_of(whole, rank, 2), [g.chunk(2)[rank] for g in gradients()]) for rank in range(2)]  # type: ignore[arg-type]
    for rank, optimizer in enumerate(written):
        write_state(optimizer, tmp_path, rank=rank, ranks=2)
    for rank, optimizer in enumerate(written):
        back = read_state(optimizer, facts, tmp_path, rank=rank, ranks=2, mapped=True)
        assert same(back["state"], optimizer.state_dict()["state"])


def test_blocks_of_8_bits_are_not_shared_out_anew(tmp_path: Path) -> None:
    facts, whole = plugin.optimizer("adamw_8bit"), weights()
    optimizer = stepped(adamw, whole, gradients())
    write_state(optimizer, tmp_path, rank=0, ranks=1)
    with pytest.raises(RunError) as refused:
        read_state(optimizer, facts, tmp_path, rank=0, ranks=2, mapped=False)
    assert refused.value.problems[0].rule == "resume-state"
    assert "one process" in str(refused.value)
