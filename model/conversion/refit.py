"""Closed-form refit of the output projection.

Per layer, on the layer inputs of the source model: ridge regression of
`source attention output − (W_o o + b_o)` on [o, 1], o the converted layer's head outputs; the
solution is added to W_o and b_o.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from internvideo3.model.attention import LatentAttention
from internvideo3.model.conversion.statistics import (
    Batch,
    LayerCall,
    record,
    valid_tokens,
    vision_tokens,
)


def refit_outputs(
    source: Qwen3VLForConditionalGeneration,
    layers: list[LatentAttention],
    batches: Iterable[Batch],
    ridge: float,
) -> list[float]:
    """Changes the output projections in place.

    Returns:
        Per layer, the share of the attention output's error (energy) that is left.
    """
    fits = [_NormalEquations(layer) for layer in layers]
    with torch.no_grad():
        for batch in batches:
            calls, _ = record(source, batch)
            valid_BT = valid_tokens(batch, calls[0].x_BTX)
            vision_BT = vision_tokens(source, batch, valid_BT)
            for call in calls:
                fits[call.layer].add(call, valid_BT, vision_BT)
        return [fit.solve(ridge) for fit in fits]


class _NormalEquations:
    """Sums of one layer's regression, float64."""

    def __init__(self, layer: LatentAttention) -> None:
        self.layer = layer
        width, device = layer.o_proj.in_features + 1, layer.o_proj.weight.device
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros(
            width, layer.o_proj.out_features, dtype=torch.float64, device=device
        )
        self.energy = 0.0

    def add(self, call: LayerCall, valid_BT: Tensor, vision_BT: Tensor) -> None:
        assert call.heads_BTE is not None
        wanted = call.attention.o_proj(call.heads_BTE)
        caught: list[Tensor] = []
        hook = self.layer.o_proj.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
        try:
            got, _ = self.layer(
                call.x_BTX,
                (call.cos_BTD, call.sin_BTD),
                call.mask,
                modality_mask=vision_BT,
            )
        finally:
            hook.remove()
        error = (wanted - got)[valid_BT].double()
        heads = caught[0][valid_BT].double()
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
