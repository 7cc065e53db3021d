"""`compare` and `report` on tiny runs: every field of the JSON, killed and continued, failed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest

from bitsandbytes_here import NEEDS_BITSANDBYTES
from forked import Forked, forked_command
from sophia_galore import __version__
from sophia_galore.cli import compare as cli_compare
from sophia_galore.experiment.children import carry_out
from unit.cli.tiny_run import Ended, World, command, json_lines

# 5 steps an epoch, 10 in all; the children of a comparison find out nothing that takes a second.
QUICK = ("memory.predict=false", "training.probe_step=false")
SAVING = (*QUICK, "checkpoint.save_every_steps=1")


@dataclass(frozen=True)
class Compared:
    """A comparison that was carried out."""

    output: Path
    ended: Ended

    @property
    def json(self) -> dict[str, Any]:
        """Its `report.json`."""
        found: dict[str, Any] = json.loads((self.output / "report.json").read_text(encoding="utf-8"))
        return found


def variant(world: World, name: str, old: str = "", new: str = "") -> str:
    """The world's configuration under another name, with another text in one place."""
    path = world.folder / name
    text = world.config.read_text()
    assert old in text
    path.write_text(text.replace(old, new) if old else text)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def forked_runs() -> Iterator[None]:
    """Runs of comparisons in copies of this process; those of `as_a_user` are new interpreters, as for a user."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setattr(cli_compare, "carry_out", partial(carry_out, begin=forked_command))
        yield


@pytest.fixture(scope="module")
def pair(world: World) -> list[str]:
    """Two configurations that differ in the optimizer."""
    return [
        variant(world, "galore.yaml"),
        variant(world, "adamw.yaml", "optimizer: {", "optimizer: {type: adamw, "),
    ]


@pytest.fixture(scope="module")
def whole(world: World, pair: list[str]) -> Compared:
    """Both of them, compared without a disturbance."""
    output = world.folder / "whole"
    return Compared(output, command("compare", *pair, "--output", str(output), *SAVING))


def test_every_field_of_the_json(whole: Compared, world: World, pair: list[str]) -> None:
    assert whole.ended.code == 0, whole.ended.err
    found = whole.json
    assert set(found) == {
        *("runs", "summary", "warnings", "machine", "versions", "data_fingerprint", "date", "command"),
    }
    assert [run["name"] for run in found["runs"]] == ["galore", "adamw"]
    for run in found["runs"]:
        folder = whole.output / "runs" / f"{run['name']}-seed42"
        plan = json.loads((folder / "plan.json").read_text())
        memory = json.loads((folder / "memory_report.json").read_text())
        lines = json_lines(folder / "metrics.jsonl")
        steps = [line for line in lines if "loss" in line]
        evals = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
        seconds = sum(line["tokens"] / line["tokens_per_second"] for line in steps)
        assert run == {
            "name": run["name"],
            "optimizer": run["name"],
            "seed": 42,
            "eval_loss": [evals[5], evals[10]],
            "eval_loss_before": evals[0],
            "peak_allocated_bytes": memory["peak_allocated_bytes"],
            "peak_reserved_bytes": memory["peak_reserved_bytes"],
            "peak_process_bytes": memory["peak_process_bytes"],
            "seconds_per_epoch": pytest.approx(seconds / 2, abs=1e-3),  # rounded to milliseconds
            "tokens_per_second": pytest.approx(sum(line["tokens"] for line in steps) / seconds, abs=1e-3),
            "trained_fraction": 1.0,
            "state_bytes": plan["bytes"]["optimizer state"] + plan["bytes"]["projections"],
            "step": 10,
            "num_steps": 10,
            "finished": True,
            "ended_early": False,
            "exported_step": None,
            "exported_eval_loss": None,
            "waiting_share": None,
            "failure": "",
            "tokens": sum(line["tokens"] for line in steps),
            "folder": str(folder),
            "command": f"sophia-galore train --config {pair[run['name'] == 'adamw']} {' '.join(SAVING)} "
            f"training.seed=42 data.seed=42 data.date={date.today()} training.output_dir={folder}",
        }
        assert found["data_fingerprint"] == plan["data_fingerprint"]
    galore, adamw = found["runs"]
    assert galore["state_bytes"] < adamw["state_bytes"]
    assert [group["name"] for group in found["summary"]] == ["galore", "adamw"]
    assert found["summary"][1]["difference"] == {
        "mean": adamw["eval_loss"][1] - galore["eval_loss"][1],
        "deviation": None,
    }
    # An untrained model against a count of the training text: that is said, and nothing else is.
    assert {warning["kind"] for warning in found["warnings"]} == {"repetition"}
    assert found["machine"]["num_threads"] >= 1 and found["versions"]["sophia-galore"] == __version__
    assert found["command"] == (
        f"sophia-galore compare {' '.join(pair)} --seeds 1 --output {whole.output} {' '.join(SAVING)}"
    )
    assert found["date"].startswith("20")


def test_what_the_terminal_says(whole: Compared) -> None:
    out = whole.ended.out
    assert "optimizer.type: galore in galore; adamw in adamw" in out
    assert "Run 2 of 2: adamw, seed 42" in out
    assert "Lowest eval loss at the end: " in out
    assert f"Report: {whole.output / 'report.html'}" in out


def test_the_same_command_again_trains_nothing_and_says_the_same(whole: Compared, pair: list[str]) -> None:
    files = {path: path.stat().st_mtime_ns for path in whole.output.glob("runs/*/*")}
    before = whole.json
    again = command("compare", *pair, "--output", str(whole.output), *SAVING)
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in whole.output.glob("runs/*/*")} == files
    assert whole.json == before


def test_other_settings_in_the_same_folder_are_refused(whole: Compared, pair: list[str]) -> None:
    ended = command("compare", *pair, "--output", str(whole.output), *SAVING, "training.learning_rate=0.02")
    assert ended.code == 2
    assert "holds a run of other settings" in ended.err and "Choose another --output" in ended.err


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on where the runs lie, when they were made and how busy the machine was."""
    dropped = {"seconds_per_epoch", "tokens_per_second", "peak_process_bytes", "folder", "command", "date"}

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: of(entry) for key, entry in value.items() if key not in dropped}
        return [of(entry) for entry in value] if isinstance(value, list) else value

    found: dict[str, Any] = of(report)
    return found


def interrupted(
    begin: Callable[[list[str], IO[str]], Forked | subprocess.Popen[bytes]],
    words: list[str],
    output: Path,
    number: signal.Signals,
) -> tuple[int, str]:
    """A comparison in a process of its own that gets a signal after some steps of its first run; how it ended."""
    log = output / "said.log"
    with log.open("w", encoding="utf-8") as written:
        process = begin(words, written)
    metrics = output / "runs" / "galore-seed42" / "metrics.jsonl"
    until_s = time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < until_s, log.read_text()
        time.sleep(0.01)
    process.send_signal(number)
    code = process.wait()
    assert not (output / "runs" / "galore-seed42" / "model.safetensors").exists()
    return code, log.read_text()


def as_a_user(words: list[str], written: IO[str]) -> subprocess.Popen[bytes]:
    """`sophia-galore WORDS` in a new interpreter, whose runs are new interpreters too."""
    return subprocess.Popen(
        [sys.executable, "-m", "sophia_galore", *words],
        stdout=written,
        stderr=subprocess.STDOUT,
        # Where the tests run in a shell's background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_killed_in_the_middle_the_same_command_goes_on_to_the_same_report(
    whole: Compared, pair: list[str], tmp_path: Path
) -> None:
    words = ["compare", *pair, "--output", str(tmp_path), *SAVING]
    begin = forked_command if sys.platform == "linux" else as_a_user
    assert interrupted(begin, words, tmp_path, signal.SIGKILL)[0] == -signal.SIGKILL
    ended = command(*words)
    assert ended.code == 0, ended.err
    assert "Going on after step" in ended.out
    assert without_times(Compared(tmp_path, ended).json) == without_times(whole.json)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_saves_and_names_the_way_on(pair: list[str], tmp_path: Path) -> None:
    words = ["compare", *pair, "--output", str(tmp_path), *QUICK]
    code, said = interrupted(as_a_user, words, tmp_path, signal.SIGINT)
    assert code == 0, said
    assert "Stopped in galore, seed 42. Go on with: sophia-galore compare" in said
    assert list((tmp_path / "runs" / "galore-seed42").glob("checkpoint-*"))


def test_a_run_that_fails_is_told_and_the_others_are_compared(world: World, tmp_path: Path) -> None:
    galore = variant(world, "fits.yaml")
    limited = variant(world, "limited.yaml", "optimizer: {", "memory: {limit: 1MiB}\noptimizer: {type: adamw, ")
    ended = command("compare", limited, galore, "--output", str(tmp_path), *QUICK)
    assert ended.code == 1
    assert "limited, seed 42 failed: " in ended.out
    found = Compared(tmp_path, ended).json
    assert [run["name"] for run in found["runs"]] == ["fits"]
    (warning,) = [warning for warning in found["warnings"] if warning["kind"] == "unfinished"]
    assert "failed before its first step: Out of memory" in warning["message"]
    assert "memory.limit" in (tmp_path / "runs" / "limited-seed42.log").read_text()


def test_numbers_that_agree_to_the_bit_are_doubted(world: World, tmp_path: Path) -> None:
    """Two ways to say the same: what the user's first tables showed."""
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for folder, words in zip(folders, ([], ["engine.keep_layers=2"]), strict=True):
        assert world.train(folder, *words, "training.max_steps=2").code == 0
    ended = command("report", *folders, "--output", str(tmp_path))
    assert ended.code == 0, ended.err
    (warning,) = [warning for warning in Compared(tmp_path, ended).json["warnings"] if warning["kind"] == "identical"]
    assert "one, seed 42 and two, seed 42 are identical to the bit in all 2 steps" in warning["message"]
    assert "engine.keep_layers" in warning["message"]


def test_evaluation_data_that_are_trained_on_are_told(world: World, tmp_path: Path) -> None:
    records = json.loads(world.data.read_text())
    held = tmp_path / "held.json"
    held.write_text(json.dumps(records[:5]))
    words = [f"data.eval={held}", "data.eval_fraction=0", "training.max_steps=1"]
    config = variant(world, "leaky.yaml", "eval_fraction: 0.2", "")
    # One run, by the ordinary command, and reported afterwards.
    trained = world.train(str(tmp_path / "run"), *words[:1], *words[2:], "--config", config)
    assert trained.code == 0, trained.err
    ended = command("report", str(tmp_path / "run"))
    assert ended.code == 0, ended.err
    kinds = {warning["kind"]: warning["message"] for warning in Compared(tmp_path / "run", ended).json["warnings"]}
    assert "5 training records are in the evaluation data too" in kinds["overlap"]


@NEEDS_BITSANDBYTES
def test_a_run_that_took_another_path_is_told(world: World, tmp_path: Path) -> None:
    eight = ("quantization.load_in_8bit=true", "quantization.backend=bitsandbytes", "training.max_steps=1")
    trained = world.train(str(tmp_path / "run"), *eight)
    assert trained.code == 0, trained.err
    ended = command("report", str(tmp_path / "run"), "--output", str(tmp_path / "report"))
    assert ended.code == 0, ended.err
    found = Compared(tmp_path / "report", ended).json
    (warning,) = [warning for warning in found["warnings"] if warning["kind"] == "rerouted"]
    assert "asked for galore, but adamw trained" in warning["message"]
    assert "held by bitsandbytes" in warning["message"]
    assert 0 < found["runs"][0]["trained_fraction"] < 1
    assert (found["runs"][0]["optimizer"], ended.out.count("asked for galore")) == ("adamw", 1)


def test_report_of_runs_that_are_there(whole: Compared, tmp_path: Path) -> None:
    runs = [str(whole.output / "runs" / f"{name}-seed42") for name in ("adamw", "galore")]
    by_name = command("report", *runs, "--output", str(tmp_path / "named"))
    as_a_whole = command("report", str(whole.output), "--output", str(tmp_path / "all"))
    assert (by_name.code, as_a_whole.code) == (0, 0), by_name.err + as_a_whole.err
    named, everything = Compared(tmp_path / "named", by_name).json, Compared(tmp_path / "all", as_a_whole).json
    assert [run["name"] for run in named["runs"]] == ["adamw", "galore"]
    assert sorted(named["runs"], key=str) == sorted(everything["runs"], key=str)
    assert sorted(named["runs"], key=str) == sorted(whole.json["runs"], key=str)


BAD: list[tuple[list[str], str]] = [
    (["compare"], "Missing argument"),
    (["compare", "no.yaml", "other.yaml"], "no.yaml"),
    (["compare", "training.max_steps=3"], "No configuration is named"),
    (["compare", "CONFIG"], "One run is nothing to compare"),
    (["compare", "CONFIG", "CONFIG"], "is named twice"),
    (["compare", "CONFIG", "--seeds", "0"], "greater than or equal to 1"),
    (["compare", "CONFIG", "--seeds", "2", "training.max_stepps=3"], "max_steps"),
    (["compare", "CONFIG", "--seeds", "2", "training.output_dir=x"], "Use --output instead"),
    (["report"], "Missing argument"),
    (["report", "nowhere"], "nowhere is not a folder"),
    (["report", "MODEL"], "plan.json can't be read"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_what_is_wrong_is_said(words: list[str], message: str, world: World) -> None:
    names = {"CONFIG": str(world.config), "MODEL": str(world.model)}
    ended = command(*(names.get(word, word) for word in words))
    assert ended.code == 2
    assert message in ended.err and "Traceback" not in ended.err
