"""Whether a checkpoint's configuration has a shape of which a model can be made.

What a profile works out, before any weight is read, takes the configuration at its word: an empty
or endless model would end in an error of torch's, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvideo3.model.checkpoint import ARCHITECTURES, CheckpointError, read_json

MOST_LAYERS = 1000
MOST_NUMBERS = 1 << 24
"""Of a width, a vocabulary, a count of heads."""
MOST_POSITIONS = 1 << 40
TEXT: Mapping[str, int] = {
    "num_hidden_layers": MOST_LAYERS,
    "hidden_size": MOST_NUMBERS,
    "intermediate_size": MOST_NUMBERS,
    "num_attention_heads": MOST_NUMBERS,
    "num_key_value_heads": MOST_NUMBERS,
    "head_dim": MOST_NUMBERS,
    "vocab_size": MOST_NUMBERS,
    "max_position_embeddings": MOST_POSITIONS,
}
"""Fields of the text model, and the most that one may be; what is left out has a default."""
VISION: Mapping[str, int] = {
    "depth": MOST_LAYERS,
    "hidden_size": MOST_NUMBERS,
    "intermediate_size": MOST_NUMBERS,
    "num_heads": MOST_NUMBERS,
    "out_hidden_size": MOST_NUMBERS,
}
SHOWN = 40
"""Characters of a value."""
BY_LAYER = ("latent_rank", "rope_slots", "vision_rank")
"""Of M²LA: a number, or one of each layer."""


def check_shape(checkpoint: Path) -> None:
    """Check the numbers of a checkpoint's config.json; one that is not there is not looked at.

    Raises:
        CheckpointError: a number makes no model; says which field, and what it is.
    """
    file = checkpoint / "config.json"
    if not file.is_file():
        return
    config = read_json(file)
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{file} must hold an object, not {_told(config)}.")
    if config.get("model_type") not in ARCHITECTURES:
        return
    text = _part(file, config, "text_config")
    _check_numbers(file, text, TEXT, "")
    _check_divides(file, text, "num_key_value_heads", "num_attention_heads", "")
    _check_layers(file, text)
    if "vision_config" in config:
        vision = _part(file, config, "vision_config")
        _check_numbers(file, vision, VISION, "vision_config.")
        _check_divides(file, vision, "num_heads", "hidden_size", "vision_config.")


def _part(file: Path, config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name, config if config["model_type"] == "internvideo3_text" else None)
    if not isinstance(part, Mapping):
        raise CheckpointError(f"{file}: {name} is {_told(part)}; it must be an object.")
    return part


def _check_numbers(
    file: Path, part: Mapping[str, Any], fields: Mapping[str, int], prefix: str
) -> None:
    for name, most in fields.items():
        if name in part:
            _check_number(file, prefix + name, part[name], most)


def _check_number(file: Path, name: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(
            f"{file}: {name} is {_told(value)}; it must be a whole number from 1 to {most}."
        )


def _check_divides(file: Path, part: Mapping[str, Any], by: str, name: str, prefix: str) -> None:
    if by in part and name in part and part[name] % part[by]:
        raise CheckpointError(
            f"{file}: {prefix}{by} is {part[by]}; it must divide {prefix}{name}, {part[name]}."
        )


def _check_layers(file: Path, text: Mapping[str, Any]) -> None:
    """Whether what may differ between layers is there for each of them."""
    layers = text.get("num_hidden_layers")
    for name in BY_LAYER:
        value = text.get(name)
        if value is None:
            continue
        each = value if isinstance(value, list) else [value]
        if isinstance(value, list) and layers is not None and len(value) != layers:
            raise CheckpointError(
                f"{file}: {name} has {len(value)} numbers; there are {layers} layers."
            )
        for one in each:
            # No slots, as no rank, is a form that the model itself refuses or takes.
            if type(one) is not int or not 0 <= one <= MOST_NUMBERS:
                raise CheckpointError(
                    f"{file}: {name} is {_told(one)}; it must be a whole number from 0 to "
                    f"{MOST_NUMBERS}."
                )


def _told(value: object) -> str:
    """A value in short, as JSON has it."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
