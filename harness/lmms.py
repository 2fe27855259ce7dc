"""The one file that talks to lmms-eval (0.7.3): our model as its plugin, its engine as ours.

`InternVideo3` is what `lmms-eval --model internvideo3` loads through the entry point of
lmms_manifest.py, and what `internvideo3 eval` hands to the engine in-process (`run_benchmark`).

Things about the engine that this file is shaped by: it deletes modules in `clean()` after the
first task; it fingerprints a model by `repr`; it pads shards with repeated requests; it takes
answers from a generator in the order of the requests; one failing sample would end every task; a
chat model's request is `(context, doc_to_messages, gen_kwargs, doc_id, task, split)`.
"""

import argparse
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import lmms_eval.api.task
import lmms_eval.evaluator
import lmms_eval.tasks
import torch
import transformers
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger
from PIL import Image

from internvideo3.harness.direct import (
    Answerer,
    Clip,
    Outcome,
    Question,
    failed,
    shuffle_images,
)
from internvideo3.harness.settings import SYSTEM_PROMPT, Settings, pixel_range
from internvideo3.model.checkpoint import load_model, resolve_checkpoint

Doc = Mapping[str, Any]


class LmmsError(ValueError):
    """A request or an argument that this plugin does not take."""


class Recorder(Protocol):
    """Keeps answers as they come, and knows those of an earlier, interrupted run."""

    def known(self, task: str, doc: Doc) -> str | None:
        """The recorded answer to a document, or None if it has to be computed."""

    def video(self, task: str, doc: Doc) -> str | None:
        """The video to show instead of the document's own, or None for its own."""

    def record(self, task: str, answers: Sequence[tuple[Doc, Outcome]]) -> None:
        """Keep a batch of answers; when this returns they are on disk."""


class InternVideo3(lmms):  # type: ignore[misc]  # lmms_eval has no types
    """Qwen3-VL-shaped video models, GQA or M²LA, answering by groups of questions on one video.

    Args:
        pretrained: checkpoint folder, or a name such as `scale:m2la`.
        device: torch device; by default CUDA if there is one, this rank's under torchrun.
        dtype: float32, bfloat16 or auto (float32 on CPU, bfloat16 on CUDA).
        fps: frames taken from a second of video.
        max_num_frames: most frames of a video.
        min_pixels: fewest pixels of a frame.
        max_pixels: most pixels of a frame.
        system_prompt: text of the system turn; empty for none.
        max_new_tokens: most tokens of an answer; None for what the task says.
        question_batch: most questions of one video decoded together.
        threads: CPU threads of torch.
        batch_size: taken for compatibility with lmms-eval's command line; questions are batched
            by video, see `question_batch`.
        max_batch_size: as `batch_size`.
        answerer: an answerer that is already built, instead of everything above.
        name: what `repr` and lmms-eval's cache know the answerer as.
        recorder: keeps answers and knows earlier ones.
        control: `text` to show no video or image, `shuffled` to show frames in another order.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "scale:m2la",
        device: str | None = None,
        dtype: str = "auto",
        fps: float = 2.0,
        max_num_frames: int = 768,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str = SYSTEM_PROMPT,
        max_new_tokens: int | None = None,
        question_batch: int = 16,
        threads: int = 1,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        answerer: Answerer | None = None,
        name: str | None = None,
        recorder: Recorder | None = None,
        control: str | None = None,
    ) -> None:
        super().__init__()
        if answerer is None:
            torch.set_num_threads(int(threads))
            low, high = pixel_range(resolve_checkpoint(pretrained), min_pixels, max_pixels)
            settings = Settings(
                min_pixels=low,
                max_pixels=high,
                fps=float(fps),
                max_frames=int(max_num_frames),
                system_prompt=system_prompt,
                max_new_tokens=max_new_tokens,
                batch=int(question_batch),
            )
            place = device or local_device()
            answerer = Answerer(*load_model(pretrained, place, dtype), settings)
        self.answerer = answerer
        self.name = name or pretrained
        self.recorder = recorder
        self.control = control
        self.fps_of_documents = True
        """Whether a document may say how many frames a second its videos are sampled at."""
        self.batch_size = answerer.settings.batch

    def __repr__(self) -> str:
        """Stable from one process to the next: lmms-eval's cache hashes it."""
        return f"InternVideo3({self.name}, {self.answerer.settings})"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.answerer.model.device)

    def clean(self) -> None:
        """Keep the weights; the base class deletes them after the first task."""

    def generate_until(self, requests: list[Instance]) -> Iterator[GenerationResult]:
        """Answer requests; yields in their order, and records each batch before it is yielded."""
        docs = [self._doc(request) for request in requests]
        given = [self._given(*pair) for pair in zip(requests, docs, strict=True)]
        pending: dict[int, GenerationResult] = {
            at: GenerationResult(text=text) for at, text in enumerate(given) if text is not None
        }
        asked = (
            self._ask(at, request, docs[at])
            for at, request in enumerate(requests)
            if not request.metadata.get("__padding_only__")
        )
        batches = itertools.chain.from_iterable(
            self._answered(window, pending) for window in _windows(asked)
        )
        for at in range(len(requests)):
            while at not in pending:
                outcomes = next(batches)
                self._record(outcomes, requests, docs)
                pending.update((int(one.question.id), _result(one)) for one in outcomes)
            yield pending[at]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered.

        Raises:
            LmmsError: always.
        """
        raise LmmsError(
            "InternVideo3 answers by generation only; take a task whose output_type is "
            "generate_until."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered.

        Raises:
            LmmsError: always.
        """
        raise LmmsError(
            "InternVideo3 has no multi-round form; take a task whose output_type is generate_until."
        )

    def _answered(
        self, asked: Sequence[Question | Outcome], pending: Mapping[int, Any]
    ) -> Iterator[list[Outcome]]:
        """Batches of outcomes: those that the tasks could not ask, then the model's."""
        yield from ([one] for one in asked if isinstance(one, Outcome))
        questions = [one for one in asked if isinstance(one, Question)]
        yield from self.answerer.answer(questions, known=lambda key: int(key) in pending)

    def _doc(self, request: Instance) -> Doc:
        _, _, _, doc_id, task, split = request.args
        return dict(self.task_dict[task][split][doc_id])

    def _given(self, request: Instance, doc: Doc) -> str | None:
        """An answer that needs no model: of a padding request, or recorded by an earlier run."""
        if request.metadata.get("__padding_only__"):
            return ""
        return self.recorder.known(request.args[4], doc) if self.recorder else None

    def _ask(self, at: int, request: Instance, doc: Doc) -> Question | Outcome:
        """The question of a request; or the reason why the task could not pose it."""
        try:
            return self._question(at, request, doc)
        except (Exception, SystemExit) as error:  # some tasks call sys.exit on a missing video
            return failed(Question(id=str(at), messages=()), error)

    def _question(self, at: int, request: Instance, doc: Doc) -> Question:
        _, doc_to_messages, gen_kwargs, _, task, _ = request.args
        shown = self.recorder.video(task, doc) if self.recorder else None
        # For tasks that take pictures out of the video themselves.
        taken = {
            "iv3_shown": shown,
            "iv3_max_frames": self.answerer.settings.max_frames,
            "iv3_decode_limit_s": self.answerer.reader.time_limit_s,
        }
        messages = ChatMessages(messages=doc_to_messages({**doc, **taken})).to_hf_messages()
        if self.control == "text":
            messages = [_without_media(message) for message in messages]
        if self.answerer.settings.system_prompt and messages[0]["role"] != "system":
            system = {"type": "text", "text": self.answerer.settings.system_prompt}
            messages.insert(0, {"role": "system", "content": [system]})
        fps = doc.get("iv3_fps") if self.fps_of_documents else None
        _check_parts(messages)
        images = tuple(_images(messages))
        if self.control == "shuffled":
            images = shuffle_images(images)
        return Question(
            id=str(at),
            messages=tuple(_placeholders(message) for message in messages),
            clips=tuple(_clips(messages, shown, fps, self.control == "shuffled")),
            images=images,
            max_new_tokens=gen_kwargs.get("max_new_tokens"),
            temperature=float(gen_kwargs.get("temperature") or 0.0),
        )

    def _record(
        self, outcomes: list[Outcome], requests: list[Instance], docs: Sequence[Doc]
    ) -> None:
        if self.recorder is None:
            for one in outcomes:
                if one.error is not None:
                    logger.error("{}: {}", one.error["type"], one.error["message"])
            return
        task = requests[int(outcomes[0].question.id)].args[4]
        self.recorder.record(task, [(docs[int(one.question.id)], one) for one in outcomes])


def run_benchmark(
    model: InternVideo3, task: str, tasks_folder: Path, ids: Sequence[str] | None
) -> dict[str, float]:
    """Run one task of a folder of YAML files through lmms-eval's evaluator, in this process.

    Args:
        model: the model; its recorder keeps the answers.
        task: the task's name.
        tasks_folder: the folder with its YAML; lmms-eval's own tasks are not indexed.
        ids: the `id` fields of the documents to run, in the data set's order; None for all.

    Returns:
        lmms-eval's own aggregates, by metric.
    """
    manager = TaskManager("ERROR", include_path=[str(tasks_folder)], include_defaults=False)
    loaded = get_task_dict([task], manager, "chat")[task]
    if ids is not None:
        _select(loaded, set(ids))
    # Without `cli_args` aggregators get no arguments. Reasoning is stripped by our scorers, which
    # also see blocks that never close.
    arguments = argparse.Namespace(
        output_path=None,
        process_with_media=False,
        reasoning_tags="none",
        agentic_trace_mode="full",
    )
    results = simple_evaluate(
        model=model,
        tasks=[loaded],
        task_manager=manager,
        batch_size=1,
        cli_args=arguments,
        log_samples=False,
        bootstrap_iters=0,
        process_docs_parallel=1,
        verbosity="ERROR",
    )
    numbers = results["results"][task]
    return {
        key.split(",")[0]: float(value)
        for key, value in numbers.items()
        if isinstance(value, int | float) and "stderr" not in key
    }


def lmms_tasks() -> Path:
    """The folder of lmms-eval's own tasks."""
    return Path(lmms_eval.tasks.__file__).parent


def local_device() -> str | None:
    """This process's GPU under torchrun; None elsewhere, for the loader's own default."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


def quiet() -> None:
    """Turn off the engine's log, bars and advice in this process; they would bury ours."""
    logger.disable("lmms_eval")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for module in (lmms_eval.evaluator, lmms_eval.api.task):
        module.tqdm = _without_bar(module.tqdm)


def _without_bar(tqdm: Any) -> Any:
    def bar(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **(kwargs | {"disable": True}))

    return bar


def _select(task: Any, ids: set[str]) -> None:
    """Keep only the documents of some ids in a loaded task."""
    split = task.config.test_split
    column = "iv3_id" if "iv3_id" in task.dataset[split].column_names else "id"
    keep = [at for at, key in enumerate(task.dataset[split][column]) if key in ids]
    task.dataset[split] = task.dataset[split].select(keep)
    task.dataset_no_image[split] = task.dataset_no_image[split].select(keep)


_MOST_IMAGES = 64
"""Opened images that wait at once; a benchmark of images would not fit memory otherwise."""


def _windows(asked: Iterable[Question | Outcome]) -> Iterator[list[Question | Outcome]]:
    """Questions in lists that hold few images; without images all of them are one list."""
    window: list[Question | Outcome] = []
    images = 0
    for one in asked:
        window.append(one)
        images += len(one.images) if isinstance(one, Question) else 0
        if images >= _MOST_IMAGES:
            yield window
            window, images = [], 0
    yield window


Part = dict[str, Any]


def _parts(messages: Sequence[Part]) -> Iterator[Part]:
    return (part for message in messages for part in message["content"])


def _check_parts(messages: Sequence[Part]) -> None:
    for part in _parts(messages):
        if part["type"] not in ("text", "video", "image"):
            raise LmmsError(
                f"A message holds {part['type']}; this model takes video, images and text. "
                "Take another task."
            )


def _without_media(message: Part) -> Part:
    return message | {"content": [part for part in message["content"] if part["type"] == "text"]}


def _placeholders(message: Part) -> Part:
    """A message whose media are placeholders; what they stand for goes beside it."""
    content = [
        part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]
    ]
    return message | {"content": content}


def _clips(
    messages: Sequence[Part], shown: str | None, fps: float | None, shuffled: bool
) -> Iterator[Clip]:
    for part in _parts(messages):
        if part["type"] == "video":
            yield Clip(
                path=shown or part["video"],
                start_s=part.get("video_start"),
                end_s=part.get("video_end"),
                fps=fps,
                shuffled=shuffled,
            )


def _images(messages: Sequence[Part]) -> Iterator[Any]:
    for part in _parts(messages):
        if part["type"] == "image":
            image = part["image"]
            if not isinstance(image, str | Path):
                yield image.convert("RGB")
                continue
            with Image.open(image) as opened:
                yield opened.convert("RGB")


def _result(outcome: Outcome) -> GenerationResult:
    if outcome.reply is None:
        return GenerationResult(text="")
    counts = TokenCounts(
        input_tokens=outcome.reply.prompt_tokens, output_tokens=outcome.reply.new_tokens
    )
    return GenerationResult(text=outcome.reply.text, token_counts=counts)


def requests_for(model: lmms, task: str, tasks_folder: Path, ids: Sequence[str]) -> list[Instance]:
    """The requests that the evaluator would hand to a chat model for some documents of a task."""
    manager = TaskManager("ERROR", include_path=[str(tasks_folder)], include_defaults=False)
    loaded = get_task_dict([task], manager, "chat")[task]
    _select(loaded, set(ids))
    model.task_dict[task] = loaded.dataset
    loaded.build_all_requests(limit=None, rank=0, world_size=1)
    return list(loaded.instances)


def stock_model(path: Path, settings: Settings, weights: Any) -> Any:
    """lmms-eval's own `qwen3_vl` chat class at our settings, around weights already in memory.

    Its own loading would round to bfloat16; the weights are replaced by ours, so that both classes
    run the very same module.
    """
    from lmms_eval.models.chat import qwen3_vl

    qwen3_vl.tqdm = _without_bar(qwen3_vl.tqdm)
    device = str(weights.device)
    stock = qwen3_vl.Qwen3_VL(
        pretrained=str(path),
        device=device,
        device_map=device,
        batch_size=1,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
        max_num_frames=settings.max_frames,
        fps=settings.fps,
        system_prompt=settings.system_prompt,
    )
    stock._model = weights
    return stock
