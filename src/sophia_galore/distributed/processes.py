"""The processes of a run, and what they tell each other: sums, objects, and why one of them failed.

Every process calls the same methods in the same order. A process that fails says so in the store that all share, before
it closes its connections; the others meet a closed connection, and read why.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.graph import increment_version

from sophia_galore.errors import RunError, SophiaGaloreError, UserError, short

Made = TypeVar("Made")

_FAILURE = "sophia_galore/failure"
# How messages of Gloo begin.
_SOURCE_PLACE = re.compile(r"^\[[^\]]*\] ")
WHY_GONE = "It was killed, ran out of memory, or its machine can't be reached. All processes end."
"""What is said of a process that was there and is gone."""
# Smaller tensors are sent together, since each message takes time of its own.
_SMALL_BYTES = 2**20


class FailedElsewhere(SophiaGaloreError):
    """Another process failed and says why; this one ends in silence.

    Args:
        exit_code: The exit code of this process.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code  # type: ignore[misc]


@dataclass(eq=False)
class Pending:
    """Sums that are on their way.

    Args:
        works: What is to be waited for.
        copies: Pairs of a part of a sent buffer and the tensor that it is copied to.
        lost: Makes the error to raise if a process is lost.
        later: What is started, one after the other, once the works before are done; each returns works.
    """

    works: list[Any]
    copies: list[tuple[Tensor, Tensor]]
    lost: Callable[[Exception], Exception] = lambda error: error
    later: Sequence[Callable[[], list[Any]]] = ()

    def wait(self) -> None:
        """Wait for all sums."""
        try:
            for start in (lambda: self.works, *self.later):
                for work in start():
                    work.wait()
        except RuntimeError as error:
            raise self.lost(error) from error
        for part, tensor in self.copies:
            tensor.copy_(part.view_as(tensor))
        self.works, self.copies = [], []


@dataclass(eq=False)
class Processes:
    """The processes of a run, seen from one of them.

    Args:
        rank: Number of this process, from 0.
        count: Number of processes; 1: nothing is sent.
        local_rank: Number of this process on its machine, from 0.
        store: Shared by all; None for a single process.

    Attributes:
        summed_bytes: Bytes of the tensors that were summed so far.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    store: Any = None
    summed_bytes: int = field(default=0, init=False)
    # Between which processes each round of a sum is; None: all.
    _rounds: tuple[Any, ...] = field(default=(None,), init=False)

    def sum_in_pairs(self) -> None:
        """From now on, add up the sums of neighbours first, then those of pairs of neighbours, and so on.

        Each process calls it. The number of processes is a power of two.
        """
        rounds: list[Any] = []
        for distance in (1 << level for level in range(self.count.bit_length() - 1)):
            pairs = [(rank, rank + distance) for rank in range(self.count) if not rank & distance]
            # Every process has to name every group, also those that it is not in.
            made = {pair: self._guarded(partial(dist.new_group, list(pair))) for pair in pairs}
            rounds += [group for pair, group in made.items() if self.rank in pair]
        self._rounds = tuple(rounds)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks, and writes what the run records."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is one process."""
        return self.count == 1

    @property
    def name(self) -> str:
        """What this process is called in messages."""
        return f"process {self.rank} of {self.count} on {socket.gethostname()}"

    def start_sum(self, tensors: Sequence[Tensor]) -> Pending:
        """Begin to replace tensors by their sums over all processes.

        Args:
            tensors: In each process of the same shapes and dtypes; not to be used until the sums are there.
        """
        if self.is_alone:
            return Pending([], [])
        self.summed_bytes += sum(tensor.nbytes for tensor in tensors)
        buffers, copies = in_buffers(tensors)

        def start(group: Any) -> list[Any]:
            return [dist.all_reduce(each, group=group, async_op=True) for each in buffers]

        first, *others = self._rounds
        works = self._guarded(lambda: start(first))
        return Pending(works, copies, self.lost, [partial(start, group) for group in others])

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums of some numbers over all processes, in float64.

        Args:
            values: The numbers of this process.
        """
        if self.is_alone:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        for group in self._rounds:
            self._guarded(partial(dist.all_reduce, total, group=group))
        return [float(value) for value in total]

    def gather(self, value: Made) -> list[Made]:
        """Return what each process gave, by rank.

        Args:
            value: Plain data.
        """
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.count
        self._guarded(lambda: dist.all_gather_object(found, value))
        return found

    def from_first(self, value: Made) -> Made:
        """Return what the first process gave.

        Args:
            value: Plain data; that of the other processes is ignored.
        """
        if self.is_alone:
            return value
        held = [value]
        self._guarded(lambda: dist.broadcast_object_list(held, src=0))
        return held[0]

    def send(self, tensor: Tensor, source: int) -> None:
        """Replace a tensor by that of one process.

        Args:
            tensor: In each process of the same shape and dtype.
            source: Rank of that process.
        """
        if not self.is_alone:
            self._guarded(lambda: dist.broadcast(tensor, src=source))
            # Torch does not count it as a change, and what lives elsewhere would not be written back.
            increment_version(tensor)

    def start_sending(self, tensor: Tensor, source: int) -> Callable[[], None]:
        """Begin to replace a tensor by that of one process; return a function that waits for it.

        Args:
            tensor: As for `send`; not to be used until it is there.
            source: As for `send`.
        """
        work = self._guarded(lambda: dist.broadcast(tensor, src=source, async_op=True))
        increment_version(tensor)
        return Pending([work], [], self.lost).wait

    def hand_over(self, tensor: Tensor, source: int) -> None:
        """Replace a tensor of the first process by that of another one; only these two call it.

        Args:
            tensor: In both of the same shape and dtype.
            source: Rank of the other process.
        """
        if self.is_first:
            self._guarded(lambda: dist.recv(tensor, src=source))
            increment_version(tensor)
        else:
            self._guarded(lambda: dist.send(tensor, dst=0))

    def together(self, act: Callable[[], Made], *, in_turns: bool = False) -> Made:
        """Do something in each process; if it fails in one, all fail.

        Args:
            act: What is to be done; it sends nothing.
            in_turns: Whether the first process of each machine does it before the others, which then find its
                downloads.

        Returns:
            What it returns in this process.

        Raises:
            SophiaGaloreError: It failed in this or in another process.
        """
        if self.is_alone:
            return act()
        waits = in_turns and self.local_rank > 0
        failed: SophiaGaloreError | None = None
        made: list[Made] = []
        for is_turn in [not waits, waits] if in_turns else [True]:
            try:
                if is_turn:
                    made.append(act())
            except SophiaGaloreError as error:
                failed = error
            problems = self.gather(None if failed is None else (failed.exit_code, failed.cause, failed.remedy))
            found = next(((rank, problem) for rank, problem in enumerate(problems) if problem), None)
            if found is None:
                continue
            rank, (exit_code, cause, remedy) = found
            if self.is_first:
                where = f"In process {rank} of {self.count}: " if rank else ""
                raise failed or (UserError if exit_code == UserError.exit_code else RunError)(where + cause, remedy)
            raise FailedElsewhere(exit_code) from failed
        return made[0]

    def by_first(self, act: Callable[[], Made]) -> Made:
        """Do something in the first process; if it fails, all fail.

        Args:
            act: What is to be done.

        Returns:
            What it returned there: plain data.

        Raises:
            SophiaGaloreError: It failed.
        """
        made = self.together(lambda: act() if self.is_first else None)
        return cast(Made, self.from_first(made))

    def failing(self, error: SophiaGaloreError) -> SophiaGaloreError:
        """Tell the others that this process fails; return the error to raise.

        Args:
            error: Why it fails.

        Returns:
            The error itself; or an error without a message, if another process said first why it failed, since one
            failure mostly leads to others.
        """
        if self.is_alone or isinstance(error, FailedElsewhere):
            return error
        own = f"{self.rank} {error.exit_code}"
        with suppress(RuntimeError):  # the store may be gone
            said = self.store.compare_set(_FAILURE, "", own).decode()
            if said != own:
                return FailedElsewhere(int(said.split()[1]))
        return error

    def lost(self, error: Exception) -> SophiaGaloreError:
        """Return the error to raise when a message did not arrive.

        Args:
            error: From torch.
        """
        return RunError(
            f"Another process of the run is gone, says {self.name}: {_SOURCE_PLACE.sub('', short(error))}.",
            WHY_GONE,
        )

    def _guarded(self, act: Callable[[], Made]) -> Made:
        try:
            return act()
        except RuntimeError as error:
            raise self.lost(error) from error


def in_buffers(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return what is sent for some tensors: large ones as they are, small ones together in one buffer.

    Args:
        tensors: Of one dtype, on one device.

    Returns:
        The buffers; and pairs of a part of the common buffer and the tensor that it is copied to in the end.
    """
    apart = [tensor for tensor in tensors if tensor.nbytes >= _SMALL_BYTES and tensor.is_contiguous()]
    alone = {id(tensor) for tensor in apart}
    small = [tensor for tensor in tensors if id(tensor) not in alone]
    if not small:
        return apart, []
    common = torch.cat([tensor.reshape(-1) for tensor in small])
    parts = common.split([tensor.numel() for tensor in small])
    return [*apart, common], list(zip(parts, small, strict=True))


def num_restarts() -> int:
    """Return how often the launcher has started this run's processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
