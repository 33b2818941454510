"""`python dev.py limits`: what blocks would gain from what they cannot know.

In the packaged demo model, with its packaged blocks in all layers, each block is told a part of
what attention gives for the same features, and pictures are sampled so. What that gains is more
than a part of the block that predicts it could.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from ..cli.host import entered
from . import ROOT
from .comfyui.tree import chosen_tree
from .distill_compare import TWELVE
from .distill_demo import mean_psnr

PICTURES, STEPS = 6, 12
# Cells of the coarse map, along each side.
CELLS = 4


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py limits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "limits.json")
    options = parser.parse_args(argv)
    with entered(chosen_tree()):
        measure(options.output)
    return 0


def oracles() -> dict[str, Callable]:
    """Name → (block's map, attention's map), both [B, H, W, C] → what the block would give."""

    def mean(y):
        return y.mean((1, 2), keepdim=True)

    def scale(y, a):
        """The least-squares factor of the block's map in each channel of each picture."""
        y, a = y - mean(y), a - mean(a)
        power = y.square().sum((1, 2), keepdim=True).clamp_min(1e-12)
        return (y * a).sum((1, 2), keepdim=True) / power

    def coarse(y, a):
        from einops import reduce, repeat

        rows, columns = (size // CELLS for size in y.shape[1:3])
        cells = reduce(a - y, "b (h r) (w s) c -> b h w c", "mean", r=rows, s=columns)
        return y + repeat(cells, "b h w c -> b (h r) (w s) c", r=rows, s=columns)

    return {
        "nothing": lambda y, a: y,
        "the mean of each channel": lambda y, a: y + mean(a - y),
        "a scale of each channel": lambda y, a: mean(y) + scale(y, a) * (y - mean(y)),
        "both": lambda y, a: mean(a) + scale(y, a) * (y - mean(y)),
        f"{CELLS} × {CELLS} means of each channel": coarse,
        "30% of the error": lambda y, a: _nearer(y, a, 0.3),
        "half of the error": lambda y, a: _nearer(y, a, 0.5),
    }


def _nearer(y, a, share: float):
    return y + share * (a - y)


def measure(output: Path) -> dict[str, dict[str, float]]:
    """Name of what is told → PSNR of the pictures, error of the layers before and after it.

    Prompts are none of `TWELVE`. Writes JSON after every one, and goes on where it was stopped.
    """
    import torch

    from ..cli.distill_config import Configuration
    from ..cli.distill_inputs import chosen_data, load_teacher
    from ..deltaconv import demo, read_weights
    from ..deltaconv.distillation import default_settings, sample

    found = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    teacher = load_teacher(Configuration(), default_settings())
    blocks = read_weights(demo.DELTACONV_PATH).blocks()
    with teacher, torch.no_grad():
        data = chosen_data(Configuration(), teacher)
        others = [index for index, name in enumerate(demo.pictures()[1]) if name not in TWELVE]
        picked = others[:: len(others) // PICTURES][:PICTURES]
        conditions = [data.conditions[index] for index in picked]
        noise = torch.randn((PICTURES, 3, 64, 64), generator=torch.Generator().manual_seed(2025))

        def drawn(visit=None):
            arguments = (teacher, conditions, data.unconditional, noise)
            return sample(*arguments, steps=STEPS, visit=visit).clamp(-1, 1)

        expected = None
        for name, told in oracles().items():
            if name in found:
                continue
            since = time.monotonic()
            expected = drawn() if expected is None else expected
            sums = [0.0, 0.0, 0.0]

            def visit(site, x, attend, told=told, sums=sums):
                if site not in blocks:
                    return attend()
                y = blocks[site](x.float())
                a = attend().float().reshape(y.shape)
                given = told(y, a)
                for at, map_ in enumerate((a, a - y, a - given)):
                    sums[at] += float(map_.square().sum())
                return given

            psnr = mean_psnr(expected, drawn(visit))
            before, after = sums[1] / sums[0], sums[2] / sums[0]
            found[name] = {"psnr": psnr, "error": before, "left": after}
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            seconds = time.monotonic() - since
            print(
                f"told {name}: {psnr:.2f} dB, error of the layers {before:.4f} → {after:.4f}, "
                f"{seconds:.0f} s",
                flush=True,
            )
    return found
