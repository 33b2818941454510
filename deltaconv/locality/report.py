"""LocalityReport: measurements by site, head and sigma, with the statistics derived from them."""

import base64
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from typing_extensions import TypedDict

from .attention import AttentionStatistics, uniform_offsets
from .decomposition import LEAST_R2, STRICT, Decomposition, decompose, receptive_field
from .grid import GridMaps
from .profile import content, mean_distance, ring_distances, ring_mass, window_mass, window_widths

FORMAT = 1
KERNELS = range(3, 18, 2)
# Least share of all keys, as exp(entropy) / N, at which a layer counts as even.
EVEN = 0.7


class StandardErrors(TypedDict):
    """Standard errors of the means over heads of a measurement; `mass` by window."""

    mass: list[float]
    distance: float
    entropy: float


@dataclass(frozen=True)
class Measurement:
    """One site at one sigma; the lists run over heads, `mass` over heads and windows 1, 3, 5 …

    `distance` in cells, `entropy` and `content` in nats, `profile` is the weight on a key over
    uniform attention's, per ring of `ring_distances`, mean over heads. `error` is None where every
    query was counted.
    """

    __pydantic_config__ = STRICT

    sigma: float
    mass: list[list[float]]
    distance: list[float]
    entropy: list[float]
    content: list[float]
    fits: list[Decomposition]
    profile: list[float]
    error: StandardErrors | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Cost of replacing one site alone: squared error of ε̂ over its mean square, per sigma."""

    __pydantic_config__ = STRICT

    window: int | None = None
    window_error: list[float] | None = None
    block_error: list[float] | None = None

    @property
    def error(self) -> float | None:
        """Mean over sigmas, of the block where one was given, else of the window."""
        errors = self.block_error or self.window_error
        return statistics.fmean(errors) if errors else None


@dataclass
class SiteLocality:
    """One site: path, level, channels C, size of its map, and a measurement per sigma."""

    __pydantic_config__ = STRICT

    path: str
    level: int
    dim: int
    height: int
    width: int
    measurements: list[Measurement]
    sensitivity: Sensitivity = field(default_factory=Sensitivity)

    @property
    def heads(self) -> int:
        return len(self.measurements[0].entropy)

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def widths(self) -> list[int]:
        """Window widths of `mass` and `uniform_mass`."""
        return window_widths(self.height, self.width)

    @property
    def mass(self) -> list[float]:
        """Mass within each window, mean over sigmas and heads."""
        rows = [row for m in self.measurements for row in m.mass]
        return torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()

    @property
    def uniform_mass(self) -> list[float]:
        return window_mass(uniform_offsets(self.height, self.width)).tolist()

    @property
    def uniform_distance(self) -> float:
        return float(mean_distance(uniform_offsets(self.height, self.width)))

    def mean(self, name: str) -> float:
        """Mean over sigmas and heads of `distance`, `entropy` or `content`."""
        return statistics.fmean(v for m in self.measurements for v in getattr(m, name))

    def mean_fit(self, name: str) -> float:
        """Mean over sigmas and heads of a field of the decomposition."""
        return statistics.fmean(getattr(f, name) for m in self.measurements for f in m.fits)

    @property
    def profile(self) -> tuple[list[float], list[float]]:
        """Distances of the rings and weight over uniform there, mean over sigmas and heads."""
        distances, _ = ring_distances(2 * self.height - 1, 2 * self.width - 1)
        rows = torch.tensor([m.profile for m in self.measurements], dtype=torch.float64)
        return distances.tolist(), rows.mean(dim=0).tolist()

    @property
    def fit(self) -> Decomposition:
        """The decomposition of the mean profile: the curve that pictures draw."""
        distances, relative = self.profile
        pairs = ring_mass(uniform_offsets(self.height, self.width))
        mass = torch.tensor(relative, dtype=torch.float64) * pairs
        return decompose(mass, pairs, torch.tensor(distances), self.height, self.width)

    def field(self, share: float) -> int | None:
        """Effective receptive field in cells; None for a constant, or where no curve fits."""
        if self.mean_fit("r2") < LEAST_R2:
            return None
        constant = self.mean_fit("constant_share")
        return receptive_field(self.mass, self.uniform_mass, constant, share)

    def kernel(self, share: float) -> int:
        """Odd kernel 3 … 17 that covers the receptive field as far as it can."""
        return min(max(self.field(share) or KERNELS[0], KERNELS[0]), KERNELS[-1])

    @property
    def position_share(self) -> float:
        """How much of the attention's departure from uniform (in nats) the offset explains."""
        departure = math.log(self.tokens) - self.mean("entropy")
        return 1.0 if departure <= 1e-9 else min(1, max(0, 1 - self.mean("content") / departure))

    @property
    def kind(self) -> str:
        """`even`, else `local` if the offset explains half of the attention, else `content`."""
        if math.exp(self.mean("entropy")) >= EVEN * self.tokens:
            return "even"
        return "local" if self.position_share >= 0.5 else "content"


@dataclass
class LocalityReport:
    """All measurements of a model: the source of tables, pictures, recipes and files.

    `points` are query points as fractions (x, y) of the picture. `maps` holds, per site, their
    attention [sigmas, points, heads, H, W] in float16, and `pictures` the model's prediction at
    each sigma, [H, W, 3] in 0…1. `left_out` gives, per unmeasured site, the reason. `grid` is for
    the interactive view, at the middle sigma; files leave it out.
    """

    family: str
    latent: tuple[int, int]
    sigmas: list[float]
    percents: list[float]
    sites: dict[str, SiteLocality]
    share: float = 0.6
    sampled_queries: int | None = None
    points: list[tuple[float, float]] = field(default_factory=list)
    maps: dict[str, torch.Tensor] = field(default_factory=dict)
    pictures: list[torch.Tensor] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    source: str = ""
    grid: GridMaps = field(default_factory=GridMaps)

    def to_json(self) -> str:
        """The report as JSON; maps as base64 of little-endian float16, pictures are left out."""
        fields = {
            name: getattr(self, name)
            for name in ("family", "latent", "sigmas", "percents", "share", "sampled_queries")
        }
        sites = {}
        for path, site in self.sites.items():
            sites[path] = asdict(site) | {
                "mean_distance": site.mean("distance"),
                "uniform_distance": site.uniform_distance,
                "entropy": site.mean("entropy"),
                "log_tokens": math.log(site.tokens),
                "local_share": site.mean_fit("local_share"),
                "constant_share": site.mean_fit("constant_share"),
                "receptive_field": site.field(self.share),
                "kernel": site.kernel(self.share),
                "kind": site.kind,
            }
        document = {
            "format": FORMAT,
            **fields,
            "source": self.source,
            "points": self.points,
            "left_out": self.left_out,
            "sites": sites,
            "maps": {path: _encode(maps) for path, maps in self.maps.items()},
        }
        return json.dumps(document, allow_nan=False)


def measure_site(
    statistics_: Sequence[AttentionStatistics], sigma: float, *, fit: bool = True
) -> Measurement:
    """Statistics of one site at one sigma, one per model call → the measurement of their mean."""
    first = statistics_[0]
    offsets = torch.stack([s.offsets for s in statistics_]).mean(dim=0)
    entropy = torch.stack([s.entropy for s in statistics_]).mean(dim=0)
    pairs = first.pairs.mean(dim=0)
    whole = offsets.mean(dim=0)
    distances, _ = ring_distances(*pairs.shape)
    rings, uniform = ring_mass(whole), ring_mass(pairs)
    seen = uniform > 0
    fits = []
    if fit:
        fits = [decompose(row, uniform, distances, first.height, first.width) for row in rings]
    profile = torch.where(seen, rings.mean(dim=0) / uniform.where(seen, 1), 0)
    return Measurement(
        sigma,
        window_mass(whole).tolist(),
        mean_distance(whole).tolist(),
        entropy.mean(dim=0).tolist(),
        content(whole, pairs, entropy.mean(dim=0)).tolist(),
        fits,
        profile.tolist(),
        _errors(first, offsets.mean(dim=1), entropy.mean(dim=1)),
    )


def site_label(path: str) -> str:
    """A site's path in few words: "input 4", "middle", "output 3/1", "block 12"."""
    if match := re.fullmatch(r"blocks\.(\d+)\.attn", path):
        return f"block {match[1]}"
    pattern = r"(input|middle|output)_blocks?\.(\d+)\.(?:\d+\.)?transformer_blocks\.(\d+)\.attn1"
    if not (match := re.fullmatch(pattern, path)):
        return path
    number = "" if match[1] == "middle" else f" {match[2]}"
    return match[1] + number + (f"/{match[3]}" if match[3] != "0" else "")


def _errors(first: AttentionStatistics, offsets, entropy) -> StandardErrors | None:
    """offsets [G, 2H−1, 2W−1] and entropy [G], means over heads → standard errors."""
    mass = first.standard_error(window_mass(offsets))
    distance = first.standard_error(mean_distance(offsets))
    nats = first.standard_error(entropy)
    if mass is None or distance is None or nats is None:
        return None
    return {"mass": mass.tolist(), "distance": float(distance), "entropy": float(nats)}


def _encode(maps: torch.Tensor) -> dict[str, object]:
    data = maps.half().contiguous().numpy().astype("<f2").tobytes()
    return {"shape": list(maps.shape), "float16": base64.b64encode(data).decode("ascii")}
