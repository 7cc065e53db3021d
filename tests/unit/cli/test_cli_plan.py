"""`sophia-galore plan`: what a run will need, and settings that fit, without weights, data or a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sophia_galore.cli import plan as plan_command
from sophia_galore.cli.write_back import write_config
from sophia_galore.config import RunConfig, load_config
from sophia_galore.config.dump import changed
from sophia_galore.errors import EnvironmentProblem, UserError
from sophia_galore.memory.matrix import Row
from unit.cli.tiny_run import World, command

SHORT = ("training.max_length=64", "training.gradient_accumulation_steps=2")
SMALL = ("--model", "smollm2-135m", *SHORT)
KEYS = {"predicted_peak_bytes", "phases", "categories", "limit_bytes", "fits", "settings"}


def plan_json(*words: str) -> dict[str, Any]:
    ended = command("plan", "--json", *words)
    assert ended.code == 0, ended.err
    plan: dict[str, Any] = json.loads(ended.out)
    return plan


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder without models and data, from where no hub is reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_model_by_name_and_a_card_that_is_not_here() -> None:
    plan = plan_json(*SMALL, "--memory", "4GiB", "--device", "cuda")
    assert plan.keys() >= KEYS
    assert plan["num_parameters"] == 134_515_008
    assert (plan["device"], plan["compute_dtype"]) == ("cuda:0", "bfloat16")
    assert plan["limit_bytes"] == 4 * 2**30 and plan["fits"] is True
    # Context and other programs, and what lies between blocks.
    assert 0.8 * 2**30 < plan["reserve_bytes"] < 1.1 * 2**30
    assert plan["predicted_peak_bytes"] == max(plan["phases"].values()) == sum(plan["categories"].values())
    assert plan["left_bytes"] == plan["limit_bytes"] - plan["reserve_bytes"] - plan["predicted_peak_bytes"]
    assert plan["settings"]["engine.keep_layers"] == 0


def tiny(world: World) -> tuple[str, ...]:
    """Words for a tiny model, without data, on this machine."""
    return ("--model", str(world.model), *SHORT, "optimizer.galore.rank=8", "--device", "cpu")


def test_on_this_machine_all_of_the_limit_is_for_tensors(world: World) -> None:
    plan = plan_json(*tiny(world), "--memory", "4GiB")
    assert (plan["compute_dtype"], plan["reserve_bytes"]) == ("float32", 0)
    tight = plan_json(*tiny(world), "--memory", str(plan["predicted_peak_bytes"]))
    assert tight["fits"] is True and tight["left_bytes"] == 0
    less = ("--memory", str(plan["predicted_peak_bytes"] - 1))
    assert plan_json(*tiny(world), *less, "memory.placement=device", "engine.full_gradients=layer")["fits"] is False


HOST_KEYS = {"host_bytes", "host_limit_bytes", "disk_bytes", "resident_layers", "buffer_bytes", "transfers"}


def test_what_the_card_has_no_room_for_goes_to_host_memory_and_then_to_disk() -> None:
    """Weights in bf16 and two moments in fp32: 1.35 GB, of which the card holds a part."""
    words = (*SMALL, "--optimizer", "adamw", "model.store=bf16", "--device", "cuda", "--memory", "1700MiB")
    host, mixed, disk = (plan_json(*words, "--host-memory", size) for size in ("16GiB", "300MiB", "0"))
    for plan in (host, mixed, disk):
        assert plan.keys() >= KEYS | HOST_KEYS and plan["fits"] is True
        assert plan["host_bytes"] <= plan["host_limit_bytes"] and plan["resident_layers"] < 30
        moved = plan["transfers"]
        assert moved["read_bytes"] > moved["written_bytes"] > 0 and moved["move_s"] > 0 < moved["compute_s"]
        assert moved["tokens"] == 2 * 64 and not moved["machine"]["measured"], "the card is not here"
        assert 0 < plan["buffer_bytes"] < plan["standing_bytes"]["weights"]
    assert (host["disk_bytes"], host["transfers"]["disk_written_bytes"], host["host_limit_bytes"]) == (0, 0, 16 * 2**30)
    assert mixed["host_bytes"] > 0 and mixed["disk_bytes"] > 0 and mixed["transfers"]["disk_written_bytes"] > 0
    assert disk["host_bytes"] == 0 and disk["disk_bytes"] == host["host_bytes"] > 2**29
    assert mixed["host_bytes"] + mixed["disk_bytes"] == host["host_bytes"]
    assert disk["transfers"]["disk_written_bytes"] == disk["transfers"]["written_bytes"]
    assert host["predicted_peak_bytes"] == mixed["predicted_peak_bytes"] == disk["predicted_peak_bytes"]


def test_where_all_has_room_nothing_streams() -> None:
    plan = plan_json(*SMALL, "--device", "cuda", "--memory", "8GiB", "--host-memory", "1GiB")
    assert plan["transfers"] is None and plan["resident_layers"] == 30
    assert plan["host_bytes"] == plan["disk_bytes"] == plan["buffer_bytes"] == 0


def test_host_memory_that_is_too_small_for_what_was_asked_is_said() -> None:
    words = (*SMALL, "--device", "cuda", "--memory", "4GiB", "memory.placement=host", "memory.resident_layers=0")
    plan = plan_json(*words, "--host-memory", "100MiB")
    assert plan["fits"] is False and plan["host_bytes"] > plan["host_limit_bytes"] == 100 * 2**20
    assert plan_json(*words, "--host-memory", "16GiB")["fits"] is True
    ended = command("plan", *words, "--host-memory", "many")
    assert ended.code == 2 and "--host-memory" in ended.err


def test_without_a_limit_nothing_is_said_about_fitting(world: World) -> None:
    plan = plan_json(*tiny(world))
    assert (plan["limit_bytes"], plan["fits"], plan["left_bytes"]) == (None, None, None)
    assert "Whether that fits, --memory 4GiB tells." in command("plan", *tiny(world)).out


def test_what_is_shown() -> None:
    shown = command("plan", *SMALL, "--device", "cuda", "--memory", "4GiB").out
    for expected in (
        "134.5 M parameters, 30 layers",
        "backward",
        "Stays all the time, exactly: weights",
        "free",
        "fits",
    ):
        assert expected in shown
    tight = command("plan", *SMALL, "--device", "cuda", "--memory", "1200MiB", "memory.placement=device")
    assert tight.code == 0 and "does not fit into 1.17 GiB" in tight.out and "--fit" in tight.out


@pytest.mark.thorough
def test_the_reference_case_predicts_at_most_a_gibibyte() -> None:
    """Qwen2-0.5B, 8 x 512 tokens, GaLore of rank 128, int8 weights, 8-bit state, on a card."""
    root = Path(__file__).resolve().parents[3]
    plan = plan_json("--config", str(root / "configs/galore_config.yaml"), "--device", "cuda")
    assert plan["predicted_peak_bytes"] <= 2**30
    assert plan["planned_for"] == "examples of training.max_length: 8 x 1 x 512 tokens"
    honest = plan_json("--config", str(root / "configs/galore_compare_adamw.yaml"), "--device", "cuda")
    # bf16 weights and two moments in fp32: ten bytes for each of 494 M parameters stay all the time.
    assert honest["predicted_peak_bytes"] > 10 * 494_032_768


def test_fit_writes_a_configuration_that_is_what_it_says(world: World, tmp_path: Path) -> None:
    words = (*tiny(world), "training.batch_size=4", "--optimizer", "adamw")
    whole = plan_json(*words)["predicted_peak_bytes"]
    limit = whole * 2 // 3
    found = plan_json(*words, "--fit", "--memory", str(limit))
    assert found["fits"] is True and found["predicted_peak_bytes"] <= limit
    assert found["tried"][0]["predicted_peak_bytes"] == whole and not found["tried"][0]["fits"]
    assert found["tried"][-1]["fits"]
    written = tmp_path / "fitted.yaml"
    config = load_config(written, [])
    assert config.training.batch_size * config.training.gradient_accumulation_steps == 8
    again = plan_json("--config", str(written))
    assert again["predicted_peak_bytes"] == found["predicted_peak_bytes"]
    assert again["settings"] == found["settings"]


def test_a_file_of_its_own_making_is_replaced_and_no_other(tmp_path: Path) -> None:
    path, config = tmp_path / "fitted.yaml", RunConfig()
    write_config(config, path)
    write_config(changed(config, {"training.seed": 7}), path)
    assert load_config(path, []) == changed(config, {"training.seed": 7})
    path.write_text("model: {name: mine}\n")
    with pytest.raises(UserError, match="not made by this command"):
        write_config(config, path)
    assert path.read_text() == "model: {name: mine}\n"
    with pytest.raises(EnvironmentProblem, match="can't be written"):
        write_config(config, tmp_path / "nowhere" / "fitted.yaml")


def test_where_nothing_fits_the_ladder_is_shown_and_nothing_written(tmp_path: Path) -> None:
    """Arithmetic alone says so, without a simulation of what comes and goes, but for the last row."""
    words = ("--model", "qwen3-8b", "training.max_length=16", "training.gradient_accumulation_steps=1")
    ended = command("plan", *words, "--device", "cuda", "--fit", "--memory", "4GiB", "memory.placement=device")
    assert ended.code == 2
    assert "weight format" in ended.out and "disk" not in ended.out and "No settings fit into 4.00 GiB" in ended.err
    # Weights in fp32 alone: four bytes for each of 8190.7 M parameters.
    assert re.search(r"as asked +> 3[0-9]\.[0-9]+ GiB +no", ended.out)
    assert not (tmp_path / "fitted.yaml").exists()


def test_a_run_that_was_planned_needs_what_was_planned(world: World, tmp_path: Path) -> None:
    """With data and tokenizer here, the plan is for the data's longest examples, as the run's own prediction is."""
    words = ("--config", str(world.config), "training.max_steps=1", f"training.output_dir={tmp_path / 'run'}")
    plan = plan_json(*words)
    assert plan["planned_for"].startswith(f"the longest examples of {world.data}")
    assert command("train", *words, "memory.predict=true").code == 0
    report = json.loads((tmp_path / "run" / "memory_report.json").read_text())
    assert report["predicted_peak_bytes"] == plan["predicted_peak_bytes"]


@pytest.mark.drawn
def test_a_picture(world: World, tmp_path: Path) -> None:
    ended = command("plan", *tiny(world), "--picture", str(tmp_path / "plan.png"))
    assert ended.code == 0 and (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_matrix_goes_between_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("small", ("int8, 8-bit state", "fp32, keeps all graphs")), Row("large", (None, "int8"))]
    computed: list[list[str]] = []

    def matrix(asked: object, models: list[str], limits: object) -> list[Row]:
        computed.append(models)
        return rows

    monkeypatch.setattr(plan_command, "matrix", matrix)
    monkeypatch.setattr(plan_command, "LIMITS", (2**30, 8 * 2**30))
    text = tmp_path / "text.md"
    text.write_text("before\n<!-- plan --matrix -->\nold\n<!-- /plan --matrix -->\nafter\n")
    assert command("plan", "--matrix", "--output", str(text)).code == 0
    table = ["| model | 1.00 GiB | 8.00 GiB |", "|---|---|---|"]
    table += ["| small | int8, 8-bit state | fp32, keeps all graphs |", "| large | - | int8 |"]
    assert text.read_text().splitlines() == [
        "before",
        "<!-- plan --matrix -->",
        *table,
        "<!-- /plan --matrix -->",
        "after",
    ]
    assert command("plan", "--matrix").out.splitlines() == table
    # Those of the table are computed again; with a name, only that one, and the others stay.
    assert command("plan", "--matrix", "--output", str(text)).code == 0
    rows[:] = [Row("new", ("bf16", None))]
    assert command("plan", "--matrix", "--output", str(text), "--model", "new").code == 0
    assert text.read_text().splitlines()[2:-2] == [*table, "| new | bf16 | - |"]
    assert computed[-2:] == [["small", "large"], ["new"]]
    text.write_text("no marks\n")
    assert command("plan", "--matrix", "--output", str(text)).code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "qwen9-0.5b"), "Unknown model 'qwen9-0.5b'"),
        ((*SMALL, "--memory", "0"), "--memory is 0 bytes"),
        ((*SMALL, "--memory", "-4GiB"), "--memory is no size"),
        ((*SMALL, "--memory", "4 apples"), "--memory is no size"),
        ((*SMALL, "--memory", "4"), "4 bytes"),
        ((*SMALL, "--memory", "4GiB", "memory.limit=2GiB"), "memory.limit=2GiB contradicts"),
        ((*SMALL, "memory.limit=1GiB", "memory.reserve=2GiB"), "memory.reserve"),
        ((*SMALL, "--fit", "--device", "cpu"), "--fit needs a limit"),
        ((*SMALL, "--device", "tpu"), "tpu"),
        ((*SMALL, "training.max_length=0"), "training.max_length"),
        ((*SMALL, "engine.keep_layers=auto", "--device", "cpu"), "there is no limit"),
        ((*SMALL, "training.max_length=100000"), "knows 8192 positions"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--model", "."), "config.json"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(words: tuple[str, ...], said: str) -> None:
    ended = command("plan", *words)
    assert ended.code == 2 and said in ended.err
    assert "Traceback" not in ended.err and len(ended.err.splitlines()) <= 4


@pytest.mark.parametrize("size", ["4GiB", "4GB", "4G", "4294967296"])
def test_sizes(world: World, size: str) -> None:
    plan = plan_json(*tiny(world), "--memory", size)
    assert plan["limit_bytes"] == (4 * 10**9 if size == "4GB" else 4 * 2**30)


def test_a_card_that_is_here_is_the_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**30, 6 * 2**30))
    plan = plan_json(*tiny(world)[:-1], "cuda")
    assert plan["limit_bytes"] == 6 * 2**30 and plan["fits"] is True
    assert plan["reserve_bytes"] > 2**30  # what is taken already, and a share for gaps
