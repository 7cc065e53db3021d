"""Make sample data: instruction examples from the documentation of Python's standard library.

The documentation is part of the Python that runs this, so nothing has to be downloaded or shipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sophia_galore.data import stdlib_walk
from sophia_galore.errors import DataError, EnvironmentProblem

MIN_CHARS = 40
MAX_CHARS = 1200
MAX_EXAMPLES = 2000
WALK_TIMEOUT_S = 300
QUESTIONS = (
    "What does `{name}` do, and how is it called?",
    "How do I use the {kind} `{name}` in Python?",
    "Explain the Python {kind} `{name}` and show its signature.",
    "Give the signature of `{name}` and describe what it does.",
    "In Python, what is `{name}` for, and which arguments does it take?",
)


@dataclass(frozen=True)
class SampleDataReport:
    """The file that `prepare_sample_data` wrote.

    Attributes:
        path: The file.
        num_examples: Examples in it.
        num_found: Number of documented calls found, of which `num_examples` were chosen.
        num_bytes: Size of the file.
        fingerprint: SHA-256 of the file, 64 hex digits.
        python_version: The Python whose documentation it is, such as "3.11.7".
    """

    path: Path
    num_examples: int
    num_found: int
    num_bytes: int
    fingerprint: str
    python_version: str


def prepare_sample_data(path: Path) -> SampleDataReport:
    """Write alpaca examples made from the documentation of this Python's standard library.

    The same Python gives the same bytes. An earlier sample file is replaced atomically.

    Args:
        path: The JSON file to write; its folder is created if necessary.

    Returns:
        What was written.

    Raises:
        EnvironmentProblem: The file can't be written, or this Python has no documentation.
        DataError: The file exists and holds other records.
    """
    _refuse_others_records(path)
    examples = sample_examples(_walk())
    if not examples:
        raise EnvironmentProblem(
            f"The Python at {sys.executable} comes without documentation, so no sample data can be made from it.",
            "Use an ordinary build of Python, or give your own file as `data.train`.",
        )
    chosen = choose(examples, MAX_EXAMPLES)
    content = (json.dumps(chosen, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
    write_whole(path, content)
    return SampleDataReport(
        path=path,
        num_examples=len(chosen),
        num_found=len(examples),
        num_bytes=len(content),
        fingerprint=hashlib.sha256(content).hexdigest(),
        python_version=platform.python_version(),
    )


def sample_examples(entries: Iterable[stdlib_walk.Entry]) -> list[dict[str, str]]:
    """Turn documentation into questions and answers.

    Args:
        entries: Name, kind, call and documentation, sorted by name.

    Returns:
        Alpaca records in the same order, without duplicate questions or documentation.
    """
    examples, seen = [], set()
    for name, kind, call, doc in entries:
        # Documentation from C often begins with the call itself.
        short_call = call[len(name.rpartition(".")[0]) :].lstrip(".")
        body = shortened(doc.removeprefix(f"{short_call}\n\n"))
        if body is None or body in seen:
            continue
        seen.add(body)
        question = QUESTIONS[_hash_number(name) % len(QUESTIONS)].format(name=name, kind=kind)
        examples.append({"instruction": question, "input": "", "output": f"{call}\n\n{body}"})
    return examples


def shortened(doc: str) -> str | None:
    """Cut documentation at the end of a paragraph.

    Args:
        doc: The documentation.

    Returns:
        As many whole paragraphs as fit into 1200 characters; None if that leaves under 40.
    """
    body = ""
    for paragraph in doc.split("\n\n"):
        longer = f"{body}\n\n{paragraph}" if body else paragraph
        if len(longer) > MAX_CHARS:
            break
        body = longer
    body = body.rstrip()
    return body if len(body) >= MIN_CHARS else None


def choose(examples: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """Choose examples evenly over the library.

    Args:
        examples: All examples.
        most: The number to keep.

    Returns:
        Those with the smallest digest of their question, in their old order.
    """
    smallest = sorted(examples, key=lambda example: _hash_number(example["instruction"]))[:most]
    kept = {example["instruction"] for example in smallest}
    return [example for example in examples if example["instruction"] in kept]


def _hash_number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _walk() -> list[stdlib_walk.Entry]:
    # -I and -S: no environment variables, no installed packages, no optimisation that drops docstrings.
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(Path(stdlib_walk.__file__).resolve())]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=WALK_TIMEOUT_S
        )
        return [(name, kind, call, doc) for name, kind, call, doc in json.loads(done.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise EnvironmentProblem(
            f"The documentation of Python's standard library can't be read by {sys.executable}: {error}.",
            "Give your own file as `data.train`.",
        ) from error


def _refuse_others_records(path: Path) -> None:
    """Refuse to overwrite a file with other records than sample data."""
    if not path.is_file() or not path.stat().st_size:
        return
    shapes = [re.escape(question).replace(r"\{name\}", ".+").replace(r"\{kind\}", ".+") for question in QUESTIONS]
    ours = re.compile("|".join(shapes))
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        questions = [record["instruction"] for record in records]
        if all(record.keys() == {"instruction", "input", "output"} for record in records) and all(
            ours.fullmatch(question) for question in questions
        ):
            return
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise DataError(
        f"{path} exists and holds other records than these examples, so it is not replaced.",
        "Train on it as it is, or write the examples to another file: --output FILE.",
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is created if necessary.

    Args:
        path: The file.
        content: What it shall hold.

    Raises:
        EnvironmentProblem: It can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise EnvironmentProblem(
            f"The sample data can't be written to {path}: {error.strerror or error}.",
            "Choose a folder that may be written to, on a disk that has room.",
        ) from error
