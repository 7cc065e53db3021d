"""What a disk may hold after the power fails: a recorder of what a run does to files, and the states that follow.

A file is what was written into it before its last fsync; later writes may be there, may be zeros, or may be missing.
An entry of a folder (a name of a file) is there for certain once the folder was flushed; later changes of entries may
or may not have happened. Two kinds of file systems are known: one keeps the order of such changes, as journals do, and
flushes them all with any fsync; the other may keep any of them, which is all that POSIX promises.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A file whose time of change is this close may be changed again within the same tick of the clock.
_TICK_NS = 50_000_000
_ZEROED_BYTES = 512

Entry = tuple[int, str]
"""A name in a folder: the folder's number, and the name."""


@dataclass(frozen=True)
class Change:
    """A change of entries that happens as a whole.

    Args:
        sets: The number that each entry has afterwards; None: it is gone.
    """

    sets: tuple[tuple[Entry, int | None], ...]


@dataclass(frozen=True)
class Content:
    """A file's content as far as a process sees it."""

    file: int
    blob: str


@dataclass(frozen=True)
class Flush:
    """An fsync of a file or a folder."""

    target: int


@dataclass(frozen=True)
class Mark:
    """The run promised something, such as a saved checkpoint."""

    what: str
    number: int


Event = Change | Content | Flush | Mark


@dataclass
class Recording:
    """What a run did to a folder.

    Args:
        events: In order.
        blobs: Contents by digest.
        folders: Numbers of folders; the first is the recorded one.
    """

    events: list[Event] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    folders: set[int] = field(default_factory=set)
    root: int = 0


class Recorder:
    """Records what this process does below a folder, for the rest of its life.

    Files that libraries write without Python are seen too: before each call that changes or flushes something, the
    whole folder is compared with what was known of it.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.recording = Recording()
        # Layers on disk are written by a thread of their own; and looking opens files too, which is no event.
        self._lock, self._looks = threading.RLock(), threading.local()
        self._seen: dict[int, tuple[int, int, str]] = {}  # size, time and blob of each file
        self._known: dict[int, str] = {}  # the blob of each file
        self._entries: dict[Entry, int] = {}
        self._inodes: dict[int, int] = {}
        self._next = 1
        self.recording.root = self._number(os.stat(root).st_ino, is_folder=True)
        self._look()
        fsync = os.fsync

        def flushed(handle: Any) -> None:
            fsync(handle)
            self._flush(handle if isinstance(handle, int) else handle.fileno())

        for name in ("fsync", "fdatasync"):
            if hasattr(os, name):
                setattr(os, name, flushed)
        sys.addaudithook(self._audit)

    def mark(self, what: str, number: int) -> None:
        """Note a promise."""
        self._look()
        self.recording.events.append(Mark(what, number))

    def save(self, path: Path) -> None:
        """Write the recording, for the process that began this one."""
        self._look()
        self._looks.now = True
        path.write_bytes(pickle.dumps(self.recording))

    def _audit(self, event: str, given: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"):
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        # A path that is relative to an open folder, as when a tree is removed, counts as one of ours.
        paths = [os.fsdecode(each) for each in given[:2] if isinstance(each, str | bytes | os.PathLike)]
        if any(path.startswith(self.root) or not path.startswith("/") for path in paths):
            self._look()

    def _flush(self, handle: int) -> None:
        with self._lock:
            self._look()
            number = self._inodes.get(os.fstat(handle).st_ino)
            if number is not None:
                self.recording.events.append(Flush(number))

    def _number(self, inode: int, *, is_folder: bool) -> int:
        number = self._inodes[inode] = self._next
        self._next += 1
        if is_folder:
            self.recording.folders.add(number)
        return number

    def _look(self) -> None:
        """Compare the folder with what is known of it."""
        if getattr(self._looks, "now", False):
            return
        with self._lock:
            self._looks.now = True
            try:
                self._compare()
            finally:
                self._looks.now = False

    def _compare(self) -> None:
        entries: dict[Entry, int] = {}
        contents: list[tuple[int, str]] = []
        inodes: set[int] = {os.stat(self.root).st_ino}
        folders = [(self.root, self.recording.root)]
        while folders:
            folder, number = folders.pop()
            try:
                inside = list(os.scandir(folder))
            except FileNotFoundError:
                continue
            for entry in inside:
                try:
                    stat = entry.stat(follow_symlinks=False)
                    is_folder = entry.is_dir(follow_symlinks=False)
                    inodes.add(stat.st_ino)
                    own = self._inodes.get(stat.st_ino)
                    if own is None or (own in self.recording.folders) != is_folder:
                        own = self._number(stat.st_ino, is_folder=is_folder)
                        self._seen.pop(stat.st_ino, None)
                    entries[number, entry.name] = own
                    if is_folder:
                        folders.append((entry.path, own))
                    else:
                        contents.append((own, self._blob(stat.st_ino, stat, entry.path)))
                except FileNotFoundError:
                    continue
        # A name that went and one that came for the same file are one change: a rename.
        gone = {name: own for name, own in self._entries.items() if name not in entries}
        came = {name: own for name, own in entries.items() if self._entries.get(name) != own}
        for name, own in came.items():
            old = [other for other, number in gone.items() if number == own]
            sets: list[tuple[Entry, int | None]] = [(other, None) for other in old]
            for other in old:
                del gone[other]
            self.recording.events.append(Change((*sets, (name, own))))
        for name in gone:
            self.recording.events.append(Change(((name, None),)))
        for own, blob in contents:
            if self._known.get(own) != blob:
                self._known[own] = blob
                self.recording.events.append(Content(own, blob))
        for inode in [each for each in self._inodes if each not in inodes]:
            del self._inodes[inode]  # its number may be given to another file
            self._seen.pop(inode, None)
        self._entries = entries

    def _blob(self, inode: int, stat: os.stat_result, path: str) -> str:
        before = self._seen.get(inode)
        if before and before[:2] == (stat.st_size, stat.st_mtime_ns) and time.time_ns() - stat.st_mtime_ns > _TICK_NS:
            return before[2]
        with open(path, "rb") as file:
            content = file.read()
        digest = hashlib.sha256(content).hexdigest()
        self.recording.blobs[digest] = content
        self._seen[inode] = (stat.st_size, stat.st_mtime_ns, digest)
        return digest


def write_state(recording: Recording, upto: int, target: Path, draw: random.Random, *, ordered: bool) -> None:
    """Write what a disk may hold if the power fails before an event.

    Args:
        recording: What was done.
        upto: The number of the event.
        target: An empty folder.
        draw: Decides what was written that need not have been.
        ordered: Whether the file system keeps the order of changes to entries.
    """
    events = recording.events[:upto]
    flushed_at = [place for place, event in enumerate(events) if isinstance(event, Flush)]
    changes = [(place, event) for place, event in enumerate(events) if isinstance(event, Change)]
    if ordered:
        last = flushed_at[-1] if flushed_at else -1
        until = draw.randint(last + 1, len(events))
        kept = [change for place, change in changes if place < until]
    else:
        share = draw.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        kept = []
        for place, change in changes:
            folder = change.sets[-1][0][0]
            is_flushed = any(isinstance(event, Flush) and event.target == folder for event in events[place + 1 :])
            if is_flushed or draw.random() < share:
                kept.append(change)
    entries: dict[Entry, int] = {}
    for change in kept:
        for name, own in change.sets:
            if own is None:
                entries.pop(name, None)
            else:
                entries[name] = own
    _write_folder(recording, recording.root, target, entries, _contents(recording, events, draw), {})


def _contents(recording: Recording, events: list[Event], draw: random.Random) -> Callable[[int], bytes]:
    """Return what decides the content of each file after the power failed."""
    safe: dict[int, str] = {}
    now: dict[int, str] = {}
    for event in events:
        if isinstance(event, Content):
            now[event.file] = event.blob
        elif isinstance(event, Flush) and event.target in now:
            safe[event.target] = now[event.target]
    fate = draw.choice(("old", "new", "zeros", "cut", "any"))

    def content(file: int) -> bytes:
        newest = recording.blobs[now[file]] if file in now else b""
        oldest = recording.blobs[safe[file]] if file in safe else b""
        if safe.get(file) == now.get(file):
            return newest
        own = draw.choice(("old", "new", "zeros", "cut")) if fate == "any" else fate
        if own == "old":
            return oldest
        if own == "new":
            return newest
        if own == "cut":
            # What was safe and was not changed stays.
            return newest[: draw.randint(0, len(newest))] if file not in safe else oldest
        made = bytearray(newest)
        for start in range(0, len(made), _ZEROED_BYTES):
            part = slice(start, start + _ZEROED_BYTES)
            if made[part] != oldest[part] and draw.random() < 0.5:
                before = oldest[part]
                made[part] = before + bytes(len(made[part]) - len(before))
        return bytes(made)

    return content


def _write_folder(
    recording: Recording,
    number: int,
    target: Path,
    entries: dict[Entry, int],
    content: Callable[[int], bytes],
    made: dict[int, Path],
) -> None:
    target.mkdir(exist_ok=True)
    for (folder, name), own in sorted(entries.items()):
        if folder != number:
            continue
        if own in recording.folders:
            if own not in made:  # a rename of which only the new name was kept, and then the old one too
                made[own] = target / name
                _write_folder(recording, own, target / name, entries, content, made)
        elif own in made:
            os.link(made[own], target / name)
        else:
            made[own] = target / name
            (target / name).write_bytes(content(own))
