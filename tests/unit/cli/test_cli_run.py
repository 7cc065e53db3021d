"""A whole run through the command line: what it leaves behind, and that it is true."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from sophia_galore.config import load_config
from sophia_galore.data.dataset import load_data
from sophia_galore.train import answers
from unit.cli.tiny_run import Ended, World, command, json_lines, sha256

FILES = [
    "README.md",
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "metrics.jsonl",
    "trainer_state.json",
    "environment.json",
    "memory_report.json",
    "plan.json",
    "run_config.yaml",
    "loss.png",
    "memory.png",
    "written.json",
]
# Name of the run: its words, the dtype of its final model.
RUNS: dict[str, tuple[list[str], torch.dtype]] = {
    "galore-fp32": ([], torch.float32),
    "adamw-bf16": (["--optimizer", "adamw", "model.store=bf16"], torch.bfloat16),
    "galore-as-fp16": (["export.dtype=fp16", "training.max_steps=1"], torch.float16),
    "galore-bf16-as-fp32": (["model.store=bf16", "export.dtype=fp32", "training.max_steps=1"], torch.float32),
}
NUMBERS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second")
BYTES = ("allocated_bytes", "reserved_bytes")


@pytest.fixture(scope="module")
def world(world: World) -> World:
    """The runs of this file are those that a user gets."""
    return replace(world, quick=False)


@pytest.fixture(scope="module")
def ended(world: World) -> dict[str, Ended]:
    return {name: world.train(name, *words) for name, (words, _) in RUNS.items()}


@pytest.fixture(scope="module")
def finished(world: World, ended: dict[str, Ended]) -> Path:
    """The folder of the plain run."""
    assert ended["galore-fp32"].code == 0, ended["galore-fp32"].err
    return world.folder / "galore-fp32"


@pytest.mark.drawn  # and so are those of all these runs, which the first of these tests makes
@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_well_and_leaves_its_files(name: str, world: World, ended: dict[str, Ended]) -> None:
    assert ended[name].code == 0, ended[name].err
    folder = world.folder / name
    assert {file for file in FILES if not (folder / file).is_file()} == set()
    assert all((folder / file).stat().st_size > 0 for file in FILES)
    for picture in ("loss.png", "memory.png"):
        assert (folder / picture).stat().st_size > 10_000, "drawn, and not empty"
    left_over = {path.name for path in folder.iterdir()} - set(FILES)
    assert left_over == set(), "nothing else lies in the folder"


@pytest.mark.parametrize("name", RUNS)
def test_the_final_model_is_an_ordinary_one(name: str, world: World, ended: dict[str, Ended]) -> None:
    folder, dtype = world.folder / name, RUNS[name][1]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype
    assert model.config.use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(world.model).chat_template
    assert tokenizer("what is two")["input_ids"] == AutoTokenizer.from_pretrained(world.model)("what is two").input_ids


@pytest.mark.parametrize("name", ["galore-fp32", "adamw-bf16"])
def test_plain_transformers_finds_the_same_eval_loss(name: str, world: World, ended: dict[str, Ended]) -> None:
    folder = world.folder / name
    recorded = [line["eval_loss"] for line in json_lines(folder / "metrics.jsonl") if "eval_loss" in line]
    # Here as there: bf16 weights, float32 arithmetic. 1e-5: other shapes of the sums (padding, chunks) in float32.
    assert plain_eval_loss(folder, folder) == pytest.approx(recorded[-1], rel=1e-5)
    assert plain_eval_loss(folder, world.model, bf16="bf16" in name) == pytest.approx(recorded[0], rel=1e-5)
    assert recorded[-1] < recorded[0] - 0.1, "it learned something"


def plain_eval_loss(run: Path, model_folder: Path, *, bf16: bool = False) -> float:
    """Loss a counted token of a model on a run's evaluation data, one example at a time."""
    config = load_config(run / "run_config.yaml")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model = (model.bfloat16() if bf16 else model).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = load_data(config.data, max_length=config.training.max_length, seed=config.training.seed, tokenizer=tokenizer)
    assert len(data.eval) == 4
    total, count = 0.0, 0
    for example in data.eval:
        tokens = example.input_ids.long()[None]
        labels = tokens[0, 1:].masked_fill(~example.counted[1:], -100)
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def test_each_step_has_its_line(finished: Path) -> None:
    lines = json_lines(finished / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert all(key in line for line in steps for key in (*NUMBERS, *BYTES))
    assert all(math.isfinite(line[key]) for line in steps for key in NUMBERS)
    assert [line["epoch"] for line in steps] == pytest.approx([step / 5 for step in range(1, 11)])
    assert steps[0]["learning_rate"] == 0.01
    assert steps[0]["allocated_bytes"] > 0
    # Two epochs over the same examples: the tokens of each are the same.
    assert sum(line["tokens"] for line in steps[:5]) == sum(line["tokens"] for line in steps[5:])


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], [0, 5, 10]),
        (["training.max_steps=7"], [0, 5, 7]),
        (["training.max_steps=7", "training.eval_every_steps=3"], [0, 3, 6, 7]),
        (["training.epochs=0.5"], [0, 3]),
        (["data.eval_fraction=0", "training.max_steps=2"], []),
    ],
)
def test_evaluations_are_where_they_should_be(words: list[str], steps: list[int], world: World, tmp_path: Path) -> None:
    ended = world.train(str(tmp_path / "run"), *words, "memory.track_steps=0")
    assert ended.code == 0, ended.err
    evals = [line for line in json_lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in evals] == steps
    assert all(line["eval_loss"] > 0 and "epoch" in line for line in evals)
    assert ended.out.count("eval loss") == len(steps)


def test_what_was_configured_is_kept_and_reads_back(world: World, finished: Path) -> None:
    asked = load_config(world.config, [f"training.output_dir={finished}", "memory.predict=false"])
    assert load_config(finished / "run_config.yaml") == asked


def test_trainer_state_has_every_record(finished: Path) -> None:
    state = TrainerState.load_from_json(str(finished / "trainer_state.json"))
    assert (state.global_step, state.epoch, state.max_steps, state.num_train_epochs) == (10, 2.0, 10, 2.0)
    lines = json_lines(finished / "metrics.jsonl")
    assert [entry["step"] for entry in state.log_history] == [line["step"] for line in lines]


def test_the_memory_report_is_that_of_the_run(finished: Path) -> None:
    report = read(finished / "memory_report.json")
    plan = read(finished / "plan.json")
    assert report["device"] == "cpu"
    assert sum(report["categories"].values()) == report["peak_allocated_bytes"] == max(report["phases"].values())
    assert report["peak_process_bytes"] > report["peak_allocated_bytes"]
    assert all(report["phases"].values())
    # What stays for the whole run is known to the byte before it begins.
    for category in ("weights", "optimizer state", "projections"):
        assert report["categories"][category] == plan["bytes"][category]
    assert report["categories"]["gradients"] > 0
    assert report["categories"]["activations"] > 0
    assert [entry["step"] for entry in report["steps"]] == list(range(1, 11))
    # The probe step's batch is as large as any, so the peak is there.
    largest = max(entry["allocated_bytes"] for entry in report["steps"][:2])
    assert 0.5 * report["peak_allocated_bytes"] < largest <= report["peak_allocated_bytes"]


@pytest.mark.parametrize("track_steps", [0, 1])
def test_a_run_of_one_step_has_a_memory_report(track_steps: int, world: World, tmp_path: Path) -> None:
    words = ["training.max_steps=1", f"memory.track_steps={track_steps}"]
    assert world.train(str(tmp_path / "run"), *words).code == 0
    report = read(tmp_path / "run" / "memory_report.json")
    assert all(report[key] > 0 for key in report if key.startswith("peak"))
    assert len(report["steps"]) == 1
    assert (report["categories"]["gradients"] > 0) == (track_steps > 0)
    assert (tmp_path / "run" / "memory.png").is_file()


def test_weights_in_bf16_are_counted_as_such(world: World, ended: dict[str, Ended]) -> None:
    report = read(world.folder / "adamw-bf16" / "memory_report.json")
    plan = read(world.folder / "adamw-bf16" / "plan.json")
    assert plan["bytes"]["weights"] == 2 * plan["num_parameters"]
    # Float32 copies of the layer that is at work come on top, if the peak is where a layer is at work.
    assert plan["bytes"]["weights"] <= report["categories"]["weights"] < 3 * plan["bytes"]["weights"]
    assert report["categories"]["optimizer state"] == plan["bytes"]["optimizer state"] == 8 * plan["num_parameters"]
    assert report["categories"]["projections"] == plan["bytes"]["projections"] == 0


def test_the_run_says_what_it_does(ended: dict[str, Ended], finished: Path) -> None:
    out = ended["galore-fp32"].out
    for words in ("what is trained by what", "10 steps on 18 examples", "4 held out", "Training example 2", "⟦"):
        assert words in out
    assert out.count("tokens/s") == 10
    before, _, after = out.partition("Peak memory")
    assert "W weights" in before and "S optimizer state" in before and "W weights" not in after
    assert "after training: -" in out and "Peak memory" in out and str(finished) in out


def test_resuming_a_finished_run_changes_nothing(world: World, finished: Path) -> None:
    before = sha256(finished / "model.safetensors")
    metrics = (finished / "metrics.jsonl").read_text()
    # The fixture may have trained it twice, when tests were dealt to another process.
    moved = set(world.folder.glob("galore-fp32.previous*"))
    ended = world.train("galore-fp32", "--resume")
    assert ended.code == 0, ended.err
    assert "finished" in ended.out
    assert sha256(finished / "model.safetensors") == before
    assert (finished / "metrics.jsonl").read_text() == metrics
    assert set(world.folder.glob("galore-fp32.previous*")) == moved


def test_a_second_run_moves_the_first_aside_and_has_the_same_bits(world: World, tmp_path: Path) -> None:
    words = [str(tmp_path / "run"), "training.max_steps=2", "memory.track_steps=0"]
    assert world.train(*words).code == 0
    first = sha256(tmp_path / "run" / "model.safetensors")
    ended = world.train(*words)
    assert ended.code == 0 and "was moved to" in ended.out
    assert sha256(tmp_path / "run" / "model.safetensors") == first
    assert sha256(tmp_path / "run.previous-1" / "model.safetensors") == first


def test_questions_are_answered_before_and_after(world: World, tmp_path: Path) -> None:
    questions = ["what is one", "what follows"]
    ended = world.train(
        str(tmp_path / "run"),
        "training.max_steps=1",
        f"training.sample_questions={json.dumps(questions)}",
        "training.sample_max_new_tokens=3",
    )
    assert ended.code == 0, ended.err
    answers = read(tmp_path / "run" / "answers.json")
    assert [list(answers[when]) for when in ("before", "after")] == [questions, questions]
    assert "before:" in ended.out and "after:" in ended.out


def test_memory_of_the_answers_belongs_to_a_phase(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_bytes = 50_000_000

    def answer(*args: Any, **kwargs: Any) -> list[str]:
        return [str(torch.zeros(large_bytes, dtype=torch.uint8).numel())]

    monkeypatch.setattr(answers, "answer", answer)
    words = ["training.max_steps=1", 'training.sample_questions=["what"]']
    assert world.train(str(tmp_path / "run"), *words).code == 0
    report = read(tmp_path / "run" / "memory_report.json")
    assert large_bytes < report["peak_allocated_bytes"] == max(report["phases"].values())
    assert sum(report["categories"].values()) == report["peak_allocated_bytes"]
    assert report["steps"][0]["allocated_bytes"] < large_bytes


def test_the_placeholder_in_output_dir_is_the_optimizer(world: World, tmp_path: Path) -> None:
    words = ["training.max_steps=1", "memory.track_steps=0", "--optimizer", "adamw"]
    assert world.train(str(tmp_path / "run-{optimizer}"), *words).code == 0
    assert read(tmp_path / "run-adamw" / "plan.json")["optimizer"] == "adamw"


def test_check_writes_nothing_and_its_json_is_the_plan(world: World, finished: Path, tmp_path: Path) -> None:
    words = ["check", "--config", str(world.config), f"training.output_dir={tmp_path / 'run'}"]
    ended = command(*words)
    assert ended.code == 0 and "what is trained by what" in ended.out and "Configuration OK." in ended.out
    plan = json.loads(command(*words, "--json").out)
    assert plan == read(finished / "plan.json")
    assert not (tmp_path / "run").exists()


def read(path: Path) -> Any:
    return json.loads(path.read_text())
