"""Activations that are computed again in the backward pass instead of kept."""

from __future__ import annotations

from typing import Any


def recompute(model: Any, *, on: bool = True) -> None:
    """Switches a transformers model's recomputation of activations, by whichever name it has.

    `gradient_checkpointing_enable` is all that 5.17 has, and warns in 5.23.
    """
    word = "enable" if on else "disable"
    switch = getattr(model, f"activation_checkpointing_{word}", None)
    switch = switch or getattr(model, f"gradient_checkpointing_{word}")
    switch(*[{"use_reentrant": False}] * on)
