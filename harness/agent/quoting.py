"""What others wrote, as token ids that are never control tokens.

Tool output, subtitles, read text, file names and questions may hold `<|im_end|>`, `<tool_call>` or
`<|video_pad|>`. A tokenizer's `split_special_tokens` spares tokens that are added but not special,
and Qwen3's `<tool_call>` is one; so the text is cut inside every added token, and each cut piece is
tokenised alone. The ids decode to the very text.
"""

from __future__ import annotations

import re
from typing import Any

LONGEST_CHARS = 4_000
"""Characters of one quotation; the rest is dropped, and the quotation says so."""


class Quoter:
    """Tokenises text of unknown origin for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_vocab()
        self._control_ids = frozenset(added.values())
        # A lookahead finds overlapping occurrences too: a cut may not complete another token.
        names = "|".join(re.escape(name) for name in sorted(added, key=len, reverse=True))
        self._starts = re.compile(f"(?=(?:{names}))") if names else re.compile(r"(?!)")

    def control(self, text: str) -> list[int]:
        """Ids of a text of our own; control tokens in it count as such."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def quote(self, text: str, *, whole: bool = False) -> list[int]:
        """Ids of a text of unknown origin; none is a control id.

        Args:
            text: of it at most `LONGEST_CHARS` count.
            whole: whether all of it counts.
        """
        shown = shorten(text, len(text) if whole else LONGEST_CHARS)
        cuts = [match.start() + 1 for match in self._starts.finditer(shown)]
        bounds = [0, *cuts, len(shown)]
        ids: list[int] = []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            ids += self._piece(shown[start:stop])
        return ids

    def _piece(self, text: str) -> list[int]:
        ids = self.control(text)
        if self._control_ids.isdisjoint(ids):
            return ids
        # A normalising tokenizer may still build a token; no added token is one character long.
        alone = [self.control(character) for character in text]
        return [token for ids_ in alone for token in ids_ if token not in self._control_ids]


def shorten(text: str, longest: int = LONGEST_CHARS) -> str:
    """The text as it can be shown: valid Unicode, no more than so many characters."""
    clean = (
        text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\N{REPLACEMENT CHARACTER}")
    )
    if len(clean) <= longest:
        return clean
    return f"{clean[:longest]} [… {len(clean) - longest} more characters were dropped]"
