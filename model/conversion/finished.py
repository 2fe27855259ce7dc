"""Converted layers on disk, loaded one at a time.

All layers of a large model would take as much memory as a fifth of its weights: a layer is built
when it is called, on tensors that are mapped from its file, and dropped afterwards. Projections and
norms that a conversion does not change are the source's own modules and are not in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvideo3.model.attention import RowAttention
from internvideo3.model.config import InternVideo3TextConfig
from internvideo3.model.modeling import ATTENTIONS

KEPT = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
"""Modules that a converted layer may share with the source's."""


def save_layer(layer: RowAttention, attention: Any, file: Path) -> None:
    """Writes what is the layer's own; the file exists only when it is whole."""
    kept = {id(parameter) for parameter in attention.parameters()}
    own = {k: v for k, v in layer.named_parameters() if id(v) not in kept}
    partial = file.with_suffix(".partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in own.items()}, partial)
    partial.rename(file)


def load_layer(file: Path, config: InternVideo3TextConfig, attention: Any) -> RowAttention:
    """What `save_layer` wrote.

    Args:
        file: the layer's file.
        config: of this layer alone.
        attention: the source's layer.
    """
    with torch.device("meta"):
        made = ATTENTIONS[config.row_form](config, 0)
    device = attention.o_proj.weight.device
    tensors = load_file(file, device=str(device))
    present = {name.partition(".")[0] for name in tensors}
    for name in KEPT:
        if name not in present and hasattr(attention, name) and hasattr(made, name):
            setattr(made, name, getattr(attention, name))
    absent, unknown = made.load_state_dict(tensors, strict=False, assign=True)
    lost = [name for name in absent if made.get_parameter(name).is_meta]
    assert not lost and not unknown, f"{file}: lacks {lost}, does not know {unknown}"
    _freeze(made, tensors)
    return made.eval()


def _freeze(made: RowAttention, tensors: dict[str, Tensor]) -> None:
    """The source's own parameters stay as trainable as they were."""
    for name in tensors:
        made.get_parameter(name).requires_grad_(False)


class FinishedLayers(Sequence[RowAttention]):
    """Converted layers, each loaded anew whenever it is asked for."""

    def __init__(self, load: Callable[[int], RowAttention], count: int) -> None:
        self._load, self._count = load, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[RowAttention]:
        return (self._load(index) for index in range(self._count))

    @overload
    def __getitem__(self, index: int) -> RowAttention: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowAttention]: ...
    def __getitem__(self, index: int | slice) -> RowAttention | list[RowAttention]:
        if isinstance(index, slice):
            return [self._load(i) for i in range(self._count)[index]]
        return self._load(range(self._count)[index])
