"""`internvideo3 inspect`: what a checkpoint is, without loading its weights."""

from collections.abc import Sequence

from internvideo3.model.checkpoint import (
    WIDEST_ROW,
    CheckpointInfo,
    cache_bytes_per_token,
    inspect,
    weights_digest,
)

GPU_GB = {"24 GB": 24, "48 GB": 48, "80 GB": 80, "141 GB": 141}
"""GPU memory in 10^9 bytes: consumer cards, L40S, A100/H100, H200."""

RESERVE_BYTES = 4 * 10**9
"""Left for activations and the CUDA context."""

FORMS = {
    "latent": "",
    "prerope": ", rotated after reconstruction (cannot be absorbed)",
    "released": ", the authors' released layout",
}


def describe(name: str) -> list[str]:
    """Lines on a checkpoint: layout, sizes, cache row, and which attention kernels fit it.

    Raises:
        CheckpointError: the name is unknown, or the checkpoint cannot be used.
    """
    info = inspect(name)
    share = info.numbers_per_token / info.gqa_numbers_per_token
    bytes_bf16 = cache_bytes_per_token(info.path, "bfloat16")
    of_vision = cache_bytes_per_token(info.path, "bfloat16", vision=True)
    return [
        f"checkpoint  {info.path}",
        f"weights     {info.parameters:,} values, digest {weights_digest(info.path)[:16]}",
        f"text model  {info.layers} layers, {info.query_heads} query heads of {info.head_dim}",
        *(_latent(info) if info.attention == "m2la" else _grouped(info)),
        f"cache       {bytes_bf16:,} bytes a token in bfloat16, all layers: "
        f"{share:.0%} of GQA of this shape",
        *_vision(info, of_vision),
        f"context     most tokens beside the weights, in bfloat16: {_contexts(info, of_vision)}",
    ]


def _vision(info: CheckpointInfo, bytes_per_token: int) -> list[str]:
    """What a vision token takes, if that is less."""
    if info.vision_ranks == info.latent_ranks:
        return []
    saved = sum(info.latent_ranks) - sum(info.vision_ranks)
    share = (info.numbers_per_token - saved) / info.gqa_numbers_per_token
    return [
        f"            {bytes_per_token:,} bytes a vision token: {share:.0%}; "
        f"latent rank {_short(info.vision_ranks)}"
    ]


def _contexts(info: CheckpointInfo, bytes_per_token: int) -> str:
    """Longest context by GPU memory: what weights and a reserve leave, over bytes a token.

    Of a vision token, because a context that long is a video's.
    """
    weights = 2 * info.parameters
    fits = {
        name: (size * 10**9 - weights - RESERVE_BYTES) // bytes_per_token
        for name, size in GPU_GB.items()
    }
    return ", ".join(f"{max(0, tokens):,} on {name}" for name, tokens in fits.items())


def _grouped(info: CheckpointInfo) -> list[str]:
    return [f"attention   GQA: {info.kv_heads} key/value heads of {info.head_dim} (Qwen3-VL)"]


def _latent(info: CheckpointInfo) -> list[str]:
    widths, of_vision = (
        [rank + rope for rank, rope in zip(ranks, info.rope_widths, strict=True)]
        for ranks in (info.latent_ranks, info.vision_ranks)
    )
    apart = f" ({_short(of_vision)} of vision tokens)" if of_vision != widths else ""
    fit = (
        "Triton kernels fit"
        if info.has_kernels
        else f"runs in torch; kernels take up to {WIDEST_ROW}"
    )
    return [
        f"attention   M²LA: latent rank {_short(info.latent_ranks)}, "
        f"rotary key {_short(info.rope_widths)}{FORMS[info.row_form]}",
        f"kernels     row width {_short(widths)}{apart}: {fit}",
    ]


def _short(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "/".join(str(value) for value in values)
