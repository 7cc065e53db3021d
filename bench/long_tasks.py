"""The tasks of `long_run.py`: their data, divided into training, validation and test, and how answers are checked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.data.stdlib_docs import prepare_sample_data
from sophia_galore.data.stdlib_text import prepare_corpus

Record = dict[str, str]
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# The template's own system turn is longer than most questions, and would cost a third of the time.
SYSTEM = "Answer."
# One in ten of each for validation and for the test.
_PARTS = ("validation", "test", *["train"] * 8)


@dataclass(frozen=True)
class Task:
    """What is trained.

    Args:
        write: Writes `train`, `validation` and `test` into a folder, as JSONL or plain text.
        ending: Of these files.
        length: Longest example in tokens.
        exact: Whether its answers are right or wrong.
        pretrains: Whether it begins with random weights.
    """

    write: Callable[[Path], None]
    ending: str = ".jsonl"
    length: int = 48
    exact: bool = False
    pretrains: bool = False

    def file(self, folder: Path, part: str) -> Path:
        """Return the file of a part."""
        return folder / f"{part}{self.ending}"


def number_in_words(number: int) -> str:
    """Return a number from 0 to 199 in words: "one hundred and seven"."""
    if number >= 100:
        rest = number - 100
        return "one hundred" + (f" and {number_in_words(rest)}" if rest else "")
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def sums() -> list[Record]:
    """Return all sums and differences of two numbers below 100 whose result is not negative, in words and shuffled."""
    records = []
    for a in range(100):
        for b in range(100):
            one, other = number_in_words(a), number_in_words(b)
            records.append({"instruction": f"What is {one} plus {other}?", "output": number_in_words(a + b)})
            if a >= b:
                records.append({"instruction": f"What is {one} minus {other}?", "output": number_in_words(a - b)})
    random.Random(0).shuffle(records)
    return records


def divided(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return records by part, one in ten each for validation and test."""
    parts: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    for number, record in enumerate(records):
        parts[_PARTS[number % len(_PARTS)]].append(record)
    return parts


def _write(folder: Path, records: Sequence[Record]) -> None:
    for part, chosen in divided(records).items():
        lines = "".join(json.dumps({"system": SYSTEM, **record}) + "\n" for record in chosen)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")


def _write_answers(folder: Path) -> None:
    sample = folder / "all.json"
    prepare_sample_data(sample)
    records = json.loads(sample.read_text(encoding="utf-8"))
    random.Random(0).shuffle(records)
    _write(folder, records)


def _write_sums(folder: Path) -> None:
    _write(folder, sums())


def _write_text(folder: Path) -> None:
    """Divide the standard library by source file, so that no file is on two sides."""
    whole = folder / "all.text"
    prepare_corpus(whole)
    files = whole.read_text(encoding="utf-8").split("\n# ")
    random.Random(0).shuffle(files)
    texts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    # Of a text much less is enough to measure on: one file in forty each.
    for number, text in enumerate(files):
        texts[{0: "validation", 1: "test"}.get(number % 40, "train")].append(text)
    for part, chosen in texts.items():
        (folder / f"{part}.txt").write_text("\n# ".join(chosen), encoding="utf-8")


TASKS: dict[str, Task] = {
    "answers": Task(_write_answers),
    "sums": Task(_write_sums, length=64, exact=True),
    "text": Task(_write_text, ending=".txt", length=128, pretrains=True),
}


def exact_match(folder: Path, tokenizer_of: Path, questions: Sequence[Record], *, batch_size: int = 16) -> float:
    """Return the share of questions that a model answers to the letter, by greedy decoding.

    Args:
        folder: A model's folder, or an adapter's.
        tokenizer_of: The folder of the model that training began with.
        questions: Records with `instruction` and `output`.
        batch_size: Questions that are answered together.

    Returns:
        From 0 to 1.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_of, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    right = 0
    for start in range(0, len(questions), batch_size):
        chosen = questions[start : start + batch_size]
        chats = [
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": record["instruction"]}]
            for record in chosen
        ]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer.strip() == record["output"] for answer, record in zip(answers, chosen, strict=True))
    return right / len(questions)
