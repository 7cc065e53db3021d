from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sophia_galore.config.schema_data import DataConfig
from sophia_galore.data.conversation import Conversation
from sophia_galore.data.dataset import Dataset, fingerprint, load_data
from sophia_galore.data.example import Example
from sophia_galore.data.split import split_off
from sophia_galore.errors import DataError


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def load(tokenizer: Any, max_length: int = 100, seed: int = 42, **options: Any) -> Dataset:
    return load_data(DataConfig(**options), max_length=max_length, seed=seed, tokenizer=tokenizer)


def texts(examples: list[Example], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(example.input_ids, skip_special_tokens=True) for example in examples]


TWENTY = [f"text {i:02}" for i in range(20)]


def conversations(contents: list[str]) -> list[Conversation]:
    return [Conversation((), f"x:{i}", kind="text", text=content) for i, content in enumerate(contents)]


@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**63 - 1),
)
def test_a_split_is_disjoint_complete_and_fixed_by_the_seed(contents: list[str], fraction: float, seed: int) -> None:
    everything = conversations(contents)
    if len(set(contents)) == 1 and len(contents) > 1 and fraction > 0:
        with pytest.raises(DataError, match="say the same"):
            split_off(everything, fraction, seed)
        return
    train, held = split_off(everything, fraction, seed)
    assert (train, held) == split_off(everything, fraction, seed)
    assert sorted(c.where for c in train + held) == sorted(c.where for c in everything)
    assert {c.text for c in train}.isdisjoint(c.text for c in held)
    assert train
    assert bool(held) == (fraction > 0 and len(contents) > 1)
    if len(set(contents)) == len(contents) > 1 and fraction > 0:
        assert len(held) == min(max(round(fraction * len(contents)), 1), len(contents) - 1)


def test_eval_by_fraction(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", TWENTY)
    data = load(tokenizer, train=path, eval_fraction=0.2)
    train, held = texts(data.train, tokenizer), texts(data.eval, tokenizer)
    assert (len(train), len(held), data.format) == (16, 4, "text")
    assert sorted(train + held) == TWENTY
    again, other = (
        load(tokenizer, train=path, eval_fraction=0.2),
        load(tokenizer, train=path, eval_fraction=0.2, seed=1),
    )
    assert again.fingerprint == data.fingerprint != other.fingerprint
    assert texts(other.eval, tokenizer) != held


def test_a_seed_of_the_data_alone_holds_out_the_same_examples_for_every_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "x.jsonl", TWENTY)
    found = {
        load_data(
            DataConfig(train=path, eval_fraction=0.2, max_train_examples=10, seed=7),
            max_length=100,
            seed=seed,
            tokenizer=tokenizer,
        ).fingerprint
        for seed in (0, 1, 2)
    }
    assert found == {load(tokenizer, train=path, eval_fraction=0.2, max_train_examples=10, seed=7).fingerprint}


def test_no_eval(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = load(tokenizer, train=write(tmp_path / "x.jsonl", TWENTY), eval_fraction=0)
    assert len(data.train) == 20 and data.eval == []
    assert data.summary.eval.num_records == data.summary.eval.longest == 0
    single = load(tokenizer, train=write(tmp_path / "y.jsonl", ["one"]))
    assert (len(single.train), len(single.eval)) == (1, 0)


def test_eval_by_file_counts_what_is_shared(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train, held = write(tmp_path / "x.jsonl", TWENTY), tmp_path / "y.json"
    held.write_text(json.dumps([{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "b"}]))
    data = load(tokenizer, train=train, eval=str(held))
    assert (len(data.train), len(data.eval), data.format, data.summary.num_shared) == (20, 2, "text", 0)
    shared = load(tokenizer, train=train, eval=write(tmp_path / "z.jsonl", ["text 03 ", "new"]))
    assert shared.summary.num_shared == 1


def test_maxima_take_the_first_in_seeded_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", TWENTY)
    whole = load(tokenizer, train=path, eval_fraction=0.5)
    part = load(tokenizer, train=path, eval_fraction=0.5, max_train_examples=3, max_eval_examples=2)
    assert texts(part.train, tokenizer) == texts(whole.train, tokenizer)[:3]
    assert texts(part.eval, tokenizer) == texts(whole.eval, tokenizer)[:2]
    assert part.summary.train.num_records == 3


def test_the_summary_adds_up(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", [*TWENTY, "z" * 50])
    cut = load(tokenizer, train=path, eval_fraction=0, max_length=20).summary.train
    assert (cut.num_records, cut.num_examples, cut.num_cut, cut.num_dropped, cut.longest) == (21, 21, 1, 0, 20)
    dropped = load(tokenizer, train=path, eval_fraction=0, max_length=20, too_long="drop")
    part = dropped.summary.train
    assert (part.num_records, part.num_examples, part.num_cut, part.num_dropped) == (21, 20, 0, 1)
    assert part.num_tokens == sum(example.num_tokens for example in dropped.train)
    assert part.num_counted == part.num_tokens - 20  # all but the first token of each


@pytest.mark.parametrize(("too_long", "says"), [("drop", "2 are longer than 3"), ("cut", "in 2 the answer")])
def test_nothing_left_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, too_long: str, says: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "q", "completion": "b"}\n')
    with pytest.raises(DataError, match=says) as error:
        load(tokenizer, train=str(path), eval_fraction=0, max_length=3, too_long=too_long)
    assert str(path) in error.value.cause and "max_length" in error.value.remedy


def test_no_eval_example_left_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    held = write(tmp_path / "y.jsonl", ["long " * 50])
    with pytest.raises(DataError, match=r"y\.jsonl.*evaluation"):
        load(tokenizer, train=write(tmp_path / "x.jsonl", TWENTY), eval=held, max_length=20, too_long="drop")


def test_a_format_that_is_named_is_held_to(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", TWENTY)
    with pytest.raises(DataError, match=r"x\.jsonl:1: the field `messages` is missing"):
        load(tokenizer, train=path, format="messages")


def test_the_fingerprint_sees_ids_masks_order_and_sides() -> None:
    a, b = Example.of([1, 2, 3], [False, True, True], "x:1"), Example.of([1, 2, 3], [False, False, True], "x:1")
    cases = [([a], []), ([], [a]), ([b], []), ([a, b], []), ([b, a], []), ([a], [b])]
    assert len({fingerprint(train, held) for train, held in cases}) == len(cases)
    elsewhere = Example(a.input_ids.clone(), a.counted.clone(), "y:7")
    assert fingerprint([a], []) == fingerprint([elsewhere], [])
