"""Conversion as a stage of a recipe: GQA in, M²LA out, calibrated on videos drawn by the seed.

What is learnt afterwards depends on it, so seeds of a recipe vary from here on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvideo3.model.conversion.convert import convert_with_report
from internvideo3.training.documents import Document, WorldDocuments
from internvideo3.training.policy import Policy
from internvideo3.training.probe import modality_losses, note_losses
from internvideo3.training.recipe import Convert, require


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
    documents = WorldDocuments(data, processor, seed)
    lengths, count = dict(data.lengths), options.probe
    before = modality_losses(Policy(source.eval()), processor, lengths, count)
    note_losses(folder, "before conversion", before)
    batches = list(_calibration(documents, options.videos, source.config))
    conversion = convert_with_report(source, batches, options.preset, folder=folder / "work")
    report = {
        "cache_share": conversion.cache_share,
        "divergence": conversion.divergence,
        "layers": [asdict(layer) for layer in conversion.layers],
    }
    (folder / "conversion.json").write_text(json.dumps(report, indent=1) + "\n")
    after = modality_losses(Policy(conversion.model.eval()), processor, lengths, count)
    note_losses(folder, "after conversion", after)
    return conversion.model


def _calibration(
    documents: WorldDocuments, videos: int, config: Any
) -> Iterator[dict[str, Tensor]]:
    """Model inputs of a video and one question with its answer, for so many videos."""
    for index in range(videos):
        yield _inputs(documents.taught(index), config)


def _inputs(document: Document, config: Any) -> dict[str, Tensor]:
    ids_1T = torch.tensor([[*document.trunk_ids, *document.branches[0].ids]])
    return {
        "input_ids": ids_1T,
        "attention_mask": torch.ones_like(ids_1T),
        "mm_token_type_ids": 2 * (ids_1T == config.video_token_id).int(),
        "pixel_values_videos": torch.cat([m.pixels for m in document.media]),
        "video_grid_thw": torch.stack([m.grid_thw for m in document.media]),
    }
