"""What a conversion may spend and how it weighs errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of `convert`."""

    latent_rank: int
    """Rank r of the cached latent, the same in every layer."""
    rope_slots: int
    """Number S of rotary slots, 2 S cached numbers, the same in every layer."""
    adapters: Literal["auto", "on", "off"] = "auto"
    """Modality adapters: "auto" keeps them where they lower the calibrated error."""
    refit_output: bool = True
    """Whether the output projection is refitted in closed form."""
    seed: int = 0
    """Seed of the labels drawn from the model."""
    token_floor: float = 0.05
    """Weight added to every token's share of the loss, in units of the mean weight."""
    metric_ridge: float = 1e-3
    """Added to the metric, in units of its mean eigenvalue."""
    refit_ridge: float = 1e-2
    """Added to the normal equations of the refit, in units of their mean diagonal."""

    @classmethod
    def full(cls, config: Qwen3VLTextConfig) -> Self:
        """Full rank: the converted model computes what the source computes.

        Every key pair has a slot of its own, so the latent carries the values alone.
        """
        width = key_width(config)
        return cls(latent_rank=width, rope_slots=width // 2, adapters="off", refit_output=False)

    @classmethod
    def share(cls, config: Qwen3VLTextConfig, cache_share: float, rope_share: float = 0.25) -> Self:
        """Caches `cache_share` of the source's numbers, `rope_share` of them rotary.

        A quarter was the best rotary share at half the cache where it was measured (SmolLM2-135M,
        S = 20, 24, 32 and 40 of 96 slots).
        """
        numbers = int(2 * key_width(config) * cache_share)
        slots = max(1, round(numbers * rope_share / 2))
        return cls(latent_rank=numbers - 2 * slots, rope_slots=slots)

    def with_(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def half(config: Qwen3VLTextConfig) -> ConversionOptions:
    """50 % of the source's cache bytes."""
    return ConversionOptions.share(config, 0.5)


PRESETS = {
    "full": ConversionOptions.full,
    "half": half,
}
"""Options by name; each takes the source's text configuration."""


def key_width(config: Qwen3VLTextConfig) -> int:
    """Numbers in the keys of one token and layer of the source: K D."""
    return (config.num_key_value_heads or config.num_attention_heads) * config.head_dim
