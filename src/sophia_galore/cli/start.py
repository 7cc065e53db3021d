"""The entry point of the command line; it says which packages are missing.

`pip install sophia-galore` installs only the optimizers, but the command as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sophia_galore.errors import lacks_package


def main(argv: Sequence[str]) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The exit code.
    """
    try:
        from sophia_galore.cli.main import main as run
    except ModuleNotFoundError as error:
        problem = lacks_package(error)
        if problem is None:
            raise
        print(f"Error: {problem.cause} {problem.remedy}", file=sys.stderr)
        return problem.exit_code
    return run(argv)


def entry() -> None:
    """The installed command."""
    try:
        from sophia_galore.cli.main import entry as run
    except ModuleNotFoundError:
        sys.exit(main(sys.argv[1:]))
    run()
