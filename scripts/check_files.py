"""Two guards of pre-commit over the named files: how text files end, and how large a file may be.

Usage: check_files.py [--max-kib N] FILE...   With --max-kib only the sizes are checked.
"""

import argparse
import sys
from pathlib import Path


def text_fault(content: bytes) -> str | None:
    """Why a text file is not tidy, or None: it ends with exactly one newline and no line ends in a blank."""
    if not content:
        return None
    if not content.endswith(b"\n"):
        return "no newline at the end"
    if content.endswith(b"\n\n"):
        return "blank lines at the end"
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.endswith((b" ", b"\t", b"\r")):
            return f"line {number} ends in a blank"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-kib", type=int, default=None)
    parser.add_argument("files", nargs="*", type=Path)
    args = parser.parse_args(argv)
    faults = 0
    for path in args.files:
        if args.max_kib is None:
            fault = text_fault(path.read_bytes())
        else:
            kib = path.stat().st_size / 1024
            fault = f"{kib:.0f} KiB, more than {args.max_kib}" if kib > args.max_kib else None
        if fault:
            faults += 1
            print(f"{path}: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
