"""The processes of one training run: alone, or under torchrun with FSDP2."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from internvideo3.model.device import device_of, use
from internvideo3.training.attention import Sharing

Made = TypeVar("Made")
PATIENCE = timedelta(hours=12)
"""Longest wait for another process. One converts or pushes weights while the others stand at a
barrier, an 8B conversion for hours; NCCL's own limit is ten minutes."""


def _device(name: str | None) -> torch.device:
    """A device by its name; of several GPUs, that of this process's rank on the machine."""
    device = device_of(name)
    if device.type != "cuda" or device.index is not None:
        return device
    return device_of(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")


class Processes:
    """Rank, count and device of this process, and what it does together with the others."""

    def __init__(self, device: str | None = None) -> None:
        """Joins the group that torchrun announces in the environment, if there is one.

        Args:
            device: `cpu`, `cuda` (under torchrun each process its own) or `cuda:N`; None for CUDA
                if there is one.

        Raises:
            DeviceError: There is no such GPU here.
        """
        self.device = _device(device)
        use(self.device)
        cuda = self.device.type == "cuda"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        self.count = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.sharing: Sharing | None = None
        self._sharings: dict[int, Sharing] = {}

    def divide_rows(self, parts: int) -> None:
        """From here on, every so many neighbouring processes share each row.

        Raises:
            ValueError: The number of processes is no multiple of it.
        """
        if self.count % parts:
            raise ValueError(
                f"sequence_parallel is {parts} and there are {self.count} processes; start a "
                "multiple of it with torchrun --nproc-per-node"
            )
        if parts > 1 and parts not in self._sharings:
            # Every process must take part in making every group.
            for first in range(0, self.count, parts):
                ranks = list(range(first, first + parts))
                group: Any = dist.new_group(ranks, timeout=PATIENCE)
                if first <= self.rank < first + parts:
                    self._sharings[parts] = Sharing(group, self.rank - first, parts)
        self.sharing = self._sharings[parts] if parts > 1 else None

    @property
    def parts(self) -> int:
        """Processes that share a row."""
        return 1 if self.sharing is None else self.sharing.count

    @property
    def documents_of_step(self) -> tuple[int, int]:
        """(first, step): which of a step's documents are this process's."""
        return self.rank // self.parts, self.count // self.parts

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0

    def shard(self, policy: Any) -> None:
        """Divides the weights among the processes, layer by layer; alone, nothing happens.

        Of a policy that learns nothing (a reference, a teacher) too. Its embeddings and head, once
        gathered, stay: it has no backward pass after which they would go.
        """
        if self.count == 1:
            return
        mesh = init_device_mesh(self.device.type, (self.count,))
        inner = policy.model.model
        for block in (*inner.visual.blocks, *inner.language_model.layers):
            fully_shard(block, mesh=mesh)
        fully_shard(policy, mesh=mesh)

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes; of those that share rows, one counts."""
        return self._reduced(values, dist.ReduceOp.SUM) / self.parts

    def most(self, number: int) -> int:
        """Largest of the processes' numbers."""
        return int(self._reduced(torch.tensor([number], device=self.device), dist.ReduceOp.MAX))

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.count > 1:
            dist.barrier()

    def from_first(self, value: str) -> str:
        """The first process's text, on every process."""
        if self.count == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    @property
    def leads_row(self) -> bool:
        """Whether this is the first of the processes that share its rows; alone, it is."""
        return self.sharing is None or self.sharing.rank == 0

    def from_leader(self, value: Made) -> Made:
        """What the first of the processes that share a row has, on all of them."""
        if self.sharing is None:
            return value
        told: list[Any] = [value]
        source = self.rank - self.sharing.rank
        dist.broadcast_object_list(told, src=source, group=self.sharing.group, device=self.device)
        made: Made = told[0]
        return made

    def alike(self, number: int) -> bool:
        """Whether the processes that share a row all have this number, which is below 2**63."""
        if self.sharing is None:
            return True
        ends = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.sharing.group)
        most, least = ends.tolist()
        return bool(most == -least)

    def leave(self) -> None:
        """Ends the group, if there is one."""
        if self.count > 1:
            dist.destroy_process_group()

    def whole_weights(self, policy: nn.Module) -> dict[str, Tensor]:
        """All weights of a policy, in the host's memory; all processes must ask together.

        On the device one tensor at a time is whole. The first process keeps them, the others get
        an empty dictionary: each copy of an 8B model takes 33 GB of the host.

        Args:
            policy: A policy, divided or not.
        """
        kept = {}
        for name, value in policy.state_dict().items():
            tensor = _whole(value)
            if self.first:
                kept[name] = tensor.cpu()
        return kept

    def fill(self, policy: nn.Module, copy: nn.Module) -> None:
        """Give a copy that is whole on every process a policy's weights, tensor by tensor.

        Nothing passes through the host, and beside the copy one tensor at a time is whole; all
        processes must ask together.

        Args:
            policy: A policy, divided or not.
            copy: Of the same names and shapes, not divided; of its own floating type.

        Raises:
            ValueError: They have not the same names.
        """
        weights, kept = policy.state_dict(), copy.state_dict()
        if weights.keys() != kept.keys():
            apart = sorted(weights.keys() ^ kept.keys())
            raise ValueError(
                f"{len(apart)} weights are only in the policy or only in its copy, such as "
                f"{apart[0]}; make the copy with Policy.copied()"
            )
        with torch.no_grad():
            for name, value in weights.items():
                kept[name].copy_(_whole(value))

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        if self.count > 1:
            dist.all_reduce(values, op=how)
        return values


def _whole(value: Tensor) -> Tensor:
    """A weight that is perhaps divided; all processes gather it together."""
    return value.full_tensor() if isinstance(value, DTensor) else value
