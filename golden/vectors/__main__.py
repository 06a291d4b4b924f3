"""Write the test vectors: ``python -m golden.vectors --out DIR``."""

import argparse
import os
import sys
from pathlib import Path

import numpy

from golden.vectors import generate


def main(arguments=None):
    """Exit code: 0, or 2 where the folder cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m golden.vectors", description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", type=Path,
                        help="folder for the npz files; made if missing")
    folder = parser.parse_args(arguments).out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, arrays in generate().items():
            part = folder / f"{name}.npz.part"
            try:
                with part.open("wb") as file:
                    numpy.savez_compressed(file, **arrays)
                os.replace(part, folder / f"{name}.npz")
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        sys.stderr.write(f"{folder}: cannot be written: {error.strerror}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
