"""The order of images: by definition, and the same however many processes share a batch."""

from collections import defaultdict

import pytest
import torch
from comfyui_deltaconv.deltaconv.distillation.data import draw
from comfyui_deltaconv.deltaconv.distillation.order import EpochOrders
from toy_parallel import toy_sizes
from toy_teacher import ToyTeacher


def epoch_by_definition(sizes, seed, batch, epoch):
    """Shuffled images in full batches of a size, the first filling up the last; shuffled."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    by_size = defaultdict(list)
    for index in torch.randperm(len(sizes), generator=generator).tolist():
        by_size[sizes[index]].append(index)
    batches = []
    for members in by_size.values():
        missing = -len(members) % batch
        members += (members * (missing // len(members) + 1))[:missing]
        batches += [members[at : at + batch] for at in range(0, len(members), batch)]
    return [batches[at] for at in torch.randperm(len(batches), generator=generator).tolist()]


@pytest.mark.parametrize(("count", "kinds", "batch"), [(1, 1, 4), (24, 1, 8), (101, 5, 7)])
def test_orders_are_those_of_the_definition(count, kinds, batch):
    sizes = [(index * index) % kinds for index in range(count)]
    orders = EpochOrders(sizes)
    for seed in (0, 3):
        expected = [
            one for epoch in range(6) for one in epoch_by_definition(sizes, seed, batch, epoch)
        ]
        found = [orders.indices(seed, batch, position) for position in range(len(expected))]
        assert found == expected
        assert orders.indices(seed, batch, 0) == expected[0]


def test_shares_of_a_batch_are_the_batch():
    def drawn(rows=None):
        generator = torch.Generator().manual_seed(4)
        arguments = {"seed": 1, "batch": 7, "position": 3, "unconditional": 0.3, "rows": rows}
        return draw(toy_sizes(), ToyTeacher(), generator, **arguments)

    whole, shares = drawn(), [drawn([0, 1, 5]), drawn([2, 3, 4, 6])]
    for row, (share, at) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 2), (1, 3)]):
        for name in ("x", "sigma", "noise"):
            assert torch.equal(getattr(whole, name)[row], getattr(shares[share], name)[at])
        assert torch.equal(whole.conditions[row], shares[share].conditions[at])
