"""Make a corpus of plain text: the source of Python's standard library, with its documentation, file by file."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from sophia_galore.data.stdlib_docs import write_whole
from sophia_galore.errors import DataError, EnvironmentProblem

_FIRST_WORDS = "# The standard library of Python "
# Packages of others, tests, and copies of what stands elsewhere.
_LEFT_OUT = {
    *("site-packages", "dist-packages", "__pycache__", "pydoc_data", "ensurepip"),
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"),
}


@dataclass(frozen=True)
class CorpusReport:
    """The file that `prepare_corpus` wrote.

    Attributes:
        path: The file.
        num_files: Source files in it.
        num_bytes: Its size.
        fingerprint: SHA-256 of the file, 64 hex digits.
        python_version: The Python whose library it is, such as "3.11.7".
    """

    path: Path
    num_files: int
    num_bytes: int
    fingerprint: str
    python_version: str


def prepare_corpus(path: Path) -> CorpusReport:
    """Write the standard library's source as one text.

    The same Python gives the same bytes. An earlier corpus is replaced atomically.

    Args:
        path: The text file to write; its folder is created if necessary.

    Returns:
        What was written.

    Raises:
        EnvironmentProblem: The file can't be written, or this Python has no source of its library.
        DataError: The file exists and holds another text.
    """
    _refuse_others_text(path)
    library = Path(sysconfig.get_paths()["stdlib"])
    version = platform.python_version()
    parts = [f"{_FIRST_WORDS}{version}, file by file.\n"]
    for file in sorted(library.rglob("*.py"), key=lambda file: file.relative_to(library).as_posix()):
        name = file.relative_to(library)
        if not _LEFT_OUT.intersection(name.parts):
            parts.append(f"\n# {name.as_posix()}\n{_text(file)}")
    if len(parts) == 1:
        raise EnvironmentProblem(
            f"The Python in {library} comes without the source of its library, so no corpus can be made from it.",
            "Use an ordinary build of Python, or give your own text as `data.train`.",
        )
    content = "".join(parts).encode("utf-8")
    write_whole(path, content)
    return CorpusReport(path, len(parts) - 1, len(content), hashlib.sha256(content).hexdigest(), version)


def _text(file: Path) -> str:
    """Return a source file's text; the few that are not UTF-8 say so themselves and are left out."""
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _refuse_others_text(path: Path) -> None:
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        if file.read(len(_FIRST_WORDS)) == _FIRST_WORDS.encode():
            return
    raise DataError(
        f"{path} exists and holds another text, so it is not replaced.",
        "Train on it as it is, or write the corpus to another file: --output FILE.",
    )
