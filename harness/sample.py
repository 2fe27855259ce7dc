"""`internvideo3 data sample`: responses to questions, for the filters of `data filter`; resumable.

    NAME.begun.jsonl        what is sampled so far: a line with what decides it, then a line a row
    NAME.jsonl              when all is done: the rows, in the order of their file
    NAME.dropped.jsonl      rows that could not be used, with their reasons

A row is on disk when it is sampled, so a killed command loses the one it was at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvideo3.harness.outputs import alone, make_ready
from internvideo3.harness.provenance import file_digest
from internvideo3.harness.settings import pixel_range
from internvideo3.harness.store import append_rows, repair_rows
from internvideo3.model.checkpoint import read_config, resolve_checkpoint, weights_digest
from internvideo3.training.curation.budget import MOST_BAD, UNUSABLE, Budget
from internvideo3.training.curation.origin import refuse_others
from internvideo3.training.curation.records import (
    DataError,
    Row,
    keys_of,
    moved,
    read_rows,
    write_rows,
)
from internvideo3.training.endpoint import Endpoint, EndpointError
from internvideo3.training.recipe import DEFAULT_TEACHER, served_teacher


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """One `data sample` command."""

    rows: Path
    """Questions in the chat form, each about one video."""
    out: Path
    """File for the responses."""
    model: str
    """The student: checkpoint folder or name."""
    samples: int = 8
    """Responses to a question."""
    teacher: str | None = None
    """Checkpoint folder or name, or the address of a server of OpenAI's form; None for none."""
    teacher_model: str = DEFAULT_TEACHER
    """Name of the teacher at the server; by default its address tells it from others."""
    fps: float = 2.0
    """Frames from a second of video."""
    max_frames: int = 512
    """Most frames of a video."""
    min_pixels: int | None = None
    """Fewest pixels of a frame; None for what the student's processor names."""
    max_pixels: int | None = None
    """Most pixels of a frame; None for what the student's processor names."""
    total_pixels: int | None = None
    """Most pixels of all frames of a video, as in the recipe; None: no limit."""
    pack_tokens: int | None = None
    """Tokens of a row of training, by which it sizes frames; None: any number."""
    group: int | None = None
    """Responses that share such a row with their prompt; None for `samples`."""
    max_new_tokens: int = 256
    """Most tokens of a response."""
    most_bad: float = MOST_BAD
    """Share of the rows that may be unusable."""
    limit: int | None = None
    """Only the first so many rows."""
    seed: int = 0
    """Of the responses."""
    device: str | None = None
    """cpu, cuda; None for cuda if there is one."""
    dtype: str = "auto"
    """float32, bfloat16, or auto."""
    threads: int = 1
    """CPU threads."""

    @property
    def served(self) -> bool:
        """Whether the teacher is behind a server."""
        return self.teacher is not None and self.teacher.startswith(("http://", "https://"))

    @property
    def look(self) -> dict[str, Any]:
        """How frames are taken."""
        low, high = pixel_range(resolve_checkpoint(self.model), self.min_pixels, self.max_pixels)
        return {"fps": self.fps, "max_frames": self.max_frames, "min_pixels": low,
                "max_pixels": high, "total_pixels": self.total_pixels}  # fmt: skip

    @property
    def answer_tokens(self) -> int:
        """Of the responses in a row of training, each with its end."""
        return (self.group or self.samples) * (self.max_new_tokens + 1)


@dataclass(frozen=True)
class Written:
    """What came of the rows."""

    rows: int
    kept: int
    """Of them, sampled by an earlier command."""
    dropped: int


def write_samples(options: SampleOptions, progress: Callable[[str, int, int], None]) -> Written:
    """Sample responses to all rows; goes on where it was stopped.

    Raises:
        DataError: A file is not as it must be, too many rows cannot be used, the responses so far
            are of other options, or another command is writing to the file.
        CheckpointError: A model cannot be used.
        EndpointError: The teacher's server does not answer; what is finished is kept.
        StoreError: The disk is full.
    """
    make_ready(options.out)
    with alone(options.out):
        _check(options)
        return _sampled(options, progress)


def _sampled(options: SampleOptions, progress: Callable[[str, int, int], None]) -> Written:
    rows = read_rows(options.rows)[: options.limit]
    keys = keys_of(options.rows, rows)
    begun = options.out.with_suffix(".begun.jsonl")
    made = _kept(begun, _decides(options))
    kept = len(made)
    budget = Budget(str(options.rows), len(rows), options.most_bad)
    with ExitStack() as stack:
        answer = _answerer(options, stack) if kept < len(rows) else None
        for number, (key, row) in enumerate(zip(keys, rows, strict=True), start=1):
            progress("questions", len(made) + len(budget.bad), len(rows))
            if key in made or answer is None:
                continue
            try:
                made[key] = answer(row)
            except EndpointError:
                raise
            except UNUSABLE as error:
                budget.leave_out(number, key, error)
                continue
            append_rows(begun, [made[key]])
    progress("questions", len(rows), len(rows))
    if not made:
        raise DataError(f"no row of {options.rows} can be used; the log says why of each")
    write_rows(options.out, [made[key] for key in keys if key in made])
    drops = [{"id": key, "reason": why} for key, why in budget.bad.items()]
    write_rows(options.out.with_suffix(".dropped.jsonl"), drops)
    begun.unlink()
    return Written(len(made), kept, len(budget.bad))


def _check(options: SampleOptions) -> None:
    if options.out.suffix != ".jsonl":
        raise DataError(f"{options.out} must end in .jsonl")
    if options.out.exists():
        raise DataError(f"{options.out} is finished; give another --out, or delete it")
    if options.group is not None and options.pack_tokens is None:
        raise DataError(f"--group {options.group} shares a row of --pack-tokens; give both")
    models = [options.model] if options.served else [options.model, options.teacher]
    for name in filter(None, models):
        if "vision_config" not in read_config(resolve_checkpoint(name)):
            raise DataError(f"{name} is a text model and sees no video; give one that does")


def _decides(options: SampleOptions) -> Row:
    """What of a command decides its responses; where they are computed does not."""
    teacher = options.teacher
    if teacher is not None:
        named = served_teacher(teacher, options.teacher_model)
        teacher = named if options.served else _digest_of(teacher)
    return options.look | {
        "rows": file_digest(options.rows), "limit": options.limit,
        "model": _digest_of(options.model), "teacher": teacher, "samples": options.samples,
        "pack_tokens": options.pack_tokens, "group": options.group,
        "max_new_tokens": options.max_new_tokens, "dtype": options.dtype, "seed": options.seed,
    }  # fmt: skip


def _digest_of(model: str) -> str:
    return weights_digest(resolve_checkpoint(model))


def _kept(begun: Path, decides: Row) -> dict[str, Row]:
    """Rows that an interrupted command finished, by id.

    Raises:
        DataError: It was a command with other options.
    """
    repair_rows(begun)
    if not begun.is_file() or len(read_rows(begun)) < 2:
        # Nothing was sampled yet, so whoever comes may take the file.
        write_rows(begun, [{"options": decides}])
    first, *made = read_rows(begun)
    if not isinstance(first.get("options"), dict):
        raise DataError(f"{begun} does not begin with its options; delete it to begin anew")
    refuse_others(str(begun), first["options"], decides)
    return {str(row["id"]): row for row in made}


def _answerer(options: SampleOptions, stack: ExitStack) -> Callable[[Row], Row]:
    """What samples a row; whatever it opens is closed with the stack.

    Raises:
        CheckpointError: A model cannot be used.
    """
    import torch

    from internvideo3.model.checkpoint import load_model
    from internvideo3.training.curation import sampling
    from internvideo3.training.policy import vision_ids
    from internvideo3.training.rollouts import Sampler

    torch.set_num_threads(options.threads)

    def loaded(name: str) -> tuple[sampling.RowPrompts, Sampler]:
        model, processor = load_model(name, options.device, options.dtype)
        prompts = sampling.prompts_of(
            options.rows, processor, options.look, options.pack_tokens, options.answer_tokens
        )
        stack.callback(prompts.reader.close)
        barred = vision_ids(model, processor)
        return prompts, Sampler(model.eval(), processor, barred, options.max_new_tokens)

    prompts, student = loaded(options.model)
    teacher: sampling.Teacher | None = None
    if options.served:
        endpoint = Endpoint(url=str(options.teacher), model=options.teacher_model)
        teacher = sampling.ServedTeacher(endpoint, options.max_new_tokens)
    elif options.teacher is not None:
        teacher = sampling.LoadedTeacher(*loaded(options.teacher))

    def answer(row: Row) -> Row:
        made = sampling.sampled(row, prompts, student, teacher, options.samples, options.seed)
        return moved(made, options.rows.parent, options.out.parent)

    return answer
