"""DeltaConvWeights: blocks by site, in memory or read from a file on access."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import nn

from ..block import DeltaConvBlock
from ..families import families_of
from ..geometry import BlockGeometry, BlockPlan, canonical_tensor
from ..start import EXPECTED, is_start


class WeightsError(ValueError):
    """ΔConv weights cannot be read, written or used; the message says what to do."""


@dataclass(frozen=True)
class DeltaConvWeights:
    """ΔConvBlocks by site path, with everything needed to build and describe them.

    `tensors` maps site path → published tensor name → tensor, in any published layout; those of a
    file are read on access. `family` is "" where the weights do not name one; `base_model` and
    `training` record their origin. Blocks should act from `start` on, a share of sampling: before,
    they were not trained or are not good enough.
    """

    sites: Mapping[str, BlockGeometry]
    scales: Mapping[str, tuple[float, ...]]
    gate: str
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    family: str = ""
    base_model: str = ""
    training: Mapping[str, object] = field(default_factory=dict)
    source: str = ""
    start: float = 0.0

    def __post_init__(self):
        if not is_start(self.start):
            raise WeightsError(f"Expected {EXPECTED}, got {self.start}. Blocks would never act.")

    def __str__(self) -> str:
        # Shown by previews, also where a bypassed Apply ΔConv passes its input on.
        families = ", ".join(self.families) or "an unnamed model"
        layers = f"{len(self.sites)} layer{'s' if len(self.sites) != 1 else ''}"
        return (
            f"No layer is replaced: these are ΔConv weights for {layers} of {families}, "
            f"{self.parameters / 1e6:.2f} M parameters. Apply ΔConv puts them onto a model."
        )

    @property
    def dims(self) -> dict[str, int]:
        """Site path → channels C."""
        return {site: geometry.dim for site, geometry in self.sites.items()}

    @property
    def plans(self) -> dict[str, BlockPlan]:
        """Site path → the plan by which a block of the same kind is made there."""
        return {site: block.plan(self.scales[site]) for site, block in self.sites.items()}

    @property
    def families(self) -> tuple[str, ...]:
        """Families these weights are for: the one they name, else all whose sites they fit."""
        if self.family:
            return (self.family,)
        return tuple(family.name for family in families_of(self.dims))

    @property
    def parameters(self) -> int:
        """Number of parameters of all blocks together."""
        return sum(geometry.parameters for geometry in self.sites.values())

    def only(self, sites: Iterable[str], start: float) -> "DeltaConvWeights":
        """The blocks of these sites alone, in the order they stand in, to act from `start` on."""
        wanted = set(sites)
        parts = {
            name: {site: of[site] for site in self.sites if site in wanted}
            for name, of in (
                ("sites", self.sites),
                ("scales", self.scales),
                ("tensors", self.tensors),
            )
        }
        return replace(self, **parts, start=start)

    def state(self, site: str) -> dict[str, torch.Tensor]:
        """Published tensor name → tensor in the published layout.

        Raises WeightsError where values are NaN or infinite.
        """
        tensors = self.tensors[site].items()
        require_finite(site, tensors, self.source)
        return {name: canonical_tensor(name, tensor) for name, tensor in tensors}

    def blocks(self) -> dict[str, DeltaConvBlock]:
        """Site path → its block in float32, as distillation and evaluation take them."""
        return {site: self.block(site).float() for site in self.sites}

    def block(
        self, site: str, *, gate: str | None = None, operations: ModuleType | type = nn
    ) -> DeltaConvBlock:
        """The block of one site, built from `operations`; `gate` overrides the weights' own."""
        return DeltaConvBlock.from_state(
            self.state(site),
            gate=gate or self.gate,
            scales=self.scales[site],
            operations=operations,
        )


def require_finite(site: str, tensors: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Raise WeightsError, naming them, where tensors of a block hold NaN or infinite values."""
    # aminmax propagates NaN; `isfinite` on the whole tensor allocates and is far slower.
    broken = sorted(
        name
        for name, tensor in tensors
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax())
    )
    if broken:
        where = f" of {source}" if source else ""
        raise WeightsError(
            f"Expected finite ΔConv weights, got NaN or infinite values in {site}: "
            f"{', '.join(broken)}{where}. Get the file again, or train it again with a lower "
            "learning rate or in a wider dtype."
        )


def weights_of_blocks(
    blocks: Mapping[str, DeltaConvBlock],
    *,
    family: str = "",
    base_model: str = "",
    training: Mapping[str, object] | None = None,
    source: str = "",
    start: float = 0.0,
) -> DeltaConvWeights:
    """Weights that share the tensors of `blocks` (site path → block), as distillation makes them.

    Raises WeightsError for no blocks or blocks with several gates.
    """
    gates = {block.gate for block in blocks.values()}
    if len(gates) != 1:
        raise WeightsError(f"Expected blocks with one gate, got {sorted(gates)} in {len(blocks)}.")
    return DeltaConvWeights(
        sites={
            site: BlockGeometry(
                block.dim, block.kernel_size, len(block.scales), block.biased, block.heads
            )
            for site, block in blocks.items()
        },
        scales={site: block.scales for site, block in blocks.items()},
        gate=gates.pop(),
        tensors={site: block.state_dict() for site, block in blocks.items()},
        family=family,
        base_model=base_model,
        training=training or {},
        source=source,
        start=start,
    )
