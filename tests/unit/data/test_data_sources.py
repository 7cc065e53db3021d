"""Files, folders, lists of data sets: what is read, how it is understood, and how much of each is taken."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from sophia_galore.cli.show import file_lines
from sophia_galore.config import dump_config, load_config
from sophia_galore.config.schema_data import DataConfig
from sophia_galore.data.dataset import Dataset, load_data
from sophia_galore.data.folders import split_of
from sophia_galore.data.read import find, read_records
from sophia_galore.errors import ConfigError, DataError

ROWS = [{"instruction": "q1", "output": "a1"}, {"instruction": "q2", "output": "a2"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [record.fields for record in read_records(str(path))]


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def load(tokenizer: Any, seed: int = 42, **options: Any) -> Dataset:
    return load_data(DataConfig(**options), max_length=100, seed=seed, tokenizer=tokenizer)


def said(dataset: Dataset, tokenizer: Any, part: str = "train") -> list[str]:
    return [tokenizer.decode(example.input_ids, skip_special_tokens=True) for example in getattr(dataset, part)]


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("x.jsonl", LINES, ""),
        ("x.ndjson", LINES, ""),
        ("x.JSONL", LINES, ""),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0), ""),
        ("x.jsonl.bz2", bz2.compress(LINES), ""),
        ("x.json.xz", lzma.compress(json.dumps(ROWS).encode()), ""),
        ("x.json", LINES, "one object a line"),
        ("x.jsonl", json.dumps(ROWS, indent=1).encode(), "one JSON document"),
        ("x.jsonl", json.dumps(ROWS).encode(), "one JSON document"),
        ("x.json", json.dumps({"data": ROWS}).encode(), ""),
        ("x.json", b'{"instruction": ["q1", "q2"], "output": ["a1", "a2"]}', "an object of columns"),
        (
            "x.json",
            b'{"instruction": {"0": "q1", "1": "q2"}, "output": {"0": "a1", "1": "a2"}}',
            "an object of columns",
        ),
        ("x.json", json.dumps(ROWS).encode("utf-16"), ""),
        ("x.csv", b"instruction,output\nq1,a1\nq2,a2\n", ""),
        ("x.csv", b"instruction;output\nq1;a1\nq2;a2\n", "semicolons between the columns"),
        ("x.csv", b"instruction\toutput\nq1\ta1\nq2\ta2\n", "tabs between the columns"),
        ("x.csv", b"instruction|output\r\nq1|a1\r\nq2|a2\r\n", "vertical bars between the columns"),
        ("x.csv", b"sep=;\ninstruction;output\nq1;a1\nq2;a2\n", "semicolons between the columns"),
        ("x.tsv", b"instruction\toutput\nq1\ta1\nq2\ta2\n", ""),
        ("x.csv.gz", gzip.compress(b"instruction,output\nq1,a1\nq2,a2\n", mtime=0), ""),
    ],
)
def test_the_same_records_in_other_shapes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: bytes, note: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert rows_of(path) == ROWS
    data = load(tokenizer, train=str(path), eval_fraction=0)
    assert [(file.num_records, file.format, file.note) for file in data.files] == [(2, "alpaca", note)]
    assert any(note in line for line in file_lines(data.files)) == bool(note)


def test_a_document_of_one_record(tmp_path: Path) -> None:
    for record in (ROWS[0], {"messages": [{"role": "user", "content": "q"}]}):
        (tmp_path / "x.json").write_text(json.dumps(record))
        assert rows_of(tmp_path / "x.json") == [record]


def test_headers_in_capitals_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "x.csv"
    path.write_text("Instruction;Input;Output;Id\nq1;NaN;a1;7\nq2;;a2;8\n")
    data = load(tokenizer, train=str(path), eval_fraction=0)
    assert [line.partition("x.csv: ")[2] for line in file_lines(data.files)] == [
        "train, 2 records, alpaca (semicolons between the columns; Instruction, Input, Output read as "
        "instruction, input, output)"
    ]
    assert sum("NaN" in text for text in said(data, tokenizer)) == 0


def test_lines_of_other_separators_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('sep=;\ntext;id\n"two\nlines";1\nb;2\n')
    assert [record.where for record in read_records(str(path))] == [f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.xz"])
def test_a_packed_file_that_is_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(DataError, match=rf"{name} can't be decompressed"):
        read_records(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_pylist([{"text": "a", "more": {"x": 1}}, {"text": "b", "more": {"y": 2}}])
    open_ipc = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, open_ipc(sink, table.schema) as writer:
        writer.write_table(table)
    # Nulls that only fill up the objects of a table are no fields.
    assert rows_of(tmp_path / "x.arrow") == [{"text": "a", "more": {"x": 1}}, {"text": "b", "more": {"y": 2}}]
    (tmp_path / "y.arrow").write_bytes(b"no")
    with pytest.raises(DataError, match=r"y\.arrow is not a readable Arrow file"):
        read_records(str(tmp_path / "y.arrow"))


def test_saved_datasets(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"text {number}" for number in range(5)]
    one = datasets.Dataset.from_dict({"text": texts})
    one.select([4, 2, 0, 1, 3]).save_to_disk(tmp_path / "one", num_shards=2)
    assert [row["text"] for row in rows_of(tmp_path / "one")] == [texts[number] for number in (4, 2, 0, 1, 3)]
    several = datasets.DatasetDict(
        {name: one.select([place]) for place, name in enumerate(("train", "validation", "test"))}
    )
    several.save_to_disk(tmp_path / "several")
    data = load(tokenizer, train=str(tmp_path / "several"))
    assert (said(data, tokenizer), said(data, tokenizer, "eval")) == (["text 0"], ["text 1"])
    assert [file.use for file in data.files] == ["train", "eval", "left alone"]


FOLDERS: list[tuple[str, dict[str, str]]] = [
    ("files", {"train.jsonl": "train", "validation.jsonl": "eval", "test.jsonl": "left alone"}),
    ("valid", {"train.jsonl": "train", "valid.jsonl": "eval"}),
    ("dev", {"x_train.jsonl": "train", "x_dev.jsonl": "eval", "x_test.jsonl": "left alone"}),
    ("eval", {"train.jsonl": "train", "eval.jsonl": "eval"}),
    (
        "shards",
        {
            "train-00000-of-00002.jsonl": "train",
            "train-00001-of-00002.jsonl": "train",
            "validation-00000-of-00001.jsonl": "eval",
            "test-00000-of-00001-0a1b2c3d4e5f6071.jsonl": "left alone",
        },
    ),
    (
        "a hub's layout",
        {
            "data/train-00000-of-00001.jsonl": "train",
            "data/test-00000-of-00001.jsonl": "left alone",
            "dataset_infos.json": "",
            "README.md": "",
        },
    ),
    (
        "subfolders",
        {"train/a.jsonl": "train", "train/b.jsonl": "train", "val/a.jsonl": "eval", "test/a.jsonl": "left alone"},
    ),
    ("no parts", {"a.jsonl": "train", "latest.jsonl": "train", "training_notes.jsonl": "train"}),
    ("only a test part has a name", {"alpaca.jsonl": "train", "test.jsonl": "left alone"}),
    ("a word in a name is no part", {"python.jsonl": "train", "test_writing.jsonl": "train"}),
    ("others", {"train.jsonl": "train", "test.jsonl": "left alone", "extra.jsonl": "left alone"}),
    ("hidden files", {"a.jsonl": "train", "._a.jsonl": "", ".b.jsonl": "", "__MACOSX/train.jsonl": ""}),
    ("packed", {"train.jsonl.gz": "train", "test.jsonl.gz": "left alone"}),
    ("one folder in a folder", {"main/train.jsonl": "train", "main/test.jsonl": "left alone"}),
]


@pytest.mark.parametrize("layout", [row[1] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_a_folder_with_parts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, layout: dict[str, str]) -> None:
    for name, use in layout.items():
        path = write(tmp_path / name, *(f"{name} {number}" for number in range(3)))
        if use == "":
            path.write_bytes(b"\x00\x05\x16\x07")  # what macOS writes into ._files
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
    data = load(tokenizer, train=str(tmp_path))
    uses = {str(Path(file.name).relative_to(tmp_path)): file.use for file in data.files}
    assert uses == {name: use for name, use in layout.items() if use}
    trained = {text.rsplit(" ", 1)[0] for text in said(data, tokenizer)}
    assert trained <= {name for name, use in layout.items() if use == "train"}
    evaluated = {name for name, use in layout.items() if use == "eval"}
    if evaluated:
        assert {text.rsplit(" ", 1)[0] for text in said(data, tokenizer, "eval")} == evaluated
        assert len(data.train) == 3 * sum(use == "train" for use in layout.values())
    else:
        assert len(data.train) + len(data.eval) == 3 * sum(use == "train" for use in layout.values())
        assert data.eval  # held out, as from any other data
    lines = file_lines(data.files)
    assert len(lines) == (len(uses) if len(uses) > 1 else 0)


def test_what_is_measured_on_can_be_said_otherwise(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for use in ("train", "validation", "test"):
        write(tmp_path / f"{use}.jsonl", *(f"{use} {number}" for number in range(4)))
    folder = str(tmp_path)

    def uses(**options: Any) -> tuple[set[str], set[str]]:
        data = load(tokenizer, train=folder, **options)
        train, held = ({text.split()[0] for text in said(data, tokenizer, part)} for part in ("train", "eval"))
        return train, held

    assert uses() == ({"train"}, {"validation"})
    assert uses(eval_fraction=0.25) == ({"train"}, {"train"})
    assert uses(eval_fraction=0) == ({"train"}, set())
    assert uses(eval=folder) == ({"train"}, {"validation"})
    assert uses(eval=str(tmp_path / "test.jsonl")) == ({"train"}, {"test"})
    write(tmp_path / "validation.jsonl", "x").unlink()
    assert uses(eval=folder) == ({"train"}, {"test"})
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"no training split.*test\.jsonl"):
        load(tokenizer, train=folder)


def test_the_choice_is_the_same_from_the_configuration_of_the_run(tmp_path: Path) -> None:
    for given in ([], ["data.eval_fraction=0.05"]):
        config = load_config(None, [f"data.train={tmp_path}", *given])
        path = tmp_path / "run_config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        again = load_config(path)
        assert again == config
        assert ("eval_fraction" in again.data.model_fields_set) == bool(given)


def test_a_column_that_names_the_part(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,split\na,train\nb,train\nc,validation\nd,test\n")
    data = load(tokenizer, train=str(path))
    assert (sorted(said(data, tokenizer)), said(data, tokenizer, "eval")) == (["a", "b"], ["c"])
    assert "1 for testing (left alone)" in file_lines(data.files)[0]
    path.write_text("text,split\na,test\nb,test\n")
    assert len(load(tokenizer, train=str(path), eval_fraction=0).train) == 2
    path.write_text("text,split\na,train\nb,banana\n")
    assert len(load(tokenizer, train=str(path), eval_fraction=0).train) == 2


def test_several_folders_are_not_guessed_at(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.jsonl", "a")
    write(tmp_path / "b" / "x.jsonl", "b")
    with pytest.raises(DataError, match="no data file") as error:
        find(str(tmp_path), "train")
    assert "a, b" in error.value.remedy


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("train_sft", "train"),
        ("my-test", "test"),
        ("val_1", "validation"),
        ("TRAIN", "train"),
        ("latest", None),
        ("contest", None),
        ("trainer", None),
        ("evaluate", None),
        ("retrain", None),
        ("unit_test_x", None),
    ],
)
def test_words_that_name_a_part(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_patterns(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "deep" / "b.jsonl", "b")
    assert rows_of(tmp_path / "*.jsonl") == [{"text": "a"}]
    assert rows_of(tmp_path / "**" / "*.jsonl") == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"No file matches .*\.csv"):
        rows_of(tmp_path / "*.csv")
    with pytest.raises(DataError, match="does not exist") as error:
        read_records("a.jsonl,b.jsonl")
    assert "data.train='[A, B]'" in error.value.remedy


def shares_of(data: Dataset, tokenizer: Any, part: str = "train") -> dict[str, int]:
    return dict(Counter(text.split()[0] for text in said(data, tokenizer, part)))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, {"a": 20, "b": 10}),
        ({"weight": 1}, {"a": 20, "b": 10}),
        ({"weight": 0.5}, {"a": 10, "b": 10}),
        ({"weight": 0.29}, {"a": 6, "b": 10}),
        ({"weight": 2}, {"a": 40, "b": 10}),
        ({"weight": 2.5}, {"a": 50, "b": 10}),
        ({"max_examples": 7}, {"a": 7, "b": 10}),
        ({"max_examples": 100}, {"a": 20, "b": 10}),
        ({"max_examples": 8, "weight": 0.5}, {"a": 4, "b": 10}),
        ({"max_examples": 8, "weight": 3}, {"a": 24, "b": 10}),
    ],
)
def test_shares_of_several_data_sets(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], count: dict[str, int]
) -> None:
    one = write(tmp_path / "a.jsonl", *(f"a {number}" for number in range(20)))
    two = write(tmp_path / "b.jsonl", *(f"b {number}" for number in range(10)))
    train = ({"path": str(one), **options}, str(two))
    data = load(tokenizer, train=train, eval_fraction=0)
    assert shares_of(data, tokenizer) == count
    assert [(file.name, file.num_records) for file in data.files] == [(str(one), 20), (str(two), 10)]
    times = Counter(said(data, tokenizer))
    weight = options.get("weight", 1)
    assert {times[text] for text in times if text.startswith("a")} <= {max(int(weight), 1), int(weight) + 1}
    again, other = load(tokenizer, train=train, eval_fraction=0), load(tokenizer, train=train, eval_fraction=0, seed=1)
    assert again.fingerprint == data.fingerprint != other.fingerprint


def test_what_is_held_out_is_not_trained_on_however_often_it_repeats(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    one = write(tmp_path / "a.jsonl", *(f"a {number}" for number in range(20)))
    data = load(tokenizer, train=({"path": str(one), "weight": 3},), eval_fraction=0.2)
    train, held = said(data, tokenizer), said(data, tokenizer, "eval")
    assert (len(train), len(held)) == (48, 4)
    assert set(train).isdisjoint(held) and len(set(held)) == 4


def test_a_list_of_one_is_the_file_itself(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = str(write(tmp_path / "a.jsonl", *(f"a {number}" for number in range(20))))
    prints = {load(tokenizer, train=train).fingerprint for train in (path, (path,), {"name": path}, ({"path": path},))}
    assert len(prints) == 1


def test_evaluation_data_may_be_a_list_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    paths = [str(write(tmp_path / f"{name}.jsonl", *(f"{name} {n}" for n in range(6)))) for name in "abc"]
    data = load(tokenizer, train=paths[0], eval=(paths[1], {"path": paths[2], "max_examples": 2}))
    assert shares_of(data, tokenizer, "eval") == {"b": 6, "c": 2}


def test_each_data_set_has_its_own_format(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    one = write(tmp_path / "a.jsonl", "a")
    two = tmp_path / "b.json"
    two.write_text(json.dumps(ROWS))
    data = load(tokenizer, train=(str(one), str(two)), eval_fraction=0)
    assert data.format == "text, alpaca" and len(data.train) == 3
    with pytest.raises(DataError, match="`messages` is missing"):
        load(tokenizer, train=(str(one), {"path": str(two), "format": "messages"}))


def test_a_weight_that_leaves_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = str(write(tmp_path / "a.jsonl", "a", "b"))
    with pytest.raises(DataError, match=r"a\.jsonl: weight 0\.1 leaves none of its 2 records"):
        load(tokenizer, train=({"path": path, "weight": 0.1},))


def test_lists_in_files_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data:\n  train:\n    - a.json\n    - {path: b.json, weight: 0.5, max_examples: 9}\n"
        "    - {name: c, format: text}\n"
    )
    config = load_config(path)
    sources = [(each.path, each.weight, each.max_examples, each.format) for each in config.data.train_sources]
    assert sources == [("a.json", 1, None, None), ("b.json", 0.5, 9, None), ("c", 1, None, "text")]
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    config = load_config(None, ["data.train=[a.json, {path: b.json, weight: 2}]", "data.eval=[c.json]"])
    assert [each.path for each in (*config.data.train_sources, *config.data.eval_sources)] == [
        "a.json",
        "b.json",
        "c.json",
    ]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[]", "an empty list"),
        ("[a.json, 3]", "entry 2 is neither"),
        ("[{weight: 2}]", "entry 1 lacks its `path`"),
        ("[{path: a, weigth: 2}]", "unknown key 'weigth'"),
        ("[{path: a, weight: 0}]", "weight takes a number above 0"),
        ("[{path: a, weight: true}]", "weight takes"),
        ("[{path: a, max_examples: 0}]", "max_examples takes"),
        ("[{path: a, format: csv}]", "format takes one of alpaca"),
        ("[{path: ''}]", "path takes"),
        ("3", "takes text or a list"),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_lists_that_are_wrong(key: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"{key}={value}"])
    assert key in error.value.cause and says in error.value.cause
