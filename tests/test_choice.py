"""The choice between block and attention, measured with real clocks on real work."""

import time

import torch
from comfyui_deltaconv.deltaconv.choice import Choices, measure, seconds

CPU = torch.device("cpu")


def work(duration, calls):
    def run():
        calls.append(1)
        time.sleep(duration)

    return run


def test_the_faster_way_is_taken():
    assert measure(CPU, work(0.001, []), work(0.02, [])).takes_block
    assert not measure(CPU, work(0.02, []), work(0.001, [])).takes_block


def test_a_first_call_that_compiles_does_not_count():
    calls = []

    def block():
        calls.append(1)
        time.sleep(0.3 if len(calls) == 1 else 0.001)

    assert measure(CPU, block, work(0.02, [])).takes_block


def test_long_calls_are_not_repeated():
    block, attention = [], []
    measure(CPU, work(0.6, block), work(0.7, attention))
    assert (len(block), len(attention)) == (1, 1)
    assert measure(CPU, work(0.001, block), work(0.06, attention)).takes_block
    assert len(attention) == 3


def test_every_key_is_measured_once():
    choices, calls = Choices(), []
    way = work(0.001, calls)
    first = choices.choose("a", CPU, way, way)
    count = len(calls)
    assert choices.choose("a", CPU, way, way) is first
    assert len(calls) == count
    choices.choose("b", CPU, way, way)
    assert len(calls) == 2 * count


def test_seconds_are_those_of_the_clock():
    assert 0.02 <= seconds(CPU, work(0.02, [])) < 0.2
