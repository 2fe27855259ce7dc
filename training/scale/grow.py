"""A deeper scale model that computes what a trained one does, as the start of a larger teacher.

    python -m internvideo3.training.scale.grow --source CKPT --out DIR

After each decoder layer comes a copy of it whose two writing matrices (`o_proj`, `down_proj`) are
zero, so that the copy adds nothing until it has learnt (after Chen, Goodfellow and Shlens,
"Net2Net: Accelerating Learning via Knowledge Transfer", 2016). The first layer stays the first:
DeepStack's visual features are added after it.
"""

from __future__ import annotations

import argparse
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from internvideo3.model.checkpoint import resolve_checkpoint
from internvideo3.model.scale.build import load_processor

WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_LAYER = re.compile(r"(.*language_model\.layers\.)(\d+)\.(.*)")


@torch.no_grad()
def grow(model: Any) -> Any:
    """A Qwen3-VL with twice the decoder layers and, so far, the same outputs.

    Args:
        model: A GQA Qwen3-VL for conditional generation; not changed.

    Raises:
        ValueError: DeepStack adds features after more than the first layer, which would then no
            longer follow one another.
    """
    config = deepcopy(model.config)
    if len(config.vision_config.deepstack_visual_indexes) > 1:
        raise ValueError("growing keeps DeepStack's place after the first layer only; it has more.")
    config.text_config.num_hidden_layers *= 2
    grown = type(model)(config)
    grown.load_state_dict(_twice(model.state_dict()))
    return grown.eval()


def _twice(state: dict[str, Any]) -> dict[str, Any]:
    """The weights of the grown model."""
    made: dict[str, Any] = {}
    for name, value in state.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            made[name] = value
            continue
        stem, layer, part = found[1], int(found[2]), found[3]
        made[f"{stem}{2 * layer}.{part}"] = value
        silent = part in WRITERS
        made[f"{stem}{2 * layer + 1}.{part}"] = torch.zeros_like(value) if silent else value.clone()
    return made


def main(arguments: list[str] | None = None) -> None:
    """Parse and grow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="checkpoint folder or name, GQA")
    parser.add_argument("--out", type=Path, required=True, help="folder of the grown checkpoint")
    given = parser.parse_args(arguments)
    source = resolve_checkpoint(given.source)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    grow(model).save_pretrained(given.out)
    load_processor().save_pretrained(given.out)


if __name__ == "__main__":
    main()
