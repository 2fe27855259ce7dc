"""What a benchmark's protocol consists of: data, prompt, frames, tokens, metric, and their sources.

A `Benchmark` is data; nothing here opens a file. Sizes are pixels of one frame, unless they say
that they are of a whole video. One visual token stands for 32 x 32 pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

Doc: TypeAlias = Mapping[str, Any]
Raw: TypeAlias = dict[str, Any]
Group: TypeAlias = Literal["long", "short", "grounding", "spatial", "classic"]
PresetName: TypeAlias = Literal["paper", "official"]
PRESETS: tuple[PresetName, ...] = ("paper", "official")

TOKEN_PIXELS = 32 * 32
QWEN3_VL_VIDEO = (4_096, 25_165_824)
"""Pixels of a whole video in Qwen3-VL's published processor configuration."""
SCRIPTS = "OpenGVLab/InternVideo@3965eef:InternVideo3/InternVideo3_eval/scripts"
LMMS = "EvolvingLMMs-Lab/lmms-eval@v0.7.3:lmms_eval/tasks"


def tokens(count: int) -> int:
    """Pixels of a frame of so many visual tokens."""
    return count * TOKEN_PIXELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Settings under which a benchmark is run."""

    source: str
    """Where they are written down."""
    fps: float = 2.0
    """Frames sampled from a second of video."""
    max_frames: int = 768
    """Most frames of a video."""
    min_pixels: int | None = None
    """Fewest pixels of a frame; None for the checkpoint's default."""
    max_pixels: int | None = None
    """Most pixels of a frame; None for the checkpoint's default."""
    video_pixels: tuple[int, int] | None = None
    """Fewest and most pixels of a whole video, where the budget is per video."""
    question_frames: int | None = None
    """Frames spread over all videos of a question together, where the protocol counts so; `fps` and
    `max_frames` are then the bounds of one video."""
    max_new_tokens: int = 16
    """Most tokens of an answer."""
    prompt: Callable[[Doc], str] | None = None
    """The user's text; None for lmms-eval's own."""
    note: str = ""
    """What a reader of the number must know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A benchmark's data set and how it lies on disk, under `<root>/<folder>`."""

    id: str
    """The data set's id on the Hugging Face hub, or its repository."""
    split: str
    """Split, and configuration where it has several."""
    questions: int
    """How many it has."""
    counted: Literal["verified", "stated"]
    """Whether the count was checked in the data or is what is commonly stated."""
    licence: str
    """Terms of annotations and videos."""
    get: str
    """Where annotations and videos come from, for a reader who has neither."""
    gigabytes: float | None = None
    """Size of the published archive of videos of all splits; None where it is not known."""
    annotations: tuple[str, ...] = ("annotations.*",)
    """Names of the annotation files below the folder, as patterns; json, jsonl, csv or parquet."""
    parts: tuple[str, ...] = ()
    """Stems of the published annotation files, where each holds a part of the questions."""
    skipped: tuple[str, ...] = ()
    """Names of published files that fit a pattern and hold nothing that is scored here."""
    skipped_why: str = ""
    """What they hold."""
    read: Callable[[str, Any], Iterator[Raw]] | None = None
    """(file's stem, its rows) → documents, where the file has another layout than a row each."""
    complete: Callable[[Sequence[Raw]], Iterator[Raw]] | None = None
    """All documents → documents, where one needs what another holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lmms:
    """The task of lmms-eval that a benchmark reuses."""

    yaml: str
    """Its file below lmms-eval's `tasks` folder."""
    shows: Callable[[Doc], Sequence[str]]
    """Fields of a document that its prompt is made of; without them it cannot be asked."""
    prompt_settings: Mapping[str, str] | None = None
    """The prompt settings, where lmms-eval would choose them by the model's name."""


def fields(*names: str) -> Callable[[Doc], Sequence[str]]:
    """The same fields for every document."""
    return lambda doc: names


def no_videos(_doc: Doc) -> tuple[str, ...]:
    """The videos of a document of a benchmark on images alone."""
    return ()


def no_images(_doc: Doc) -> tuple[str, ...]:
    """The images of a document of a benchmark on video alone."""
    return ()


def no_length(_doc: Doc) -> float | None:
    """The length of a video that the annotations do not tell."""
    return None


def no_rate(_doc: Doc, _frames: int) -> float | None:
    """The frame rate of a document of a benchmark that samples every video alike."""
    return None


def no_subtitles(_doc: Doc, _folder: Path) -> str | None:
    """The subtitles of a benchmark that has none."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark: what is asked, of which data, how, and by which rule it is scored."""

    name: str
    """Name of the suite and of its files."""
    title: str
    """Name for readers."""
    group: Group
    """The part of the paper's tables that it belongs to."""
    scorer: str
    """Its name in `tasks.scoring`."""
    metric: str
    """The headline number."""
    data: Data
    paper: Preset
    official: Preset
    lmms: Lmms | None = None
    """The lmms-eval task that is reused; None where it is ours."""
    reason: str
    """Why that task, or why ours."""
    column: tuple[int, str] | None = None
    """Table and column of the paper."""
    not_comparable: str = ""
    """Why even a full run under `paper` cannot be set beside the paper's number."""
    verdict: str = ""
    """Who has the last word on answers, where it is not the run: a server, a judge."""
    folder: str = ""
    """Folder below the data root; the name by default."""
    kept: tuple[str, ...]
    """Fields that scoring reads; they are stored with every sample."""
    identify: Callable[[Doc], str]
    """A document's id, unique in the data set."""
    videos: Callable[[Doc], Sequence[str]]
    """Paths of a document's videos below `videos/`."""
    images: Callable[[Doc], Sequence[Any]] = no_images
    """A document's images: paths below `images/`, or their bytes."""
    length_s: Callable[[Doc], float | None] = no_length
    """Length of the video in seconds."""
    rate: Callable[[Doc, int], float | None] = no_rate
    """(document, frames of all its videos together) → frames a second, for
    `Preset.question_frames`; None where the annotations do not tell."""
    family: Callable[[Doc], str]
    """The question's kind."""
    question: Callable[[Doc], str] = field(default=lambda doc: str(doc["question"]))
    """The question as readers see it."""
    answer: Callable[[Doc], str] | None = None
    """The right answer as readers see it, where it is not one of the options."""
    answer_type: Literal["choice", "number", "span", "windows"] = "choice"
    evidence: Callable[[Doc], Sequence[Sequence[float]]] = field(default=lambda doc: ())
    """Spans of the video, in seconds, in which the answer can be seen."""
    subtitles: Callable[[Doc, Path], str | None] | None = None
    """(document, data folder) → the subtitles' text; None where the benchmark has none."""
    between: Callable[[Doc], Raw] | None = None
    """A document's subtitles where its video is shown as single pictures with the subtitles between
    them: `path` below the folder, `starts_at_s` and `length_s` in seconds; see interleaved.py."""
    interleaved: bool = False
    """Whether the prompt says by `<video>` and `<image>` where the media stand."""

    def preset(self, name: PresetName) -> Preset:
        """The settings of a name."""
        return self.paper if name == "paper" else self.official

    @property
    def home(self) -> str:
        """Folder below the data root."""
        return self.folder or self.name
