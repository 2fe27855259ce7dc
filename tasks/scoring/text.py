"""From a model's raw reply to the text that states its answer.

Linear-time regular expressions only: replies are untrusted and may be long.
"""

import re

_TAG = re.compile(r"<(/?)(think|thinking|analysis|reasoning)>", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)?)\}")
_ANSWER_TAG = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
_JSON_ANSWER = re.compile(r"""["']answer["']\s*:\s*["']([^"']*)["']""", re.IGNORECASE)
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_END_TOKEN = re.compile(r"<\|?(?:/s|im_end|endoftext|eot_id)\|?>", re.IGNORECASE)
_MARKUP = re.compile(r"[*`$]+|(?<![^\W_])_{1,3}|_{1,3}(?![^\W_])")
_SPACE = re.compile(r"\s+")
_INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\u00ad]")
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
"""Full-width forms of ASCII characters, as Chinese and Japanese text has them."""


def strip_thinking(reply: str) -> str | None:
    """Remove closed thinking blocks; return `None` if a block was opened and never closed.

    A reply that starts inside the block (the opening tag was part of the prompt) is cut after the
    last closing tag. Blank space that follows a closing tag goes with it; other blanks stay,
    because some official rules are sensitive to them.
    """
    depth = 0
    end_of_thinking = 0
    kept: list[str] = []
    for tag in _TAG.finditer(reply):
        closing = tag.group(1) == "/"
        if not closing:
            if depth == 0:
                kept.append(reply[end_of_thinking : tag.start()])
            depth += 1
        else:
            if depth == 0:
                kept.clear()
            depth = max(0, depth - 1)
            end_of_thinking = tag.end()
    if depth:
        return None
    if end_of_thinking == 0:
        return reply
    return ("".join(kept) + reply[end_of_thinking:].lstrip()).lstrip()


def unmark(text: str) -> str:
    r"""Remove Markdown emphasis, `\text{}`, dollar signs and end-of-turn tokens, keep the words.

    Characters that show nothing (zero width, direction marks) go too; full-width letters, digits
    and punctuation become the usual ones.
    """
    text = _INVISIBLE.sub("", text).translate(_WIDE)
    text = _END_TOKEN.sub(" ", text)
    text = _BOXED.sub(r" \1 ", text)
    text = _LATEX_TEXT.sub(r"\1", text)
    text = _MARKUP.sub("", text)
    return _SPACE.sub(" ", text).strip()


def final_answer(text: str) -> str:
    r"""Return the last `\boxed{}`, else `<answer>`, else `"answer": "…"`, else the whole text."""
    found = [m.group(1) for m in _BOXED.finditer(text)]
    found = found or [m.group(1) for m in _ANSWER_TAG.finditer(text)]
    found = found or [m.group(1) for m in _JSON_ANSWER.finditer(text)]
    return unmark(found[-1]) if found else unmark(text)


def fold(text: str) -> str:
    """Return a form for comparing option texts: case, blanks and outer punctuation ignored."""
    return _SPACE.sub(" ", text).strip().strip("\"'“”‘’.,;:!?()[]").strip().casefold()
