"""The command `sophia-galore`. Its exit codes:

0  done (also: stopped by the user after saving)
1  the run failed
2  an error in the user's input: one message with cause and remedy
130  interrupted (Ctrl-C) where there was nothing to save
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence

import typer
from rich.console import Console

from sophia_galore import __version__
from sophia_galore.cli.chat import chat
from sophia_galore.cli.check import check
from sophia_galore.cli.compare import compare
from sophia_galore.cli.display import ReaderGone, displays, open_standard_streams
from sophia_galore.cli.doctor import doctor
from sophia_galore.cli.download import download
from sophia_galore.cli.export import export
from sophia_galore.cli.generate import generate
from sophia_galore.cli.init import init
from sophia_galore.cli.plan import plan
from sophia_galore.cli.prepare_data import prepare_data
from sophia_galore.cli.push import push_model
from sophia_galore.cli.report import report
from sophia_galore.cli.train import train
from sophia_galore.distributed.launch import is_first_on_machine
from sophia_galore.errors import SophiaGaloreError, lacks_memory, lacks_package, say_out_of_memory, short
from sophia_galore.model.disk import errno_of

# Typer's exit code for Ctrl-C.
_INTERRUPTED = 130

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# What is at a path, or may be done there, is not what is needed.
_PATH = (
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG),
)

app = typer.Typer(
    name="sophia-galore",
    help="Full-parameter fine-tuning of language models on small cards. --debug shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_command: Callable[..., object]
_COMMANDS = (init, train, check, plan, doctor, prepare_data, download, compare, report, generate, chat, export)
for _command in _COMMANDS:
    app.command()(_command)
app.command("push")(push_model)


def _version(asked: bool) -> None:
    if asked:
        print(f"sophia-galore {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True)) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with displays() as out:
            code = _carry_out(arguments)
            if isinstance(out.failure, OSError):
                _complain(f"The output could not be written: {out.failure.strerror}.", "Free some space.")
                # A run's result does not depend on its printed output.
                code = code or (0 if arguments[:1] in (["train"], ["compare"]) else 2)
        return code
    except Exception as error:
        # Explaining an error takes memory too.
        if "--debug" in arguments or not lacks_memory(error):
            raise
        return say_out_of_memory()


def _carry_out(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = _resume_as_value([word for word in arguments if word != "--debug"])
    try:
        returned = typer.main.get_command(app).main(arguments, prog_name="sophia-galore", standalone_mode=False)
        code = returned if isinstance(returned, int) else 0
    except ReaderGone:
        return 0  # who closes a pipe has read enough
    except Exception as error:
        if debug and not isinstance(error, typer.TyperException):
            raise
        return _explain(error)
    if code == _INTERRUPTED:
        _complain("Stopped.", "")
    return code


def entry() -> None:
    """The installed command."""
    open_standard_streams()
    sys.exit(main())


def _resume_as_value(arguments: list[str]) -> list[str]:
    """`--resume` takes a path or nothing; the parser wants a value, so nothing becomes "latest"."""
    out: list[str] = []
    for index, word in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        key, equals, _ = following.partition("=")
        override = bool(equals) and not set(key) & set("/\\")  # a path may hold "=" too
        bare = word == "--resume" and (not following or following.startswith("-") or override)
        out.append("--resume=latest" if bare else word)
    return out


def _explain(error: Exception) -> int:
    if isinstance(error, ModuleNotFoundError):
        error = lacks_package(error) or error
    if isinstance(error, SophiaGaloreError):
        if error.cause:  # else another process of the run says it
            _complain(error.cause, error.remedy)
        return error.exit_code
    if isinstance(error, typer.TyperException):
        if not is_first_on_machine():
            return 2  # all processes of a machine are given the same words
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _complain(message, "sophia-galore COMMAND --help shows what a command takes.")
        return 2
    if errno_of(error) in _DISK:
        _complain(f"The disk is full or can't be written to: {short(error)}.", "Free some space, or take another disk.")
        return 2
    if isinstance(error, OSError) and error.errno in _PATH and error.filename:
        path = error.filename2 or error.filename
        _complain(f"{path} can't be used: {error.strerror}.", "Look what is there, and who may read and write it.")
        return 2
    if lacks_memory(error):
        _complain(
            f"Out of memory: {short(error)}",
            "Lower training.batch_size or training.max_length, or use model.store=bf16 or optimizer.state_bits=8.",
        )
        return 1
    _complain(f"{type(error).__name__}: {error}", "This should not happen. --debug shows where it did.")
    return 1


def _complain(cause: str, remedy: str) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("Error:", style="bold red", end=" ")
    console.print(cause, markup=False)
    if remedy:
        console.print(remedy, markup=False)
