"""Several processes that share an effective batch: the same curve, what they send, and how fast they are.

    python bench/processes.py --curve outputs/curve.json     # losses with 1, 2 and 4 processes; an hour
    python bench/processes.py --speed outputs/speed.json     # 2 processes of a thread each against 1 of two
    python bench/processes.py --link outputs/link.json       # 2 machines, a slow link, beside DDP with AdamW; root

`--link` makes two network namespaces, joins them by a link that `tc` limits, and runs one process in each. All runs
take their turns, several times; ratios are medians. Run `--speed` and `--link` when nothing else runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measured import provenance, weights_sha256
from quiet import cpu_times, quietness, warn_if_busy

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "quickstart.yaml"
STORES: dict[str, list[str]] = {"fp32": [], "int8": ["quantization.enabled=true"]}
OPTIMIZERS = ("galore", "adamw", "sophia")
QUIET = [
    "training.warmup_steps=0",
    "memory.predict=false",
    "memory.track_steps=0",
    "training.probe_step=false",
    "training.sample_questions=[]",
]
EARLY_STEPS = 32
"""Steps of GaLore that are not counted over a link: a tracked basis is refreshed more often at the beginning."""
LATE_STEPS = 8
"""Steps after them, which are counted."""


def launch(count: int, program: Sequence[str], threads: int, spaces: Sequence[str] = ()) -> None:
    """Run a program in several processes; each in a network namespace of its own, if some are given."""
    base = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "WORLD_SIZE": str(count),
        "MASTER_PORT": os.environ.get("MASTER_PORT", "29511"),
    }
    base |= {"MASTER_ADDR": "10.77.0.1" if spaces else "127.0.0.1"}
    children = []
    for rank in range(count):
        names = base | {"RANK": str(rank), "LOCAL_RANK": "0" if spaces else str(rank)}
        inside: list[str] = []
        if spaces:
            inside = ["ip", "netns", "exec", spaces[rank]]
            names["GLOO_SOCKET_IFNAME"] = f"sgv{rank}"
        children.append(subprocess.Popen([*inside, sys.executable, *program], env=names))
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"{' '.join(program)}: exit codes {codes}")


def train(count: int, folder: Path, words: Sequence[str], threads: int = 1, spaces: Sequence[str] = ()) -> None:
    """Train with several processes."""
    start = ["-m", "sophia_galore", "train", "--config", str(CONFIG), f"training.output_dir={folder}"]
    launch(count, [*start, *QUIET, *words], threads, spaces)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses_of(folder: Path) -> list[float]:
    """Return all losses of a run, those of evaluations too."""
    return [line.get("loss", line.get("eval_loss")) for line in lines_of(folder) if {"loss", "eval_loss"} & line.keys()]


def same_bits(one: Path, other: Path) -> bool:
    """Return whether two runs have the same weights and losses."""
    return weights_sha256(one) == weights_sha256(other) and losses_of(one) == losses_of(other)


def compare_curves(asked: argparse.Namespace, folder: Path) -> None:
    """Train with 1, 2, 2 and 4 processes; write whether bits are the same, and how far apart losses are."""
    found: dict[str, Any] = {}
    for store in asked.stores:
        for optimizer in asked.optimizers:
            words = [
                f"model.name={asked.model}",
                f"data.train={asked.data}",
                f"optimizer.type={optimizer}",
                "optimizer.galore.update_proj_gap=8",
                "optimizer.sophia.curvature_every=6",
                "training.max_steps=20",
                "training.batch_size=1",
                "training.gradient_accumulation_steps=4",
                f"training.max_length={asked.length}",
                "data.max_eval_examples=8",
                "checkpoint.save_every_steps=0",
                f"distributed.sum_blocks={asked.sum_blocks}",
                *STORES[store],
            ]
            runs = {"1": 1, "2": 2, **({"2 again": 2} if asked.again else {}), "4": 4}
            for name, count in runs.items():
                train(count, folder / f"{store}-{optimizer}-{name.replace(' ', '-')}", words)
            places = {name: folder / f"{store}-{optimizer}-{name.replace(' ', '-')}" for name in runs}
            one = losses_of(places["1"])
            found[f"{store}, {optimizer}"] = {
                "largest_relative_difference": {
                    name: max(abs(a - b) / b for a, b in zip(losses_of(places[name]), one, strict=True))
                    for name in ("2", "4")
                },
                "same_bits_as_one": {name: same_bits(places[name], places["1"]) for name in ("2", "4")},
                "same_bits_again": same_bits(places["2"], places["2 again"]) if asked.again else None,
                "summed_bytes": sorted({line["summed_bytes"] for line in lines_of(places["2"]) if "loss" in line}),
                "losses": one,
            }
            print(
                store, optimizer, {k: v for k, v in found[f"{store}, {optimizer}"].items() if k != "losses"}, flush=True
            )
            facts = provenance() | {"sum_blocks": asked.sum_blocks, "runs": found}
            asked.curve.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def compare_speed(asked: argparse.Namespace, folder: Path) -> None:
    """Two processes of one thread each against one process with two threads."""
    words = [
        f"model.name={asked.model}",
        f"data.train={asked.data}",
        f"training.max_steps={asked.steps}",
        "training.batch_size=1",
        "training.gradient_accumulation_steps=4",
        "training.max_length=256",
        "data.packing=true",
        "data.eval_fraction=0",
        "training.eval_every_steps=0",
    ]
    speeds: dict[str, list[float]] = {"1 x 2 threads": [], "2 x 1 thread": []}
    warn_if_busy()
    begun = cpu_times()
    for turn in range(asked.turns):
        for name, count, threads in (("1 x 2 threads", 1, 2), ("2 x 1 thread", 2, 1)):
            run = folder / f"{turn}-{count}"
            train(count, run, words, threads)
            speeds[name].append(_speed([line for line in lines_of(run) if "tokens_per_second" in line]))
            print(name, speeds[name], flush=True)
    one, two = speeds.values()
    ratios = [b / a for a, b in zip(one, two, strict=True)]
    figures = {"tokens_per_second": speeds, "ratios": ratios, "median_ratio": statistics.median(ratios)}
    figures |= quietness(begun)
    asked.speed.write_text(json.dumps(provenance() | figures, indent=2) + "\n", encoding="utf-8")


def compare_link(asked: argparse.Namespace, folder: Path) -> None:
    """Two machines with a slow link between them, beside DDP with AdamW."""
    found: list[dict[str, Any]] = []
    warn_if_busy()
    for mbits, tokens in itertools.product(asked.mbits, asked.tokens):
        words = [
            f"model.name={asked.model}",
            f"data.train={asked.data}",
            "training.batch_size=1",
            f"training.gradient_accumulation_steps={max(2, tokens // 256)}",
            f"training.max_length={min(256, tokens // 2)}",
            "data.packing=true",
            "data.eval_fraction=0",
            "training.eval_every_steps=0",
        ]
        speeds: dict[str, list[float]] = {"DDP, AdamW": [], "GaLore": []}
        sent: dict[str, float] = {}
        begun = cpu_times()
        for turn in range(asked.turns):
            with linked(mbits) as spaces:
                result = folder / f"ddp-{mbits}-{tokens}-{turn}.json"
                peer = [f"training.output_dir={folder / 'peer'}", *QUIET, *words, "optimizer.type=adamw"]
                launch(2, [str(HERE / "ddp_adamw.py"), str(result), *peer, "training.max_steps=5"], 1, spaces)
                theirs = json.loads(result.read_text(encoding="utf-8"))
                speeds["DDP, AdamW"].append(statistics.median(n / s for n, s in theirs["steps"][1:]))
                sent["DDP, AdamW"] = theirs["summed_bytes"]
                run = folder / f"run-{mbits}-{tokens}-{turn}"
                # Without recomputation, as the peer.
                ours = [
                    *words,
                    f"training.max_steps={EARLY_STEPS + LATE_STEPS}",
                    "training.gradient_checkpointing=false",
                ]
                train(2, run, [*ours, "optimizer.type=galore"], 1, spaces)
                # The first step refreshes all bases, steps 2 and 3 a half each, 4 to 7 a quarter each, and so on.
                lines = [line for line in lines_of(run) if "tokens_per_second" in line][EARLY_STEPS:]
                speeds["GaLore"].append(statistics.median(line["tokens_per_second"] for line in lines))
                sent["GaLore"] = statistics.median(line["summed_bytes"] for line in lines)
            print(mbits, tokens, speeds, sent, flush=True)
        ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
        found.append(
            {
                "mbits": mbits,
                "tokens_a_step": tokens,
                "tokens_per_second": speeds,
                "median_ratio": statistics.median(ratios),
                "summed_bytes": sent,
                "share_of_bytes": sent["GaLore"] / sent["DDP, AdamW"],
                **quietness(begun),
            }
        )
        asked.link.write_text(json.dumps(provenance() | {"links": found}, indent=2) + "\n", encoding="utf-8")


@contextmanager
def linked(mbits: int) -> Iterator[list[str]]:
    """Make two network namespaces with a link of a given speed between them.

    Args:
        mbits: Mbit/s in each direction.

    Yields:
        Their names.
    """
    spaces = ["sophia0", "sophia1"]
    commands = [
        *(f"ip netns add {space}" for space in spaces),
        f"ip link add sgv0 netns {spaces[0]} type veth peer name sgv1 netns {spaces[1]}",
        *(
            f"ip netns exec {space} {command}"
            for number, space in enumerate(spaces)
            for command in (
                f"ip addr add 10.77.0.{number + 1}/24 dev sgv{number}",
                f"ip link set sgv{number} up",
                "ip link set lo up",
                f"tc qdisc add dev sgv{number} root tbf rate {mbits}mbit burst 256kb latency 200ms",
            )
        ),
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        yield spaces
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False)


def _speed(lines: Sequence[dict[str, Any]]) -> float:
    """Return the median tokens a second, without the first step."""
    return statistics.median(line["tokens_per_second"] for line in lines[1:])


def main() -> None:
    """Compare curves, or speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", type=Path, help="compare losses, and write the figures to this file")
    parser.add_argument("--speed", type=Path, help="compare speed on this machine")
    parser.add_argument("--link", type=Path, help="compare speed over a slow link")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("data/sample_data.json"))
    parser.add_argument("--stores", nargs="+", default=list(STORES))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=7, help="steps of a run, for --speed; the first is not counted")
    parser.add_argument(
        "--no-again", dest="again", action="store_false", help="not twice with 2 processes, for --curve"
    )
    parser.add_argument("--sum-blocks", type=int, default=4, help="distributed.sum_blocks, for --curve")
    parser.add_argument("--length", type=int, default=64, help="longest example in tokens, for --curve")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="tokens a step, for --link")
    parser.add_argument(
        "--mbits", type=int, nargs="+", default=[1000, 250, 100], help="speeds of the link in Mbit/s, for --link"
    )
    asked = parser.parse_args()
    asked.data = asked.data.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        if asked.curve:
            compare_curves(asked, Path(temporary))
        if asked.speed:
            compare_speed(asked, Path(temporary))
        if asked.link:
            compare_link(asked, Path(temporary))


if __name__ == "__main__":
    main()
