"""Attention of packed rows, whole and divided: `pytest tests/training/test_attention.py`."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internvideo3.model.checkpoint import load_model
from internvideo3.training.attention import BACKENDS, PackedAttention, Sharing, overlaps
from internvideo3.training.packing import pack
from internvideo3.training.policy import Policy, frame_owners
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Sft
from internvideo3.training.train import build_stage

DOCUMENT = torch.tensor([0] * 11 + [1] * 5 + [2] * 9)
BRANCH = torch.tensor([0] * 4 + [1] * 3 + [2] * 4 + [0] * 5 + [0] * 2 + [1] * 7)
DIVIDED = Path(__file__).with_name("divided.py")
SFT = Sft(kind="sft", **runpy.run_path(str(DIVIDED))["COMMON"])


def plain(packed: PackedAttention, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Token by token, in float64, from the words of the definition."""
    groups = q.shape[1] // k.shape[1]
    rows = []
    for t in range(len(DOCUMENT)):
        seen = [
            s for s in range(t + 1)
            if DOCUMENT[s] == DOCUMENT[t] and int(BRANCH[s]) in (0, int(BRANCH[t]))
        ]  # fmt: skip
        keys, values = (x[0].repeat_interleave(groups, 0)[:, seen] for x in (k, v))
        share = torch.softmax((q[0, :, t, None] * keys).sum(-1) * scale, -1)
        rows.append((share[..., None] * values).sum(1))
    return torch.stack(rows, 1)[None]


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries of 4 heads, keys of 2 that are twice as wide as values."""
    torch.manual_seed(0)
    shapes = ((1, 4, 25, 16), (1, 2, 25, 16), (1, 2, 25, 8))
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


def outcome(attend: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of a fixed direction."""
    out = attend(PackedAttention(DOCUMENT, BRANCH), *given, 0.3)
    along = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * along).sum(), given)]


@pytest.mark.parametrize("name", ["segments", "mask"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_backends_have_the_definitions_outputs_and_gradients(
    name: Any, dtype: torch.dtype, most: float
) -> None:
    truth = outcome(plain, inputs())
    ours = outcome(BACKENDS[name], inputs(dtype))
    assert all((a - b).abs().max() <= most for a, b in zip(ours, truth, strict=True))


def test_flex_has_the_definitions_output() -> None:
    """On a CPU it has no backward pass."""
    given = [x.detach() for x in inputs(torch.float32)]
    packed = PackedAttention(DOCUMENT, BRANCH)
    truth = plain(packed, *(x.double() for x in given), 0.3)
    assert (BACKENDS["flex"](packed, *given, 0.3) - truth).abs().max() <= 1e-5


@pytest.mark.gpu
def test_flex_on_a_gpu_has_the_definitions_outputs_and_gradients() -> None:
    given = [x.detach().cuda().float().requires_grad_() for x in inputs()]
    packed = PackedAttention(DOCUMENT.cuda(), BRANCH.cuda())
    pairs = []
    for name in ("flex", "mask"):
        out = BACKENDS[name](packed, *given, 0.3)  # type: ignore[index]
        pairs.append([out, *torch.autograd.grad(out.sin().sum(), given)])
    assert all((a - b).abs().max() <= 1e-4 for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("checkpoint", ["scale:m2la", "scale:base"])
def test_a_model_trains_alike_with_every_backend(checkpoint: str) -> None:
    model, processor = load_model(checkpoint, "cpu", torch.float32)
    found = {}
    for backend in ("segments", "mask"):
        policy = Policy(model, backend=backend)  # type: ignore[arg-type]
        (work,), _ = build_stage(SFT, processor, policy, 0, Processes()).works(0, policy)
        model.zero_grad()
        loss = policy(work.pack, work.loss)
        loss.backward()
        learned = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        found[backend] = [loss.detach(), *learned]
    assert len(found["mask"]) > 20
    for ours, theirs in zip(*found.values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_a_row_form_without_rotary_keys_is_refused() -> None:
    from internvideo3.model.config import InternVideo3Config
    from internvideo3.model.modeling import InternVideo3ForConditionalGeneration

    config, _ = load_model("scale:m2la", "cpu", torch.float32)
    told = config.config.to_dict()
    told["text_config"] |= {"row_form": "prerope"}
    model = InternVideo3ForConditionalGeneration(InternVideo3Config.from_dict(told))
    with pytest.raises(ValueError, match="prerope.*does not train"):
        Policy(model)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["scale:m2la", "scale:base"])
def test_rows_divided_between_two_processes_train_as_whole_ones(
    checkpoint: str, tmp_path: Path
) -> None:
    """All stages and sights: loss and every gradient, of M²LA (latent gather) and GQA.

    Also with weights that are divided (FSDP2) while the rows differ, and of a frozen copy.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, str(DIVIDED), checkpoint, str(tmp_path / "found.pt")]
    running = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    made = runpy.run_path(str(DIVIDED))
    whole = {}
    for name, options in made["STAGES"].items():
        model, processor = load_model(checkpoint, "cpu", torch.float32)
        policy = Policy(model)
        works, _ = build_stage(options, processor, policy, 0, Processes()).works(0, policy)
        loss = torch.stack([policy(work.pack, work.loss) for work in works]).sum()
        loss.backward()
        whole[name] = {"loss": loss.detach(), **made["learned"](policy)}
    rows = {name: [name] for name in made["SIGHTS"]}
    for name, shown in {**rows, "sharded": ["videos and images", "text alone"]}.items():
        # Gradients of words at random are large, and float64 rounds them.
        model, _ = load_model(checkpoint, "cpu", torch.float64)
        policy = Policy(model, train_vision=True)
        sights = [made["sight"](model, made["SIGHTS"][one]) for one in shown]
        loss = torch.stack([policy(row, made["own_words"](row)) for row in sights]).sum()
        loss.backward()
        whole[name] = {"loss": loss.detach(), **made["learned"](policy)}
    whole["frozen"] = {"loss": torch.zeros(()), **Policy(model).state_dict()}
    assert [one.wait(timeout=250) for one in running] == [0, 0]
    divided = torch.load(tmp_path / "found.pt", weights_only=True)
    assert most_of_the_tower(whole["videos and images"]) > 1e-3
    for name, truth in whole.items():
        assert truth.keys() == divided[name].keys(), name
        apart = {k: float((divided[name][k] - v).abs().max()) for k, v in truth.items()}
        assert max(apart.values()) <= 1e-5, (name, max(apart, key=lambda k: apart[k]))
    assert float(whole["sft"]["loss"]) > 0


def most_of_the_tower(found: dict[str, Tensor]) -> float:
    """The largest gradient of the vision tower."""
    return max(float(v.abs().max()) for k, v in found.items() if ".visual." in k)


def test_frames_are_divided_in_their_order_and_by_their_patches() -> None:
    frames_F3, owner_F = frame_owners(torch.tensor([[3, 4, 4], [1, 8, 12], [1, 4, 4]]), 3)
    assert frames_F3.tolist() == [[1, 4, 4]] * 3 + [[1, 8, 12], [1, 4, 4]]
    assert owner_F.tolist() == [0, 0, 0, 1, 2]
    # One frame for three processes: the middle one's, the others have none.
    assert frame_owners(torch.tensor([[1, 4, 4]]), 3)[1].tolist() == [1]
    assert overlaps([4, 0, 3], 0, [1, 5, 1]) == [1, 3, 0]
    assert overlaps([4, 0, 3], 1, [1, 5, 1]) == [0, 0, 0]


def test_processes_share_the_frames_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees its own half of the patches, in one call, whatever the frames' sizes."""
    model, _ = load_model("scale:m2la", "cpu", torch.float32)
    made = runpy.run_path(str(DIVIDED))
    row = made["sight"](model, made["SIGHTS"]["videos and images"])
    seen: list[Tensor] = []
    model.model.visual.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    monkeypatch.setattr(Sharing, "dealt", lambda self, rows, held, wanted: rows)
    for rank in range(2):
        policy = Policy(model, sharing=Sharing(None, rank, 2))  # type: ignore[arg-type]
        policy._see(row, torch.zeros(2, dtype=torch.bool))
    assert len(seen) == 2
    assert torch.equal(torch.cat(seen), row.pixels)
    assert abs(len(seen[0]) - len(seen[1])) <= 2 * 64


def test_processes_wait_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first converts a large model the others stand at a barrier."""
    told: list[timedelta] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(told))
    monkeypatch.setattr(dist, "init_process_group", lambda _, timeout: told.append(timeout))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "new_group", lambda _, timeout: told.append(timeout))
    Processes("cpu").divide_rows(2)
    assert len(told) == 2
    assert min(told) >= timedelta(hours=6)


def test_only_latent_rows_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what M²LA's processes exchange, keys and values are no part."""
    widths: list[int] = []
    monkeypatch.setattr(Sharing, "gathered",
                        lambda self, part, dim: widths.append(part.shape[-1]) or
                        torch.cat([part, part], dim))  # fmt: skip
    monkeypatch.setattr(Sharing, "heads_of_all",
                        lambda self, x: torch.cat([x, x], 2)[:, : x.shape[1] // 2])  # fmt: skip
    monkeypatch.setattr(Sharing, "tokens_of_all",
                        lambda self, x: torch.cat([x, x], 1)[:, :, : x.shape[2] // 2])  # fmt: skip
    model, _ = load_model("scale:m2la", "cpu", torch.float32)
    layer = model.model.language_model.layers[0].self_attn
    rows = torch.randn(1, 4, layer.rank + 2 * len(layer.slot_frequencies))
    q = torch.randn(1, layer.num_heads, 4, layer.head_dim + 2 * len(layer.slot_frequencies))
    zeros = torch.zeros(8, dtype=torch.long)
    sharing = Sharing(None, 0, 2)  # type: ignore[arg-type]
    packed = PackedAttention(zeros, zeros, sharing=sharing)
    assert packed.latent(layer, q, rows).shape == (1, layer.num_heads, 4, layer.head_dim)
    assert widths == [rows.shape[-1]]


def test_heads_that_cannot_be_divided_are_told() -> None:
    with pytest.raises(ValueError, match="3 processes cannot divide 2 key/value heads"):
        PackedAttention._own_heads(2, Sharing(None, 0, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sequence_parallel is 2 and there are 1 processes"):
        Processes().divide_rows(2)


def test_a_padded_row_is_the_same_row() -> None:
    model, processor = load_model("scale:m2la", "cpu", torch.float32)
    policy = Policy(model)
    stage: Any = build_stage(SFT, processor, policy, 0, Processes())
    row = pack([stage.documents.taught(0)], model)
    found: list[Tensor] = []
    with torch.no_grad():
        for one in (row, row.padded(64)):
            policy(one, lambda hidden, head: found.append(hidden) or hidden)
    assert len(row.padded(64).ids_T) % 64 == 0
    assert (found[0] - found[1]).abs().max() < 1e-6
