"""The vision tower over many equal frames at once.

transformers runs attention patch group by patch group in a Python loop; thousands of 4 x 4 grids
per batch make that the bottleneck. This is the same tower (its own modules and weights) with the
groups as a batch dimension; a test compares the two.

Letters: P temporal patches, K patches of one (16), M merged tokens of one (4), E vision width,
H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3_vl import modeling_qwen3_vl

# The names below are imported there, not exported: typed as any module attribute.
hf: Any = modeling_qwen3_vl

GRID = (1, 4, 4)


class FrameEncoder:
    """Encodes temporal patches of one fixed grid with a Qwen3-VL vision tower."""

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        grid = torch.tensor([GRID], device=visual.pos_embed.weight.device)
        merge = visual.config.spatial_merge_size
        self.indices, self.weights = hf.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge,
            kwargs={},
        )
        positions = hf.get_vision_position_ids(grid, merge, kwargs={})
        self.rotary = visual.rotary_pos_emb(visual.pos_embed.weight, positions)

    def __call__(self, patches_PKV: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode.

        Args:
            patches_PKV: Pixel values `[P,16,1536]`.

        Returns:
            Merged tokens `[P,M,text width]` and one such tensor for every DeepStack level.
        """
        visual = self.visual
        project = visual.patch_embed.proj
        # The Conv3d sees exactly one window per patch: it is this matrix product, whose backward
        # pass is 50 times faster on a CPU.
        x_PKE = functional.linear(patches_PKV, project.weight.flatten(1), project.bias)
        place_KE = (visual.pos_embed(self.indices) * self.weights[:, :, None]).sum(1)
        x_PKE = x_PKE + place_KE
        deep: list[Tensor] = []
        for index, block in enumerate(visual.blocks):
            x_PKE = x_PKE + self._attend(block.attn, block.norm1(x_PKE))
            x_PKE = x_PKE + block.mlp(block.norm2(x_PKE))
            if index in visual.deepstack_visual_indexes:
                level = visual.deepstack_visual_indexes.index(index)
                deep.append(self._merge(visual.deepstack_merger_list[level], x_PKE))
        return self._merge(visual.merger, x_PKE), deep

    def _attend(self, attention: Any, x_PKE: Tensor) -> Tensor:
        count, patches, width = x_PKE.shape
        qkv = attention.qkv(x_PKE).view(count, patches, 3, attention.num_heads, -1)
        q_PKHD, k_PKHD, v_PKHD = qkv.unbind(2)
        q_PKHD, k_PKHD = hf.apply_rotary_pos_emb_vision(q_PKHD, k_PKHD, *self.rotary)
        scores = q_PKHD.transpose(1, 2) * attention.scaling @ k_PKHD.permute(0, 2, 3, 1)
        mixed_PHKD = functional.softmax(scores, -1).to(v_PKHD.dtype) @ v_PKHD.transpose(1, 2)
        out: Tensor = attention.proj(mixed_PHKD.transpose(1, 2).reshape(count, patches, width))
        return out

    def _merge(self, merger: Any, x_PKE: Tensor) -> Tensor:
        count, patches, width = x_PKE.shape
        merged: Tensor = merger(x_PKE.reshape(count * patches, width))
        return merged.view(count, -1, merged.shape[-1])
