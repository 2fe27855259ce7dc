"""Reading the chosen option from a reply, as a careful reader would (`plain`), or strictly."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from .text import final_answer, fold, unmark

_LONE = re.compile(r"[(\[<{\"']?\s*([A-Za-z])\s*[)\]>}\"']?\s*[.:,;)]?\s*", re.ASCII)
_LEAD_BRACKET = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]]", re.ASCII)
_LEAD_MARK = re.compile(r"([A-Za-z])\s*[).:](?=\s|$)", re.ASCII)
_LETTER = r"[(\[]?[A-Z][)\]]?(?!\w)"
_VERB = (
    r"\s+(?:is|are|was|were|has|have|does|do|did|would|can|could|will|shows?|seems?|appears?"
    r"|happens?|comes?|never|cannot"
    r"|(?:is|are|was|were|do|does|did|has|have|ca|could|wo|would)n['’]t)\b"
)
_MORE = rf"(?:\s+and\s+(?:option\s+)?{_LETTER}){{0,3}}"
_NEGATED = re.compile(
    r"\b(?:not|cannot|(?:is|ca|could|wo|would|should)n['’]t|hardly|scarcely|never|unlikely"
    r"|rather than|instead of|neither|nor)(?:\s+to)?(?:\s+be)?\s+(?:option\s+)?"
    + _LETTER
    # Of "not A or B" both are negated; after a comma the right one may follow.
    + rf"(?:\s+n?or\s+(?:option\s+)?{_LETTER}"
    + rf"|\s+and\s+(?:option\s+)?{_LETTER}(?!{_MORE}{_VERB})){{0,8}}"
    r"|(?<![\w'’])[(\[]?[A-Z][)\]]?\s+(?:is\s+(?:not|hardly|never|wrong|incorrect|false)"
    r"|isn['’]t|can(?:not|['’]t|\s+not))\b"
    r"|(?<![\w'’])[(\[]?[A-Z][)\]]?\s*[.:?)]\s*(?:no|wrong|incorrect|false)\b",
    re.ASCII | re.IGNORECASE,
)
_LEAD_REASON = re.compile(
    r"([A-Z])(?:\s+(?:because|since|as|due|given|for)\b|\s*[,;]\s+(?![(\[]?[A-Z][)\]]?(?!\w))"
    r"|\s*[–—]|\s+-)",
    re.ASCII,
)
_STATED = re.compile(
    r"(?:\b(?:answer|option|choice|choose|select|pick)(?:\s+(?:is|would be|should be))?\s*[:=]?"
    r"|\bcorrection\s*[:=]?|\b(?:it is|it's|is)\b)"
    r"\s*(?:option\s+|choice\s+)?[\"'“‘]?"
    r"(?:[(\[]\s*([A-Za-z])\s*[)\]]|((?-i:[A-Z]))(?!\w|['’]\w)|([a-z])(?=\s*(?:[.:,;!)\"'”’]|$)))",
    re.ASCII | re.IGNORECASE,
)
_ALSO = re.compile(
    r"[\"'”’]?(?:\s*,\s*[(\[]?[A-Z][)\]]?(?!\w)){0,8}\s*,?\s*(?:\b(?:or|(and))\b|[&/])\s*[\"'“‘]?"
    r"(?:option\s+|choice\s+)?(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Z])(?![\w]|['’]\w))"
    r"(?!\s+(?:is|was|shows?|has|does|would|can)\b)",
    re.ASCII,
)
"""What follows a stated letter and makes it one of several: " or B", ", B and C"."""
_BEGINS = re.compile(
    _MORE
    + _VERB
    + r"(?!\s+(?:both|all|each|equally|plausible|possible|correct|right|true|valid|acceptable)\b)",
    re.ASCII,
)
"""By what a letter after "and" begins what is said next, as in "B, and A and C are wrong". Letters
that are called right together are several answers."""
_BRACKETED = re.compile(r"[(\[]\s*([A-Z])\s*[)\]]", re.ASCII)
_STANDALONE = re.compile(r"(?<![\w’])(?<!\w')([A-Z])(?![\w+]|['’]\w|-\w)", re.ASCII)
_LABEL = re.compile(r"(?<![\w'’])[(\[]?([A-Z])[)\]]?\s*[.:)]", re.ASCII)
_AFTER_ANSWER = re.compile(r"\banswer(?:\s+is\b|\s*[:=])", re.ASCII | re.IGNORECASE)
# "A" before a lower-case word is the article, unless the word is one that follows no article.
_NO_NOUNS = frozenset(
    ("because", "since", "as", "for", "due", "given", "and", "which", "based", "or", "is")
)
_NO_WORD = re.compile(r"\W+")
_NEXT_WORD = re.compile(r"\s+([a-z]+)")


def letter_index(letter: str, n_options: int) -> int | None:
    """Return 0 for A or a, 1 for B … or `None` if the letter names no option."""
    index = ascii_uppercase.find(letter.upper()) if len(letter) == 1 else -1
    return index if 0 <= index < n_options else None


def read_strict(text: str, options: Sequence[str]) -> int | None:
    """Read a reply that is only a letter, only an option's text, or a letter and its own text.

    Case, outer punctuation and blanks do not matter. Anything more is not read.
    """
    exact = _equal_option(text, options)
    if exact is not None:
        return exact
    lone = _LONE.fullmatch(text.strip())
    if lone:
        return letter_index(lone.group(1), len(options))
    return _letter_and_text(text.strip(), options)


def read_plain(text: str, n_options: int, options: Sequence[str] = ()) -> int | None:
    """Read the option that a careful reader would take the reply to choose.

    In this order, and only if what is found is not contradicted: a letter alone on the first or
    last line; the reply as a letter or an option's text; a letter and then its text; a stated
    answer ("the answer is B"); a letter and then a reason ("B because"); the only bracketed letter;
    the only option whose text is mentioned after "answer is", or at all; the only standalone
    capital.
    Articles ("A dog"), pronouns ("I") and negated letters ("not A", "it can't be A") are no
    answers, nor is one of several ("the answer is A or B"); a correction replaces what was stated.

    Args:
        text: The reply without thinking.
        n_options: Number of options; letters beyond are not read.
        options: Option texts in order, where they are known.

    Returns:
        Index of the option, or `None` if the reply names none or several.
    """
    candidate, whole = final_answer(text), unmark(text)
    if candidate == whole:
        line = _line_alone(text, n_options)
        if line is not None and _stated(whole, n_options) in (None, line):
            return line
    found = _read_plain(candidate, n_options, options)
    if found is None and candidate != whole:
        found = _read_plain(whole, n_options, options)
    return found


def _line_alone(text: str, n_options: int) -> int | None:
    """Return the letter that stands alone on the first or the last line of several."""
    lines = text.strip().splitlines()
    if len(lines) < 2:
        return None
    alone = [_LONE.fullmatch(unmark(line)) for line in (lines[0], lines[-1])]
    return _single([found.group(1) for found in alone if found], n_options)


def _read_plain(text: str, n_options: int, options: Sequence[str]) -> int | None:
    exact = _equal_option(text, options)
    if exact is not None:
        return exact
    lone = _LONE.fullmatch(text)
    if lone:
        return letter_index(lone.group(1), n_options)
    mark = _LEAD_BRACKET.match(text) or _LEAD_MARK.match(text)
    if mark and not _is_list(text, n_options, options):
        return _letter_with_text(mark, text, n_options, options)
    text = _NEGATED.sub(" ", text).strip()
    lead = _LEAD_REASON.match(text)
    for found in (
        _stated(text, n_options),
        letter_index(lead.group(1), n_options) if lead else None,
        _single(_BRACKETED.findall(text), n_options),
        _mentioned(_AFTER_ANSWER.split(text)[-1], options),
        _mentioned(text, options),
        _single(_capitals(text), n_options),
    ):
        if found is not None:
            return found
    return None


def _equal_option(text: str, options: Sequence[str]) -> int | None:
    wanted = fold(text)
    matches = [i for i, option in enumerate(options) if fold(option) == wanted]
    return matches[0] if wanted and len(matches) == 1 else None


def _letter_and_text(text: str, options: Sequence[str]) -> int | None:
    """Read "B. red circle" if B is the red circle; a letter with another option's text is none."""
    mark = _LEAD_BRACKET.match(text) or _LEAD_MARK.match(text)
    if not mark:
        return None
    index = letter_index(mark.group(1), len(options))
    rest = text[mark.end() :]
    if index is None or not fold(rest):
        return index
    return index if _equal_option(rest, options) == index else None


def _is_list(text: str, n_options: int, options: Sequence[str]) -> bool:
    """Whether a reply that opens with a labelled option goes through several of them.

    That is, options are repeated with their own texts, or the first one is denied ("A: no").
    """
    words = _words(text)
    repeated = sum(
        f" {letter.casefold()}{_words(option)}" in words
        for letter, option in zip(ascii_uppercase, options, strict=False)
        if option
    )
    first = _NEGATED.match(text)
    rest = [m.group(1) for m in _LABEL.finditer(text, first.end() if first else len(text))]
    return repeated > 1 or any(letter_index(letter, n_options) is not None for letter in rest)


def _letter_with_text(
    mark: re.Match[str], text: str, n_options: int, options: Sequence[str]
) -> int | None:
    """Return the letter that opens the reply, unless it is followed by another option's text."""
    other = _equal_option(text[mark.end() :], options)
    index = letter_index(mark.group(1), n_options)
    return index if other in (None, index) else None


def _stated(text: str, n_options: int) -> int | None:
    """Return the letter of the last statement such as "the answer is B"; "A or B" states none."""
    found = None
    for statement in _STATED.finditer(text):
        letter = statement.group(1) or statement.group(2) or statement.group(3)
        bare = statement.group(2)
        if bare and _is_article(bare, text, statement.end()):
            continue
        index = letter_index(letter, n_options)
        if index is not None:
            found = None if _is_one_of_several(text, statement.end(), index, n_options) else index
    return found


def _is_one_of_several(text: str, end: int, index: int, n_options: int) -> bool:
    """Whether a stated letter that ends at `end` is followed by another one that is as good."""
    also = _ALSO.match(text, end)
    if also is None:
        return False
    letter = also.group(2) or also.group(3)
    if also.group(1) and _BEGINS.match(text, also.end()):
        return False
    if also.group(3) and _is_article(letter, text, also.end()):
        return False
    return letter_index(letter, n_options) not in (None, index)


def _is_article(letter: str, text: str, end: int) -> bool:
    following = _NEXT_WORD.match(text, end)
    return letter in "AI" and following is not None and following.group(1) not in _NO_NOUNS


def _capitals(text: str) -> list[str]:
    return [m.group(1) for m in _STANDALONE.finditer(text)
            if not _is_article(m.group(1), text, m.end())]  # fmt: skip


def _single(letters: Sequence[str], n_options: int) -> int | None:
    indices = {letter_index(letter, n_options) for letter in letters} - {None}
    return indices.pop() if len(indices) == 1 else None


def _words(text: str) -> str:
    return f" {_NO_WORD.sub(' ', text.casefold()).strip()} "


def _mentioned(text: str, options: Sequence[str]) -> int | None:
    """Return the only option whose text occurs in the reply as whole words.

    An option inside a longer option that also occurs ("circle" in "red circle") does not count.
    """
    haystack = _words(text)
    needles = [_words(option) for option in options]
    hits: list[int] = []
    for i in sorted(range(len(needles)), key=lambda i: -len(needles[i])):
        if needles[i].strip() and needles[i] in haystack:
            hits.append(i)
            haystack = haystack.replace(needles[i], " | ")
    return hits[0] if len(hits) == 1 else None
