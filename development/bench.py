"""`python dev.py bench`: time attention, its replacements and ours; see benchmarks/README.md."""

from ..benchmarks import layers


def main(argv: list[str]) -> int:
    return layers.main(argv)
