"""What the processes of a run must have in common, and how differences of rounding are removed."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from sophia_galore.distributed.processes import Processes
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.optim.states import ParamStates
from sophia_galore.plan.plan import RunPlan
from sophia_galore.weights.safetensors_layout import bytes_of
from sophia_galore.weights.store import WeightStore

_WHAT = {
    "data": "other training data",
    "steps": "another number of steps",
    "routes": "another plan for the parameters",
    "weights": "other weights",
}


def refuse_differences(processes: Processes, plan: RunPlan, store: WeightStore) -> None:
    """Refuse processes that do not train the same model on the same data.

    Args:
        processes: The processes of the run.
        plan: This process's plan.
        store: This process's weights.

    Raises:
        EnvironmentProblem: They differ; in each process, with the same message.
    """
    if processes.is_alone:
        return
    own = {
        "data": plan.data_fingerprint,
        "steps": plan.num_steps,
        "routes": str([route.to_json() for route in plan.routes]),
        "weights": weights_checksum(store),
    }
    first, *others = processes.gather(own)
    for rank, other in enumerate(others, 1):
        odd = next((what for what in own if other[what] != first[what]), None)
        if odd:
            raise EnvironmentProblem(
                f"Process {rank} has {_WHAT[odd]} than process 0.",
                "Give all machines the same files and versions, and the same command.",
            )


def equalise(processes: Processes, store: WeightStore, states: ParamStates, say: Callable[[str], None]) -> None:
    """Let all processes go on with the first one's weights and states, if they differ.

    Every process takes each step itself. Unlike processors may round a product differently, so that the copies of the
    model would slowly drift apart.

    Args:
        processes: The processes of the run.
        store: This process's weights.
        states: This process's optimizer states.
        say: Takes a sentence for the user.
    """
    if processes.is_alone or len(set(processes.gather(weights_checksum(store)))) == 1:
        return
    say("The machines round differently, so their copies of the model differed a little: all go on with the first one.")
    own_states = states.tensors()
    for name, _ in store.items():
        with store.borrow(name, trains=True) as weights:
            for part in weights[name].parts(change=True):
                for tensor in part.values():
                    processes.send(tensor, 0)
            for tensor in own_states.get(name, {}).values():
                processes.send(tensor, 0)


def weights_checksum(store: WeightStore) -> int:
    """Return a checksum of all weights as they are stored, wherever that is."""
    sums: list[tuple[str, str, int]] = []
    for name, weight in store.each():
        # By tensor, so that blocks of rows give what the whole gives.
        own: dict[str, int] = {}
        for part in weight.parts():
            for ending, tensor in part.items():
                own[ending] = zlib.crc32(bytes_of(tensor.detach().cpu().contiguous()), own.get(ending, 0))
        sums += [(name, ending, found) for ending, found in own.items()]
    return zlib.crc32(repr(sums).encode())
