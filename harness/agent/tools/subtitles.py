"""Tool: what a subtitle file says, in any form that pysubs2 reads."""

from pathlib import Path
from typing import Any

import pysubs2


def run(path: str) -> dict[str, Any]:
    """Read a subtitle file.

    Returns:
        `segments` with start_s, end_s and text.

    Raises:
        pysubs2.Pysubs2Error: the file holds no subtitles.
    """
    text = Path(path).read_bytes().decode("utf-8", "replace")
    events = pysubs2.SSAFile.from_string(text).events
    return {
        "segments": [
            {"start_s": e.start / 1000, "end_s": e.end / 1000, "text": e.plaintext.strip()}
            for e in events
            if not e.is_comment
        ]
    }
