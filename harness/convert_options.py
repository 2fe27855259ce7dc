"""What a conversion may spend and how, from the command line: preset, budget, single choices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_type_hints

from internvideo3.harness.preflight import nearest
from internvideo3.model.checkpoint import ITEM_BYTES
from internvideo3.model.conversion.options import (
    CHOICES,
    PRESETS,
    ConversionOptions,
    preset,
    share,
)

BUDGET_TYPE = "bfloat16"
"""Of the cache whose bytes are counted, as in `internvideo3 inspect`."""

KINDS: dict[str, Any] = {
    field: kind
    for field, kind in get_type_hints(ConversionOptions).items()
    if field not in ("row_width", "seed")
}
"""What `--choices` can set, and of which type; width and seed have options of their own."""

SWITCH = {"on": True, "off": False, "true": True, "false": False}
"""Words for a choice that is made or not."""


class ChoiceError(ValueError):
    """A budget or a choice that cannot be used; says why and what can."""


def conversion_options(
    name: str,
    text: Any,
    *,
    seed: int,
    cache_share: float | None = None,
    bytes_per_token: int | None = None,
    choices: str = "",
) -> ConversionOptions:
    """A preset's options, with another budget and other choices.

    Args:
        name: of the preset.
        text: the source's text configuration.
        seed: of the labels drawn from the source.
        cache_share: share of the source's cached numbers, in place of the preset's.
        bytes_per_token: most bytes a token may take in all layers' cache together, in place of the
            preset's.
        choices: `NAME=VALUE,...`, fields of `ConversionOptions`.

    Raises:
        ValueError: an unknown name or value, with the nearest known one, two budgets, or one that
            has no room for a latent.
    """
    if name not in PRESETS:
        raise ChoiceError(f"no preset {name!r}. {nearest(name, PRESETS)}")
    options = preset(name, text)
    changes = parse_choices(choices) | {"seed": seed}
    if cache_share is not None and bytes_per_token is not None:
        raise ChoiceError("--cache and --bytes-per-token are one budget in two units; give one.")
    if cache_share is not None:
        if not 0 < cache_share <= 1:
            raise ChoiceError(f"a cache share of {cache_share} is not above 0, up to 1.")
        changes["row_width"] = share(text, cache_share).row_width
    if bytes_per_token is not None:
        changes["row_width"] = row_width(bytes_per_token, text.num_hidden_layers)
    return replace(options, **changes)


def row_width(bytes_per_token: int, layers: int) -> int:
    """Numbers of one layer's row for so many bytes a token in all layers.

    Raises:
        ChoiceError: not a number for each layer.
    """
    each = layers * ITEM_BYTES[BUDGET_TYPE]
    if bytes_per_token < each:
        raise ChoiceError(
            f"{bytes_per_token} bytes a token are less than one number in each of {layers} layers "
            f"({each} bytes in {BUDGET_TYPE}); the budget is below the feasible minimum."
        )
    return bytes_per_token // each


def parse_choices(text: str) -> dict[str, Any]:
    """Fields of `ConversionOptions` out of `NAME=VALUE,...`; empty: none.

    Raises:
        ChoiceError: an unknown or repeated name, or a value that the name cannot have.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value:
            raise ChoiceError(f"--choices has {part!r}; write NAME=VALUE, commas between them.")
        if name not in KINDS:
            raise ChoiceError(f"--choices has no {name!r}. {nearest(name, KINDS)}")
        if name in found:
            raise ChoiceError(f"--choices says twice what {name} is; say it once.")
        found[name] = _value(name, value)
    return found


def _value(name: str, given: str) -> Any:
    if name in CHOICES:
        if given not in CHOICES[name]:
            raise ChoiceError(
                f"--choices: {name} has no {given!r}. {nearest(given, CHOICES[name])} "
                f"It is one of {', '.join(CHOICES[name])}."
            )
        return given
    kind = KINDS[name]
    if given == "auto" and kind in (int | None, bool | None, float | None):
        return None
    if kind in (bool, bool | None):
        if given.lower() in SWITCH:
            return SWITCH[given.lower()]
        raise ChoiceError(f"--choices: {name} is {given!r}; write {_form(name)}.")
    try:
        return int(given) if kind == int | None else float(given)
    except ValueError as error:
        raise ChoiceError(f"--choices: {name} is {given!r}; write {_form(name)}.") from error


def _form(name: str) -> str:
    """What a value looks like, in words."""
    if name in CHOICES:
        return "|".join(CHOICES[name])
    kind = KINDS[name]
    words = {
        bool: "on|off",
        float: "NUMBER",
        bool | None: "on|off|auto",
        float | None: "NUMBER|auto",
    }
    return words.get(kind, "INTEGER|auto")


def choices_help() -> list[str]:
    """Every choice with the values it takes, as the command's help has them."""
    return [f"{name}={_form(name)}" for name in KINDS]
