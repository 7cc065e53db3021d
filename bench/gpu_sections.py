"""The sections of `gpu.py`: each returns its figures as plain data, and runs in a process of its own."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from gpu_work import Work
from hf_trainer import micro_batches, trainer_inputs
from measured import weights_sha256
from sophia_galore import GaLore
from sophia_galore.config import load_config
from sophia_galore.data.portion import whole
from sophia_galore.records.files import MEMORY_REPORT
from sophia_galore.records.memory import MemoryReport
from sophia_galore.records.metrics import TrainStep, read_metrics
from sophia_galore.train.callback import Callback
from sophia_galore.train.checkpoint import checkpoints
from sophia_galore.train.run import train

ROOT = Path(__file__).resolve().parents[1]
CAPPED = ROOT / "configs" / "galore_config.yaml"
CAP = "4GiB"
Figures = dict[str, Any]


def doctor(work: Work) -> Figures:
    """The program's own self-test."""
    words = ["-m", "sophia_galore", "doctor", "--json", "--device", work.device]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        said = {"output": done.stdout[-2000:], "error": done.stderr[-2000:]}
    return {"exit_code": done.returncode, "said": said}


def bits(work: Work) -> Figures:
    """SmolLM2-135M twice, and once from a checkpoint half-way: digests of the final weights."""
    model = work.plain_model("smollm2-135m")
    common = ["optimizer.type=galore", "training.batch_size=4", "training.gradient_accumulation_steps=2"]

    def run(name: str, resume: Path | None = None) -> str:
        words = [*work.settings(model, name, length=256, steps=30), *common, "checkpoint.save_every_steps=3"]
        train(load_config(None, words), Callback(), resume_from=resume)
        return weights_sha256(work.folder / name)

    first, again = run("bits-1"), run("bits-2")
    half = checkpoints(work.folder / "bits-2")[0]
    resumed = run("bits-2", half)
    return {
        "sha256": first,
        "same again": again == first,
        "same after resuming": resumed == first,
        "resumed from": half.name,
        "losses": [step.loss for step in _steps(work.folder / "bits-1")],
    }


def capped(work: Work) -> Figures:
    """Qwen2-0.5B's shapes as configs/galore_config.yaml says, under a limit: the plan beside what was reserved."""
    return _run(work, work.plain_model("qwen2-0.5b"), "capped", [f"memory.limit={CAP}"])


def capped_without_recomputing(work: Work) -> Figures:
    """The same without a limit and with the graphs of all layers kept."""
    return _run(work, work.plain_model("qwen2-0.5b"), "kept", ["training.gradient_checkpointing=false"])


def adamw_checkpointing(work: Work) -> Figures:
    """The same micro-batches by Hugging Face and fused AdamW: float32 weights, bf16 autocast, checkpointing."""
    return _hugging_face(work, checkpointing=True)


def adamw_kept(work: Work) -> Figures:
    """The same without checkpointing."""
    return _hugging_face(work, checkpointing=False)


def streamed_1_5b(work: Work) -> Figures:
    """Qwen2.5-1.5B's shapes in host memory, under the limit."""
    return _streamed(work, "qwen2.5-1.5b")


def streamed_7b(work: Work) -> Figures:
    """Qwen2.5-7B's shapes in host memory, under the limit."""
    return _streamed(work, "qwen2.5-7b")


def optimizer_step(work: Work) -> Figures:
    """Milliseconds of a step over Qwen2-0.5B's parameters: ours between refreshes beside torch's fused AdamW."""
    from transformers import AutoModelForCausalLM

    config = work.config("qwen2-0.5b")
    with torch.device("meta"):
        shapes = [(name, tuple(p.shape)) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()]
    rank = 8 if work.tiny else 128
    found: Figures = {}
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "torch.optim.AdamW(fused=True)": lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-4, fused=True),
        "GaLore": lambda named: GaLore(named, lr=1e-4, rank=rank, update_proj_gap=10_000),
        "GaLore, 8-bit state": lambda named: GaLore(named, lr=1e-4, rank=rank, update_proj_gap=10_000, state_bits=8),
    }
    for name, make in makers.items():
        torch.manual_seed(0)
        named = [(label, torch.nn.Parameter(torch.randn(shape, device=work.device) * 0.02)) for label, shape in shapes]
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizer = make(named)
        times = []
        for _ in range(6 if work.tiny else 40):
            begun = time.perf_counter()
            optimizer.step()
            _wait(work)
            times.append(1000 * (time.perf_counter() - begun))
        # In its first octaves of steps a basis is made early: the last quarter has none.
        found[name] = {"ms": statistics.median(times[-len(times) // 4 :]), "first_ms": times[0]}
        del optimizer, named
    return found


def profile(work: Work) -> Figures:
    """Where the time of a step goes: the kernels that take most, and how many launches a step has."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from sides import open_side

    words = [*work.settings(work.plain_model("qwen2-0.5b"), "profile", length=512, steps=8), "memory.predict=false"]
    config = load_config(CAPPED, [*words, "training.probe_step=false", "memory.track_steps=0"])
    with ExitStack() as stack:
        side = open_side(config, stack)
        for step in range(1, 5):
            side.take(step)
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if work.device == "cuda" else [])
        with profiled(activities=kinds) as seen:
            side.loaded.stepper.take(whole(side.loaded.feed.step(5)), step=5, factor=1.0)
            _wait(work)
    on_device = work.device == "cuda"
    rows = seen.key_averages()

    def own_us(row: Any) -> float:
        return float(row.self_device_time_total if on_device else row.self_cpu_time_total)

    top = sorted(rows, key=own_us, reverse=True)[:15]
    launches = sum(
        row.count for row in rows if row.key in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC")
    )
    return {
        "seconds_unprofiled": statistics.median(side.seconds[1:]),
        "launches": launches,
        "device_ms": sum(map(own_us, rows)) / 1000,
        "top": [{"name": row.key[:90], "ms": own_us(row) / 1000, "calls": row.count} for row in top],
    }


SECTIONS: dict[str, Callable[[Work], Figures]] = {
    "doctor": doctor,
    "bits": bits,
    "capped": capped,
    "adamw, checkpointing": adamw_checkpointing,
    "adamw, kept": adamw_kept,
    "capped, kept": capped_without_recomputing,
    "streamed 1.5B": streamed_1_5b,
    "streamed 7B": streamed_7b,
    "optimizer step": optimizer_step,
    "profile": profile,
}
"""In the order in which they are run: what most needs proof first."""


def _run(work: Work, model: Path, name: str, words: list[str], *, steps: int = 10, length: int = 512) -> Figures:
    """Train as configs/galore_config.yaml says; return what the run's records say of memory and speed."""
    settings = work.settings(model, name, length=length, steps=steps)
    with _counted(work) as peak:
        train(load_config(CAPPED, [*settings, "checkpoint.save_every_steps=0", *words]), Callback())
    report = MemoryReport.read(work.folder / name / MEMORY_REPORT)
    taken = _steps(work.folder / name)
    shutil.rmtree(work.folder / name)
    waited = [step.waiting_share for step in taken[1:] if step.waiting_share is not None]
    return {
        "limit_bytes": report.limit_bytes,
        "predicted_peak_bytes": report.predicted_peak_bytes,
        "peak_allocated_bytes": report.peak_allocated_bytes,
        "peak_reserved_bytes": report.peak_reserved_bytes,
        "predicted_ratio": report.predicted_ratio,
        **peak,
        "tokens_per_second": statistics.median(step.tokens_per_second or 0.0 for step in taken[1:]),
        "waiting_share": statistics.median(waited) if waited else None,
        "losses": [step.loss for step in taken],
        "adaptations": list(report.adaptations),
    }


def _streamed(work: Work, name: str) -> Figures:
    model = work.int8_model(name)
    words = [f"memory.limit={CAP}", "memory.placement=host", "training.probe_step=false"]
    try:
        return _run(work, model, "streamed", words, steps=4)
    finally:
        shutil.rmtree(model)


def _hugging_face(work: Work, *, checkpointing: bool) -> Figures:
    from transformers import AutoModelForCausalLM

    settings = work.settings(work.plain_model("qwen2-0.5b"), "unused", length=512, steps=10)
    config = load_config(CAPPED, settings)
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32).to(work.device)
    model.config.use_cache = False
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    times, tokens, losses = [], [], []
    with _counted(work) as peak:
        for batches in micro_batches(config):
            begun = time.perf_counter()
            counted = sum(batch.num_counted for batch in batches)
            summed = 0.0
            for batch in batches:
                inputs = {key: value.to(work.device) for key, value in trainer_inputs(batch).items()}
                with torch.autocast(work.device, torch.bfloat16, enabled=work.device == "cuda"):
                    loss = model(**inputs).loss * batch.num_counted / counted
                loss.backward()
                summed += loss.item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _wait(work)
            times.append(time.perf_counter() - begun)
            tokens.append(sum(batch.num_tokens for batch in batches))
            losses.append(summed)
    speeds = [count / seconds for count, seconds in zip(tokens, times, strict=True)]
    return {**peak, "tokens_per_second": statistics.median(speeds[1:]), "losses": losses}


@contextmanager
def _counted(work: Work) -> Iterator[Figures]:
    """Fill in what torch's allocator had at most, on a GPU."""
    found: Figures = {}
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    if work.device == "cuda":
        found["torch_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["torch_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()


def _wait(work: Work) -> None:
    if work.device == "cuda":
        torch.cuda.synchronize()


def _steps(run: Path) -> tuple[TrainStep, ...]:
    """Return the optimizer steps of a run's metrics."""
    return read_metrics(run).train
