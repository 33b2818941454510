"""`deltaconv COMMAND …`: distill, fetch, time and test the blocks from a terminal.

After `pip install` the command is `deltaconv`, or `python -m comfyui_deltaconv.cli`; in a ComfyUI
whose custom_nodes folder holds the pack, `python -m custom_nodes.FOLDER.cli`, run in ComfyUI's own
folder with ComfyUI's Python.
"""

import argparse
import signal
import sys

from . import CommandError, bench, distill, download, precompute, selftest

# To add a command: a file with a docstring, `add_arguments(parser)` and `run(options) -> int`, and
# its row here. Its libraries are imported in `run`, so that --help is quick.
COMMANDS = {
    "bench": (bench, "time attention, its replacements and the ΔConvBlock on this machine"),
    "distill": (distill, "distill the demo, or any checkpoint, into ΔConv weights"),
    "download": (download, "list the ΔConv files that are known on Hugging Face, or fetch one"),
    "precompute": (precompute, "encode pictures and captions once, for distill to train on"),
    "selftest": (selftest, "compare the kernels with their definition on this machine's device"),
}
ALIASES = {"distill": ["distil"]}


def main(argv: list[str] | None = None, program: str = "deltaconv") -> int:
    """Run one command → its exit code; `argv` defaults to this process's arguments.

    `program` is what --help calls it.
    """
    if argv is None:
        _prepare_process()
    options = _parser(program).parse_args(argv)
    try:
        return options.run(options)
    except CommandError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        # A module of the pack or of ComfyUI is no library that another Python has.
        if missing in (__name__.split(".")[0], "comfy", "folder_paths"):
            raise
        print(
            f"\nExpected the Python that runs ComfyUI, got {sys.executable}, which has no module "
            f"{error.name}. Run this with ComfyUI's Python, or install it there.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def _parser(program: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, purpose) in COMMANDS.items():
        command = commands.add_parser(
            name,
            aliases=ALIASES.get(name, []),
            help=purpose,
            description=module.__doc__,
            formatter_class=raw,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _prepare_process() -> None:
    # Messages hold a Δ; a console with a narrow encoding shows a ? instead of failing.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    # Being told to end saves as Ctrl-C does.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
