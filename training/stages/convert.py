"""Conversion as a stage of a recipe: GQA in, M²LA out, calibrated on videos drawn by the seed.

What is learnt afterwards depends on it, so seeds of a recipe vary from here on.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvideo3.model.conversion.convert import convert_with_report
from internvideo3.training.documents import Document
from internvideo3.training.policy import Policy
from internvideo3.training.probe import held_of, measured_on, modality_losses, note_losses
from internvideo3.training.recipe import Convert, require
from internvideo3.training.sources import documents_of


def convert(options: Convert, source: Any, processor: Any, seed: int, folder: Path) -> Any:
    """The converted model; `conversion.json` and `losses.json` in the folder say what it cost.

    Args:
        options: The stage.
        source: A GQA model, not changed.
        processor: Its processor.
        seed: Of the calibration videos.
        folder: Of the stage; `work/` keeps what is finished of an interrupted conversion.

    Raises:
        ValueError: The model cannot be converted, or the preset is unknown.
    """
    data = require(options.data, "data")
    _probe("before conversion", options, source, processor, folder)
    documents = documents_of(data, processor, seed)
    batches = [_inputs(documents.taught(n), source.config) for n in range(options.videos)]
    conversion = convert_with_report(source, batches, options.preset, folder=folder / "work")
    report = {
        "cache_share": conversion.cache_share,
        "divergence": conversion.divergence,
        "layers": [asdict(layer) for layer in conversion.layers],
    }
    (folder / "conversion.json").write_text(json.dumps(report, indent=1) + "\n")
    _probe("after conversion", options, conversion.model, processor, folder)
    return conversion.model


def _probe(moment: str, options: Convert, model: Any, processor: Any, folder: Path) -> None:
    """Losses by modality, where the recipe has held-out documents."""
    held = held_of(options, processor)
    if held is not None:
        losses = modality_losses(Policy(model.eval()), held, options.probe)
        note_losses(folder, moment, losses, measured_on(options))


def _inputs(document: Document, config: Any) -> dict[str, Tensor]:
    """What the model's forward takes, of a document and its first branch."""
    ids_1T = torch.tensor([[*document.trunk_ids, *document.branches[0].ids]])
    image = (ids_1T == config.image_token_id).int()
    made = {
        "input_ids": ids_1T,
        "attention_mask": torch.ones_like(ids_1T),
        "mm_token_type_ids": image + 2 * (ids_1T == config.video_token_id).int(),
    }
    for kind, pixels in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        media = [m for m in document.media if m.kind == kind]
        if media:
            made[pixels] = torch.cat([m.pixels for m in media])
            made[f"{kind}_grid_thw"] = torch.stack([m.grid_thw for m in media])
    return made
