"""`internvideo3 inspect`: what a checkpoint is, without loading its weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from internvideo3.harness.preflight import check_checkpoint, count_parameters
from internvideo3.model.checkpoint import (
    cache_bytes_per_token,
    resolve_checkpoint,
    weights_digest,
)

KERNEL_WIDTHS = (512, 576, 1024)


def describe(name: str) -> list[str]:
    """Lines on a checkpoint: layout, sizes, cache row, and which attention kernels fit it.

    Raises:
        PreflightError: no checkpoint, or of another architecture.
        CheckpointError: the name is unknown.
    """
    path = resolve_checkpoint(name)
    config = check_checkpoint(path)
    text = config["text_config"]
    heads = f"{text['num_attention_heads']} query heads, {text['num_hidden_layers']} layers"
    lines = [
        f"checkpoint   {path}",
        f"weights      {count_parameters(path):,} values, digest {weights_digest(path)[:16]}",
        f"text model   hidden {text['hidden_size']}, {heads}",
    ]
    converted = config["model_type"] == "internvideo3"
    lines += _latent(text) if converted else _grouped(text)
    bytes_bf16 = cache_bytes_per_token(path, "bfloat16")
    return [*lines, f"cache        {bytes_bf16:,} bytes a token in bfloat16, all layers together"]


def _grouped(text: Mapping[str, Any]) -> list[str]:
    return [
        f"attention    GQA: {text['num_key_value_heads']} key/value heads of {text['head_dim']}, "
        "a Qwen3-VL checkpoint; `internvideo3` converts it to M²LA"
    ]


def _latent(text: Mapping[str, Any]) -> list[str]:
    layers = int(text["num_hidden_layers"])
    ranks = _by_layer(text["latent_rank"], layers)
    slots = _by_layer(text["rope_slots"], layers)
    rotary = [2 * count for count in slots]
    widths = [rank + both for rank, both in zip(ranks, rotary, strict=True)]
    fits = all(width in KERNEL_WIDTHS for width in widths)
    known = ", ".join(str(width) for width in KERNEL_WIDTHS)
    return [
        f"attention    M²LA: latent rank {_short(ranks)}, rotary key {_short(rotary)}",
        f"kernels      row width {_short(widths)}: "
        + ("Triton kernels fit" if fits else f"runs in torch; the Triton kernels take {known}"),
    ]


def _by_layer(value: int | Sequence[int], layers: int) -> list[int]:
    return [value] * layers if isinstance(value, int) else list(value)


def _short(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "/".join(str(value) for value in values)
