from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.data import stdlib_docs, stdlib_walk
from sophia_galore.data.formats import detect_format, to_conversation
from sophia_galore.data.read import read_records
from sophia_galore.data.stdlib_docs import choose, prepare_sample_data, sample_examples, shortened
from sophia_galore.errors import DataError, EnvironmentProblem


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> stdlib_docs.SampleDataReport:
    return prepare_sample_data(tmp_path_factory.mktemp("sample") / "new folder" / "sample.json")


@pytest.fixture(scope="module")
def rows(sample: stdlib_docs.SampleDataReport) -> list[dict[str, str]]:
    content: list[dict[str, str]] = json.loads(sample.path.read_text(encoding="utf-8"))
    return content


def test_the_report_tells_what_is_there(sample: stdlib_docs.SampleDataReport, rows: list[dict[str, str]]) -> None:
    content = sample.path.read_bytes()
    assert sample.num_examples == len(rows) <= sample.num_found
    assert 1000 <= sample.num_examples <= stdlib_docs.MAX_EXAMPLES
    assert sample.num_bytes == len(content)
    assert sample.fingerprint == hashlib.sha256(content).hexdigest()
    assert sample.python_version == platform.python_version()
    assert [path.name for path in sample.path.parent.iterdir()] == ["sample.json"]  # no temporary file stays


def test_it_is_alpaca_data_that_converts(sample: stdlib_docs.SampleDataReport) -> None:
    records = read_records(str(sample.path))
    assert detect_format(records) == "alpaca"
    assert all(to_conversation(record, "alpaca").messages for record in records)


def test_it_is_real_text_once_each(rows: list[dict[str, str]]) -> None:
    assert len({row["instruction"] for row in rows}) == len(rows)
    bodies = [row["output"].split("\n\n", 1)[1] for row in rows]
    assert len(set(bodies)) == len(bodies)
    assert all(stdlib_docs.MIN_CHARS <= len(body) <= stdlib_docs.MAX_CHARS for body in bodies)
    modules = {row["output"].split("(")[0].split(".")[0] for row in rows}
    assert {"os", "json", "math", "collections", "str"} <= modules
    assert modules.isdisjoint(stdlib_walk.EXCLUDED.split())


def test_nothing_in_it_belongs_to_this_machine(rows: list[dict[str, str]]) -> None:
    calls = [row["output"].split("\n\n", 1)[0] for row in rows]
    for secret in (sys.prefix, sys.base_prefix, os.getcwd(), str(Path.home())):
        assert not [call for call in calls if len(secret) > 1 and secret in call]
    assert not [row for row in rows if stdlib_walk.ADDRESS.search(row["output"])]


def test_another_process_writes_the_same_bytes(sample: stdlib_docs.SampleDataReport, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import sophia_galore.data.stdlib_docs as docs;"
        "print(docs.prepare_sample_data(Path(sys.argv[1])).fingerprint)"
    )
    source = str(Path(stdlib_docs.__file__).parents[2])
    for hash_seed in ("1", "4242"):
        path = tmp_path / f"{hash_seed}.json"
        done = subprocess.run(
            [sys.executable, "-OO", "-c", script, str(path)],
            env={**os.environ, "PYTHONPATH": source, "PYTHONHASHSEED": hash_seed, "HOME": str(tmp_path), "USER": "x"},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == sample.fingerprint
        assert path.read_bytes() == sample.path.read_bytes()


def test_an_existing_file_is_replaced_and_a_failure_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ("m.f", "function", "m.f(x)", "Return x, and nothing else, for whoever asks for x.")
    monkeypatch.setattr(stdlib_docs, "_walk", lambda: [entry])
    path = tmp_path / "sample.json"
    path.write_text("old")
    with pytest.raises(DataError, match="holds other records"):
        prepare_sample_data(path)
    assert path.read_text() == "old"
    path.unlink()
    assert prepare_sample_data(path).num_examples == 1
    written = path.read_bytes()
    assert prepare_sample_data(path).num_examples == 1 and path.read_bytes() == written
    assert json.loads(written)[0]["output"] == "m.f(x)\n\nReturn x, and nothing else, for whoever asks for x."

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stdlib_docs.os, "replace", full)
    with pytest.raises(EnvironmentProblem, match="No space left") as error:
        prepare_sample_data(path)
    assert str(path) in error.value.cause
    assert [p.name for p in tmp_path.iterdir()] == ["sample.json"] and path.read_bytes() == written


def test_a_folder_that_can_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ("m.f", "function", "m.f(x)", "Return x, and nothing else, for whoever asks for x.")
    monkeypatch.setattr(stdlib_docs, "_walk", lambda: [entry])
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="can't be written"):
        prepare_sample_data(tmp_path / "file" / "sample.json")


def test_a_python_without_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_docs, "_walk", list)
    with pytest.raises(EnvironmentProblem, match="without documentation"):
        prepare_sample_data(tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_an_interpreter_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(stdlib_docs.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(EnvironmentProblem, match="can't be read"):
        prepare_sample_data(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("short", None),
        ("a" * 40, "a" * 40),
        ("a" * 1201, None),
        ("a" * 50 + "\n\n" + "b" * 2000, "a" * 50),
        ("a" * 50 + "\n\n" + "b" * 1149, "a" * 50),
        ("a" * 50 + "\n\n" + "b" * 1148, "a" * 50 + "\n\n" + "b" * 1148),
    ],
)
def test_documentation_is_cut_at_the_end_of_a_paragraph(doc: str, expected: str | None) -> None:
    assert shortened(doc) == expected


def test_repeated_documentation_counts_once_and_a_leading_call_is_not_doubled() -> None:
    doc = "Join paths, in the way that this platform wants them joined."
    found = sample_examples(
        [
            ("os.path.join", "function", "os.path.join(a, *p)", f"join(a, *p)\n\n{doc}"),
            ("x.f", "function", "x.f()", doc),
        ]
    )
    assert [row["output"] for row in found] == [f"os.path.join(a, *p)\n\n{doc}"]
    assert "`os.path.join`" in found[0]["instruction"]


def test_choosing_keeps_the_order_and_depends_on_the_examples_alone() -> None:
    examples = [{"instruction": f"q{i}"} for i in range(100)]
    chosen = choose(examples, 10)
    assert len(chosen) == 10 and chosen == sorted(chosen, key=examples.index)
    assert {row["instruction"] for row in choose(examples[::-1], 10)} == {row["instruction"] for row in chosen}
    assert choose(examples, 200) == examples


class Thing:
    def method(self, x: int = 3, *, key: str = "k") -> int: ...

    def everything(*args: Any) -> None: ...

    def bare() -> None: ...  # type: ignore[misc]


@pytest.mark.parametrize(
    ("function", "bound", "expected"),
    [
        (Thing.method, True, "n(x=3, *, key='k')"),
        (Thing.method, False, "n(self, x=3, *, key='k')"),
        (Thing.everything, True, "n(*args)"),
        (Thing.bare, True, None),
        (str.split, True, "n(sep=None, maxsplit=-1)"),
        (len, False, "n(obj, /)"),
        (lambda path="/home/someone": path, False, None),
        (lambda path="C:\\Users": path, False, None),
        (lambda sentinel=object(): sentinel, False, None),  # noqa: B008
        (lambda chosen=frozenset("ab"): chosen, False, None),
        (lambda call=functools.partial(print): call, False, None),  # noqa: B008
        (lambda kind=dict, pair=(1, None), mode=inspect.Parameter.VAR_KEYWORD: 0, False, "n(kind=<class 'dict'>, "),
    ],
)
def test_calls_never_depend_on_the_machine(function: Any, bound: bool, expected: str | None) -> None:
    call = stdlib_walk.call_of("n", function, bound=bound)
    assert call == expected or (call is not None and expected is not None and call.startswith(expected))


def test_documentation_with_an_address_is_left_out() -> None:
    def shown() -> None:
        """Such as <object at 0x7f00>."""

    assert stdlib_walk.documentation_of(shown) is None
    assert stdlib_walk.documentation_of(Thing) is None
    assert stdlib_walk.documentation_of(type("Sub", (dict,), {})) is None  # what it inherits is not its own


def test_the_walk_skips_what_has_side_effects() -> None:
    names = stdlib_walk.module_names()
    assert not {"antigravity", "this", "idlelib", "turtle", "tkinter", "test"} & set(names)
    assert not [name for name in names if name.startswith("_")]
