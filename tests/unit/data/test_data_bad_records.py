"""Records that can't be used: all of them are told at once, or left out, counted and listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sophia_galore.config.schema_data import DataConfig
from sophia_galore.data.bad_records import BadRecords
from sophia_galore.data.dataset import Dataset, load_data
from sophia_galore.errors import DataError, ModelError


def load(tokenizer: Any, path: Path, **options: Any) -> Dataset:
    config = DataConfig(train=str(path), **{"eval_fraction": 0, **options})
    return load_data(config, max_length=100, seed=42, tokenizer=tokenizer)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD = [{"instruction": f"q {number}", "output": f"a {number}"} for number in range(10)]
EMPTY = {"instruction": "q", "output": ""}
REJECTED = {"instruction": "q", "output": "a", "label": False}
# The templates' own refusal, met only when the record is rendered.
STRICT = (
    "{% for m in messages %}{% if 'forbidden' in m['content'] %}{{ raise_exception('a forbidden word') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORBIDDEN = {"instruction": "forbidden", "output": "a"}


@pytest.fixture
def strict(make_tokenizer: Any) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(STRICT)
    return tokenizer


def test_all_of_them_are_counted_and_the_first_five_named(tmp_path: Path, strict: PreTrainedTokenizerFast) -> None:
    # Of every stage: reading, conversion and rendering.
    rows = [GOOD[0], FORBIDDEN, EMPTY, '{"instruction": "q', GOOD[1], REJECTED, "[1]", FORBIDDEN, *[EMPTY] * 28, *GOOD]
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError) as error:
        load(strict, path)
    lines = error.value.cause.splitlines()
    assert lines[0] == "34 of 46 records can't be used:"
    assert [line.partition(str(path))[2].split(" ")[0] for line in lines[1:6]] == [":2:", ":3:", ":4:", ":6:", ":7:"]
    reasons = ["a forbidden word", "`output` is empty", "broken JSON", "`label` is false", "a list where a record"]
    assert all(reason in line for reason, line in zip(reasons, lines[1:], strict=False))
    assert lines[6] == "- and 29 more"
    assert "data.on_bad_record: skip" in error.value.remedy


def test_a_single_one_keeps_its_own_message(tmp_path: Path, strict: PreTrainedTokenizerFast) -> None:
    for bad, says in ((EMPTY, "the field `output` is empty."), (FORBIDDEN, "refuses this conversation")):
        path = write(tmp_path / "x.jsonl", [GOOD[0], bad, GOOD[1]])
        with pytest.raises(DataError) as error:
            load(strict, path)
        assert error.value.cause.startswith(f"{path}:2: ") and says in error.value.cause
        assert "data.on_bad_record: skip" in error.value.remedy


def test_skipping_leaves_them_out_counts_and_lists_them(tmp_path: Path, strict: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", [GOOD[0], FORBIDDEN, EMPTY, "{", *GOOD[1:], REJECTED])
    data = load(strict, path, on_bad_record="skip")
    assert data.summary.num_bad == len(data.bad) == 4
    assert [record.where for record in data.bad] == [f"{path}:{line}" for line in (2, 3, 4, 14)]
    assert all(record.reason and record.remedy and str(path) not in record.reason for record in data.bad)
    assert len(data.train) == 10
    clean = load(strict, write(tmp_path / "x.jsonl", GOOD))
    texts = [sorted(strict.decode(example.input_ids) for example in part.train) for part in (data, clean)]
    assert texts[0] == texts[1]
    again = load(
        strict, write(tmp_path / "x.jsonl", [GOOD[0], FORBIDDEN, EMPTY, "{", *GOOD[1:], REJECTED]), on_bad_record="skip"
    )
    assert again.fingerprint == data.fingerprint


def test_rows_of_another_width(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,completion\na,b\nc\nd,e\nf,g,h\n")
    with pytest.raises(DataError, match=r"2 of 4 records can't be used:\n.*x\.csv:3: 1 values.*\n.*x\.csv:5: 3 values"):
        load(tokenizer, path)
    assert len(load(tokenizer, path, on_bad_record="skip").train) == 2


def test_a_first_record_that_is_bad_does_not_hide_the_format(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "x.jsonl", [{"note": "about"}, *GOOD])
    assert len(load(tokenizer, path, on_bad_record="skip").train) == 10


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_nothing_but_bad_records(tmp_path: Path, strict: PreTrainedTokenizerFast, policy: str) -> None:
    for rows in ([EMPTY] * 7, [FORBIDDEN] * 7, [EMPTY, *[FORBIDDEN] * 6], [REJECTED] * 7):
        path = write(tmp_path / "x.jsonl", rows)
        with pytest.raises(DataError, match="7 of 7 records can't be used") as error:
            load(strict, path, on_bad_record=policy)
        assert "skip" not in error.value.remedy


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_fault_of_all_is_no_bad_record(tmp_path: Path, make_tokenizer: Any, policy: str) -> None:
    path = write(tmp_path / "x.jsonl", GOOD)
    with pytest.raises(DataError, match=r"x\.jsonl:\d+: this is a conversation, but .* no chat template"):
        load(make_tokenizer(None), path, on_bad_record=policy)
    with pytest.raises(ModelError, match="fails even on one question"):
        load(make_tokenizer("{{ raise_exception('no') }}"), path, on_bad_record=policy)
    with pytest.raises(DataError, match="formats are mixed"):
        load(make_tokenizer(), write(tmp_path / "x.jsonl", [*GOOD, {"text": "t"}]), on_bad_record=policy)
    for name, content in (("y.json", b'{"a'), ("y.jsonl", b"no\njson\n"), ("y.jsonl", b"\xff\xfe\xfd\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            load(make_tokenizer(), tmp_path / name, on_bad_record=policy)
        assert "records can't be used" not in error.value.cause


def test_evaluation_data_are_checked_alike(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train, held = write(tmp_path / "x.jsonl", [*GOOD, EMPTY]), write(tmp_path / "y.jsonl", [*GOOD, EMPTY])
    with pytest.raises(DataError, match=r"2 of 22 records can't be used:\n.*x\.jsonl:11.*\n.*y\.jsonl:11"):
        load(tokenizer, train, eval=str(held), eval_fraction=0.0)
    data = load(tokenizer, train, eval=str(held), on_bad_record="skip")
    assert (len(data.train), len(data.eval), data.summary.num_bad) == (10, 10, 2)


def test_a_record_that_repeats_is_told_once(tmp_path: Path, strict: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", [*GOOD, FORBIDDEN])
    config = DataConfig(train=({"path": str(path), "weight": 3},), eval_fraction=0, on_bad_record="skip")
    data = load_data(config, max_length=100, seed=42, tokenizer=strict)
    assert (len(data.train), data.summary.num_bad) == (30, 1)


def test_many_are_listed_in_the_order_of_the_files() -> None:
    bad = BadRecords("skip")
    for where in ("b.jsonl:10", "b.jsonl:9", "a.json, record 11", "a.json, record 2", "b.jsonl:9"):
        bad.report(where, DataError(f"{where}: no.", "Mend it."))
    places = ["b.jsonl:9", "b.jsonl:10", "a.json, record 2", "a.json, record 11"]
    assert [record.where for record in bad.found] == places
    assert {record.reason for record in bad.found} == {"no."}
