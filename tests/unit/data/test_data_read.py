from __future__ import annotations

import csv
import json
import socket
import sys
import time
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.data import hub
from sophia_galore.data.read import read_records
from sophia_galore.errors import DataError

ROWS = [{"text": "eins"}, {"text": 'zwei, \u2028 "drei"\nvier'}, {"text": "ü🙂"}]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("x.json", [", record 1", ", record 2", ", record 3"]),
        ("x.jsonl", [":1", ":2", ":3"]),
        ("x.csv", [":2", ":3", ":5"]),  # the second value spans two lines
        ("x.parquet", [", record 1", ", record 2", ", record 3"]),
    ],
)
def test_every_kind_of_file_gives_the_same_fields_and_its_own_places(
    tmp_path: Path, name: str, places: list[str]
) -> None:
    write(tmp_path / name, ROWS)
    records = read_records(str(tmp_path / name))
    assert [record.fields for record in records] == ROWS
    assert [record.where for record in records] == [f"{tmp_path / name}{place}" for place in places]


def test_blank_lines_bom_and_crlf_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [(r.fields["text"], r.where) for r in read_records(str(path))] == [("a", f"{path}:1"), ("b", f"{path}:3")]


def test_json_object_with_a_list_under_data(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"version": 1, "data": [{"text": "a"}]}')
    assert read_records(str(path))[0].fields == {"text": "a"}


def test_csv_takes_long_values_and_leaves_the_global_limit_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    write(tmp_path / "x.csv", [{"text": "y" * (before + 1)}])
    assert len(read_records(str(tmp_path / "x.csv"))[0].fields["text"]) == before + 1
    assert csv.field_size_limit() == before


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.json", ROWS[1:2])
    write(tmp_path / "a.jsonl", ROWS[:1])
    write(tmp_path / "c.parquet", ROWS[2:])
    (tmp_path / "README.md").write_text("about")
    assert [record.fields for record in read_records(str(tmp_path))] == ROWS


@given(
    st.lists(
        st.dictionaries(st.text(min_size=1), st.text() | st.integers() | st.none() | st.lists(st.booleans())),
        min_size=1,
        max_size=5,
    )
)
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert [record.fields for record in read_records(str(path))] == rows


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", b"", ["x.json", "empty"]),
        ("x.json", b"[]", ["x.json", "empty"]),
        ("x.json", b" \n", ["x.json", "empty"]),
        ("x.jsonl", b"\n\n", ["x.jsonl", "empty"]),
        ("x.csv", b"text\n", ["x.csv", "empty"]),
        ("x.json", b'[{"a": 1},\n {"a" 2}]', ["x.json:2", "column 7"]),
        ("x.json", b'{"a": 1} {"a": 2}', ["x.json:1", "column 10"]),
        ("x.json", b'"text"', ["x.json", "a string"]),
        ("x.json", b'[{"a": 1}, 7]', ["x.json, record 2", "a number"]),
        ("x.json", b"[" * 100_000, ["x.json", "nested too deeply"]),
        ("x.jsonl", b'{"a": 1}\n{"a": \n', ["x.jsonl:2", "column 7"]),
        ("x.jsonl", b'{"a": 1}\n[1]\n', ["x.jsonl:2", "a list"]),
        ("x.jsonl", b'{"a": 1}\nnull\n', ["x.jsonl:2", "null"]),
        ("x.jsonl", '{"a": "ä"}\n{"b": "ä"}'.encode("latin-1"), ["x.jsonl:1", "UTF-8", "0xe4", "byte 8"]),
        ("x.csv", b"a,b\n1,2\n3\n", ["x.csv:3", "1 values", "2 columns"]),
        ("x.csv", b"a,b\n1,2\n3,4,5\n", ["x.csv:3", "3 values"]),
        ("x.csv", b'a,b\n1,"2\n', ["x.csv", "broken CSV"]),
        ("x.csv", b"a,a\n1,2\n", ["x.csv:1", "'a'", "twice"]),
        ("x.parquet", b"PAR0 no", ["x.parquet", "Parquet"]),
        ("x.txt", b"hello", ["x.txt", "'.txt'", ".jsonl"]),
        ("x", b"hello", ["x", "extension"]),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, says: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_records(str(path))
    assert str(tmp_path) in error.value.cause
    assert error.value.remedy
    for part in says:
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["no/such.json", "no/such/folder/x.jsonl", "plain", "data/x.parquet", "/no/such"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.socket, "create_connection", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(DataError, match="does not exist"):
        read_records(name)


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no data file"):
        read_records(str(tmp_path))


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def test_an_unreachable_hub_is_noticed_in_seconds(monkeypatch: pytest.MonkeyPatch, no_proxy: None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(DataError) as error:
        read_records("owner/name")
    assert time.monotonic() - started < 5
    assert f"http://127.0.0.1:{port}" in error.value.cause
    assert "HF_HUB_OFFLINE" in error.value.remedy


def test_a_name_server_that_never_answers_does_not_hang(monkeypatch: pytest.MonkeyPatch, no_proxy: None) -> None:
    monkeypatch.setattr(hub, "REACH_TIMEOUT_S", 0.05)
    monkeypatch.setattr(hub.socket, "create_connection", lambda *a, **k: time.sleep(2) or socket.socket())
    started = time.monotonic()
    with pytest.raises(DataError, match="can't be reached"):
        read_records("owner/name")
    assert time.monotonic() - started < 1


def test_the_proxy_is_what_has_to_be_reached(monkeypatch: pytest.MonkeyPatch, no_proxy: None) -> None:
    asked = []
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy.example:3128"})
    monkeypatch.setattr(hub.urllib.request, "proxy_bypass", lambda host: False)

    def connect(address: tuple[str, int], timeout: float) -> None:
        asked.append(address)
        raise OSError

    monkeypatch.setattr(hub.socket, "create_connection", connect)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    with pytest.raises(DataError, match="can't be reached"):
        read_records("owner/name")
    assert asked == [("proxy.example", 3128)]


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub.socket, "create_connection", lambda *a, **k: pytest.fail("asked the network"))


@pytest.mark.parametrize(("name", "split"), [("owner/name", "train"), ("owner/name:test[:10%]", "test[:10%]")])
def test_offline_uses_the_cache_without_asking_the_network(
    monkeypatch: pytest.MonkeyPatch, name: str, split: str
) -> None:
    fake_datasets(monkeypatch, lambda repo, split: [{"text": f"{repo} {split}"}])
    assert [(r.fields, r.where) for r in read_records(name)] == [({"text": f"owner/name {split}"}, f"{name}, record 1")]


def test_what_the_hub_client_raises_becomes_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(repo: str, split: str) -> None:
        raise KeyError("no such split\nand a long story")

    fake_datasets(monkeypatch, load)
    with pytest.raises(DataError, match=r"owner/name.*'test'.*no such split"):
        read_records("owner/name:test")
