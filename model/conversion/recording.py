"""What the calibration pass leaves on disk: every attention layer's input and its loss gradient.

One forward and one backward pass per batch, with labels drawn from the model itself. A layer's
input x and the gradient dO of its head outputs are written as they appear, so memory holds one
layer's; later steps read one layer of all batches. A batch counts as recorded once its `shared`
file exists, so an interrupted pass continues with the next one.

Axes: B batch, T tokens, X model width, E = H D (head outputs), N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from internvideo3.model.conversion.source import Batch, Source, valid_tokens
from internvideo3.model.recompute import recompute

RECOMPUTE_ABOVE_BYTES = 2 << 30
"""Estimated activations from which a layer's are recomputed in the backward pass."""

HEAD_TOKENS = 128
"""Tokens whose logits are held at once."""

Progress = Callable[[str, int, int], None]
"""Called with a step's name, how many of its parts are done, and how many there are."""


def silent(step: str, done: int, total: int) -> None:
    """Progress that nobody wants to see."""


@dataclass(frozen=True)
class LayerCall:
    """One call of one attention layer of the source, with its gradient."""

    x_BTX: Tensor
    cos_BTD: Tensor
    sin_BTD: Tensor
    mask: Tensor | None
    """As transformers hands it to the layer: None (causal), boolean or additive."""
    grad_BTE: Tensor
    """dLoss/d(head outputs)."""
    valid_BT: Tensor
    vision_BT: Tensor

    def scores_bias(self) -> Tensor:
        """Additive mask [B or 1, 1, T, T], float32."""
        T, device = self.x_BTX.shape[1], self.x_BTX.device
        mask = self.mask
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()[None, None]
        if mask.dtype != torch.bool:
            return mask.float()
        return torch.zeros(mask.shape, device=device).masked_fill(~mask, -1e30)


@dataclass(frozen=True)
class Recording:
    """A folder of recorded calibration batches."""

    folder: Path
    batches: int
    device: torch.device

    def calls(self, layer: int) -> Iterator[LayerCall]:
        """One layer's calls, one batch after the other."""
        for index in range(self.batches):
            shared = load_file(_shared_file(self.folder, index), device=str(self.device))
            own = load_file(_layer_file(self.folder, index, layer, "x"), device=str(self.device))
            grad = load_file(_layer_file(self.folder, index, layer, "grad"), str(self.device))
            yield LayerCall(
                own["x"],
                shared["cos"],
                shared["sin"],
                shared.get("mask"),
                grad["grad"],
                shared["valid"],
                shared["vision"],
            )

    def hidden(self, batch: int) -> Tensor:
        """The source's final hidden states at supervised tokens, [N, X]."""
        found: Tensor = load_file(_shared_file(self.folder, batch))["hidden"]
        return found.to(self.device)


def record(
    source: Source,
    batches: Sequence[Batch],
    folder: Path,
    *,
    seed: int,
    progress: Progress = silent,
) -> Recording:
    """Runs the calibration pass, or the rest of it.

    Args:
        source: the model.
        batches: its inputs. Sequences must begin at their true start: the first token is an
            attention sink.
        folder: where to.
        seed: of the labels drawn from the model.
        progress: called after every batch.

    Raises:
        ValueError: there is no batch.
    """
    if not batches:
        raise ValueError("no calibration batch was given; pass at least one dict of model inputs.")
    folder.mkdir(parents=True, exist_ok=True)
    for index, batch in enumerate(batches):
        if not _shared_file(folder, index).is_file():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            _record_batch(source, batch, folder, index, generator)
        progress("calibration pass", index + 1, len(batches))
    return Recording(folder, len(batches), source.device)


def _record_batch(
    source: Source, batch: Batch, folder: Path, index: int, generator: torch.Generator
) -> None:
    (folder / f"{index:04d}").mkdir(exist_ok=True)
    shared: dict[str, Tensor] = {}
    counts_BT = source.supervised(batch).to(source.device)
    with _frozen(source, batch), _hooks(source, folder, index, shared), torch.enable_grad():
        hidden_BTX = source.hidden(batch)
        chosen_NX = hidden_BTX[counts_BT]
        grad_NX = sampled_gradient(source.head, chosen_NX.detach(), generator)
        torch.autograd.backward(chosen_NX, grad_NX)
    shared |= {
        "valid": valid_tokens(batch),
        "vision": source.vision_tokens(batch),
        "hidden": chosen_NX.detach().cpu(),
    }
    _save(shared, _shared_file(folder, index))


@torch.no_grad()
def sampled_gradient(head: nn.Linear, hidden_NX: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the summed cross-entropy by the hidden states, labels drawn from the model.

    d/dh = (softmax − onehot) W; the logits of a few tokens are held at a time.
    """
    grads = []
    for part_NX in hidden_NX.split(HEAD_TOKENS):
        wide = torch.promote_types(part_NX.dtype, torch.float32)
        probs = head(part_NX).to(wide).softmax(-1)
        labels = torch.multinomial(probs.cpu().float(), 1, generator=generator).to(probs.device)
        probs.scatter_add_(1, labels, -torch.ones_like(labels, dtype=wide))
        grads.append((probs.to(head.weight.dtype) @ head.weight).to(part_NX.dtype))
    return torch.cat(grads)


@contextmanager
def _frozen(source: Source, batch: Batch) -> Iterator[None]:
    """Gradients flow from the embeddings to the layers, and to no weight."""
    model = source.model
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.requires_grad_(False)
    model.eval()
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _m, _i, out: out.detach().requires_grad_(True)
    )
    try:
        with _recomputing(source, batch):
            yield
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


@contextmanager
def _recomputing(source: Source, batch: Batch) -> Iterator[None]:
    """Recomputes activations layer by layer where they would take much memory."""
    text = source.text
    per_token = 12 * text.hidden_size + 4 * text.intermediate_size
    tokens = batch["input_ids"].numel() * source.model.dtype.itemsize
    if per_token * tokens * text.num_hidden_layers < RECOMPUTE_ABOVE_BYTES:
        yield
        return
    recompute(source.model)
    for layer in source.layers:
        # The layer alone: its dropout, a child, stays off.
        layer.training = True
    try:
        yield
    finally:
        recompute(source.model, on=False)
        for layer in source.layers:
            layer.training = False


@contextmanager
def _hooks(source: Source, folder: Path, index: int, shared: dict[str, Tensor]) -> Iterator[None]:
    """Writes each attention layer's input and gradient while the model runs."""
    handles: list[Any] = []
    for number, layer in enumerate(source.layers):
        attention = layer.self_attn
        enter = _input_hook(_layer_file(folder, index, number, "x"), shared)
        leave = _gradient_hook(_layer_file(folder, index, number, "grad"))
        handles.append(attention.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(attention.o_proj.register_forward_pre_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(file: Path, shared: dict[str, Tensor]) -> Callable[..., None]:
    """Writes a layer's input, and keeps what all layers share."""
    written = False

    def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal written
        if written:  # recomputation
            return
        written = True
        _save({"x": kwargs["hidden_states"]}, file)
        if not shared:
            shared["cos"], shared["sin"] = kwargs["position_embeddings"]
            if kwargs["attention_mask"] is not None:
                shared["mask"] = kwargs["attention_mask"]

    return hook


def _gradient_hook(file: Path) -> Callable[..., None]:
    """Writes the gradient of a layer's head outputs."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].register_hook(lambda grad: _save({"grad": grad}, file))

    return hook


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a file that exists only when it is whole."""
    partial = file.with_suffix(".partial")
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial)
    partial.rename(file)


def _shared_file(folder: Path, index: int) -> Path:
    return folder / f"{index:04d}" / "shared.safetensors"


def _layer_file(folder: Path, index: int, layer: int, what: str) -> Path:
    return folder / f"{index:04d}" / f"{layer:03d}.{what}.safetensors"
