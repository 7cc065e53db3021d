"""One command on a machine with a GPU: does it hold there what holds on a CPU, and how fast is it?

    python bench/gpu.py --output gpu.json          # 8 minutes at most on a data-centre GPU
    python bench/gpu.py --output tiny.json --tiny  # the same in small, also on a CPU: does the script run?

Needs no network: models have random weights and the shapes of known ones, the text is the source of Python's standard
library. Each section runs in a process of its own and is written when it is done; what fails says why, and the others
go on. `--table` prints what a file holds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpu_sections import SECTIONS
from gpu_work import Work
from measured import provenance, reason

GIB = 2**30


def machine(device: str) -> dict[str, Any]:
    """Return date, commit, versions and device."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    found = provenance() | {"python": platform.python_version(), "versions": versions, "device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def run_section(name: str, work: Work, timeout_s: float) -> dict[str, Any]:
    """Run a section in a process of its own.

    Args:
        name: A key of `SECTIONS`.
        work: What it works on.
        timeout_s: Seconds after which it is ended.

    Returns:
        Its figures and seconds; or why there are none: {"failed": ...}.
    """
    result = work.folder / "result.json"
    result.unlink(missing_ok=True)
    words = ["--section", name, "--folder", str(work.folder), "--device", work.device, "--output", str(result)]
    begun = time.monotonic()
    try:
        command = [sys.executable, __file__, *words, *(["--tiny"] if work.tiny else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
        said = done.stderr[-3000:]
        if result.exists():
            figures: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        else:
            figures = {"failed": f"exit code {done.returncode}", "said": said}
    except subprocess.TimeoutExpired:
        figures = {"failed": f"not done after {timeout_s:.0f} s"}
    return {**figures, "seconds": round(time.monotonic() - begun, 1)}


def child(name: str, work: Work, output: Path) -> None:
    """Carry out a section here; an error becomes a result."""
    try:
        figures = SECTIONS[name](work)
    except Exception as error:
        figures = {"failed": reason(error), "said": traceback.format_exc()[-3000:]}
    output.write_text(json.dumps(figures), encoding="utf-8")


def table(found: Mapping[str, Any]) -> str:
    """Return the sections of a file as lines of Markdown."""
    lines = [
        f"{found.get('gpu', found['machine'])}, torch {found['torch']}, commit {found['commit'][:7]}, {found['date']}",
        "",
        "| section | tokens/s | peak reserved GiB | plan GiB | waiting | what it says | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in found["sections"].items():
        reserved = figures.get("torch_peak_reserved_bytes") or figures.get("peak_allocated_bytes")
        plan, waited = figures.get("predicted_peak_bytes"), figures.get("waiting_share")
        cells = (
            name,
            f"{figures['tokens_per_second']:.0f}" if "tokens_per_second" in figures else "",
            f"{reserved / GIB:.3f}" if reserved else "",
            f"{plan / GIB:.3f}" if plan else "",
            f"{waited:.1%}" if waited is not None else "",
            _words(name, figures),
            str(figures["seconds"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(name: str, figures: Mapping[str, Any]) -> str:
    if "failed" in figures:
        return f"FAILED: {figures['failed']}"
    if name == "doctor":
        return f"exit code {figures['exit_code']}"
    if name == "bits":
        return f"same again: {figures['same again']}, after resuming: {figures['same after resuming']}"
    if name == "optimizer step":
        return "; ".join(f"{side} {found['ms']:.2f} ms" for side, found in figures.items() if isinstance(found, dict))
    if name == "profile":
        first = figures["top"][0]
        return f"{figures['launches']} launches; most: {first['name'][:40]} {first['ms']:.1f} ms"
    return f"loss {figures['losses'][0]:.3f} to {figures['losses'][-1]:.3f}"


def main() -> None:
    """Run all sections, or one, or print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a JSON file, written after each section")
    parser.add_argument("--table", action="store_true", help="print what the file holds, and run nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and few steps, for any machine")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=8, help="what is not begun by then is left out")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.table:
        print(table(json.loads(asked.output.read_text(encoding="utf-8"))))
        return
    if asked.section:
        child(asked.section, Work(asked.folder, asked.device, asked.tiny), asked.output)
        return
    if asked.device == "cpu" and not asked.tiny:
        parser.error("there is no GPU here: add --tiny to see whether the script runs")
    end = time.monotonic() + 60 * asked.minutes
    found = machine(asked.device) | {"command": " ".join(sys.argv), "tiny": asked.tiny, "sections": {}}
    with tempfile.TemporaryDirectory() as temporary:
        work = Work(Path(temporary), asked.device, asked.tiny)
        for name in asked.sections:
            left_s = end - time.monotonic()
            if left_s < 5:
                figures: dict[str, Any] = {"failed": "no time was left", "seconds": 0}
            else:
                figures = run_section(name, work, left_s)
            found["sections"][name] = figures
            asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            print(f"{name}: {_words(name, figures)} ({figures['seconds']} s)", flush=True)
    print(table(found))
    if any("failed" in figures for figures in found["sections"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
