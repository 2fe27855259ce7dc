"""`internvideo3 profile`: prefill and decode rates and cache bytes at several context lengths.

A small profile for models that fit a laptop. The gate comes first: logits of the session, which
prefills in chunks and then decodes token by token, against one forward pass over the same tokens.
No rate is written for a model whose gate is red. Models take turns within each repeat, so that a
change in the machine's load falls on all of them alike.

Contexts are random token ids: prefill and decode cost depends on how many tokens there are and not
on which; the vision tower is not part of these numbers.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from internvideo3.harness import provenance
from internvideo3.harness.evaluate import describe_model
from internvideo3.harness.store import SCHEMA, Row, RunStore, append_measurements, read_rows
from internvideo3.model.checkpoint import load_model
from internvideo3.model.session import Limits, Session

CONTEXTS = (512, 2048, 8192)
NEW_TOKENS = 16
GATE_TOKENS = 96
GATE_NEW = 8
# Largest difference of logits; float32 sums of different order, and bfloat16 rounding.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


class GateError(ValueError):
    """A model whose session and forward pass disagree; it is not timed."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """One profile command."""

    models: tuple[str, ...]
    """Checkpoints; they take turns."""
    out: Path
    """Folder that gets one run directory for each model."""
    contexts: tuple[int, ...] = CONTEXTS
    """Context lengths in tokens."""
    repeats: int = 5
    """Timings of each kind; the median and the interquartile range are reported."""
    threads: int = 1
    """CPU threads of torch."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    into: Mapping[str, Path] = field(default_factory=dict)
    """Evaluation runs of some of the models: their rows go there, and not into `out`."""
    command: tuple[str, ...] = ()
    """The command line, for the record."""


@dataclass(frozen=True)
class _Subject:
    name: str
    run: Path
    attention: str
    model: Any
    processor: Any
    gate: float


def profile(options: ProfileOptions, tell: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Measure models in turns and write each one's rows into a run directory of its own.

    Args:
        options: the command.
        tell: gets one line for each step.

    Returns:
        The run directories, in the order of the models.

    Raises:
        GateError: a model's session disagrees with its forward pass.
    """
    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    subjects = [_prepare(name, options) for name in options.models]
    for one in subjects:
        tell(f"{one.name}: gate green, largest logit difference {one.gate:.1e}")
    for context in options.contexts:
        samples: dict[str, list[_Timing]] = {one.name: [] for one in subjects}
        for _ in range(options.repeats):
            for one in subjects:
                samples[one.name].append(_time(one, context))
        for one in subjects:
            rows = _rows(one, context, samples[one.name], options)
            append_measurements(one.run, rows)
            tell(_summary(one, rows))
    return [one.run for one in subjects]


def is_complete(options: ProfileOptions) -> bool:
    """Whether an earlier command has measured every model at every context into `into`."""
    return all(
        {row["context_tokens"] for row in read_rows(run / "measurements.jsonl")}
        >= set(options.contexts)
        for run in options.into.values()
    )


@dataclass(frozen=True)
class _Timing:
    prefill_s: float
    decode_s: float
    cache_bytes: int


def _prepare(name: str, options: ProfileOptions) -> _Subject:
    described = describe_model(name, options.dtype)
    model, processor = load_model(name, "cpu", options.dtype)
    gate = gate_difference(model, processor)
    if gate > TOLERANCE[options.dtype]:
        raise GateError(
            f"{name}: session and forward pass differ by {gate:.2e} in logits, more than "
            f"{TOLERANCE[options.dtype]:.0e}. No rate is reported; run the tests of model/."
        )
    run = options.into.get(name) or options.out / name.replace(":", "-").replace("/", "-")
    if name not in options.into:
        RunStore.open(run, _describe(described, options)).__exit__()
    (run / "measurements.jsonl").unlink(missing_ok=True)
    return _Subject(name, run, described["attention"], model, processor, gate)


def gate_difference(model: Any, processor: Any) -> float:
    """Largest difference between the logits of a session and of one forward pass.

    The session prefills `GATE_TOKENS` tokens in two pieces and decodes `GATE_NEW` more; the forward
    pass sees all of them at once.
    """
    ids = _tokens(model, GATE_TOKENS)
    session = Session(model, processor)
    session.append_ids(ids[: GATE_TOKENS // 3])
    session.append_ids(ids[GATE_TOKENS // 3 :])
    steps = [session.logits_last.flatten().float()]
    for _ in range(GATE_NEW):
        following = int(steps[-1].argmax())
        ids = [*ids, following]
        session.append_ids([following])
        steps.append(session.logits_last.flatten().float())
    with torch.inference_mode():
        whole_TV = model(input_ids=torch.tensor([ids])).logits[0].float()
    expected = whole_TV[GATE_TOKENS - 1 :]
    return float((torch.stack(steps) - expected).abs().max())


def _time(one: _Subject, context: int) -> _Timing:
    ids = _tokens(one.model, context)
    session = Session(one.model, one.processor)
    started = time.perf_counter()
    session.append_ids(ids)
    prefilled = time.perf_counter()
    session.generate(Limits(max_new_tokens=NEW_TOKENS, stop_ids=()))
    return _Timing(prefilled - started, time.perf_counter() - prefilled, session.bytes())


def _tokens(model: Any, count: int) -> list[int]:
    """Reproducible text token ids, none of them special."""
    drawn = torch.Generator().manual_seed(count)
    low, high = 64, model.config.text_config.vocab_size - 64
    return list(torch.randint(low, high, (count,), generator=drawn).tolist())


def _rows(
    one: _Subject, context: int, timings: Sequence[_Timing], options: ProfileOptions
) -> list[Row]:
    common = {
        "attention": one.attention,
        "model": one.name,
        "context_tokens": context,
        "cache_bytes": timings[-1].cache_bytes,
        "device": provenance.hardware()["cpu"],
        "dtype": options.dtype,
        "threads": options.threads,
        "repeats": options.repeats,
        "gate_max_logit_difference": one.gate,
        "label": "scale" if one.name.startswith("scale:") else None,
    }
    prefill = [timing.prefill_s for timing in timings]
    decode = [timing.decode_s for timing in timings]
    nothing = {"median_s": None, "iqr_s": None, "tokens_per_s": None}
    return [
        {"kind": "prefill", **common, **_statistics(prefill, context)},
        {"kind": "decode", **common, **_statistics(decode, NEW_TOKENS)},
        {"kind": "cache", **common, **nothing},
    ]


def _statistics(seconds: Sequence[float], tokens: int) -> Row:
    median = statistics.median(seconds)
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    else:
        low = high = median
    return {"median_s": median, "iqr_s": high - low, "tokens_per_s": tokens / median}


def _summary(one: _Subject, rows: Sequence[Row]) -> str:
    prefill, decode, cache = rows
    return (
        f"{one.name:<14} {prefill['context_tokens']:>6} tokens of context: "
        f"prefill {prefill['tokens_per_s']:>8.0f} tok/s, decode {decode['tokens_per_s']:>6.0f} "
        f"tok/s, cache {cache['cache_bytes'] / 2**20:>6.2f} MiB"
    )


def _describe(model: Row, options: ProfileOptions) -> Row:
    commit, dirty = provenance.revision()
    return {
        "schema": SCHEMA,
        "id": model["name"],
        "created": provenance.now(),
        "command": list(options.command),
        "mode": "profile",
        "model": model,
        "suites": {},
        "config": {
            "contexts": list(options.contexts),
            "new_tokens": NEW_TOKENS,
            "repeats": options.repeats,
            "threads": options.threads,
            "dtype": options.dtype,
            "device": "cpu",
        },
        "commit": commit,
        "dirty": dirty,
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "comparable": {"paper": False, "reason": "a scale model on a CPU; the paper's is an H200"},
    }
