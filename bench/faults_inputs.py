"""Inputs: random configurations, overrides, words and data files; the command line takes them or refuses them in words.

Examples are drawn by hypothesis from strategies that know the keys and what they accept, so that most of a
configuration is often right and one part of it is not. A case is a copy of this process that tries some examples.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from faults_child import start
from faults_world import Found, World, last_words
from sophia_galore.cli.main import main
from sophia_galore.config.keys import keys, sections
from sophia_galore.config.paths import PATH_KEYS

EXAMPLES = 25
"""Examples of a case."""

_PLAIN = st.text(st.characters(exclude_characters="/~$%*?\\"), max_size=12)
_ANY_TEXT = st.one_of(_PLAIN, st.sampled_from(["", " ", "null", "~x", "1e400", "0x1f", "auto", "none", "true", "-0"]))
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.floats(0, 1),
    _ANY_TEXT,
    st.sampled_from(["4GiB", "1.5GB", "10%", "0", "-1GiB", "9e99GiB", "host", "disk", "bf16", "cpu", "int8", "fp16"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_PLAIN, inner, max_size=3)),
    max_leaves=6,
)


def _usual(name: str) -> st.SearchStrategy[Any]:
    """Return values that a key most likely accepts."""
    key = keys()[name]
    usual: list[st.SearchStrategy[Any]] = [st.just(key.default)]
    if key.takes(bool):
        usual.append(st.booleans())
    if key.takes(int):
        usual.append(st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
    if key.takes(float):
        usual.append(st.sampled_from([0.0, 0.1, 0.5, 1.0, 2]))
    if "one of " in key.accepts:
        named = key.accepts.partition("one of ")[2].replace(" or ", ", ")
        usual.append(st.sampled_from([word.strip() for word in named.split(",")]))
    return st.one_of(usual)


def _value_of(name: str) -> st.SearchStrategy[Any]:
    if name in PATH_KEYS:  # nothing outside of the case's own folder
        return st.one_of(st.sampled_from(["{model}", "{data}", "missing.json", "no/such", "", "data.jsonl"]), _PLAIN)
    return st.integers(0, 7).flatmap(lambda number: _VALUES if number == 0 else _usual(name))


_SETTINGS = st.lists(st.sampled_from(sorted(keys())), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: _value_of(name) for name in names})
)
_STRANGE = st.dictionaries(
    st.one_of(_PLAIN, st.sampled_from([*sections(), "training.max_step", "Training", "optimizer.galore.rank.x"])),
    _VALUES,
    max_size=2,
)
_BREAKS = st.sampled_from(
    [
        "",
        "\t",
        ": :",
        "- ",
        "{",
        "}",
        "!!python/object:os.system {}",
        "&a [*a]",
        "\0",
        "﻿",
        "%YAML 9.9",
        "? ",
        "'",
        "<<: 1",
    ]
)
# A plan takes some seconds, a check tenths of one.
_COMMANDS = st.sampled_from(
    [*["check"] * 20, *["check --json"] * 10, *["check --parameters"] * 5, "plan", "plan --json"]
)

_MORE_WORDS = st.one_of(
    st.sampled_from(["--optimizer", "--json", "--parameters", "-o", "--fit", "--processes", "-h", "0", "="]),
    _PLAIN,
    st.builds("{}={}".format, st.one_of(st.sampled_from(sorted(set(keys()) - set(PATH_KEYS))), _PLAIN), _PLAIN),
)

_FIELD_NAMES = (
    "instruction input output messages conversations prompt completion text chosen rejected system tools weight images "
    "id role content label question answer response"
)
_FIELDS = st.sampled_from(["", *_FIELD_NAMES.split(" ")])
_TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt"]), _SCALARS),
        "content": st.one_of(_ANY_TEXT, _VALUES),
        "from": st.one_of(st.sampled_from(["human", "gpt", "system"]), _SCALARS),
        "value": st.one_of(_ANY_TEXT, _VALUES),
        "tool_calls": _VALUES,
        "weight": _SCALARS,
    },
)
_RECORD = st.one_of(
    st.fixed_dictionaries({"instruction": _ANY_TEXT, "output": _ANY_TEXT}),
    st.fixed_dictionaries({"messages": st.lists(_TURN, max_size=4)}),
    st.fixed_dictionaries({"conversations": st.lists(_TURN, max_size=4)}),
    st.fixed_dictionaries({"prompt": _VALUES, "completion": _VALUES}),
    st.fixed_dictionaries({"text": _ANY_TEXT}),
    st.dictionaries(_FIELDS, _VALUES, max_size=4),
    _VALUES,
)
_GOOD = {"instruction": "what is the sum", "output": "two and two"}
_RECORDS = st.tuples(st.integers(0, 3), st.lists(_RECORD, max_size=3)).map(
    lambda drawn: [_GOOD | {"output": f"two and {number}"} for number in range(2 * drawn[0])] + drawn[1]
)
_ENDINGS = st.sampled_from(
    ["json", "jsonl", "ndjson", "csv", "tsv", "parquet", "arrow", "feather", "json.gz", "jsonl.gz", "txt", "json.zst"]
)


def one(world: World, number: int, draw: random.Random) -> Found:
    """Try some configurations, or some data files."""
    kind = ("configurations", "data", "configurations", "words")[number % 4]
    own_seed = draw.randrange(2**32)
    found = Found({"tried": kind, "seed": own_seed})
    with world.place() as place:
        results, log = place / "results.json", world.folder / "inputs.log"
        log.unlink(missing_ok=True)
        [child] = start(lambda: _try(world, kind, own_seed, place, results), log)
        code = child.wait()
        if code or not results.exists():
            found.faults.append(f"the process ended with {code}: {last_words(log)}")
            return found
        for result in json.loads(results.read_text(encoding="utf-8")):
            found.count(kind)
            found.count(f"exit code {result['code']}")
            if result["fault"]:
                found.faults.append(f"{result['words']}: {result['given']!r}: {result['fault']}")
    return found


def _try(world: World, kind: str, own_seed: int, place: Path, results: Path) -> int:
    _without_network()
    os.chdir(place)
    tried: list[dict[str, Any]] = []
    usual = [f"model.name={world.model}", f"data.train={world.data}", "memory.predict=false", "training.max_length=64"]

    def configuration(values: dict[str, Any], strange: dict[str, Any], breaks: str, place_of: int, word: str) -> None:
        tree: dict[str, Any] = {"model": {"name": str(world.model)}, "data": {"train": str(world.data)}}
        tree |= {"memory": {"predict": False}, "training": {"max_length": 64}}
        for name, value in values.items():
            _put(tree, name, _filled(value, world))
        text = _yaml(tree | strange)
        cut = place_of % (len(text) + 1)
        text = text[:cut] + breaks + text[cut:]
        (place / "config.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        tried.append(_carried_out([*word.split(), "--config", "config.yaml"], text))

    def words(values: dict[str, Any], word: str, more: list[str]) -> None:
        (place / "config.yaml").write_text("{}", encoding="utf-8")
        own = [f"{name}={_yaml(_filled(value, world))}" for name, value in values.items()]
        tried.append(_carried_out([*word.split(), "--config", "config.yaml", *usual, *own, *more], ""))

    def data(records: list[Any], form: str, mutation: bytes, place_of: int, removed: int) -> None:
        file = place / f"data.{form}"
        try:
            content = _encoded(records, form)
        except (ValueError, TypeError, OverflowError):
            return  # not every value fits into every kind of file
        cut = place_of % (len(content) + 1)
        content = content[:cut] + mutation + content[cut + (removed if mutation else 0) :]
        file.write_bytes(content)
        (place / "config.yaml").write_text("{}", encoding="utf-8")
        more = [f"data.train={file}", "data.on_bad_record=skip"] if place_of % 2 else [f"data.train={file}"]
        tried.append(
            _carried_out(["check", "--config", "config.yaml", usual[0], *usual[2:], *more], repr(content[:600]))
        )

    tests: dict[str, Callable[..., None]] = {
        "configurations": given(_SETTINGS, _seldom({}, _STRANGE), _seldom("", _BREAKS), st.integers(0, 999), _COMMANDS)(
            configuration
        ),
        "words": given(_SETTINGS, _COMMANDS, _seldom([], st.lists(_MORE_WORDS, max_size=2)))(words),
        "data": given(_RECORDS, _ENDINGS, _seldom(b"", st.binary(max_size=6)), st.integers(0, 9999), st.integers(0, 3))(
            data
        ),
    }
    quiet = settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seed(own_seed)(quiet(tests[kind]))()
    results.write_text(json.dumps(tried), encoding="utf-8")
    return 0


def _seldom(usual: Any, other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 3).flatmap(lambda number: other if number == 0 else st.just(usual))


def _carried_out(words: list[str], text: str) -> dict[str, Any]:
    """Carry out a command in this process, and say what is wrong with how it ended."""
    out, err = io.StringIO(), io.StringIO()
    fault = ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    except BaseException as error:  # whatever it is, the command line should have caught it
        code, fault = -1, f"{type(error).__name__} went through: {error}"
    said = err.getvalue()
    if not fault and ("Traceback (most recent" in said or "This should not happen" in said):
        fault = " ".join(said.split())[-300:]
    if not fault and code not in (0, 2):
        fault = f"exit code {code}: {' '.join(said.split())[-300:]}"
    if not fault and code == 2 and not said.strip():
        fault = "refused without words"
    return {"words": words, "given": text[:600], "code": code, "fault": fault}


def _without_network() -> None:
    """Let every connection fail at once: a random name must not be asked for anywhere."""

    def refuse(*_: object, **__: object) -> Any:
        raise OSError("there is no network here")

    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.getaddrinfo = refuse


def _filled(value: Any, world: World) -> Any:
    return value.format(model=world.model, data=world.data) if value in ("{model}", "{data}") else value


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *outer, last = name.split(".")
    for word in outer:
        tree = tree.setdefault(word, {})
    tree[last] = value


def _yaml(value: Any) -> str:
    """Write JSON, which is YAML, but for numbers that JSON has not."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    return text.replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")


def _encoded(records: list[Any], form: str) -> bytes:
    """Write records as a kind of file."""
    form, _, packed = form.partition(".")
    if form in ("csv", "tsv"):
        text = io.StringIO()
        rows = [record for record in records if isinstance(record, dict)]
        writer = csv.DictWriter(
            text, sorted({key for row in rows for key in row}), delimiter="," if form == "csv" else "\t"
        )
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode("utf-8", "surrogatepass")
    elif form in ("parquet", "arrow", "feather"):
        content = _table(records, form)
    elif form in ("json", "txt"):
        content = json.dumps(records, ensure_ascii=False).encode("utf-8", "surrogatepass")
    else:
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
    return gzip.compress(content) if packed == "gz" else content


def _table(records: list[Any], form: str) -> bytes:
    import pyarrow as pa
    from pyarrow import feather, parquet

    try:
        table = pa.Table.from_pylist([record for record in records if isinstance(record, dict)])
        target = io.BytesIO()
        if form == "parquet":
            parquet.write_table(table, target)
        else:
            feather.write_feather(table, target)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    return target.getvalue()
