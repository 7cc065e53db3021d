"""`python train.py ...` is `sophia-galore train ...`; with --prepare-data it is `sophia-galore prepare-data ...`."""

from __future__ import annotations

import sys

from _door import enter

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--prepare-data" in arguments:
        sys.exit(enter("prepare-data", *(argument for argument in arguments if argument != "--prepare-data")))
    sys.exit(enter("train", *arguments))
