"""What is checked after loading: weights, state and a probe step, which changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sophia_galore.config import load_config
from sophia_galore.config.schema import MemoryConfig
from sophia_galore.engine.layer_graph import Gradients
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.step_results import FinishedGradients, ForwardPass
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.numerics.subspace import tensor_of
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.train import load as loading
from sophia_galore.train import run
from sophia_galore.train.callback import Callback
from sophia_galore.train.checkpoint import Checkpoint, checkpoints
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.store import WeightStore
from sophia_galore.weights.tensor_stream import Block, TensorStream
from tiny import write_tiny_model
from unit.cli.tiny_run import Ended, World, json_lines, make_world, sha256

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
INT8 = "quantization.enabled=true"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return replace(make_world(tmp_path_factory.mktemp("world")), quick=False)


def assert_refused(ended: Ended, folder: Path, code: int, *words: str) -> None:
    assert ended.code == code, ended.out + ended.err
    assert "Traceback" not in ended.err and len(ended.err.strip().splitlines()) == 2, "cause and remedy"
    for said in words:
        assert said in ended.err, ended.err
    assert not folder.exists(), "nothing was begun"


# ---- bits


@pytest.mark.parametrize(
    "words",
    [
        [],
        [INT8],
        ["optimizer.state_bits=8", "model.store=bf16"],
        ["training.max_grad_norm=1"],
        ["training.compute_dtype=bf16"],
        ["--optimizer", "sophia"],
        ["DROPOUT"],
    ],
    ids=["fp32", "int8", "bf16 with 8 bits of state", "clipped", "half precision", "sophia", "dropout"],
)
def test_a_probe_changes_no_bit(words: list[str], world: World, tmp_path: Path) -> None:
    if words == ["DROPOUT"]:
        words = [f"model.name={write_tiny_model(tmp_path / 'model', attention_dropout=0.2)}"]
    ends = {}
    for probe in ("true", "false"):
        folder = tmp_path / probe
        ended = world.train(
            str(folder), *words, "training.max_steps=3", f"training.probe_step={probe}", "checkpoint.save_every_steps=2"
        )
        assert ended.code == 0, ended.err
        assert ("Probe step: 2 x " in ended.out) == (probe == "true")
        (weights,) = (folder / "checkpoint-2").glob("model*.safetensors")
        paths = [folder / "model.safetensors", weights, folder / "checkpoint-2" / "optimizer.safetensors"]
        losses = [line.get("loss", line.get("eval_loss")) for line in json_lines(folder / "metrics.jsonl")]
        ends[probe] = [*map(sha256, paths), losses]
    assert ends["true"] == ends["false"]


def test_a_probe_before_going_on_changes_no_bit(world: World, tmp_path: Path) -> None:
    words = ["training.max_steps=4", "checkpoint.save_every_steps=2", "checkpoint.keep_last=3"]
    assert world.train(str(tmp_path / "run"), *words, "training.probe_step=false").code == 0
    before = sha256(tmp_path / "run" / "model.safetensors")
    from_two = f"--resume={tmp_path / 'run' / 'checkpoint-2'}"
    ended = world.train(str(tmp_path / "again"), *words, from_two)
    assert ended.code == 0 and "Probe step:" in ended.out, ended.err
    assert sha256(tmp_path / "again" / "model.safetensors") == before


def test_nothing_is_tried_where_no_step_is_left(world: World, tmp_path: Path) -> None:
    words = ["training.max_steps=2", "checkpoint.save_every_steps=2"]
    assert world.train(str(tmp_path / "run"), *words).code == 0
    last = f"--resume={tmp_path / 'run' / 'checkpoint-2'}"
    ended = world.train(str(tmp_path / "again"), *words, last)
    assert ended.code == 0 and "Probe step" not in ended.out, ended.err


# ---- memory


@pytest.mark.parametrize("track_steps", [0, 1])
def test_the_peak_is_said_where_it_was_measured(track_steps: int, world: World, tmp_path: Path) -> None:
    ended = world.train(str(tmp_path / "run"), "training.max_steps=2", f"memory.track_steps={track_steps}")
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if line.startswith("Probe step: ")]
    assert " tokens in 2 micro-batches fit" in line
    assert ("peak" in line) == (track_steps > 0)
    steps = [entry for entry in json_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in entry]
    assert [entry["allocated_bytes"] is not None for entry in steps] == [track_steps > 0, False]


def test_the_probe_counts_to_the_report_but_to_no_step() -> None:
    with MemoryMonitor(torch.device("cpu"), MemoryConfig(track_steps=1)) as monitor:
        with monitor.phase("backward"):
            assert torch.zeros(1000).numel() == 1000
        assert monitor.end_probe() == 4000
        assert monitor.end_probe() is None
        assert monitor.watches_tensors, "the probe is not one of the steps that are followed"
        with monitor.phase("backward"):
            assert torch.zeros(10).numel() == 10
        assert monitor.end_step(1)["allocated_bytes"] == 40
    report = monitor.report()
    assert report["peak_allocated_bytes"] == report["phases"]["backward"] == 4000
    assert [entry["step"] for entry in report["steps"]] == [1]


# ---- broken weights and state


def set_nan(store: WeightStore) -> None:
    store["model.norm.weight"].first[3] = torch.nan


def edit_int8(change: Callable[[Any], Any]) -> Callable[[WeightStore], None]:
    return lambda store: store.__setitem__(Q_PROJ, change(store[Q_PROJ]))


def set_scale(weight: Any, value: float) -> Any:
    weight.scales[1, 0] = value
    return weight


def set_code(weight: Any) -> Any:
    weight.codes[0, 0] = -128
    return weight


def half_of(weight: Any) -> Any:
    return weight[: weight.shape[0] // 2]


def without_scales(weight: Any) -> Any:
    return type(weight)(weight.codes, weight.scales.float(), weight.form)


STORES: dict[str, tuple[Callable[[WeightStore], None], list[str], list[str]]] = {
    "NaN": (set_nan, [], ["model.norm.weight holds values that are not finite"]),
    "NaN beside codes": (set_nan, [INT8], ["model.norm.weight holds values that are not finite"]),
    "infinite scale": (edit_int8(lambda w: set_scale(w, torch.inf)), [INT8], [Q_PROJ, "scales that are not finite"]),
    "negative scale": (edit_int8(lambda w: set_scale(w, -1)), [INT8], [Q_PROJ, "negative"]),
    "no code": (edit_int8(set_code), [INT8], [Q_PROJ, "the code -128"]),
    "scales of another dtype": (edit_int8(without_scales), [INT8], [Q_PROJ, "torch.float32 scales"]),
    "half of it": (edit_int8(half_of), [INT8], [Q_PROJ, "shape (32, 64) instead of (64, 64)"]),
    "another dtype": (
        edit_int8(lambda w: PlainWeight(w.tensor.bfloat16())),
        [],
        [Q_PROJ, "is in bf16, but should be in fp32"],
    ),
    "not packed": (edit_int8(lambda w: PlainWeight(w.values(torch.float32))), [INT8], [Q_PROJ, "should be in int8"]),
}


@pytest.mark.parametrize("name", STORES)
def test_a_broken_weight_is_named(name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, words, expected = STORES[name]
    load = loading.load_store

    def damaged(*given: Any, **more: Any) -> WeightStore:
        store = load(*given, **more)
        damage(store)
        return store

    monkeypatch.setattr(loading, "load_store", damaged)
    ended = world.train(str(tmp_path / "run"), *words, "memory.track_steps=0")
    assert_refused(ended, tmp_path / "run", 2, *expected, "Copy the folder again from where it came from")


def test_broken_scales_in_a_models_file(world: World, tmp_path: Path) -> None:
    assert world.train(str(tmp_path / "first"), INT8, "training.max_steps=1", "checkpoint.save_every_steps=1").code == 0
    model = Path(shutil.copytree(tmp_path / "first" / "checkpoint-1", tmp_path / "model"))
    path = model / "model.int8.safetensors"
    tensors = load_file(path)
    assert world.train(str(tmp_path / "run"), INT8, f"model.name={model}", "training.max_steps=1").code == 0
    tensors[f"{Q_PROJ}.scales"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt", "block_size": "128"})
    ended = world.train(str(tmp_path / "again"), INT8, f"model.name={model}")
    assert_refused(ended, tmp_path / "again", 2, Q_PROJ, "scales that are not finite")


@pytest.mark.parametrize("words", [[], ["optimizer.state_bits=8"]], ids=["fp32", "8 bits"])
def test_broken_state_of_a_checkpoint_is_named(
    words: list[str], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    words = [*words, "--optimizer", "adamw", "training.max_steps=4"]
    assert world.train(str(folder), *words, "checkpoint.save_every_steps=2").code == 0
    (folder / "model.safetensors").unlink()
    read = Checkpoint.optimizer_state
    key = "model.embed_tokens.weight/exp_avg_sq" + (".scales" if "optimizer.state_bits=8" in words else "")

    def broken(self: Checkpoint) -> TensorStream:
        stream = read(self)

        def blocks() -> Iterator[Block]:
            for block in stream.blocks():
                if block.name == key:
                    block.rows.view(-1)[0] = torch.inf
                yield block

        return TensorStream(stream.groups, blocks)

    monkeypatch.setattr(Checkpoint, "optimizer_state", broken)
    first = str(checkpoints(folder)[0])
    ended = world.train(str(tmp_path / "again"), *words, f"--resume={first}")
    assert_refused(ended, tmp_path / "again", 2, first, key, "not finite", "earlier checkpoint")


# ---- what fails in the probe


def replace_forward(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """Put something around the engine's forward; `change` gets the original and its arguments."""
    original = LayerwiseEngine.forward
    monkeypatch.setattr(LayerwiseEngine, "forward", lambda self, *given, **more: change(original, self, *given, **more))


def change_gradients(monkeypatch: pytest.MonkeyPatch, change: Callable[[Gradients], object]) -> None:
    """Change finished gradients before anyone uses them."""
    original = LayerwiseEngine.backward

    def changed(engine: LayerwiseEngine, forward: ForwardPass) -> Iterator[FinishedGradients]:
        for layer in original(engine, forward):
            change(layer.gradients)
            yield layer

    monkeypatch.setattr(LayerwiseEngine, "backward", changed)


def test_a_gradient_that_is_not_finite_is_named_and_the_earlier_run_stays(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert world.train(str(folder), "training.max_steps=1", "memory.track_steps=0").code == 0
    before = {path.name: sha256(path) for path in folder.iterdir()}

    def broken(gradients: Gradients) -> None:
        if Q_PROJ in gradients:
            tensor_of(gradients[Q_PROJ])[0, 0] = torch.nan

    change_gradients(monkeypatch, broken)
    stepped = []
    monkeypatch.setattr(ParamOptimizer, "apply", lambda *given, **more: stepped.append(given))
    ended = world.train(str(folder), "training.max_steps=1", "memory.track_steps=0")
    assert ended.code == 1 and not stepped
    assert f"The gradient of {Q_PROJ} is not finite in the probe step" in ended.err
    assert "training.compute_dtype=fp32" in ended.err
    assert {path.name: sha256(path) for path in folder.iterdir()} == before
    assert not list(tmp_path.glob("run.previous*"))


def test_a_loss_that_is_not_finite(world: World, tmp_path: Path) -> None:
    model = Path(shutil.copytree(world.model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)  # finite, but nothing that is made of it
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ended = world.train(str(tmp_path / "run"), f"model.name={model}")
    assert_refused(ended, tmp_path / "run", 1, "In the probe step: The loss is nan")


def test_a_parameter_without_a_gradient_is_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_gradients(monkeypatch, lambda gradients: gradients.pop(Q_PROJ, None))
    assert_refused(world.train(str(tmp_path / "run")), tmp_path / "run", 1, Q_PROJ, "no gradient in the probe step")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_what_does_not_fit_says_what_helps(
    error: Exception, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **more: Any) -> None:
        raise error

    replace_forward(monkeypatch, fails)
    remedies = (
        "training.max_length",
        "training.batch_size",
        "quantization.enabled=true",
        "optimizer.state_bits=8",
    )
    expected = ("The probe step (2 x ", "in 2 micro-batches", "needs more memory than there is", *remedies)
    ended = world.train(str(tmp_path / "run"))
    assert_refused(ended, tmp_path / "run", 1, *expected)
    assert "which is max_length" not in ended.err
    cut = world.train(str(tmp_path / "run"), "training.max_length=28")
    assert_refused(cut, tmp_path / "run", 1, "its longest example has 28 tokens, which is max_length", *expected)
    kept = world.train(str(tmp_path / "run"), "engine.keep_layers=1")
    assert_refused(kept, tmp_path / "run", 1, "keep fewer of them (engine.keep_layers)", *expected)


def test_another_failure_is_no_riddle(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **more: Any) -> None:
        raise RuntimeError("shapes differ\nhere")

    replace_forward(monkeypatch, fails)
    assert_refused(world.train(str(tmp_path / "run")), tmp_path / "run", 1, "failed: shapes differ.", "--debug")
    with pytest.raises(RuntimeError, match="shapes differ"):
        world.train(str(tmp_path / "run"), "training.probe_step=false", "--debug")


def test_without_the_probe_the_first_step_finds_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(original: Any, engine: LayerwiseEngine, *given: Any, **more: Any) -> Any:
        calls.append(more["step"])
        return original(engine, *given, **more)

    replace_forward(monkeypatch, counted)
    words = ["training.max_steps=2", "memory.track_steps=0"]
    for probe, expected in (("true", [1, 1, 2]), ("false", [1, 2])):
        calls.clear()
        assert world.train(str(tmp_path / probe), *words, f"training.probe_step={probe}").code == 0
        assert calls == expected


# ---- interrupts


def test_ctrl_c_in_the_probe_stops_with_nothing_begun(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(original: Any, engine: LayerwiseEngine, *given: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(engine, *given, **more)

    before = signal.getsignal(signal.SIGINT)
    replace_forward(monkeypatch, interrupted)
    ended = world.train(str(tmp_path / "run"))
    assert ended.code == 130 and ended.err.strip() == "Error: Stopped."
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_python_says_it_to_its_callback(world: World, tmp_path: Path) -> None:
    heard: list[str] = []

    class Says(Callback):
        def say(self, text: str) -> None:
            heard.append(text)

    words = ["training.max_steps=1", f"training.output_dir={tmp_path / 'run'}"]
    assert run.train(load_config(world.config, words), Says()).finished
    assert sum(text.startswith("Probe step: ") for text in heard) == 1
