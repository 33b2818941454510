"""May the kernels be trusted on this device?

Every dtype and kernel size is compared with the float64 definition, forward, then backward, and
allowed what torch's own operators lose in that dtype. Needs torch alone, no ComfyUI. Ends with code
1 if a result is wrong.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: the GPU, or the CPU without one")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="no test is begun after this (default: 30)"
    )


def run(options: argparse.Namespace) -> int:
    import torch

    from ..kernels.device import device_name
    from ..kernels.selftest import self_test
    from .device import chosen_device

    device = chosen_device(options.device)
    print(f"ΔConv self-test on {device_name(device)}, torch {torch.__version__}")
    wrong = 0
    for verdict in self_test(device, options.seconds):
        wrong += verdict.trusted is False
        print(verdict, flush=True)
    print("Some results are wrong: set DELTACONV_KERNELS=torch." if wrong else "No wrong results.")
    return 1 if wrong else 0
