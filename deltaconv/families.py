"""Model families: their self-attention sites, under ComfyUI's and diffusers' names.

A site path is ComfyUI's name of the attention module inside the diffusion model; its published
path is the diffusers name of the transformer block that holds the ΔConvBlock as `conv1`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Also the demo's, which has no published layout.
_DEFAULT_LATENT = 64

# Every UNet family with published blocks has two residual blocks per level.
NUM_RES_BLOCKS = (2, 2, 2, 2)

_UNET_SITE = re.compile(
    r"(?:(input|output)_blocks\.(\d+)|middle_block)\.1\.transformer_blocks\.(\d+)\.attn1"
)
_UNET_PUBLISHED = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.transformer_blocks\.(\d+)"
)
_PIXART_SITE = re.compile(r"blocks\.(\d+)\.attn")
_PIXART_PUBLISHED = re.compile(r"transformer_blocks\.(\d+)")


def to_published(site: str, num_res_blocks: Sequence[int] = NUM_RES_BLOCKS) -> str | None:
    """ComfyUI's site path → the published path of its transformer block; None if there is none."""
    if match := _PIXART_SITE.fullmatch(site):
        return f"transformer_blocks.{match[1]}"
    if not (match := _UNET_SITE.fullmatch(site)):
        return None
    side, number, block = match[1], match[2], match[3]
    if side is None:
        return f"mid_block.attentions.0.transformer_blocks.{block}"
    # input_blocks.0 is the first convolution, and each level ends with a downsampler. Output blocks
    # run from the lowest resolution up, one more per level; their upsamplers have no number.
    number = int(number) - (side == "input")
    counts = num_res_blocks if side == "input" else num_res_blocks[::-1]
    for level, count in enumerate(counts):
        if number <= count:
            if side == "input" and number == count:
                return None
            name = "down" if side == "input" else "up"
            return f"{name}_blocks.{level}.attentions.{number}.transformer_blocks.{block}"
        number -= count + 1
    return None


def from_published(path: str, num_res_blocks: Sequence[int] = NUM_RES_BLOCKS) -> str | None:
    """The published path of a transformer block → ComfyUI's site path; None if there is none."""
    if match := _PIXART_PUBLISHED.fullmatch(path):
        return f"blocks.{match[1]}.attn"
    if not (match := _UNET_PUBLISHED.fullmatch(path)):
        return None
    side, level, attention, block = match[1], match[2], int(match[3]), match[4]
    tail = f".1.transformer_blocks.{block}.attn1"
    if side is None:
        return f"middle_block{tail}" if attention == 0 else None
    level = int(level)
    counts = num_res_blocks if side == "down" else num_res_blocks[::-1]
    if level >= len(counts) or attention >= counts[level] + (side == "up"):
        return None
    number = sum(count + 1 for count in counts[:level]) + attention
    return f"input_blocks.{number + 1}{tail}" if side == "down" else f"output_blocks.{number}{tail}"


def resolution_level(site: str, num_res_blocks: Sequence[int] = NUM_RES_BLOCKS) -> int:
    """Number of downsamplings before this site: 0 is the highest resolution."""
    published = to_published(site, num_res_blocks)
    match = published and _UNET_PUBLISHED.fullmatch(published)
    if not match:
        return 0
    last = len(num_res_blocks) - 1
    if match[1] is None:
        return last
    return int(match[2]) if match[1] == "down" else last - int(match[2])


@dataclass(frozen=True)
class Family:
    """A model family: sites in network order, native size, and settings of the published blocks."""

    name: str
    title: str
    gate: str
    # Latent height and width the family was trained at, and pixels per latent cell.
    native_latent: int
    dims: Mapping[str, int]
    num_res_blocks: tuple[int, ...] = ()
    # Kernel by resolution level on the way down, in the middle and on the way up; 0: no attention.
    kernels: Mapping[str, tuple[int, ...]] | None = None
    published_base: str = ""
    # Pixels along a token of the highest resolution.
    token: int = 8

    def published_kernel(self, site: str) -> int | None:
        """Kernel size the authors ship for this site; None where they ship no blocks."""
        if not self.kernels:
            return None
        by_level = self.kernels[re.split("[._]", site)[0]]
        level = resolution_level(site, self.num_res_blocks)
        return by_level[level if len(by_level) > 1 else 0]


def _unet(
    channels: int,
    multipliers: Sequence[int],
    down: Sequence[int],
    middle: int,
    up: Sequence[int],
) -> dict[str, int]:
    """Site path → dim of a UNet; `down`, `up`: transformer depth per level, highest first."""
    sides = [depth for depth in down for _ in range(2)], [d for d in up[::-1] for _ in range(3)]
    return _uneven_unet(channels, multipliers, sides[0], middle, sides[1])


def _uneven_unet(
    channels: int,
    multipliers: Sequence[int],
    down: Sequence[int],
    middle: int,
    up: Sequence[int],
) -> dict[str, int]:
    """Site path → dim; `down`, `up`: depth of each residual block, as the network runs them."""
    dims, levels = {}, len(multipliers)
    for number, depth in enumerate(down):
        level = number // (len(down) // levels)
        # Each level ends with a downsampler, and block 0 is the first convolution.
        place = f"input_blocks.{level + number + 1}"
        for k in range(depth):
            dims[f"{place}.1.transformer_blocks.{k}.attn1"] = channels * multipliers[level]
    for k in range(middle):
        dims[f"middle_block.1.transformer_blocks.{k}.attn1"] = channels * multipliers[-1]
    for number, depth in enumerate(up):
        level = levels - 1 - number // (len(up) // levels)
        for k in range(depth):
            path = f"output_blocks.{number}.1.transformer_blocks.{k}.attn1"
            dims[path] = channels * multipliers[level]
    return dims


def _per_block(path: str, depth: int, dim: int) -> dict[str, int]:
    """Site path → dim of a transformer with one site per block; `path` has {} for its number."""
    return {path.format(k): dim for k in range(depth)}


def _own(
    name: str, title: str, native: int, path: str, depth: int, dim: int, token: int = 16
) -> Family:
    """A family for which nobody publishes blocks; the gate is that of the best ones for UNets."""
    return Family(name, title, "scaled", native, _per_block(path, depth, dim), token=token)


_SELF, _LTXV = "blocks.{}.self_attn", "transformer_blocks.{}.attn1"
_VISUAL = "visual_transformer_blocks.{}.self_attention"
_SD_DIMS = _unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 1, (1, 1, 1, 0))

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd1",
            "Stable Diffusion 1.x",
            "scaled",
            64,
            _SD_DIMS,
            (2, 2, 2, 2),
            {"input": (7, 9, 5, 0), "middle": (3,), "output": (11, 9, 5, 0)},
            "DreamShaper, an SD1.5 fine-tune (Lykon/DreamShaper)",
        ),
        Family("sd2", "Stable Diffusion 2.x", "scaled", 96, _SD_DIMS, (2, 2, 2, 2)),
        Family(
            "sdxl",
            "Stable Diffusion XL",
            "scaled",
            128,
            _unet(320, (1, 2, 4), (0, 2, 10), 10, (0, 2, 10)),
            (2, 2, 2),
            {"input": (0, 9, 7), "middle": (9,), "output": (0, 13, 9)},
            "SDXL base 1.0 (stabilityai/stable-diffusion-xl-base-1.0)",
        ),
        Family(
            "sdxl-refiner",
            "Stable Diffusion XL refiner",
            "scaled",
            128,
            _unet(384, (1, 2, 4, 4), (0, 4, 4, 0), 4, (0, 4, 4, 0)),
            (2, 2, 2, 2),
        ),
        # Distilled from SDXL, with fewer layers.
        Family(
            "ssd-1b",
            "SSD-1B",
            "scaled",
            128,
            _uneven_unet(320, (1, 2, 4), (0, 0, 2, 2, 4, 4), 0, (4, 4, 10, 2, 1, 1, 0, 0, 0)),
            (2, 2, 2),
        ),
        Family(
            "segmind-vega",
            "Segmind Vega",
            "scaled",
            128,
            _uneven_unet(320, (1, 2, 4), (0, 0, 1, 1, 2, 2), 0, (2, 2, 2, 1, 1, 1, 0, 0, 0)),
            (2, 2, 2),
        ),
        Family(
            "koala-700m",
            "KOALA 700M",
            "scaled",
            128,
            _uneven_unet(320, (1, 2, 4), (0, 2, 5), 0, (5, 5, 2, 2, 0, 0)),
            (1, 1, 1),
        ),
        Family(
            "koala-1b",
            "KOALA 1B",
            "scaled",
            128,
            _uneven_unet(320, (1, 2, 4), (0, 2, 6), 6, (6, 6, 2, 2, 0, 0)),
            (1, 1, 1),
        ),
        # Its layers over space; those over time stay.
        Family("svd", "Stable Video Diffusion", "scaled", 72, _SD_DIMS, (2, 2, 2, 2)),
        Family(
            "pixart",
            "PixArt-α/Σ",
            "sigmoid",
            128,
            _per_block("blocks.{}.attn", 28, 1152),
            (),
            {"blocks": (13,)},
            "PixArt-Σ, 512 or 1024",
            16,
        ),
        _own("cosmos-predict2", "Cosmos-Predict2 2B", 128, _SELF, 28, 2048),
        _own("cosmos-predict2-14b", "Cosmos-Predict2 14B", 128, _SELF, 36, 5120),
        _own("anima", "Anima", 128, _SELF, 28, 2048),
        _own("hunyuandit", "HunyuanDiT", 128, "blocks.{}.attn1", 40, 1408),
        _own("wan-1.3b", "Wan 2.1 1.3B", 64, _SELF, 30, 1536),
        _own("wan-14b", "Wan 2.1 and 2.2 14B", 128, _SELF, 40, 5120),
        _own("wan2.2-5b", "Wan 2.2 5B", 64, _SELF, 30, 3072, 32),
        _own("kandinsky5-image", "Kandinsky 5 Image", 128, _VISUAL, 50, 2560),
        _own("ltxv-2b", "LTX-Video 2B", 24, _LTXV, 28, 2048, 32),
        _own("ltxv-13b", "LTX-Video 13B", 32, _LTXV, 48, 4096, 32),
    )
}


def families_of(dims: Mapping[str, int]) -> tuple[Family, ...]:
    """Families that have all of these sites with these dims; several where layouts agree."""
    return tuple(
        family
        for family in FAMILIES.values()
        if all(family.dims.get(site) == dim for site, dim in dims.items())
    )


def family_title(name: str) -> str:
    """Display name of a family; the name itself where it is unknown."""
    return FAMILIES[name].title if name in FAMILIES else name or "an unnamed family"


def native_latent(name: str) -> int:
    """Latent height and width that models of this family draw at; the demo's for any other name."""
    return FAMILIES[name].native_latent if name in FAMILIES else _DEFAULT_LATENT
