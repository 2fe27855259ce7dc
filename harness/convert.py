"""`internvideo3 convert`: a GQA checkpoint in, an M²LA checkpoint and a report out.

Everything is checked before any work. The work folder beside the output holds what is finished, so
the same command continues after an interruption; the output folder appears when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from internvideo3.harness import provenance
from internvideo3.harness.calibration import HELD_OUT_TEXT, Reader, first_tokens
from internvideo3.harness.convert_options import (
    BUDGET_TYPE,
    conversion_options,
    parse_choices,
)
from internvideo3.harness.locks import lock
from internvideo3.harness.store import write_json
from internvideo3.model.attention import RowAttention
from internvideo3.model.checkpoint import (
    ARCHITECTURES,
    CheckpointError,
    cache_bytes_per_token,
    read_config,
    read_json,
    read_weights,
    resolve_checkpoint,
    torch_type,
    weight_files,
)
from internvideo3.model.conversion.convert import LOCK, Built, Job, check_fit
from internvideo3.model.conversion.converted import save_converted
from internvideo3.model.conversion.divergence import Agreement, Reference
from internvideo3.model.conversion.memory import give_back
from internvideo3.model.conversion.norms import UNSAFE_CV
from internvideo3.model.conversion.options import ConversionOptions
from internvideo3.model.conversion.recording import Progress, silent
from internvideo3.model.conversion.recovery import recover
from internvideo3.model.conversion.source import Batch, Source, check_config
from internvideo3.reports.conversion import conversion_page

PROCESSOR_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "*processor_config.json",
)  # fmt: skip
"""What an output takes from its source unchanged."""


ALONE_TOKENS, ALONE_VIDEOS = 256, 8
"""Held-out data that every layer is judged on alone."""


class ConvertError(ValueError):
    """A conversion that cannot be done; says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """One convert command."""

    source: str
    """Checkpoint folder or name of a GQA model."""
    out: Path
    """Folder for the converted checkpoint; must not exist."""
    preset: str = "half"
    """Name of a preset."""
    cache_share: float | None = None
    """Share of the source's cached numbers, in place of the preset's."""
    bytes_per_token: int | None = None
    """Most bytes of a token in all layers' cache, in bfloat16, in place of the preset's."""
    choices: str = ""
    """Single choices in place of the preset's: `NAME=VALUE,...`, see `convert_options`."""
    calibration: tuple[Path, ...] = ()
    """Text files and videos; empty: the shipped set."""
    held_out: Path = HELD_OUT_TEXT
    """Text that the converted model is judged on."""
    tokens: int = 1024
    """Longest text in tokens."""
    distil_minutes: float = 0.0
    """Recovery after the conversion; 0: none."""
    seed: int = 0
    """Of the labels drawn from the source."""
    dtype: str = "auto"
    """Weights' type; "auto": the source's own."""
    threads: int = 1
    """CPU threads of torch."""
    command: tuple[str, ...] = ()
    """The command line, for the record."""

    @property
    def work(self) -> Path:
        """Where unfinished work is."""
        return self.out.with_name(self.out.name + ".work")


def convert_checkpoint(given: ConvertCommand, progress: Progress = silent) -> dict[str, Any]:
    """Converts a checkpoint and writes `conversion.json` and `conversion.html` beside it.

    Returns:
        What `conversion.json` holds.

    Raises:
        ValueError: the source, the options or the calibration set cannot be used; nothing is
            written then.
    """
    torch.set_num_threads(given.threads)
    path, config = check_source(given)
    text = _text_of(config)
    options = conversion_options(
        given.preset,
        text,
        seed=given.seed,
        cache_share=given.cache_share,
        bytes_per_token=given.bytes_per_token,
        choices=given.choices,
    )
    _check_files(given)
    check_fit(options, text, has_norm=config["model_type"] != "llama")
    with _alone(given.work):
        return _convert(given, path, config, options, progress)


def _convert(
    given: ConvertCommand,
    path: Path,
    config: Mapping[str, Any],
    options: ConversionOptions,
    progress: Progress,
) -> dict[str, Any]:
    """The conversion itself, in its work folder."""
    source = load_source(path, config, given.dtype)
    reader = _reader(path, source, given.tokens)
    calibration = reader.read(given.calibration) if given.calibration else reader.default()
    held_out = {
        "held_out": reader.texts(given.held_out),
        "held_out_videos": reader.held_out_videos(),
    }
    with _writing_in_words(given.work):
        job = Job.start(source, calibration, options, given.work, progress)
        # Before the conversion, so that memory does not hold two sets of layers.
        norm_alone = _norm_alone(job, held_out)
        give_back()
        progress("norm alone", 1, 1)
        built = job.run()
    built, recovery = _recover(job, built, given, progress)
    source.model.eval()
    agreements: dict[str, Agreement | None] = {}
    for name, batches in held_out.items():
        agreements[name] = _agreement(source, batches, built.layers)
        progress("held-out data", len(agreements), len(held_out))
    report = _report(given, options, built, agreements, len(reader.tokenizer))
    report |= {
        "norm_alone": norm_alone,
        "recovery": recovery,
        "calibration_divergence": job.divergence(built),
        "layers_alone": {
            name: _layers_alone(source, batches, built) for name, batches in held_out.items()
        },
    }
    give_back()
    with _writing_in_words(given.work):
        return _write(given, source, path, built, report)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Holds a work folder for this process, which takes it away again if nothing was kept.

    Raises:
        ConvertError: another conversion has it.
    """
    work.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(work / LOCK)
    except BlockingIOError:
        raise ConvertError(
            f"another `convert` is writing to {work}. Wait for it, or give another folder."
        ) from None
    with held:
        try:
            yield
        finally:
            (work / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what is kept is not taken away
                work.rmdir()


def _check_files(given: ConvertCommand) -> None:
    """Refuses texts that are not there and a place that cannot be written to."""
    for file in (*given.calibration, given.held_out):
        if not file.is_file():
            raise ConvertError(f"there is no file {file} to calibrate or judge on.")
    place = next(folder for folder in given.out.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConvertError(f"{given.out} cannot be made: {place} is no folder one may write to.")


@contextmanager
def _writing_in_words(work: Path) -> Iterator[None]:
    """Says what to do when weights cannot be written, as on a full disk.

    Raises:
        OSError: with the folder and the cause.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"{work} cannot be written: {error}. Free space or choose another place; the same "
            "command then continues."
        ) from error


def check_source(given: ConvertCommand) -> tuple[Path, dict[str, Any]]:
    """Folder and configuration of a source that can be converted to a free place.

    Raises:
        ValueError: the output exists, or the source is missing, incomplete, or of a kind that
            cannot be converted.
    """
    if given.out.exists():
        raise ConvertError(f"{given.out} exists already; give another folder, or delete it.")
    path = resolve_checkpoint(given.source)
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json, so it is no checkpoint.")
    config = read_json(file)
    if config.get("model_type") in ARCHITECTURES:
        config = read_config(path)  # the weights may show that it is latent already
    check_config(config)
    weight_files(path)
    return path, config


def _text_of(config: Mapping[str, Any]) -> Any:
    """The source's text configuration."""
    from transformers import CONFIG_MAPPING

    kind = str(config["model_type"])
    return CONFIG_MAPPING[kind].from_dict(dict(config)).get_text_config()


def load_source(path: Path, config: Mapping[str, Any], dtype: str) -> Source:
    """The model that is converted.

    Raises:
        CheckpointError: its weights do not fit its configuration.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    asked = dtype if dtype == "auto" else torch_type(dtype)
    return Source.of(read_weights(kind, path, dtype=asked).eval())


def _reader(path: Path, source: Source, tokens: int) -> Reader:
    from transformers import AutoTokenizer, Qwen3VLProcessor

    if hasattr(source.model.config, "vision_config"):
        processor = Qwen3VLProcessor.from_pretrained(path, local_files_only=True)
        return Reader(
            tokenizer=processor.tokenizer,
            processor=processor,
            tokens=tokens,
            loss=lambda batch: Reference.of(source, [batch]).source_loss(),
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return Reader(tokenizer=tokenizer, processor=None, tokens=tokens)


def _recover(
    job: Job, built: Built, given: ConvertCommand, progress: Progress
) -> tuple[Built, dict[str, Any] | None]:
    """Distils for the minutes that were asked for."""
    if given.distil_minutes == 0:
        return built, None
    seconds = 60 * given.distil_minutes
    layers, found = recover(job.reference(), built.layers, seconds=seconds, progress=progress)
    return replace(built, layers=layers), asdict(found)


def _agreement(
    source: Source, batches: Sequence[Batch], layers: Sequence[RowAttention]
) -> Agreement | None:
    """Converted layers beside the source; None without data."""
    return Reference.of(source, batches).agreement(layers) if batches else None


def _norm_alone(
    job: Job, held_out: Mapping[str, Sequence[Batch]]
) -> dict[str, dict[str, Any] | None]:
    """The source with a linear norm and nothing compressed; empty if its norm stays."""
    layers = job.without_norm()
    if layers is None:
        return {}
    return {name: _as_row(_agreement(job.source, x, layers)) for name, x in held_out.items()}


def _layers_alone(source: Source, batches: Sequence[Batch], built: Built) -> list[float]:
    """KL of every layer alone on the first batches, a few hundred tokens; empty without data."""
    if not batches:
        return []
    few = [first_tokens(batch, ALONE_TOKENS) for batch in batches[:1]]
    if "labels" in batches[0]:  # short, and most of their tokens are not judged
        few = list(batches[:ALONE_VIDEOS])
    return Reference.of(source, few).divergences(built.layers)


def _as_row(found: Agreement | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {**asdict(found), "perplexity_ratio": found.perplexity_ratio}


def _report(
    given: ConvertCommand,
    options: ConversionOptions,
    built: Built,
    agreements: Mapping[str, Agreement | None],
    vocabulary: int,
) -> dict[str, Any]:
    commit, dirty = provenance.revision()
    return {
        "command": list(given.command),
        "made_at": provenance.now(),
        "commit": commit,
        "dirty": dirty,
        "packages": provenance.packages(),
        "source": given.source,
        "preset": given.preset,
        "budget": {"cache_share": given.cache_share, "bytes_per_token": given.bytes_per_token},
        "choices": parse_choices(given.choices),
        "options": asdict(options),
        "cache_share": built.cache_share,
        "vision_tokens": built.vision_tokens,
        **{name: _as_row(found) for name, found in agreements.items()},
        "warnings": [
            *_used_twice(given),
            *_unknown(agreements, vocabulary),
            *warnings_of(built, options),
        ],
        "layers": [asdict(layer) for layer in built.reports],
    }


def _used_twice(given: ConvertCommand) -> list[str]:
    """Where the text that judges is one that it was calibrated on."""
    size, judged = given.held_out.stat().st_size, provenance.file_digest(given.held_out)
    alike = [file for file in given.calibration if file.stat().st_size == size]
    if all(provenance.file_digest(file) != judged for file in alike):
        return []
    return [
        f"{given.held_out.name} is among the calibration files: what is said of held-out text is "
        "of text that the conversion was fitted to. Give --held-out another one."
    ]


def _unknown(agreements: Mapping[str, Agreement | None], vocabulary: int) -> list[str]:
    """Where the source itself is worse than guessing, as a small model is on words not learned."""
    names = {"held_out": "text", "held_out_videos": "videos' questions"}
    return [
        f"The source itself does not know the held-out {names[name]} (perplexity "
        f"{found.source_perplexity:,.0f}; guessing among its tokens has {vocabulary:,}). "
        "That ratio says nothing: read KL and first choices, or give --held-out of its kind."
        for name, found in agreements.items()
        if found and found.source_perplexity >= vocabulary
    ]


def warnings_of(built: Built, options: ConversionOptions) -> list[str]:
    """What a reader of the report must not miss."""
    if options.norm != "linear":
        return []
    unsafe = [
        (max(found.key_cv + found.query_cv), layer.layer)
        for layer in built.reports
        if (found := layer.concentration) and max(found.key_cv + found.query_cv) > UNSAFE_CV
    ]
    if not unsafe:
        return []
    worst, layer = max(unsafe)
    return [
        f"The norm was replaced by a linear map, but {len(unsafe)} layers have heads whose rms "
        f"varies by more than {UNSAFE_CV:.0%} (most: {worst:.0%} in layer {layer}). Errors of all "
        "layers add up; compare the perplexity with that of an exact norm (preset `half`)."
    ]


def _write(
    given: ConvertCommand, source: Source, path: Path, built: Built, report: dict[str, Any]
) -> dict[str, Any]:
    """Writes the output beside its place and moves it there when it is whole.

    Returns:
        The report, with what the written model caches.
    """
    partial = given.work / "output"
    shutil.rmtree(partial, ignore_errors=True)
    save_converted(source, built.layers, built.shape, partial)
    for pattern in PROCESSOR_FILES:
        for file in path.glob(pattern):
            shutil.copy2(file, partial / file.name)
    report |= {
        "cache_bytes_per_token": cache_bytes_per_token(partial, BUDGET_TYPE),
        "cache_bytes_per_vision_token": cache_bytes_per_token(partial, BUDGET_TYPE, vision=True),
    }
    write_json(partial / "conversion.json", report)
    (partial / "conversion.html").write_text(conversion_page(report), encoding="utf-8")
    partial.rename(given.out)
    shutil.rmtree(given.work)
    return report


def lines(report: Mapping[str, Any], out: Path) -> Sequence[str]:
    """What the command says at its end."""
    judged = {"text": report["held_out"], "video": report["held_out_videos"]}
    alone = report["norm_alone"]
    judged |= {"norm, text": alone.get("held_out"), "norm, video": alone.get("held_out_videos")}
    return [
        f"wrote       {out}",
        f"cache       {report['cache_share']:.0%} of the source's, "
        f"{_cached_bytes(report)} in {BUDGET_TYPE}",
        *(f"{name:<12}{_in_words(found)}" for name, found in judged.items() if found),
        f"report      {out / 'conversion.html'}",
        *(f"warning     {text}" for text in report["warnings"]),
    ]


def _cached_bytes(report: Mapping[str, Any]) -> str:
    text, vision = report["cache_bytes_per_token"], report["cache_bytes_per_vision_token"]
    if text == vision:
        return f"{text:,} bytes a token"
    return (
        f"{vision:,} bytes a vision token and {text:,} a text token "
        f"({report['vision_tokens']:.0%} of the calibration set's are of videos)"
    )


def _in_words(found: Mapping[str, Any]) -> str:
    return (
        f"held out: perplexity {found['source_perplexity']:.2f} -> {found['perplexity']:.2f} "
        f"(ratio {found['perplexity_ratio']:.3f}), KL {found['kl']:.4f}, "
        f"same first choice {found['top1']:.1%}, {found['tokens']} tokens"
    )
