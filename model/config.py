"""Configuration of an InternVideo3 model: Qwen3-VL with M²LA in every text layer.

The vision tower keeps transformers' own configuration; the text configuration adds the shape of the
latent cache. Paper: sections 3.2.1 (latent row), 3.2.2 (layer-wise ranks), 3.2.3 (QK-norm).
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, Qwen3VLConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)

QK_NORMS = ("exact", "linear")
ATTENTION_FORMS = ("auto", "reconstruct", "absorbed")
ROW_FORMS = ("latent", "prerope", "released")


class InternVideo3TextConfig(Qwen3VLTextConfig):
    """Text configuration of an M²LA model.

    A cached row of one token in one layer is `[c (rank r) | k_rope (2 S)]`, where S is the number
    of rotary slots. A slot is one complex number that rotates with one frequency of the source.
    """

    model_type = "internvideo3_text"

    latent_rank: int | list[int] = 0
    """Rank r of the cached latent: one for all layers, or one per layer."""

    rope_slots: int | list[int] = 0
    """Number S of rotary slots: one for all layers, or one per layer."""

    rope_slot_frequencies: list[list[int]] | None = None
    """Per layer, the frequency index (0 .. head_dim/2 - 1) of each slot. None: slot s of S gets
    frequency `s mod head_dim/2`."""

    qk_norm: str = "exact"
    """"exact": queries and keys are normalised head by head, keys before they are compressed.
    "linear": there is no norm; what replaces it (Global-Norm-Linear, equation 7) is part of the
    projections. Also for sources without QK-norm."""

    row_form: str = "latent"
    """What a cached row is and which parameters write it. "latent": `[c | k_rope]` from normalised
    keys and values (`attention.LatentAttention`). "prerope": a latent of unrotated keys and values,
    rotated after reconstruction (`prerope.PreropeAttention`); it cannot be absorbed. "released":
    the row of "latent", in the projections of the authors' checkpoint
    (`released.ReleasedAttention`)."""

    vision_rank: int | list[int] | None = None
    """Rank of vision tokens where it is smaller than r: they use the first coordinates of the
    latent (modality-wise budget, section 3.2.2). None: r."""

    attention_form: str = "auto"
    """"reconstruct", "absorbed", or "auto" (whichever needs fewer multiplications)."""

    modality_adapters: bool = False
    """Whether text and vision tokens have an affine map of their own on the latent."""

    def __post_init__(self, **kwargs: Any) -> None:
        """Checks the latent shape.

        Raises:
            ValueError: an unknown option, or a per-layer list of another length than the model.
        """
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        _check_option("attention_form", self.attention_form, ATTENTION_FORMS)
        _check_option("qk_norm", self.qk_norm, QK_NORMS)
        _check_option("row_form", self.row_form, ROW_FORMS)
        for name in ("latent_rank", "rope_slots", "rope_slot_frequencies", "vision_rank"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} lists {len(value)} layers, the model has {self.num_hidden_layers}. "
                    "Give one entry per layer."
                )
        for layer in range(self.num_hidden_layers):
            self._check_layer(layer)

    def _check_layer(self, layer: int) -> None:
        table = self.slot_frequencies(layer)
        if len(table) != self.slots(layer):
            raise ValueError(
                f"rope_slot_frequencies names {len(table)} slots for layer {layer}, "
                f"rope_slots says {self.slots(layer)}."
            )
        if any(not 0 <= f < self.head_dim // 2 for f in table):
            raise ValueError(
                f"rope_slot_frequencies of layer {layer} must lie in 0 .. {self.head_dim // 2 - 1}."
            )

        if not 0 <= self.rank_of_vision(layer) <= self.rank(layer):
            raise ValueError(
                f"vision_rank of layer {layer} is {self.rank_of_vision(layer)}; it must lie in "
                f"0 .. {self.rank(layer)}, the layer's latent rank."
            )

    def rank(self, layer: int) -> int:
        """Latent rank of one layer."""
        return _of_layer(self.latent_rank, layer)

    def rank_of_vision(self, layer: int) -> int:
        """Latent rank of vision tokens in one layer."""
        own = self.vision_rank
        return self.rank(layer) if own is None else _of_layer(own, layer)

    def slots(self, layer: int) -> int:
        """Number of rotary slots of one layer."""
        return _of_layer(self.rope_slots, layer)

    def slot_frequencies(self, layer: int) -> list[int]:
        """Frequency index of each slot of one layer."""
        if self.rope_slot_frequencies is None:
            return [s % (self.head_dim // 2) for s in range(self.slots(layer))]
        return self.rope_slot_frequencies[layer]

    def row_width(self, layer: int) -> int:
        """Numbers cached per token in one layer: r + 2 S."""
        return self.rank(layer) + 2 * self.slots(layer)


class InternVideo3Config(Qwen3VLConfig):
    """Configuration of the whole model: Qwen3-VL's vision tower and an M²LA text model."""

    model_type = "internvideo3"
    # transformers 5.17 builds sub-configurations from `sub_configs`, 5.23 from
    # `sub_configs_defaults`; with the wrong one alone it silently builds a Qwen3VLTextConfig.
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": Qwen3VLVisionConfig,
        "text_config": InternVideo3TextConfig,
    }
    sub_configs_defaults: ClassVar[dict[str, Any]] = dict(sub_configs)


def _of_layer(value: int | list[int], layer: int) -> int:
    return value[layer] if isinstance(value, list) else value


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}.")


AutoConfig.register("internvideo3_text", InternVideo3TextConfig, exist_ok=True)
AutoConfig.register("internvideo3", InternVideo3Config, exist_ok=True)
