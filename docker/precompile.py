"""Build step of the image: compiles the kernels of the default parameters for sm_90a into the cache folders.

It needs no GPU. A server finds them again by what they were compiled from: other settings, or a GPU with another number
of SMs, compile theirs when the server starts, seconds each.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

CACHES = ("TILELANG_CACHE_DIR", "TRITON_CACHE_DIR")
HEADS = (64, 32)
MODES = ("misa", "misa_rerank", "hisa", "group_rerank")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 all compiled, 1 a kernel did not compile, 2 nothing to compile with or no folder to compile into."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads", type=int, nargs="+", default=HEADS, choices=HEADS, help="indexer heads of the models"
    )
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES, help="modes whose kernels are compiled")
    args = parser.parse_args(argv)
    if unset := [name for name in CACHES if not os.environ.get(name)]:
        return refuse(f"{', '.join(unset)} must name the folder that the image keeps")
    os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")  # read when TileLang is imported
    from indexer_kernels.gpu.compile_check import compile_all  # TileLang puts the nvcc it finds on the PATH

    if shutil.which("nvcc") is None:
        return refuse("no nvcc on the PATH: this image brings no CUDA compiler")
    failed = 0
    for heads in args.heads:
        for name, error in compile_all(num_heads=heads, modes=args.modes):
            failed += error is not None
            print(f"{heads} heads, {name}: {error or 'compiled'}", flush=True)
    return 1 if failed else 0


def refuse(reason: str) -> int:
    print(f"precompile.py: error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
