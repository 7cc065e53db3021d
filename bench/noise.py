"""What noise by counting costs beside a stateful generator's, and beside the step that it is for.

    python bench/noise.py
    python bench/noise.py --device cuda

Medians over several turns, taken in turns, for one block of rows of 4 million elements: the noise alone, made by
`numerics/noise.py` and by a `torch.Generator`; and a whole write of updated weights with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from sophia_galore.numerics.blockwise import encode
from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.rounding import stochastic_round_bf16
from sophia_galore.weights.int8 import Int8Format, quantise

ELEMENTS = 1 << 22


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    values = torch.randn(1024, ELEMENTS // 1024, device=device)
    squares, bits = values.square(), values.view(torch.int32)
    noise, draw = Noise.of(0, "bench"), torch.Generator(device).manual_seed(0)
    packed = quantise(values, Int8Format())
    works: dict[str, Callable[[], object]] = {
        "noise by counting": lambda: noise.integers(bits),
        "noise of a generator": lambda: torch.randint(
            0, 1 << 16, bits.shape, generator=draw, device=device, dtype=torch.int32
        ),
        "write bf16": lambda: stochastic_round_bf16(values, noise),
        "write int8": lambda: packed.write(values.clone(), noise),
        "write 8-bit state": lambda: encode(squares, signed=False, noise=noise),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(arguments.turns + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - begun)
    found = {name: round(statistics.median(seconds) / ELEMENTS * 1e9, 3) for name, seconds in times.items()}
    print(json.dumps({"device": str(device), "threads": torch.get_num_threads(), "ns an element": found}))


if __name__ == "__main__":
    main()
