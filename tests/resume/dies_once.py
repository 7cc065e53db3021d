"""`sophia-galore train ...` as `torchrun` runs it; the last process dies by SIGKILL in its first attempt.

torchrun ... dies_once.py MOMENT COUNT ARGUMENT...
"""

from __future__ import annotations

import os
import sys

from resume.crash_run import crash_run

if __name__ == "__main__":
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    dies = is_last and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    sys.exit(crash_run(sys.argv[1] if dies else "never", int(sys.argv[2]), sys.argv[3:]))
