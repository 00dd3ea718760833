"""Storages are counted once, for as long as they live, and for what they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from ftune.memory.cuda import as_on_cuda
from ftune.memory.events import Owner, Trace
from ftune.memory.numberless import as_fake, fake_mode, numberless
from ftune.memory.peak import peak, phases
from ftune.memory.tracked import FORWARD, OPTIMIZER, Tracked

ROWS, INPUTS, OUTPUTS = 8, 16, 32


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(INPUTS, OUTPUTS, bias=False)
        self.above = nn.Linear(OUTPUTS, INPUTS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(torch.relu(self.below(x)))


def step(model: nn.Module, tracked: Tracked) -> Trace:
    """Return the second of two steps of gradient descent with momentum."""
    tracked.follow(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    with tracked:
        for number in range(2):
            if number == 1:
                tracked.restart(FORWARD)
            tracked.enter(FORWARD)
            model(torch.ones(ROWS, INPUTS)).sum().backward()
            tracked.enter(OPTIMIZER)
            optimizer.step()
            optimizer.zero_grad()
            tracked.own_survivors()
    tracked.unfollow()
    return tracked.trace()


def owned(trace: Trace, owner: Owner) -> int:
    """Return the bytes of an owner that were ever made."""
    return sum(event.size_bytes for event in trace.events if event.owner is owner and event.size_bytes > 0)


@pytest.fixture
def real() -> Trace:
    return step(TwoLayers(), Tracked())


def test_owners(real: Trace) -> None:
    weights = 4 * 2 * INPUTS * OUTPUTS
    assert owned(real, Owner.WEIGHT) == weights
    assert owned(real, Owner.GRADIENT) == weights
    assert owned(real, Owner.OPTIMIZER) == weights
    assert next(event for event in real.events if event.owner is Owner.GRADIENT).module == "above"


def test_what_is_made_is_freed_but_for_what_was_there(real: Trace) -> None:
    live: dict[int, int] = {}
    for event in real.events:
        live[event.storage] = live.get(event.storage, 0) + event.size_bytes
        assert live[event.storage] >= 0
    at_start = sum(event.size_bytes for event in real.events if event.phase == "start")
    assert sum(live.values()) == at_start


def test_without_numbers_it_is_the_same(real: Trace) -> None:
    fake = fake_mode()
    with torch.device("meta"):
        model = TwoLayers()
    as_fake(model, fake)
    with numberless(fake):
        assert step(model, Tracked()) == real


def test_work(real: Trace) -> None:
    products = {one.phase: one for one in real.work if one.operation == "aten::mm"}
    assert products["forward"].count == 2
    assert products["forward"].flops == 2 * 2 * ROWS * INPUTS * OUTPUTS
    assert products["forward"].moved_bytes == 2 * 4 * (ROWS * INPUTS + INPUTS * OUTPUTS + ROWS * OUTPUTS)
    assert products["backward"].count == 3  # the input needs no gradient


def test_the_peak_is_of_one_instant(real: Trace) -> None:
    found = peak(real)
    assert found.size_bytes == sum(found.by_owner.values()) == max(phases(real).values())
    assert peak(real, found.phase) == found


def test_shared_weights_stay_shared() -> None:
    with torch.device("meta"):
        model = TwoLayers()
    model.above.weight = model.below.weight
    as_fake(model, fake_mode())
    assert model.above.weight is model.below.weight
    assert model.above.weight.device.type == "cpu"


def test_resized_storages() -> None:
    tracked = Tracked()
    with tracked:
        tensor = torch.zeros(100)
        tensor.untyped_storage().resize_(40)
        assert tracked.live_bytes == 40
        tensor.untyped_storage().resize_(0)
        assert (tracked.live_bytes, tracked.most_bytes) == (0, 400)


def test_memory_of_the_host_is_apart() -> None:
    tracked = Tracked()
    with tracked:
        with tracked.hosting():
            away = torch.zeros(100)
        here = away.clone()
    assert (tracked.live_bytes, tracked.host_bytes) == (400, 400)
    del here


def test_known_numbers() -> None:
    """Masks are known, through views and writes; what floats say is that all is well."""
    with numberless(fake_mode()):
        mask = torch.zeros(2, 8, dtype=torch.int64)
        mask[0, :5] = 1
        assert not bool((mask == 1).all())
        assert mask.sum().item() == 5
        assert (mask[0] == 1).nonzero().shape == (5, 1)
        mask[:, :] = 1
        assert bool((mask == 1).all())
        assert torch.randn(3).isfinite().all().item() is True


@pytest.fixture
def on_cuda() -> Iterator[None]:
    with numberless(fake_mode()), as_on_cuda():
        yield


def kept(result: torch.Tensor, tracked: Tracked, before: int) -> int:
    """Return the bytes that are alive beside what was there before; the result is one of them."""
    assert result.requires_grad
    return tracked.live_bytes - before


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(("dtype", "log_sums"), [(torch.bfloat16, 48), (torch.float32, 64)])
def test_attention_keeps_what_a_gpu_keeps(dtype: torch.dtype, log_sums: int) -> None:
    """The flash kernel one float32 for each row of scores, the efficient one for as many as are a multiple of 32."""
    rows, heads, length, head = 2, 4, 48, 16
    query, key, value = (torch.zeros(rows, heads, length, head, dtype=dtype, requires_grad=True) for _ in range(3))
    with Tracked() as tracked:
        for each in (query, key, value):
            tracked.own(Owner.ACTIVATION, [each])
        before = tracked.live_bytes
        result = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        made = rows * heads * (length * head * dtype.itemsize + 4 * log_sums)
        # Beside it two states of chance, of at most 16 bytes.
        assert made <= kept(result, tracked, before) <= made + 32


@pytest.mark.usefixtures("on_cuda")
def test_dropout_keeps_a_byte_for_each_element() -> None:
    x = torch.zeros(64, 10, requires_grad=True)
    with Tracked() as tracked:
        tracked.own(Owner.ACTIVATION, [x])
        before = tracked.live_bytes
        result = functional.dropout(x, 0.1, training=True)
        assert kept(result, tracked, before) == 640 * (4 + 1)


@pytest.mark.usefixtures("on_cuda")
def test_autocast_computes_in_float32_what_a_gpu_does() -> None:
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert {f(x).dtype for f in (torch.rsqrt, torch.exp, torch.log)} == {torch.float32}
        assert functional.softmax(x, dim=-1).dtype == torch.float32
        assert functional.layer_norm(x, (8,)).dtype == torch.float32
        assert (x @ x.t()).dtype == torch.bfloat16


def test_a_process_is_as_it_was() -> None:
    from transformers.utils import import_utils

    before = import_utils.is_fake_tensor, nn.Module._apply, torch.get_rng_state
    with numberless(fake_mode()), as_on_cuda(), Tracked():
        pass
    assert (import_utils.is_fake_tensor, nn.Module._apply, torch.get_rng_state) == before
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.rsqrt(x).dtype == torch.bfloat16


WIDE, NARROW, ROW, NUMBER = torch.randn(40, 50), torch.randn(40, 50).bfloat16(), torch.randn(50), torch.tensor(2.0)
UNLIKE: list[tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = [
    ("both whole", lambda wide, narrow: wide + narrow),
    ("the other way", lambda wide, narrow: narrow + wide),
    ("a row", lambda wide, narrow: narrow * ROW),
    ("a narrow row", lambda wide, narrow: wide - narrow[0]),
    ("an expanded row", lambda wide, narrow: wide / narrow[0].expand(40, 50)),
    ("a number", lambda wide, narrow: narrow * NUMBER),
    ("in place", lambda wide, narrow: wide.add_(narrow)),
    ("in place of what is narrow", lambda wide, narrow: narrow.add_(wide)),
    ("three", lambda wide, narrow: wide.addcmul_(narrow, narrow)),
    ("a choice", lambda wide, narrow: torch.where(wide > 0, narrow, wide)),
    ("a comparison", lambda wide, narrow: wide > narrow),
    ("whole numbers", lambda wide, narrow: torch.ones(40, 50, dtype=torch.int64) + wide),
    ("alike", lambda wide, narrow: wide + wide),
]


@pytest.mark.parametrize("compute", [compute for _, compute in UNLIKE], ids=[name for name, _ in UNLIKE])
def test_a_processor_copies_operands_of_unlike_dtypes(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    def profiled(wide: torch.Tensor, narrow: torch.Tensor) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            compute(wide, narrow)
        events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))

    def tracked_by(tracked: Tracked, wide: torch.Tensor, narrow: torch.Tensor) -> int:
        with tracked:
            tracked.own(Owner.BUFFER, [wide, narrow, ROW, NUMBER])
            before = tracked.live_bytes
            compute(wide, narrow)
        return tracked.most_bytes - before

    within = 16  # a single number is held by its kernel in more forms than one
    real = profiled(WIDE.clone(), NARROW.clone())
    assert abs(tracked_by(Tracked(), WIDE.clone(), NARROW.clone()) - real) <= within
    with fake_mode() as fake:
        wide, narrow = fake.from_tensor(WIDE), fake.from_tensor(NARROW)
        assert abs(tracked_by(Tracked(), wide, narrow) - real) <= within


def test_a_gpu_copies_none() -> None:
    tracked = Tracked(on_processor=False)
    with tracked:
        tracked.own(Owner.BUFFER, [WIDE, NARROW])
        before = tracked.live_bytes
        WIDE + NARROW
    assert tracked.most_bytes - before == WIDE.nbytes
