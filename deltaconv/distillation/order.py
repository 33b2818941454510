"""The order in which images are drawn: a function of seed, epoch and position alone."""

from collections.abc import Hashable, Sequence

import torch

# Epochs whose order is kept: training goes on from one to the next beside an initialization.
_KEPT = 3


class EpochOrders:
    """Batches of images of one size each, by position; neither processes nor workers count.

    `sizes` is what each image must share with those of its batch. An order takes eight bytes per
    image.
    """

    def __init__(self, sizes: Sequence[Hashable]):
        numbers: dict[Hashable, int] = {}
        self.groups = torch.tensor([numbers.setdefault(size, len(numbers)) for size in sizes])
        self._orders: dict[tuple[int, int, int], torch.Tensor] = {}

    def indices(self, seed: int, batch: int, position: int) -> list[int]:
        """The images of draw number `position`: every image once per epoch, one size per batch."""
        epoch, offset = divmod(position, len(self._epoch(seed, batch, 0)))
        return self._epoch(seed, batch, epoch)[offset].tolist()

    def _epoch(self, seed: int, batch: int, epoch: int) -> torch.Tensor:
        key = (seed, batch, epoch)
        if key not in self._orders:
            while len(self._orders) > _KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[key] = epoch_order(self.groups, seed, batch, epoch)
        return self._orders[key]


def epoch_order(groups: torch.Tensor, seed: int, batch: int, epoch: int) -> torch.Tensor:
    """groups [N], each image's size as a number → indices [batches, batch] of one epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    shuffled = torch.randperm(len(groups), generator=generator)
    shuffled_groups = groups[shuffled]
    batches = []
    # Groups in the order of their first image: a random one, as the images' own.
    for group in dict.fromkeys(shuffled_groups.tolist()):
        members = shuffled[shuffled_groups == group]
        # Every batch is full: the first images fill up the last one.
        missing = -len(members) % batch
        fill = members.repeat(missing // len(members) + 1)[:missing]
        batches.append(torch.cat([members, fill]).view(-1, batch))
    order = torch.cat(batches)
    return order[torch.randperm(len(order), generator=generator)]
