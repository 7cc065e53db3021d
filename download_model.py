"""`python download_model.py [NAME]` is `sophia-galore download [NAME]`: Hugging Face first, then the others."""

from __future__ import annotations

import sys

from _door import enter

if __name__ == "__main__":
    sys.exit(enter("download", "--prefer", "hf", *sys.argv[1:]))
