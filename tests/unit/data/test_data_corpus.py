"""A corpus of plain text: what becomes of its tokens, and what it can't be."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sophia_galore.config.schema_data import DataConfig
from sophia_galore.data.dataset import Dataset, load_data
from sophia_galore.data.feed import Feed, one_each
from sophia_galore.errors import DataError, EnvironmentProblem

LINES = [f"line {number} of the text, {number * 7919 % 1000} \u00e9" for number in range(400)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(LINES[:300]), encoding="utf-8")
    (folder / "b.txt").write_text("\n".join(LINES[300:]), encoding="utf-8")
    return folder


def load(tokenizer: Any, tmp_path: Path, length: int = 32, seed: int = 1, **options: Any) -> Dataset:
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return load_data(
        DataConfig(**options), max_length=length, seed=seed, tokenizer=tokenizer, cache_dir=tmp_path / "cache"
    )


def all_tokens(tokenizer: Any) -> list[int]:
    """Both texts, each with the end-of-text token."""
    expected = []
    for part in (LINES[:300], LINES[300:]):
        expected += [*tokenizer.encode("\n".join(part), add_special_tokens=False), tokenizer.eos_token_id]
    return expected


def test_rows_are_the_texts_tokens_in_order_and_each_is_on_one_side(
    corpus: Path, tmp_path: Path, tokenizer: Any
) -> None:
    data = load(tokenizer, tmp_path, train=corpus, eval_fraction=0.1)
    tokens = all_tokens(tokenizer)
    rows = {tuple(tokens[start : start + 32]) for start in range(0, len(tokens) - 31, 32)}
    train, held = ([tuple(example.input_ids.tolist()) for example in part] for part in (data.train, data.eval))
    assert {*train, *held} == rows
    assert len(train) + len(held) == len(tokens) // 32 and len(held) == round(0.1 * (len(tokens) // 32))
    assert all(example.counted.tolist() == [False] + [True] * 31 for example in data.train)
    assert data.format == "corpus" and data.summary.train.num_counted == 31 * len(train)
    assert data.largest_token == max(tokens)


def test_pieces_of_a_long_text_give_the_tokens_of_its_lines(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    whole = load(tokenizer, tmp_path, train=corpus, eval_fraction=0)
    monkeypatch.setattr("sophia_galore.data.corpus._PIECE", 50)
    pieces = load(tokenizer, tmp_path / "other", train=corpus, eval_fraction=0)
    # The tiny tokenizer splits at spaces and ends of lines, so pieces make no difference.
    assert pieces.fingerprint == whole.fingerprint


@pytest.mark.parametrize("form", ["a file", "a folder", "a pattern", "a list", "compressed", "UTF-16"])
def test_where_plain_text_may_be(form: str, corpus: Path, tmp_path: Path, tokenizer: Any) -> None:
    one = corpus / "a.txt"
    text = one.read_text(encoding="utf-8")
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    wide = tmp_path / "wide.txt"
    wide.write_bytes(text.encode("utf-16"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text(text, encoding="utf-8")
    named: dict[str, Any] = {
        "a file": one,
        "a folder": tmp_path / "one",
        "a pattern": f"{tmp_path}/one/*.txt",
        "a list": [str(one)],
        "compressed": packed,
        "UTF-16": wide,
    }
    expected = load(tokenizer, tmp_path, train=one, eval_fraction=0)
    assert [e.input_ids.tolist() for e in load(tokenizer, tmp_path, train=named[form], eval_fraction=0).train] == [
        e.input_ids.tolist() for e in expected.train
    ]


def test_tokens_are_made_once_and_made_again_if_damaged(
    corpus: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tokenizer, tmp_path, train=corpus)
    made = next((tmp_path / "cache" / "tokens").glob("*.bin"))
    time = made.stat().st_mtime_ns
    assert load(tokenizer, tmp_path, train=corpus).fingerprint == first.fingerprint
    assert made.stat().st_mtime_ns == time
    tokens = np.fromfile(made, dtype="<u2")
    tokens[5] ^= 1
    tokens.tofile(made)
    again = load(tokenizer, tmp_path, train=corpus)
    assert again.fingerprint == first.fingerprint and made.stat().st_mtime_ns != time
    (corpus / "b.txt").write_text("another text\n" * 100)
    assert load(tokenizer, tmp_path, train=corpus).fingerprint != first.fingerprint


def test_another_seed_another_split_and_maxima(corpus: Path, tmp_path: Path, tokenizer: Any) -> None:
    one = load(tokenizer, tmp_path, train=corpus, max_train_examples=20, max_eval_examples=3)
    other = load(tokenizer, tmp_path, train=corpus, seed=2)
    assert (len(one.train), len(one.eval)) == (20, 3)
    assert one.eval[0].where != other.eval[0].where


def test_measured_on_another_text(corpus: Path, tmp_path: Path, tokenizer: Any) -> None:
    data = load(tokenizer, tmp_path, train=corpus / "a.txt", eval=corpus / "b.txt")
    assert [file.use for file in data.files] == ["train", "eval"]
    assert all("b.txt" in example.where for example in data.eval)


def test_rows_are_fed_without_reading_them_for_their_lengths(corpus: Path, tmp_path: Path, tokenizer: Any) -> None:
    data = load(tokenizer, tmp_path, train=corpus)
    feed = Feed(data.train, one_each(len(data.train)), "shuffled", 4, 2, 7, 0)
    batches = feed.step(1)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(4, 32), (4, 32)]
    assert all(batch.attention_mask is None for batch in batches) and feed.fill == 1.0
    expected = [data.train[row].input_ids.tolist() for row in feed.order(0)[:4]]
    assert batches[0].input_ids.tolist() == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too little text": ({"length": 10**6}, "less than one row"),
    "mixed with records": ({"train": ["a.txt", "r.jsonl"]}, "can't be mixed"),
    "measured on records": ({"train": "a.txt", "eval": "r.jsonl"}, "can't be mixed"),
    "a weight": ({"train": [{"path": "a.txt", "weight": 2.0}]}, "`weight` and `max_examples`"),
    "a format": ({"train": "a.txt", "format": "text"}, "data.format would have no effect"),
    "packing": ({"train": "a.txt", "packing": True}, "data.packing would have no effect"),
    "skipping": ({"train": "a.txt", "on_bad_record": "skip"}, "on_bad_record: skip would have no effect"),
    "dropping": ({"train": "a.txt", "too_long": "drop"}, "too_long: drop would have no effect"),
    "no text": ({"train": "empty.txt"}, "there is no text in it"),
    "no UTF-8": ({"train": "latin.txt"}, "not UTF-8 text"),
    "damaged": ({"train": "cut.txt.gz"}, "can't be decompressed"),
    "not there": ({"train": "other.txt"}, "does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(
    case: str, corpus: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus)
    Path("r.jsonl").write_text('{"text": "a record"}\n')
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    Path("cut.txt.gz").write_bytes(gzip.compress(b"a text" * 1000)[:-20])
    options, words = REFUSED[case]
    with pytest.raises(DataError, match=words):
        load(tokenizer, tmp_path, **{"train": "a.txt", **options})


def test_no_room_for_the_tokens(corpus: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sophia_galore.data.corpus.os.fsync", full)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        load(tokenizer, tmp_path, train=corpus)
    assert not [*(tmp_path / "cache" / "tokens").glob("*.bin")]
