"""`python dev.py distill`: `deltaconv distill`, and the comparisons behind the README.

--demo, --balanced and --compare take no configuration and compute on the CPU."""

import argparse

from ..cli import distill as product
from ..cli.host import entered, find_comfyui
from . import ROOT
from .comfyui.tree import chosen_tree
from .distill_balanced import measure_balanced
from .distill_compare import AUTHORS, compare_recipes
from .distill_demo import distill_demo


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py distill",
        description=f"{__doc__}\n\n{product.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    product.add_arguments(parser)
    parser.add_argument(
        "--compare",
        type=float,
        metavar="MINUTES",
        help="our recipe against the authors', each for so long per seed",
    )
    parser.add_argument(
        "--against",
        choices=AUTHORS,
        default="paper",
        help="for --compare: the losses that the paper states, or those of the authors' code for "
        "SD1.5, the features alone",
    )
    parser.add_argument(
        "--demo", action="store_true", help="a few minutes of it on the demo, with a grid"
    )
    parser.add_argument(
        "--balanced",
        type=float,
        metavar="MINUTES",
        help="the demo with a choice of layers and steps, for so long per seed: PSNR of pictures",
    )
    parser.add_argument("--side", type=int, default=64, help="for --balanced: of the pictures")
    parser.add_argument(
        "--tokens", action="store_true", help="for --balanced: blocks with pooled tokens"
    )
    parser.add_argument("--seeds", type=int, default=3, help="for --compare, --balanced")
    options = parser.parse_args(argv)
    options.comfyui = options.comfyui or chosen_tree()
    if not (options.compare or options.balanced or options.demo):
        return product.run(options)
    with entered(find_comfyui(options.comfyui)):
        if options.compare:
            # The paper's keeps the name that it had when it was the only one.
            name = "" if options.against == "paper" else f"-{options.against}"
            output = ROOT / "output" / f"distil-compare{name}.json"
            compare_recipes(options.compare, options.seeds, output, options.against)
        elif options.balanced:
            kind = "-tokens" if options.tokens else ""
            output = ROOT / "output" / f"distil-balanced-{options.side}{kind}.json"
            arguments = options.balanced, options.seeds, options.side, output
            measure_balanced(*arguments, tokens=options.tokens)
        else:
            distill_demo(ROOT / "output")
    return 0
