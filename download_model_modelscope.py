"""`python download_model_modelscope.py [NAME]` is `sophia-galore download [NAME]`: ModelScope first, then others."""

from __future__ import annotations

import sys

from _door import enter

if __name__ == "__main__":
    sys.exit(enter("download", "--prefer", "modelscope", *sys.argv[1:]))
