"""The house: imports go one way, folders have one level, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sophia_galore

SOURCE = Path(sophia_galore.__file__).parent
# Rooms in the order of the river; a room may import from those in earlier groups, and from itself.
ORDER: list[set[str]] = [
    {"errors"},
    {"records"},
    {"numerics"},
    {"weights"},
    {"streaming"},
    {"optim"},
    {"config"},
    {"model", "data"},
    {"engine"},
    {"distributed"},
    {"plan"},
    {"memory"},
    {"train"},
    {"experiment"},
    {"doctor"},
    {"cli"},
]
ALLOWED = {room: set().union(*ORDER[:place]) | {room} for place, group in enumerate(ORDER) for room in group} | {
    "report": {"errors", "records", "report"}
}
ALLOWED["experiment"] |= {"report"}
ALLOWED["cli"] |= {"report"}
FILES = sorted(SOURCE.rglob("*.py"))
# A limit on giants; what makes a file whole is one idea, not a number of lines.
MAX_LINES = 500
# What numerics may use of the standard library: nothing that knows files, processes or time.
STANDARD = {"__future__", "collections", "contextlib", "contextvars", "dataclasses", "hashlib", "math", "typing"}


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
    return found


def imported_files(path: Path) -> set[str]:
    """Modules that are imported, and what is taken from them, which may be modules too."""
    found = imported_modules(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "sophia_galore" and len(parts) > 1:
            assert parts[1] in ALLOWED[room], f"{room} must not import {parts[1]}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Within functions and for types alone counts as well."""
    modules = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    try:
        TopologicalSorter({name: imported_files(path) & modules.keys() for name, path in modules.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_numerics_knows_tensors_only() -> None:
    for path in (SOURCE / "numerics").glob("*.py"):
        outside = {name.split(".")[0] for name in imported_modules(path)}
        assert outside <= {"torch", "sophia_galore"} | STANDARD
        assert not any(name.startswith("torch.nn") for name in imported_modules(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_small_and_one_folder_deep(path: Path) -> None:
    assert len(path.relative_to(SOURCE).parts) <= 2
    assert path.stem not in {"utils", "common", "misc", "helpers"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_every_room_is_in_the_order() -> None:
    rooms = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms == set(ALLOWED)


def test_a_configuration_is_read_without_torch() -> None:
    """The command line answers at once because of that."""
    code = "import sys, sophia_galore.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) != "weights"], ids=str)
def test_nobody_outside_of_the_room_asks_what_kind_a_weight_is(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            assert not asked & {"Weight", "PlainWeight", "Int8Weight", "DeferredWeight", "RowInt8Weight", "Frozen8bit"}
