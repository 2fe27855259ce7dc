"""How much arithmetic a pass is, and what share of the machine's peak that comes to.

Model FLOPs as in the PaLM report (Chowdhery et al., 2022, appendix B): two for each weight and
token and for each pair of attending tokens and head channel, three times that with the backward
pass, for the vision tower too where it learns; recomputation does not count. Peaks are the dense
bf16 figures of the vendors' data sheets.
"""

from __future__ import annotations

from typing import Any

import torch

from internvideo3.training.objectives.linear_cross_entropy import IGNORE
from internvideo3.training.packing import Pack

PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}
"""Part of the device's name → FLOP/s."""


def pass_flops(model: Any, pack: Pack) -> float:
    """FLOPs of a forward and backward pass; of a vision tower that does not learn, of its forward.

    Args:
        model: A Qwen3-VL for conditional generation; the tower learns if its weights do.
        pack: The row.
    """
    text = model.config.get_text_config()
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    supervised = int((pack.labels_T != IGNORE).sum())
    dense = layers * len(pack.ids_T) + model.lm_head.weight.numel() * supervised
    channels = text.num_attention_heads * (key_width(text) + text.head_dim)
    attention = channels * text.num_hidden_layers * attending_pairs(pack)
    learning = any(p.requires_grad for p in model.model.visual.parameters())
    passes = 3 if learning else 1
    return float(3 * 2.0 * (dense + attention) + passes * 2.0 * tower_products(model, pack))


def tower_products(model: Any, pack: Pack) -> float:
    """Products of the vision tower's forward: of its mergers once a token, of all else a patch."""
    visual = model.model.visual
    of_patch, of_token = (
        sum(p.numel() for part in parts for p in part.parameters())
        for parts in (
            (visual.patch_embed, visual.blocks),
            (visual.merger, visual.deepstack_merger_list),
        )
    )
    return float(len(pack.pixels) * (of_patch + of_token / visual.spatial_merge_size**2))


def attending_pairs(pack: Pack) -> float:
    """Pairs of a token and one that it sees."""
    pairs_T2 = torch.stack([pack.document_T, pack.branch_T], 1)
    kinds_N2, counts_N = torch.unique_consecutive(pairs_T2, dim=0, return_counts=True)
    pairs = trunk = 0.0
    for branch, count in zip(kinds_N2[:, 1].tolist(), counts_N.tolist(), strict=True):
        trunk = trunk if branch else 0.0
        pairs += count * (count + 1) / 2 + count * trunk
        trunk = trunk if branch else float(count)
    return pairs


def key_width(text: Any) -> int:
    """Channels of a key: M²LA's have the rotary slots beside the content."""
    slots = getattr(text, "rope_slots", 0)
    widest = max(slots) if isinstance(slots, list) else slots
    return int(text.head_dim + 2 * (widest or 0))


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a GPU in bf16; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
