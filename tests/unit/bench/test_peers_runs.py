"""Both sides of bench/peers.py do the same work, and are measured by the same functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import peers_child
from engines import load_parts, make_engine
from held_out import eval_loss, held_out_batches
from hf_trainer import PlainTensorTracker, micro_batches, run_trainer
from measured import reason, weights_sha256
from ours import run_ours
from peers_sides import BASE, SIDES, Work, run_config
from sophia_galore.config import RunConfig
from sophia_galore.data.portion import Portion
from sophia_galore.engine.stepper import Stepper
from tiny import ragged_batches, write_tiny_data, write_tiny_model


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    folder = tmp_path_factory.mktemp("peers")
    model, data = write_tiny_model(folder / "model"), write_tiny_data(folder / "data.json", 60)
    yield Work(str(model), str(data), steps=4, batch_size=2, accumulation=3, max_length=40, eval_examples=3, seed=0)


@pytest.fixture
def config_of(work: Work, tmp_path: Path) -> Callable[..., RunConfig]:
    def config(name: str, **more: Any) -> RunConfig:
        return run_config(SIDES[name], work, rate=2e-4, output=tmp_path / name, **more)

    return config


def test_both_sides_take_the_same_micro_batches(
    config_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[list[int]]]] = {"ours": [], "trainer": []}
    take, forward = Stepper.take, LlamaForCausalLM.forward

    def taken(self: Stepper, portion: Portion, **more: Any) -> Any:
        seen["ours"] += [batch.input_ids.tolist() for batch in portion.batches]
        return take(self, portion, **more)

    def forwarded(self: Any, input_ids: Any = None, **more: Any) -> Any:
        seen["trainer"].append(input_ids.tolist())
        return forward(self, input_ids=input_ids, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "take", taken)
        ours = run_ours(config_of("ours-adamw"))
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", forwarded)
        theirs = run_trainer(config_of(BASE), SIDES[BASE].trainer_options)
    assert len(seen["ours"]) == 4 * 3
    assert seen["trainer"] == seen["ours"]
    assert [tokens for tokens, _ in ours.steps] == [tokens for tokens, _ in theirs.steps]
    assert ours.peak_process_bytes > 0 and theirs.peak_process_bytes > 0


def test_both_sides_take_the_same_steps(config_of: Callable[..., RunConfig], work: Work) -> None:
    """Rates, schedule and the loss's denominator are the same: so are AdamW's weights after four steps."""
    config = config_of("ours-adamw")
    run_ours(config)
    run_trainer(config_of(BASE), SIDES[BASE].trainer_options)
    batches = held_out_batches(config)
    folders = (Path(config.run_folder), Path(config_of(BASE).run_folder))
    before, ours, theirs = (eval_loss(folder, batches) for folder in (Path(work.model), *folders))
    assert abs(ours - before) > 1e-3
    # Worst seen over four models 4.8e-7 (sums in another order), so 2e-6.
    assert abs(ours - theirs) < 2e-6


def test_one_micro_batch_holds_the_whole_effective_batch(config_of: Callable[..., RunConfig]) -> None:
    parts, whole = micro_batches(config_of(BASE)), micro_batches(config_of(BASE, one_micro_batch=True))
    for some, (one,) in zip(parts, whole, strict=True):
        assert one.num_tokens == sum(batch.num_tokens for batch in some)
        assert one.num_counted == sum(batch.num_counted for batch in some)
        rows = [row.tolist() for batch in some for row in batch.input_ids]
        assert len(rows) == one.input_ids.shape[0]
        # The same examples in the same order, padded further.
        assert all(row.tolist()[: len(part)] == part for row, part in zip(one.input_ids, rows, strict=True))


def test_the_loss_is_our_engines(work: Work) -> None:
    batches = ragged_batches()
    summed, counted = make_engine(*load_parts(Path(work.model))).evaluate(batches)
    # Worst seen over four models 1.2e-7 (sums in another order), so 1e-6.
    assert eval_loss(Path(work.model), batches) == pytest.approx(summed / counted, rel=1e-6)


def test_held_out_examples_are_not_those_of_the_run(config_of: Callable[..., RunConfig], work: Work) -> None:
    config = config_of(BASE)
    more = config.model_copy(update={"data": config.data.model_copy(update={"max_eval_examples": 3})})
    rows = [row.tolist() for batch in held_out_batches(more) for row in batch.input_ids]
    assert len(rows) == 3
    # Taking more of them changes nothing for training.
    for few, many in zip(micro_batches(config), micro_batches(more), strict=True):
        assert all(torch.equal(one.input_ids, other.input_ids) for one, other in zip(few, many, strict=True))


def test_a_run_with_too_few_examples_is_refused(config_of: Callable[..., RunConfig]) -> None:
    with pytest.raises(ValueError, match="micro-batches: give more examples"):
        micro_batches(config_of(BASE, steps=50))


def test_tracking_sees_weights_gradients_and_moments(config_of: Callable[..., RunConfig], work: Work) -> None:
    tracked = run_trainer(config_of(BASE, steps=2), SIDES[BASE].trainer_options, tracked=True).peak_tracked_bytes
    num_weights = sum(param.numel() for param in LlamaForCausalLM.from_pretrained(work.model).parameters())
    assert tracked is not None
    # float32: weight, gradient and two moments; the rest is activations of a tiny model.
    assert 16 * num_weights < tracked < 40 * num_weights


def test_a_step_that_can_not_be_followed_leaves_its_state_counted(config_of: Callable[..., RunConfig]) -> None:
    config, options = config_of(BASE, steps=2), SIDES[BASE].trainer_options
    followed = run_trainer(config, options, tracked=True).peak_tracked_bytes
    apart = run_trainer(config, replace(options, compiles=True), tracked=True).peak_tracked_bytes
    # A fused step makes nothing but its state, so both see the same peak.
    assert apart == followed


def test_tensors_made_of_tensors_count_as_what_they_are_made_of() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with PlainTensorTracker(torch.device("cpu")) as tracker:
        pair = TwoTensor(torch.zeros(1000), torch.zeros(1000))
        assert tracker.allocated_bytes == 8000
        more = pair + 1
        assert tracker.allocated_bytes == 16000
        del more
        assert tracker.allocated_bytes == 8000


@pytest.mark.parametrize("name", [BASE, "ours-galore", "ours-galore-int8"])
def test_a_side_that_resumes_ends_with_the_same_bits(name: str, work: Work, tmp_path: Path) -> None:
    task = {"task": "saving", "side": name, "rate": 1e-3, "work": vars(work)}
    whole = peers_child.carry_out({**task, "output": str(tmp_path / "whole")})
    half = str(tmp_path / "whole" / "checkpoint-2")
    resumed = peers_child.carry_out({**task, "output": str(tmp_path / "resumed"), "resume_from": half})
    assert "failed" not in whole
    assert resumed == whole


@pytest.mark.parametrize("name", [name for name, side in SIDES.items() if side.lora])
def test_an_adapter_is_trained_measured_and_resumed(name: str, work: Work, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    task = {"side": name, "rate": 2e-3, "work": vars(work)}
    assert "steps" in peers_child.carry_out({**task, "task": "timing", "output": str(tmp_path / "run")})
    trained = peers_child.carry_out({**task, "task": "evaluation", "output": str(tmp_path / "run")})["eval_loss"]
    before = peers_child.carry_out({**task, "task": "evaluation", "output": work.model})["eval_loss"]
    assert trained < before - 1e-3
    # The adapter alone is saved.
    assert not [*(tmp_path / "run").glob("model*.safetensors")]
    assert "sha256" in peers_child.carry_out({**task, "task": "saving", "output": str(tmp_path / "whole")})


def test_a_missing_package_is_a_result(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: False)
    task = {"task": "timing", "side": "trainer-galore", "rate": 1e-3, "output": str(tmp_path), "work": vars(work)}
    failed = peers_child.carry_out(task)["failed"]
    assert failed.startswith("ImportError: You need to install `galore_torch`")


def test_tasks_and_results_are_files(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = tmp_path / "task.json", tmp_path / "result.json"
    task = {"task": "memory", "side": "ours-galore", "rate": 1e-3, "output": str(tmp_path / "run"), "work": vars(work)}
    asked.write_text(json.dumps(task), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["peers_child.py", str(asked), str(answered)])
    peers_child.main()
    result = json.loads(answered.read_text(encoding="utf-8"))
    assert result["peak_tracked_bytes"] > 0 and result["threads"] == torch.get_num_threads()
    smaller = replace(work, max_length=3)
    failed = peers_child.carry_out({**task, "output": str(tmp_path / "other"), "work": vars(smaller)})["failed"]
    assert failed.startswith("DataError: ")


def test_digests_tell_weights_apart(work: Work, tmp_path: Path) -> None:
    again, other = write_tiny_model(tmp_path / "again"), write_tiny_model(tmp_path / "other", seed=1)
    assert weights_sha256(again) == weights_sha256(Path(work.model)) != weights_sha256(other)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("\n first line \nsecond"), "ValueError: first line"),
        (RuntimeError("It failed. Two ways lead on."), "RuntimeError: It failed."),
        (RuntimeError("\x1b[1mIt failed\x1b[0m: see 1.2"), "RuntimeError: It failed: see 1.2"),
        (KeyError(), "KeyError"),
        (RuntimeError("x" * 500), "RuntimeError: " + "x" * 143 + "..."),
    ],
)
def test_a_reason_is_one_short_sentence(error: Exception, said: str) -> None:
    assert reason(error) == said
