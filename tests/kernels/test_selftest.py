"""The error budget, and the self-test that holds every implementation to it."""

import re

import torch
from comfyui_deltaconv.kernels import accuracy, eager, selftest


def test_error_budget_sees_what_is_wrong():
    own, dtype = accuracy.Error(1e-3, 3e-3, 10_000), torch.float16
    assert accuracy.Error(1e-3, 3e-3, 10_000).within(own, dtype)
    assert not accuracy.Error(2e-3, 3e-3, 10_000).within(own, dtype)
    assert not accuracy.Error(1e-3, 8e-3, 10_000).within(own, dtype)
    # Of four values a root mean square says less.
    assert accuracy.Error(2e-3, 3e-3, 4).within(own._replace(count=4), dtype)
    nan = accuracy.distance(torch.tensor([1.0, float("nan")]), torch.ones(2).double())
    assert not nan.within(own, dtype)


def test_self_test_trusts_torch_and_stops_in_time(monkeypatch):
    monkeypatch.setattr(selftest, "KERNEL_SIZES", (3, 17))
    verdicts = list(selftest.self_test("cpu", seconds=1000))
    assert len(verdicts) == 2 * len(selftest.DTYPES) * len(selftest.KERNEL_SIZES)
    # Drawing needs forward alone, so that comes first.
    assert verdicts[5].direction == "forward" and verdicts[6].direction == "backward"
    assert all(verdict.trusted for verdict in verdicts), [str(v) for v in verdicts]
    assert {verdict.implementation for verdict in verdicts} == {"torch"}
    assert {verdict.trusted for verdict in selftest.self_test("cpu", seconds=-1)} == {None}


def test_self_test_says_what_is_wrong(monkeypatch):
    def broken(u, weights, scales, gate, biases):
        return eager.gated_pyramid(u, weights, scales, gate, biases) * 1.01

    monkeypatch.setattr(accuracy, "gated_pyramid", broken)
    verdict = next(selftest.self_test("cpu"))
    assert verdict.trusted is False
    assert re.search(r"DO NOT TRUST: pyramid is off by \S+, torch's own", str(verdict))
