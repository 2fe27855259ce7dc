"""Initial weights for a model this small.

transformers draws every matrix with a standard deviation of 0.02, which suits widths in the
thousands. At a width of 128 each layer would then shrink its input fourfold, and the raw patch
projection (1536 inputs) would be a hundred times louder than the blocks after it: shapes stayed at
chance for 100,000 seconds of video.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EMBEDDING_STD = 0.1
PATCH_RMS = 1.0
"""Root mean square of the patch projection's output on the world's patches."""


@torch.no_grad()
def scale_weights(model: Any, patches_PKV: Tensor) -> None:
    """Redraw the weights of a Qwen3-VL model in place.

    Matrices get a variance of 1/inputs, those that write into the residual stream
    1/(inputs x writers); the patch projection is centred on and scaled by the given patches.

    Args:
        model: The model.
        patches_PKV: Pixel values of typical patches, `[P,16,D]`.
    """
    text, visual = model.model.language_model, model.model.visual
    nn.init.normal_(text.embed_tokens.weight, std=EMBEDDING_STD)
    for stack in (text.layers, visual.blocks):
        for name, module in stack.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith(("o_proj", "down_proj", "attn.proj", "linear_fc2"))
                _draw(module, 1.0 / (2 * len(stack)) if writes else 1.0)
    for merger in (visual.merger, *visual.deepstack_merger_list):
        for module in (merger.linear_fc1, merger.linear_fc2):
            _draw(module, 1.0)
    project = visual.patch_embed.proj
    mean_V = patches_PKV.mean((0, 1))
    out = (patches_PKV - mean_V) @ project.weight.flatten(1).T
    project.weight.mul_(PATCH_RMS / out.square().mean().sqrt())
    project.bias.copy_(-project.weight.flatten(1) @ mean_V)


def _draw(module: nn.Linear, gain: float) -> None:
    nn.init.normal_(module.weight, std=(gain / module.in_features) ** 0.5)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
