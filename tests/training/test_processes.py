"""Whole weights of a divided policy, by two processes: `pytest tests/training/test_processes.py`.

Each process runs this file: `test_processes.py OUT`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from internvideo3.model.checkpoint import load_model
from internvideo3.training.policy import Policy
from internvideo3.training.processes import Processes


@pytest.mark.slow
def test_whole_weights_are_kept_where_they_are_wanted(tmp_path: Path) -> None:
    """By the first process alone, and in a copy on every one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, __file__, str(tmp_path)]
    running = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    truth = learned_policy().state_dict()
    assert [one.wait(timeout=250) for one in running] == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        kept = found.pop("by the first")
        assert kept.keys() == (set() if rank else truth.keys())
        assert all(torch.equal(value, truth[name]) for name, value in kept.items())
        for where, weights in found.items():
            assert weights.keys() == truth.keys(), where
            assert all(torch.equal(weights[name], value) for name, value in truth.items()), where


def test_a_copy_of_another_model_is_not_filled() -> None:
    policy = Policy(load_model("scale:m2la", "cpu", torch.float32)[0])
    with pytest.raises(ValueError, match="only in the policy or only in its copy, such as bias"):
        Processes("cpu").fill(policy, nn.Linear(1, 1))


def learned_policy() -> Policy:
    """A policy whose weights have moved since it was loaded."""
    policy = Policy(load_model("scale:m2la", "cpu", torch.float32)[0])
    torch.manual_seed(0)
    for parameter in policy.parameters():
        parameter.data += torch.randn_like(parameter)
    return policy


def main() -> None:
    """One of two processes: what it holds of a policy that both divide."""
    torch.set_num_threads(1)
    group = Processes("cpu")
    policy = learned_policy()
    copy = Policy(load_model("scale:m2la", "cpu", torch.float32)[0]).copied()
    group.shard(policy)
    group.fill(policy, copy)
    found = {
        "by the first": group.whole_weights(policy),
        "in a copy": copy.state_dict(),
    }
    torch.save(found, Path(sys.argv[1]) / f"{group.rank}.pt")
    group.leave()


if __name__ == "__main__":
    main()
