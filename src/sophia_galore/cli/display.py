"""Standard output and error, which may end before the program does: a closed pipe, a terminal that is gone.

Whoever reads them is not needed for the work. So a command goes on without, and its output goes nowhere; only a
command whose output *is* the work, an answer that is written out token by token, ends with its reader.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# Nobody will ever read what is written there.
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESHUTDOWN, errno.ECONNRESET, errno.EINVAL}


class ReaderGone(Exception):
    """Nobody reads standard output any more, and the command is of no use without a reader."""


class Display:
    """A text stream that does not fail where nobody listens any more.

    Args:
        stream: What is written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.needs_reader = False
        self.failure: OSError | None = None
        self._is_gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, if there is still somebody to read it."""
        with self._surviving():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand over what was written."""
        with self._surviving():
            self._stream.flush()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # closed by somebody
            self._is_gone = True
        except OSError as error:
            if error.errno in _GONE:
                self._is_gone = True
                self.silence()
            elif self.needs_reader:
                raise
            else:
                self.failure = error  # such as a full disk; there may be room for the next line
        if self._is_gone and self.needs_reader:
            raise ReaderGone

    def silence(self) -> None:
        """From now on everything goes nowhere, also what lies in buffers, and what other code writes there."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def displays() -> Iterator[Display]:
    """Inside the context standard output and error are displays; gives the first of them."""
    before = sys.stdout, sys.stderr
    out, err = (Display(stream) for stream in before)
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that can't show a character shows "?", instead of ending the run.
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        for display in (out, err):
            display.needs_reader = False
            display.flush()
            if display.failure is not None:
                display.silence()  # else Python complains about what is left in a buffer when it ends


def need_reader() -> None:
    """Say that this command ends when nobody reads its output any more."""
    if isinstance(sys.stdout, Display):
        sys.stdout.needs_reader = True


def open_standard_streams() -> None:
    """Make sure that the numbers 0, 1 and 2 are taken: else the next file would get one, and what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open to the end of the process
