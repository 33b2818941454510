"""`python dev.py selftest`: compare the ops with their definition on this machine's device."""

from ..kernels import selftest


def main(argv: list[str]) -> int:
    return selftest.main(argv)
