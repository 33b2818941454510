"""The choice between block and attention, by a clock that stands still but for the work."""

import math
import time

import pytest
import torch
from comfyui_deltaconv.deltaconv.application import fastest
from comfyui_deltaconv.deltaconv.application.fastest import (
    BUDGET,
    Choices,
    measure,
    seconds,
    synchronize,
)

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def work(duration, calls):
    def run():
        calls.append(1)
        time.sleep(duration)

    return run


def fails(error):
    def run():
        raise error

    return run


def takes_block(*ways):
    """Whether the block was the faster of the two."""
    return measure(CPU, *ways)[0].takes_block


@pytest.fixture
def clock(monkeypatch):
    """Time that passes in `work` alone, so that seconds are exact and no test waits for them."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda duration: now.__setitem__(0, now[0] + duration))
    monkeypatch.setattr(fastest, "synchronize", lambda device: None)
    return now


def test_the_faster_way_is_taken(clock):
    assert takes_block(work(0.001, []), work(0.02, []))
    assert not takes_block(work(0.02, []), work(0.001, []))


@pytest.mark.parametrize("compiling, attention", [(0.3, 0.02), (10.0, 0.7)])
def test_a_first_call_that_compiles_does_not_count(clock, compiling, attention):
    calls = []

    def block():
        calls.append(1)
        time.sleep(compiling if len(calls) == 1 else 0.001)

    chosen, spent = measure(CPU, block, work(attention, []))
    assert chosen.takes_block
    assert spent == pytest.approx(clock[0] - compiling + 0.001)


def test_kernels_that_attention_loads_in_its_first_call_do_not_count(clock):
    calls = []

    def attention():
        calls.append(1)
        time.sleep(0.15 if len(calls) == 1 else 0.001)

    assert not takes_block(work(0.002, []), attention)


def test_slow_attention_is_called_once(clock):
    block, attention = [], []
    chosen, spent = measure(CPU, work(0.01, block), work(0.7, attention))
    assert (chosen.block, chosen.attention) == pytest.approx((0.01, 0.7))
    assert (len(block), len(attention)) == (2, 1)
    assert spent == pytest.approx(0.72)
    # Not clearly slower, but a second call would go beyond the budget.
    block, attention = [], []
    assert takes_block(work(0.6, block), work(0.7, attention))
    assert (len(block), len(attention)) == (2, 1)


def test_calls_of_some_length_are_not_repeated(clock):
    attention = []
    assert takes_block(work(0.001, []), work(0.06, attention))
    assert len(attention) == 2


def test_what_runs_out_of_memory_has_lost():
    gpu = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.")
    mps = RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)")

    def cpu():
        torch.empty(1 << 50)

    for out_of_memory in (fails(gpu), fails(mps), cpu):
        chosen, _ = measure(CPU, work(0.01, []), out_of_memory)
        assert chosen.takes_block and chosen.attention == math.inf
        chosen, _ = measure(CPU, out_of_memory, work(0.01, []))
        assert not chosen.takes_block and chosen.block == math.inf
    with pytest.raises(torch.cuda.OutOfMemoryError):
        measure(CPU, cpu, fails(gpu))
    with pytest.raises(RuntimeError, match="no such instruction"):
        measure(CPU, work(0.01, []), fails(RuntimeError("no such instruction")))


def test_a_block_that_runs_out_of_memory_later_has_lost_too():
    calls = []

    def block():
        calls.append(1)
        if len(calls) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    assert not takes_block(block, work(0.01, []))


def test_every_key_is_measured_once(clock):
    choices, calls = Choices(), []
    way = work(0.001, calls)
    first = choices.choose("a", (8, 8), CPU, way, way)
    count = len(calls)
    assert choices.choose("a", (8, 8), CPU, way, way) is first
    assert len(calls) == count
    choices.choose("b", (8, 8), CPU, way, way)
    assert len(calls) == 2 * count


def test_a_device_is_timed_for_two_seconds_in_all(clock):
    # One layer at many sizes, attention slow at the largest of them.
    choices = Choices()
    for side, attention in ((512, 0.7), (511, 0.7), (510, 0.7), (509, 0.7), (128, 0.003)):
        choices.choose("a", (side, side), CPU, work(0.002, []), work(attention, []))
    assert clock[0] < BUDGET + 0.7
    assert [made.measured for made in choices.made.values()] == [True] * 3 + [False] * 2
    # A sixteenth of the tokens: 0.7 s come to 2.7 ms at least, more than the block's 2.
    assert all(made.takes_block for made in choices.made.values())


def test_attention_stays_where_nothing_proves_the_block(clock):
    choices, calls = Choices(), []
    choices.choose("a", (512, 512), CPU, work(0.01, []), work(3.0, []))
    for side, expected in ((1024, True), (256, True), (128, True), (64, False), (8, False)):
        way = work(1.0, calls)
        made = choices.choose("a", (side, side), CPU, way, way)
        assert (made.takes_block, made.measured) == (expected, False)
    # Another layer may have more channels: its block costs by their square.
    assert not choices.choose("b", (256, 256), CPU, way, way).takes_block
    assert not calls


def test_every_device_has_its_own_budget_and_times(clock):
    choices, calls = Choices(), []
    ways = work(0.02, calls), work(0.01, calls)
    choices.choose(FIRST, (8, 8), FIRST, work(0.01, []), work(3.0, []))
    made = choices.choose(FIRST, (8, 9), FIRST, *ways)
    assert made.takes_block and not made.measured and not calls
    made = choices.choose(SECOND, (8, 9), SECOND, *ways)
    assert made.measured and not made.takes_block


def test_seconds_are_those_of_the_clock():
    start = time.perf_counter()
    found = seconds(CPU, work(0.02, []))
    # However long a busy machine lets it sleep.
    assert 0.02 <= found <= time.perf_counter() - start


def test_the_queue_is_that_of_the_tensors_own_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    synchronize(CPU)
    synchronize(SECOND)
    synchronize(torch.device("mps", 0))
    assert waited == [SECOND, "mps"]


class Layer:
    """Block and attention that take so many seconds by a clock of their own."""

    def __init__(self, monkeypatch, block, attention):
        self.calls = []

        def seconds(device, call):
            before = len(self.calls)
            call()
            taken = {"block": block, "attention": attention}[self.calls[before]]
            if isinstance(taken, Exception):
                raise taken
            return taken

        monkeypatch.setattr(fastest, "seconds", seconds)

    def block(self):
        self.calls.append("block")
        return torch.ones(1)

    def attention(self):
        self.calls.append("attention")


def saved(savings, layer, key="key"):
    result, saved = savings.run(key, torch.device("cpu"), layer.block, layer.attention)
    assert torch.equal(result, torch.ones(1))
    return saved


def test_savings_time_the_second_call_and_no_block_twice(monkeypatch):
    layer, savings = Layer(monkeypatch, 0.25, 1.0), fastest.Savings()
    assert [saved(savings, layer) for _ in range(3)] == [0.0, 0.75, 0.75]
    assert layer.calls == ["block", "block", "attention", "block"]


def test_savings_call_a_short_attention_twice(monkeypatch):
    layer, savings = Layer(monkeypatch, 0.01, 0.04), fastest.Savings()
    saved(savings, layer)
    assert saved(savings, layer) == pytest.approx(0.03)
    assert layer.calls.count("attention") == 2
    assert savings.spent[CPU] == pytest.approx(0.08)


def test_savings_end_with_the_budget(monkeypatch):
    layer, savings = Layer(monkeypatch, 0.25, 3.0), fastest.Savings()
    for key in ("first", "second"):
        saved(savings, layer, key)
    assert saved(savings, layer, "first") == 2.75
    assert math.isnan(saved(savings, layer, "second"))
    assert saved(savings, layer, "first") == 2.75
    assert layer.calls.count("attention") == 1


def test_attention_that_runs_out_of_memory_tells_nothing(monkeypatch):
    layer = Layer(monkeypatch, 0.25, torch.OutOfMemoryError("CUDA out of memory."))
    savings = fastest.Savings()
    saved(savings, layer)
    assert math.isnan(saved(savings, layer)) and math.isnan(saved(savings, layer))
    assert layer.calls.count("attention") == 1
