"""What a conversion may spend and how it weighs errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

ROPE_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625)
"""Shares of a cached row that are tried for the rotary key. A quarter was best on SmolLM2-135M; on
the scale model half diverges seven times less than a quarter."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of `convert`."""

    row_width: int
    """Numbers cached per token and layer: latent rank r and rotary key 2 S together."""
    rope_slots: int | None = None
    """Number S of rotary slots; None: the one of `ROPE_SHARES` with the least divergence from the
    source on the calibration batches."""
    adapters: bool | None = None
    """Whether to add modality adapters; None: if they lower the divergence."""
    refit_output: bool = True
    """Whether the output projection is refitted in closed form."""
    seed: int = 0
    """Seed of the labels drawn from the model."""
    token_floor: float = 0.3
    """Weight added to every token's share of the loss, in units of the mean weight."""
    metric_ridge: float = 1e-3
    """Added to the metric, in units of its mean eigenvalue."""
    refit_ridge: float = 3e-3
    """Added to the normal equations of the refit, in units of their mean diagonal."""

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: the row leaves no room for the latent.
        """
        if self.row_width - 2 * (self.rope_slots or 0) < 1:
            raise ValueError(
                f"a row of {self.row_width} numbers has no room for {self.rope_slots} rotary slots "
                "of two numbers and a latent; give a wider row or fewer slots."
            )

    def slot_choices(self) -> list[int]:
        """Numbers of slots to try."""
        if self.rope_slots is not None:
            return [self.rope_slots]
        return sorted({max(1, round(share * self.row_width / 2)) for share in ROPE_SHARES})

    def latent_rank(self, slots: int) -> int:
        """Rank that `slots` rotary slots leave."""
        return self.row_width - 2 * slots

    def with_(self, **changes: object) -> ConversionOptions:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def full(config: Qwen3VLTextConfig) -> ConversionOptions:
    """Full rank: the converted model computes what the source computes.

    Every key pair has a slot of its own, so the latent carries the values alone.
    """
    width = key_width(config)
    return ConversionOptions(
        row_width=2 * width, rope_slots=width // 2, adapters=False, refit_output=False
    )


def share(config: Qwen3VLTextConfig, cache_share: float) -> ConversionOptions:
    """Caches this share of the source's numbers."""
    return ConversionOptions(row_width=int(2 * key_width(config) * cache_share))


def half(config: Qwen3VLTextConfig) -> ConversionOptions:
    """50 % of the source's cache bytes."""
    return share(config, 0.5)


PRESETS: dict[str, Callable[[Qwen3VLTextConfig], ConversionOptions]] = {"full": full, "half": half}
"""Options by name; each takes the source's text configuration."""


def key_width(config: Qwen3VLTextConfig) -> int:
    """Numbers in the keys of one token and layer of the source: K D."""
    return (config.num_key_value_heads or config.num_attention_heads) * config.head_dim
