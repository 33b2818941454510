"""`python dev.py distill`: what `deltaconv distill` does, and the comparisons behind the README.

Further arguments are the product's own, among them --config FILE and --comfyui PATH.
--demo and --compare compute on the CPU.
"""

import argparse

from ..cli.__main__ import main as product
from ..cli.host import entered
from . import ROOT
from .comfyui.tree import chosen_tree
from .distill_compare import AUTHORS, compare_recipes
from .distill_demo import distill_demo


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py distill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
    parser.add_argument("--seeds", type=int, default=3, help="for --compare")
    options, rest = parser.parse_known_args(argv)
    if not (options.compare or options.demo):
        return product(["distill", "--comfyui", str(chosen_tree()), *rest])
    if rest:
        parser.error(f"expected nothing beside --compare or --demo, got {' '.join(rest)}")
    with entered(chosen_tree()):
        if options.compare:
            # The paper's keeps the name that it had when it was the only one.
            name = "" if options.against == "paper" else f"-{options.against}"
            output = ROOT / "output" / f"distil-compare{name}.json"
            compare_recipes(options.compare, options.seeds, output, options.against)
        else:
            distill_demo(ROOT / "output")
    return 0
