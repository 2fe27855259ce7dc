"""What a conversion may spend, and how it spends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

ROPE_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625)
"""Shares of a cached row that are tried for the rotary key. A quarter was best on SmolLM2-135M; on
the scale model half diverges seven times less than a quarter."""

VISION_SHARES = (1.0, 0.85, 0.7, 0.55)
"""Ranks of vision tokens over those of text tokens that are tried."""

CHOICES = {
    "norm": ("exact", "linear"),
    "norm_fit": ("constant", "affine"),
    "mixing": ("complex", "real", "mean"),
    "metric": ("fisher", "balanced"),
    "row_form": ("latent", "prerope", "released"),
}
"""Values of the options that are words."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of `convert`; each of the better choices can be switched off."""

    row_width: int
    """Numbers cached per token and layer, latent rank r and rotary key 2 S together: in the mean
    over layers, and over text and vision tokens in the calibration set's shares."""
    rope_slots: int | None = None
    """Number S of rotary slots; None: the one of `ROPE_SHARES` with the least divergence from the
    source on the calibration batches."""
    row_form: str = "latent"
    """"latent", "prerope" (rotated after reconstruction), or "released" (the authors' layout)."""
    norm: str = "exact"
    """QK-norm: "exact" (keys are normalised when they are written) or "linear" (equations 6-7)."""
    norm_fit: str = "affine"
    """Of the linear norm: "affine" (learned per head) or "constant" (equation 7)."""
    mixing: str = "complex"
    """How heads are mixed within a frequency: "complex" (unitary), "real" (orthogonal), or "mean"
    (nothing is learned: the heads' mean first)."""
    importance: bool = True
    """Whether slots go to what the loss would miss most, wherever; else one per frequency first."""
    gain: bool = True
    """Whether the part of a key that is not rotated gets a positional gain."""
    joint: bool = True
    """Whether keys and values share their latent directions; else each has its own, and the split
    of the rank between them is by energy."""
    metric: str = "fisher"
    """Metric of the joint factorisation: "fisher", or "balanced" (norms of keys and values)."""
    token_weights: bool = True
    """Whether a token counts by its loss gradient; sinks count most."""
    centred: bool = True
    """Whether the latent is affine: keys' and values' means need no rank."""
    tempered: bool = False
    """Whether ranks differ by layer (section 3.2.2), the same on average."""
    vision_rank_share: float | None = 1.0
    """Mean rank of vision tokens, as a share of text tokens' (section 3.2.2). What they save goes
    to text tokens, within `row_width`. None: the one of `VISION_SHARES` with the least divergence
    from the source on the calibration batches."""
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
            ValueError: an unknown word, a share outside of 0 .. 1, a number that is not above 0,
                or no room for the latent.
        """
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}."
                )
        if self.row_width - 2 * (self.rope_slots or 0) < 1:
            raise ValueError(
                f"a row of {self.row_width} numbers has no room for {self.rope_slots} rotary slots "
                "of two numbers and a latent; give a wider row or fewer slots."
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.vision_rank_share is not None and not 0 < self.vision_rank_share <= 1:
            raise ValueError(
                f"vision_rank_share is {self.vision_rank_share}; give a share above 0, up to 1."
            )
        if self.rope_slots is not None and self.rope_slots < 1:
            raise ValueError(
                f"rope_slots is {self.rope_slots}; a latent row needs at least one rotary slot. A "
                "row without any is the form `prerope`, which ignores the number."
            )
        for name in ("token_floor", "metric_ridge", "refit_ridge"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0.")

    def slot_choices(self) -> list[int]:
        """Numbers of slots to try."""
        if self.row_form == "prerope":
            return [0]
        if self.rope_slots is not None:
            return [self.rope_slots]
        return sorted({max(1, round(share * self.row_width / 2)) for share in ROPE_SHARES})

    def vision_shares(self) -> list[float]:
        """Shares of vision tokens' rank to try."""
        return [*VISION_SHARES] if self.vision_rank_share is None else [self.vision_rank_share]

    def latent_rank(self, slots: int, layers: int, head_dim: int) -> int:
        """Rank that `slots` rotary slots leave in a layer, in the mean over tokens.

        Before rotation a token's angles are cached once for all layers; in the released layout one
        coordinate carries the output bias.
        """
        rank = self.row_width - 2 * slots
        if self.row_form == "prerope":
            return rank - -(-head_dim // layers)
        return rank - 1 if self.row_form == "released" else rank

    def with_(self, **changes: object) -> ConversionOptions:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def full(config: Any) -> ConversionOptions:
    """Full rank: the converted model computes what the source computes.

    Every key pair has a slot of its own, so the latent carries the values alone.
    """
    width = key_width(config)
    return ConversionOptions(
        row_width=2 * width, rope_slots=width // 2, adapters=False, refit_output=False
    )


def share(config: Any, cache_share: float) -> ConversionOptions:
    """Caches this share of the source's numbers."""
    return ConversionOptions(row_width=int(2 * key_width(config) * cache_share))


def half(config: Any) -> ConversionOptions:
    """50 % of the source's cache in the released proportions; on Qwen3-VL-8B rank 896 + 128."""
    return share(config, 0.5).with_(rope_slots=config.head_dim // 2)


def official(config: Any) -> ConversionOptions:
    """As `half`, in the released layout: linear norm, one slot per frequency, no adapters."""
    return half(config).with_(row_form="released", norm="linear", adapters=False)


def best(config: Any) -> ConversionOptions:
    """50 % of the source's cache, slots chosen by divergence, ranks by layer."""
    return share(config, 0.5).with_(tempered=True)


def prerope(config: Any) -> ConversionOptions:
    """50 % of the source's cache, rotated after reconstruction; cannot be absorbed."""
    return share(config, 0.5).with_(row_form="prerope")


def small(config: Any) -> ConversionOptions:
    """A quarter of the source's cache; on Qwen3-VL-8B rank 448 + 64."""
    return share(config, 0.25).with_(rope_slots=config.head_dim // 4)


def mla576(config: Any) -> ConversionOptions:
    """Latent 512 and rotary key 64: the row of public MLA kernels."""
    return ConversionOptions(row_width=576, rope_slots=min(32, key_width(config) // 2))


PRESETS: dict[str, Callable[[Any], ConversionOptions]] = {
    "half": half,
    "best": best,
    "official": official,
    "prerope": prerope,
    "small": small,
    "mla576": mla576,
    "full": full,
}
"""Options by name; each takes the source's text configuration."""


def key_width(config: Any) -> int:
    """Numbers in the keys of one token and layer of the source: K D."""
    return int((config.num_key_value_heads or config.num_attention_heads) * config.head_dim)


def preset(name: str, config: Any) -> ConversionOptions:
    """Options of a preset.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name](config)
