"""What a plan is for: looked up without weights, network or GPU, and read from data only where these are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sophia_galore.config import load_config
from sophia_galore.config.dump import changed
from sophia_galore.config.schema import RunConfig
from sophia_galore.errors import ConfigError, EnvironmentProblem, ModelError
from sophia_galore.memory.planner import Planner, find_planner
from sophia_galore.model import reach
from sophia_galore.plan.detect import planned_device
from sophia_galore.plan.facts import DeviceFacts
from tiny import write_tiny_data, write_tiny_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(reach, "probe", forbidden)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("world")
    write_tiny_model(made / "model", "qwen2", tied=False)
    write_tiny_data(made / "data.json")
    return made


def config_of(folder: Path, *words: str) -> RunConfig:
    names = [f"model.name={folder / 'model'}", f"data.train={folder / 'data.json'}", "training.max_length=64"]
    return load_config(None, [*names, f"model.cache_dir={folder / 'cache'}", *words])


def found(config: RunConfig, *, reads_data: bool = True) -> tuple[Planner, list[str]]:
    said: list[str] = []
    return find_planner(config, said.append, reads_data=reads_data), said


def test_a_built_in_model_is_known_without_network(tmp_path: Path) -> None:
    config = load_config(None, ["model.name=smollm2-135m", f"model.cache_dir={tmp_path}", "data.train=none.json"])
    planner, said = found(config)
    assert planner.source == "built-in" and len(planner.layer_names) == 30
    assert any("built-in specification" in line for line in said)
    workload = planner.workload(config)
    assert workload.source == "examples of training.max_length: 8 x 1 x 512 tokens"
    assert len(workload.train) == 8 and workload.eval == workload.train
    assert planner.num_steps(config) > 10**6, "enough for all that recurs"
    assert not list(tmp_path.iterdir())


def test_data_that_are_here_are_read(folder: Path) -> None:
    config = config_of(
        folder, "training.batch_size=2", "training.gradient_accumulation_steps=3", "training.max_steps=5"
    )
    planner, _ = found(config)
    workload = planner.workload(config)
    assert workload.source.startswith("the longest examples of ") and " 3 x 2 x " in workload.source
    assert workload.train[0].input_ids.shape[0] == 2 and workload.train[0].input_ids.shape[1] < 64
    # The probe step has the longest examples of all, the largest step those that come together.
    numbers = [sum(batch.input_ids.numel() for batch in batches) for batches in (workload.train, workload.probe)]
    assert numbers[0] < numbers[1]
    assert planner.workload(changed(config, {"training.probe_step": False})).probe == ()
    assert workload.eval and planner.num_steps(config) == 5
    cut = config_of(folder, "training.max_length=24", "data.eval_fraction=0")
    shorter = planner.workload(cut)
    assert max(batch.input_ids.shape[1] for batch in shorter.train) == 24 and shorter.eval == ()


@pytest.mark.parametrize("missing", ["data", "tokenizer", "wish"])
def test_data_are_read_only_if_they_and_the_tokenizer_are_here(missing: str, folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    if missing == "data":
        config = config_of(folder, "data.train=not/here.json")
    if missing == "tokenizer":  # a model that is known by its specification only
        config = config_of(folder, "model.name=smollm2-135m")
    planner, _ = found(config, reads_data=missing != "wish")
    assert planner.workload(config).source.startswith("examples of training.max_length: 8 x 1 x 64")


def test_a_gpu_that_is_not_here_can_be_planned_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:0"):
        assert planned_device(name) == DeviceFacts("cuda:0", "a CUDA card", real_bf16=True)
    planner, _ = found(config_of(folder, "training.device=cuda"))
    decided = planner.decide(config_of(folder, "training.device=cuda"))
    assert decided.compute_dtype == torch.bfloat16 and not planner.facts.device.is_cpu
    assert planned_device("auto") == planned_device("cpu") == DeviceFacts()
    with pytest.raises(EnvironmentProblem, match="is not a device"):
        planned_device("gpu")


def test_what_can_not_be_trained_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knows 128 positions"):
        planner, _ = found(config_of(folder, "training.max_length=129"))
        planner.decide(config_of(folder, "training.max_length=129"))
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="'t5' is not one of"):
        found(config_of(folder, f"model.name={tmp_path / 't5'}"))


def test_an_estimate_is_made_of_what_is_here(folder: Path) -> None:
    config = config_of(folder, "training.gradient_accumulation_steps=2", "optimizer.galore.rank=8")
    planner, _ = found(config)
    forecast = planner.forecast(config, 0)
    assert planner.num_layers == 3 and forecast.phases["eval"] > forecast.phases["load"]
    assert 0 < planner.standing_bytes(config, planner.streamed(config)) < forecast.peak_bytes
