"""Parses the command line, runs one subcommand, and turns user errors into one line and exit code 2."""

import argparse
import logging
import sys
from collections.abc import Sequence

from sglang_ext.cli import compare, doctor, serve, tune


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Abbreviated options are off: `serve` passes what it does not know to SGLang verbatim."""
    parser = argparse.ArgumentParser(
        prog="sglang-ext",
        description="Routed and re-ranked DeepSeek sparse-attention indexers for SGLang.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{compare,doctor,serve,tune}")
    for module in (compare, doctor, serve, tune):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 doctor found a problem, 2 the user asked for something impossible."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown and args.command != "serve":
        parser.error(f"unknown arguments for {args.command}: {' '.join(unknown)}")
    try:
        if args.command == "serve":
            return serve.run(args, unknown)
        return {"compare": compare, "doctor": doctor, "tune": tune}[args.command].run(args)
    except (ValueError, NotImplementedError, OSError) as error:
        # What the packages raise for bad values and refused backends; the message names the argument.
        print(f"sglang-ext {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sglang-ext {args.command}: interrupted", file=sys.stderr)
        return 130
