"""`python dev.py bench`: time attention, its replacements and ours; see kernels/README.md."""

from ..kernels import bench


def main(argv: list[str]) -> int:
    return bench.main(argv)
