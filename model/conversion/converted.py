"""The converted model's configuration, and the model made of converted layers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from internvideo3.model.attention import RowAttention
from internvideo3.model.config import InternVideo3Config, InternVideo3TextConfig
from internvideo3.model.conversion.memory import give_back
from internvideo3.model.conversion.source import Source
from internvideo3.model.modeling import (
    InternVideo3ForCausalLM,
    InternVideo3ForConditionalGeneration,
)

TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What a text-only source's configuration shares with Qwen3-VL's text configuration."""

ATTENTION = ".self_attn."
"""What names of a text layer's attention have in them, and no other name has."""

SHARD_BYTES = 10**9
"""Of a written checkpoint: converted tensors of one shard are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The latent shape of a converted model; lists have one entry per layer."""

    row_form: str
    linear: bool
    """Whether there is no QK-norm."""
    biased: bool
    """Whether queries and keys got biases (from the linear norm)."""
    adapters: bool
    ranks: list[int]
    vision_ranks: list[int]
    frequencies: list[list[int]]

    def of_layer(self, index: int) -> Shape:
        """One layer's."""
        return Shape(
            row_form=self.row_form,
            linear=self.linear,
            biased=self.biased,
            adapters=self.adapters,
            ranks=[self.ranks[index]],
            vision_ranks=[self.vision_ranks[index]],
            frequencies=[self.frequencies[index]],
        )

    def fields(self, attention_bias: bool) -> dict[str, Any]:
        """As fields of the text configuration."""
        slots = [len(table) for table in self.frequencies]
        return {
            "latent_rank": _short(self.ranks),
            "vision_rank": None if self.vision_ranks == self.ranks else _short(self.vision_ranks),
            "rope_slots": _short(slots),
            "rope_slot_frequencies": self.frequencies,
            "modality_adapters": self.adapters,
            "qk_norm": "linear" if self.linear else "exact",
            "row_form": self.row_form,
            "attention_bias": self.biased or attention_bias,
        }


def _short(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def layer_config(source: Source, shape: Shape) -> InternVideo3TextConfig:
    """A text configuration of one layer."""
    fields = _text_fields(source) | {"num_hidden_layers": 1, "layer_types": None}
    fields |= shape.fields(bool(fields["attention_bias"]))
    return InternVideo3TextConfig(**fields)


def converted_config(source: Source, shape: Shape) -> InternVideo3Config | InternVideo3TextConfig:
    """The configuration of the converted model."""
    text = _text_fields(source)
    text |= shape.fields(bool(text["attention_bias"]))
    if not hasattr(source.model.config, "vision_config"):
        return InternVideo3TextConfig(**text)
    config = source.model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        config.pop(name, None)
    config["text_config"] = text
    return InternVideo3Config(**config)


def _text_fields(source: Source) -> dict[str, Any]:
    found = source.text.to_dict()
    if hasattr(source.model.config, "vision_config"):
        found.pop("model_type", None)
        return dict(found)
    text = {name: found[name] for name in TEXT_FIELDS if name in found}
    # All three position axes of text are equal; the first one rotates every frequency.
    sections = [source.text.head_dim // 2, 0, 0]
    rope = dict(found["rope_parameters"])
    text["rope_parameters"] = rope | {"mrope_section": sections, "mrope_interleaved": True}
    return text


def converted_model(source: Source, layers: Sequence[RowAttention], shape: Shape) -> Any:
    """The converted model: new attention, copies of everything else."""
    config = converted_config(source, shape)
    converted = _class_of(config)._from_config(config, dtype=source.model.dtype)
    converted.to(source.device)
    # Only text layers have a `self_attn`; the released layout has names with other shapes there.
    same = {k: v for k, v in source.model.state_dict().items() if ATTENTION not in k}
    converted.load_state_dict(same, strict=False)
    text = getattr(converted.model, "language_model", converted.model)
    for decoder, layer in zip(text.layers, layers, strict=True):
        decoder.self_attn.load_state_dict(layer.state_dict())
    converted.generation_config = source.model.generation_config
    return converted


def save_converted(
    source: Source, layers: Sequence[RowAttention], shape: Shape, folder: Path
) -> None:
    """Writes what `converted_model(...).save_pretrained` would, one shard in memory at a time.

    Args:
        source: the source.
        layers: converted layers, which may be loaded when they are asked for.
        shape: their shape.
        folder: where to; made if it is not there.
    """
    config = converted_config(source, shape)
    kind = _class_of(config)
    with torch.device("meta"):
        skeleton = kind._from_config(config, dtype=source.model.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [kind.__name__]
    config.dtype = str(source.model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    source.model.generation_config.save_pretrained(folder)
    sizes = skeleton.state_dict()
    # The whole model's configuration ties, as transformers has it; a text model's own may not say.
    if getattr(config, "tie_word_embeddings", False):
        del sizes["lm_head.weight"]  # the embeddings'
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    known = source.model.state_dict()
    for name, tensors in plan.filename_to_tensors.items():
        found = dict(_tensors(tensors, known, layers))
        save_file(found, folder / name, metadata={"format": "pt"})
        del found
        give_back()
    if plan.is_sharded:
        _write_index(plan, folder)


def _tensors(
    names: Sequence[str], known: dict[str, Tensor], layers: Sequence[RowAttention]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the converted model by name."""
    loaded: tuple[int, dict[str, Tensor]] | None = None
    for name in names:
        before, inside, own = name.partition(ATTENTION)
        if not inside:
            yield name, known[name].contiguous()
            continue
        index = int(before.rpartition(".")[2])
        if loaded is None or loaded[0] != index:
            loaded = index, layers[index].state_dict()
        yield name, loaded[1][own].contiguous()


def _write_index(plan: StateDictSplit, folder: Path) -> None:
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _class_of(config: InternVideo3Config | InternVideo3TextConfig) -> Any:
    if isinstance(config, InternVideo3Config):
        return InternVideo3ForConditionalGeneration
    return InternVideo3ForCausalLM
