"""CONDITIONING entries as arguments of the model's forward, batched where shapes agree."""

from collections.abc import Sequence

import torch

# Most entries cached, and bytes of them: more than any batch, less than a data set of captions.
_KEPT, _KEPT_BYTES = 4096, 2**29


class EncodedConditions:
    """Caches the arguments made of each entry [tensor, options] for one latent size."""

    def __init__(self, patcher, device: torch.device):
        self.patcher, self.device = patcher, device
        self._encoded: dict[tuple, tuple[object, dict]] = {}
        self._bytes = 0

    def clear(self) -> None:
        """Forget all entries."""
        self._encoded.clear()
        self._bytes = 0

    def batches(self, entries: Sequence, x: torch.Tensor) -> list[tuple[list[int], dict]]:
        """One entry per row of x [B, C, (T,) H, W] → (rows, keyword arguments) of each forward.

        Captions of different lengths may need several forwards, as in ComfyUI's own sampling.
        """
        groups: list[tuple[list[int], list[dict]]] = []
        for row, entry in enumerate(entries):
            conds = self._encode(entry, x[:1])
            group = next((g for g in groups if _fit(g[1][0], conds)), None)
            if group is None:
                groups.append(([row], [conds]))
            else:
                group[0].append(row)
                group[1].append(conds)
        return [(rows, _joined(conds)) for rows, conds in groups]

    def _encode(self, entry, x: torch.Tensor) -> dict:
        key = (id(entry), *x.shape[2:])
        if key not in self._encoded:
            if len(self._encoded) > _KEPT or self._bytes > _KEPT_BYTES:
                self.clear()
            options = {"width": x.shape[-1] * 8, "height": x.shape[-2] * 8, **entry[1]}
            tensor = entry[0].clone()
            options |= {"cross_attn": tensor, "device": self.device, "noise": x.detach()}
            options["prompt_type"] = "positive"
            conds = self.patcher.model.extra_conds(**options)
            conds = {
                name: cond.process_cond(batch_size=1, device=self.device, area=None)
                for name, cond in conds.items()
            }
            # Keep the entry beside its key: an id is unique only while its object lives.
            self._encoded[key] = (entry, conds)
            self._bytes += _bytes_of(entry[0], *entry[1].values())
            self._bytes += _bytes_of(*(cond.cond for cond in conds.values()))
        return self._encoded[key][1]


def _bytes_of(*values: object) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _fit(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].can_concat(b[name]) for name in a)


def _joined(conds: list[dict]) -> dict:
    return {
        name: first.concat([other[name] for other in conds[1:]]) for name, first in conds[0].items()
    }
