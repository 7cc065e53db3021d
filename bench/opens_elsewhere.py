"""Do exported folders open in another transformers, with the same logits and tokens?

    python bench/opens_elsewhere.py --venv /tmp/transformers-4.57      makes that environment first (about 2 GB)
    python bench/opens_elsewhere.py --python /tmp/transformers-4.57/bin/python

Both transformers write a tiny model of each kind, with random weights and settings that are no defaults. Each folder
is exported (`convert_model`, float32), and both read source and export. The table says how far the logits of the
export are from what the transformers that wrote the source reads in it; and whether tokens, chat text and stop tokens
are the same. The last column is what the other transformers makes of the source itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OTHER = "transformers==4.57.6"
_CHILD = Path(__file__).with_name("opens_child.py")


@dataclass(frozen=True)
class Row:
    """One exported folder in one transformers.

    Args:
        kind: The model.
        written_by: Version of transformers that wrote the source.
        read_by: Version that read the export.
        error: Why it could not; "": it could.
        difference: Largest difference of a logit from the source's.
        same: Whether everything else is the same.
        without: Largest difference of a logit if the source itself is read by this version; or why it can't be.
    """

    kind: str
    written_by: str
    read_by: str
    error: str
    difference: float
    same: bool
    without: float | str


def compare(ours: str, other: str, folder: Path) -> list[Row]:
    """Write, export and read everything.

    Args:
        ours: Interpreter with the pinned transformers and this package.
        other: Interpreter with another one.
        folder: An empty folder.
    """
    import torch

    from sophia_galore.model.export import convert_model

    makers = {"ours": ours, "other": other}
    sources: list[Path] = []
    for maker, python in makers.items():
        _run(python, "make", str(folder / maker))
        sources += sorted((folder / maker).iterdir())
    exports: dict[Path, Path] = {}
    for source in sources:
        exports[source] = folder / f"{source.parent.name}-exported" / source.name
        exports[source].mkdir(parents=True)
        convert_model(source, exports[source], torch.float32)
    folders = [str(path) for path in (*sources, *exports.values())]
    read = {maker: _read(python, folders) for maker, python in makers.items()}
    versions = {
        maker: next(entry["transformers"] for entry in read[maker].values() if "error" not in entry) for maker in makers
    }
    rows = []
    for source in sources:
        expected = read[source.parent.name][str(source)]
        for maker in makers:
            found, raw = read[maker][str(exports[source])], read[maker][str(source)]
            rows.append(
                Row(
                    source.name,
                    versions[source.parent.name],
                    versions[maker],
                    found.get("error", ""),
                    _difference(found, expected),
                    all(found.get(key) == expected[key] for key in ("tokens", "chat", "stops", "tied")),
                    raw.get("error") or _difference(raw, expected),
                )
            )
    return rows


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    pairs = zip(found.get("logits", [float("nan")]), expected["logits"], strict=False)
    return max(abs(one - two) for one, two in pairs)


def _run(python: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, str(_CHILD), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def _read(python: str, folders: list[str]) -> dict[str, dict[str, Any]]:
    entries = [json.loads(line) for line in _run(python, "read", *folders).splitlines()]
    return {entry["folder"]: entry for entry in entries}


def _make_environment(folder: Path) -> str:
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", OTHER, "torch", "tokenizers", "numpy"], check=True)
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--python", help="an interpreter with another transformers")
    choice.add_argument("--venv", type=Path, help=f"folder in which an environment with {OTHER} is made")
    arguments = parser.parse_args()
    other = arguments.python or _make_environment(arguments.venv)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(sys.executable, other, Path(folder))
    print("| model | written by | read by | largest difference of a logit | rest | source itself |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        without = f"{row.without:.1e}" if isinstance(row.without, float) else row.without[:60]
        found = row.error or f"{row.difference:.1e} | {'same' if row.same else 'DIFFERENT'}"
        print(f"| {row.kind} | {row.written_by} | {row.read_by} | {found} | {without} |")


if __name__ == "__main__":
    main()
