"""Closed-form refit of the output projection.

Per layer, on the layer inputs of the source model: ridge regression of
`source attention output − (W_o o + b_o)` on [o, 1], o the converted layer's head outputs; the
solution is added to W_o and b_o.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from internvideo3.model.attention import RowAttention
from internvideo3.model.conversion.recording import LayerCall


@torch.no_grad()
def refit_output(
    attention: Any, layer: RowAttention, calls: Iterable[LayerCall], ridge: float
) -> float:
    """Changes the converted layer's output projection in place.

    Args:
        attention: the source's layer.
        layer: the converted layer.
        calls: the layer's recorded calls.
        ridge: added to the normal equations, in units of their mean diagonal.

    Returns:
        The share of the attention output's error (energy) that is left.
    """
    fit = _NormalEquations(layer)
    for call in calls:
        fit.add(attention, call)
    return fit.solve(ridge)


class _NormalEquations:
    """Sums of one layer's regression, float64."""

    def __init__(self, layer: RowAttention) -> None:
        self.layer = layer
        width, device = layer.o_proj.in_features + 1, layer.o_proj.weight.device
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros(
            width, layer.o_proj.out_features, dtype=torch.float64, device=device
        )
        self.energy = 0.0

    def add(self, attention: Any, call: LayerCall) -> None:
        turn = (call.cos_BTD, call.sin_BTD)
        wanted, _ = attention(
            hidden_states=call.x_BTX, position_embeddings=turn, attention_mask=call.mask
        )
        caught: list[Tensor] = []
        hook = self.layer.o_proj.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
        try:
            got, _ = self.layer(call.x_BTX, turn, call.mask, modality_mask=call.vision_BT)
        finally:
            hook.remove()
        error = (wanted - got)[call.valid_BT].double()
        heads = caught[0][call.valid_BT].double()
        inputs = torch.cat([heads, torch.ones_like(heads[:, :1])], dim=1)
        self.gram += inputs.T @ inputs
        self.cross += inputs.T @ error
        self.energy += float(error.square().sum())

    def solve(self, ridge: float) -> float:
        # The ridge leaves the bias (the last row) free.
        penalty = ridge * self.gram.diagonal()[:-1].mean() * torch.ones_like(self.gram[0])
        penalty[-1] = 0.0
        change = torch.linalg.solve(self.gram + torch.diag(penalty), self.cross)
        self.layer.o_proj.weight.add_(change[:-1].T)
        self.layer.o_proj.bias.add_(change[-1])
        explained = float((2 * change * self.cross).sum() - (change * (self.gram @ change)).sum())
        return 1.0 - explained / self.energy if self.energy > 0 else 0.0
