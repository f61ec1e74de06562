"""``python -m numoe demo | bench | info``."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "demo": "train a small byte-level language model with MoE layers on text that every Python has",
    "bench": "measure the layer against this machine's limits and a NumPy loop",
    "info": "versions, build, CPU targets and threads",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; its module is imported only then."""
    parser = argparse.ArgumentParser(prog="python -m numoe", description="Mixture-of-Experts layers for NumPy.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    arguments = sys.argv[1:] if argv is None else argv
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            module = importlib.import_module(f"numoe.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
