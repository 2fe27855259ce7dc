"""Letters and options: readings that several official scorers share, and options inside a text."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])\)?\s*[.):]\s*(.*?)\s*$", re.ASCII)
_OPTION_LABEL = re.compile(r"(?<![\w'’])\(?([A-Z])[.:)]\s+", re.ASCII)


def letter(index: int) -> str:
    """Return A for 0, B for 1 and so on."""
    return ascii_uppercase[index]


def option_text(option: str) -> str:
    """Return an option without its own label: `A. red` and `(A) red` become `red`."""
    match = _OPTION_LINE.match(option)
    return match.group(2) if match and match.group(2) else option.strip()


def lettered_options(text: str) -> tuple[str, ...]:
    """Return the texts of options that stand on lines of their own as `A. red`, in order.

    Empty unless the labels run A, B, C … without a gap.
    """
    found: list[str] = []
    for line in text.splitlines():
        match = _OPTION_LINE.match(line)
        if match and match.group(1) == ascii_uppercase[len(found) % 26]:
            found.append(match.group(2))
    return tuple(found) if len(found) > 1 else ()


def inline_options(text: str) -> tuple[str, ...]:
    """Return the texts of options that stand in one line, as `A: red, B: blue`, in order.

    Only what follows the last "Options:" is looked at, where there is one. Empty unless the labels
    run A, B, C … without a gap.
    """
    text = text[text.rfind("Options:") + len("Options:") :] if "Options:" in text else text
    labels: list[re.Match[str]] = []
    for label in _OPTION_LABEL.finditer(text):
        if label.group(1) == ascii_uppercase[len(labels) % 26]:
            labels.append(label)
    ends = [*(label.start() for label in labels[1:]), len(text)]
    found = [
        text[label.end() : end].strip().rstrip(",;").strip()
        for label, end in zip(labels, ends, strict=False)
    ]
    return tuple(found) if len(found) > 1 and all(found) else ()


def options_in(text: str) -> tuple[str, ...]:
    """Return the texts of the options in a question: on lines of their own, else in one line."""
    return lettered_options(text) or inline_options(text)


def indexed_letter(index: object) -> str | None:
    """Return the letter of a true option's index; `None` where it is not public.

    Raises:
        ValueError: It is no index.
    """
    if index in (None, "") or int(str(index)) < 0:
        return None
    return letter(int(str(index)))


def public_letter(truth: object) -> str | None:
    """Return the letter of a true option (`B`, or `B. text`); `None` where it is not public."""
    return None if truth in (None, "") else str(truth).strip()[:1].upper()


def first_capital(text: str, letters: str, prefixes: Sequence[str]) -> str | None:
    """Delete prefixes wherever they occur, then return the first of the capital letters anywhere.

    Capitals inside ordinary words count; lower case is never read.
    """
    text = text.strip()
    for prefix in prefixes:
        text = text.replace(prefix, "")
    return next((char for char in text if char in letters), None)


def read_mmmu(text: str, options: Sequence[str]) -> str | None:
    """Read a letter as MMMU's parser does, without its random draw.

    Source: MMMU-Benchmark/MMMU@44b45b5:eval/eval_utils.py. Bracketed letters, else letters between
    blanks, else (in replies of more than five words) option texts; of several, the one that occurs
    last. Outer blanks are no part of an answer.
    """
    text = text.strip()
    for char in ",.!?;:'":
        text = text.strip(char)
    text = f" {text} "
    letters = ascii_uppercase[: len(options)]
    for form in ("({})", " {} "):
        places = {char: text.rfind(form.format(char)) for char in letters}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=lambda char: places[char])
    if len(text.split()) > 5:
        lowered = text.lower()
        places = {
            char: lowered.rfind(option.lower())
            for char, option in zip(letters, options, strict=True)
            if option.lower() in lowered
        }
        if places:
            return max(places, key=lambda char: places[char])
    return None
