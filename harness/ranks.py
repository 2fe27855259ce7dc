"""Several processes on one evaluation: who answers what, and when all are done.

Started by torchrun, `accelerate launch` or srun, each process learns its rank from the environment,
takes a share of the videos, and writes a part of its own in the run directory; rank 0 merges when
all are done. Shares depend on the data set and the number of processes only. A lost rank ends the
launch; the next launch, of any number of processes, reads all parts and answers what is missing.

`--shard 2/8` does the same without a launcher, for job arrays: each shard is a command of its own,
and the same command without `--shard` merges.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
_POLL_S = 0.2
_LONGEST_WAIT = timedelta(days=7)


class RanksError(ValueError):
    """A launch that is not what was asked for."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of the work a process has."""

    index: int = 0
    """From 0."""
    count: int = 1
    """How many processes there are."""
    local: int | None = None
    """This process's number on its machine, under a launcher."""
    beside: int = 1
    """How many processes share this machine, this one included."""
    launched: bool = False
    """Whether a launcher started the others, so that they can be waited for."""

    @property
    def part(self) -> str | None:
        """Name of the part that this process writes; None if it has all of the work."""
        if self.count == 1:
            return None
        return f"{'rank' if self.launched else 'shard'}-{self.index}-of-{self.count}"

    def takes(self, docs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """This process's documents: whole videos, balanced by what they cost.

        Videos go, the longest first, to the process with the least to do; what a video costs is
        its length, or, where annotations do not tell lengths, its file's size, and a little for
        each question.
        """
        videos: dict[str, list[Mapping[str, Any]]] = {}
        for doc in docs:
            videos.setdefault(str(doc["video_id"]), []).append(doc)
        cost = _costs(videos)
        load = [0.0] * self.count
        mine: set[str] = set()
        for name in sorted(videos, key=lambda name: (-cost[name], name)):
            lightest = min(range(self.count), key=lambda rank: (load[rank], rank))
            load[lightest] += cost[name]
            if lightest == self.index:
                mine.add(name)
        return [doc for doc in docs if str(doc["video_id"]) in mine]


_QUESTION_S = 2.0
"""Seconds of video that one more question costs about as much as."""


def _costs(videos: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    known = all(docs[0]["length_s"] for docs in videos.values())
    size = {name: float(docs[0]["length_s"] or 0) for name, docs in videos.items()}
    if not known:
        bytes_of = {name: _bytes(docs[0]) for name, docs in videos.items()}
        # An hour for the largest file keeps the unit, whatever the bit rate.
        unit = max([*bytes_of.values(), 1]) / 3600
        size = {name: count / unit for name, count in bytes_of.items()}
    return {name: size[name] + _QUESTION_S * len(docs) for name, docs in videos.items()}


def _bytes(doc: Mapping[str, Any]) -> int:
    paths = [Path(path) for path in doc.get("videos") or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def share_of(shard: str | None, processes: int | None) -> Share:
    """The share of this process, by its options and its environment.

    The launcher's variables are taken out of the environment, since lmms-eval would otherwise
    divide the documents once more.

    Args:
        shard: `2/8` for the second of eight commands; None for what the launcher says.
        processes: how many processes there must be; None for any number.

    Raises:
        RanksError: not as many processes as asked for, a shard under a launcher, or no shard.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = os.environ.get("LOCAL_RANK")
    if processes is not None and processes != world:
        raise RanksError(
            f"--processes {processes}, but {world} started. Start with `torchrun "
            f"--nproc-per-node {processes} -m internvideo3.harness.cli eval ...` (`accelerate "
            "launch --cpu` starts one only, with `--multi_gpu` as many as it is told)."
        )
    if shard is None:
        number = None if local is None else int(local)
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return Share(index=rank, count=world, local=number, beside=beside, launched=world > 1)
    if world > 1:
        raise RanksError(f"--shard {shard} under a launcher of {world} processes; take one of them")
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if found is None or not 1 <= int(found.group(1)) <= int(found.group(2)):
        raise RanksError(f"--shard {shard!r} is no part of a whole; for example 2/8.")
    return Share(index=int(found.group(1)) - 1, count=int(found.group(2)))


def is_first() -> bool:
    """Whether this process is alone or the launch's first: the one that speaks for all."""
    return int(os.environ.get("RANK", 0)) == 0


class Meeting:
    """Where the processes of a launch wait for each other."""

    def __init__(self, share: Share) -> None:
        """Meet at the launcher's address.

        Raises:
            RanksError: the launcher gave none.
        """
        self.share = share
        self._store: Any = None
        if share.launched:
            self._store = _store(share)
        for name in _OURS:
            os.environ.pop(name, None)

    def wait(self, name: str, tell: Callable[[int], None] = lambda _: None) -> None:
        """Return when all processes are at the point of this name.

        A process that died is the launcher's to notice; it ends the others.

        Args:
            name: the point's name, unique in a launch.
            tell: told how many are there, whenever that changes.
        """
        if self._store is None:
            return
        self._store.add(name, 1)
        seen = 0
        while seen < self.share.count:
            now = int(self._store.add(name, 0))
            if now != seen:
                seen = now
                tell(seen)
            if seen < self.share.count:
                time.sleep(_POLL_S)

    def total(self, name: str, mine: int) -> int:
        """Add this process's number to the launch's; whole once all have passed the next point."""
        return mine if self._store is None else int(self._store.add(f"total {name}", mine))

    def leave(self) -> None:
        """Part; the process that hosts the meeting leaves last."""
        if self._store is None:
            return
        self._store.add("left", 1)
        while self.share.index == 0 and int(self._store.add("left", 0)) < self.share.count:
            time.sleep(_POLL_S)


def _store(share: Share) -> Any:
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RanksError(
            f"WORLD_SIZE is {share.count}, but {' and '.join(missing)} are not set; start with "
            "torchrun, or set them to the first machine's address and a free port."
        )
    # torchrun's agent has a store at that address already; else rank 0 opens one.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        share.count,
        is_master=not agent and share.index == 0,
        timeout=_LONGEST_WAIT,
        wait_for_workers=False,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"internvideo3/{attempt}", store)
