"""What the scripts in this folder share: the way into `sophia_galore`, also from the wrong Python.

The scripts are for people who type `python train.py` in a fresh clone. If that Python does not
have the package, but a virtual environment lies beside this file, the script starts again in there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def enter(*arguments: str) -> int:
    """Runs `sophia-galore` with these arguments.

    Args:
        *arguments: A command and what follows it.

    Returns:
        The exit code.
    """
    if importlib.util.find_spec("sophia_galore") is None:
        return _enter_elsewhere()
    from sophia_galore.cli.start import main

    return main(list(arguments))


def _enter_elsewhere() -> int:
    python = _virtualenv_python()
    if python is None:
        print(
            "The package sophia_galore is not installed in this Python "
            f"({sys.executable}).\nRun `make install` in {_HERE}, or `pip install -e .` in an environment of yours.",
            file=sys.stderr,
        )
        return 2
    command = [str(python), *sys.argv]
    if os.name == "nt":
        # Windows' exec returns to the shell at once and leaves the program in the background.
        return subprocess.run(command, check=False).returncode
    sys.stdout.flush()
    os.execv(str(python), command)


def _virtualenv_python() -> Path | None:
    """The interpreter of `.venv` beside this file, unless it is the running one."""
    folder = _HERE / ".venv"
    # Not by the interpreter's path: in a virtual environment that is a link to the system's Python.
    if Path(sys.prefix).resolve() == folder.resolve():
        return None
    for python in (folder / "bin" / "python", folder / "Scripts" / "python.exe"):
        if python.is_file():
            return python
    return None
