"""`internvideo3 profile`: the gate, then every point of a workload, each written when it is done.

The gate comes first: logits of the engine, which prefills in pieces and decodes token by token,
against one forward pass over the same tokens, in float32, for every batch and kind of cache that is
timed. No rate is written where the gate is red: such points are rows that say so. On a CPU models
take turns within each repeat, so that a change in the machine's load falls on all of them alike; a
GPU holds one model at a time. A point that is in the file already, of this device and code and as
often repeated, is not measured again (`known`); a point that does not fit the device or fails is a
row that says so, and the others go on.

Contexts are random token ids: prefill and decode cost depends on how many tokens there are and not
on which. Decoding a video and encoding its frames are stages of their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers

from internvideo3.harness import provenance
from internvideo3.harness.gpu.measure import (
    aside,
    copy_bandwidth,
    device_state,
    matmul_rate,
    release,
)
from internvideo3.harness.profile.gate import NEW_TOKENS, PIECES, Form, Gate, gate
from internvideo3.harness.profile.host import available_bytes
from internvideo3.harness.profile.known import (
    MEASURED,
    OTHER_CODE,
    is_of_this_code,
    made_by,
    standing,
)
from internvideo3.harness.profile.measure import Ceilings, Row, Run, rows_of, run_once
from internvideo3.harness.profile.plan import folded_bytes, need_of, refusal, weights_of
from internvideo3.harness.profile.stages import UNTIMED, decoding_row, encoding_row
from internvideo3.harness.profile.subjects import (
    Subject,
    attention_of,
    config_of,
    label_of,
    load,
    parameters_of,
)
from internvideo3.harness.profile.workload import Point, Workload, WorkloadError, why_not
from internvideo3.harness.store import SCHEMA, RunStore, append_measurements, read_rows, read_run
from internvideo3.model.device import DeviceError, device_of, use
from internvideo3.model.session import CHUNK

PLAIN = Form()
"""The form in which a model is held to the gate whatever is timed."""
FRAMES_PER_S, MAX_FRAMES = 2.0, 64
Tell = Callable[[str], None]


class UnfinishedError(ValueError):
    """Models that could not be timed; the others were, and what was measured is there."""


class GateError(UnfinishedError):
    """Models whose engine and forward pass disagree."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """One profile command."""

    workload: Workload
    out: Path
    """Folder that gets one run directory for each model."""
    device: str = "cpu"
    """cpu, or cuda."""
    threads: int = 1
    """CPU threads of torch."""
    video: Path | None = None
    """A video whose decoding and encoding are timed as well."""
    budget_s: float | None = None
    """No point is begun after so many seconds; the same command goes on from there."""
    into: Mapping[str, Path] = field(default_factory=dict)
    """Evaluation runs of some of the models: their rows go there, and not into `out`."""
    command: tuple[str, ...] = ()
    """The command line, for the record."""

    def run_of(self, model: str) -> Path:
        """The run directory of a model."""
        return self.into.get(model) or self.out / model.replace(":", "-").replace("/", "-")

    def runs(self) -> list[Path]:
        """The run directories of all models."""
        return [self.run_of(name) for name in self.workload.models]

    def drawn(self) -> list[Path]:
        """Every run directory whose rows belong in the figures of `out`: earlier commands', too."""
        earlier = sorted(path.parent for path in self.out.glob("*/measurements.jsonl"))
        return list(dict.fromkeys([*self.runs(), *earlier]))


def profile(options: ProfileOptions, tell: Tell = lambda _: None) -> list[Path]:
    """Measure what is missing of a workload.

    Args:
        options: the command.
        tell: gets one line for each step.

    Returns:
        The run directories, in the order of the models.

    Raises:
        GateError: a model's engine disagrees with its forward pass; raised when all else is done.
        UnfinishedError: a model cannot be loaded; likewise.
        WorkloadError: a model, video or device that there is not.
    """
    workload, device = options.workload, _device(options.device)
    _check(options)
    use(device)
    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    deadline = None if options.budget_s is None else time.monotonic() + options.budget_s
    red: list[str] = []
    unloaded: dict[str, str] = {}
    commit, _ = provenance.revision()
    with contextlib.ExitStack() as held:
        for name in workload.models:
            if name not in options.into:
                opened = RunStore.open(options.run_of(name), _describe(name, options))
                held.enter_context(opened)
        together = device.type == "cpu"
        groups = [workload.models] if together else [(name,) for name in workload.models]
        for dtype in workload.dtypes:
            ceilings = _ceilings(device, dtype)
            tell(
                f"{_device_name(device)}: copies {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s, "
                f"multiplies {ceilings.matmul_flop_per_s / 1e9:.0f} GFLOP/s in {dtype}"
            )
            for names in groups:
                group = _Group(
                    options, device, dtype, ceilings, deadline, tell, red, unloaded, commit
                )
                group.measure(names)
    _raise_for(unloaded, red)
    return options.runs()


def _raise_for(unloaded: Mapping[str, str], red: Sequence[str]) -> None:
    """Says which models were not timed, and why."""
    told = [f"{name}: not loaded, and not timed: {why}" for name, why in unloaded.items()]
    if red:
        told.append(f"{', '.join(red)}: the gate is red, no rate is reported; see the rows.")
    if told:
        raise (UnfinishedError if unloaded else GateError)(" ".join(told))


def is_complete(options: ProfileOptions) -> bool:
    """Whether an earlier command has measured every point on this device with this code."""
    return all(_standing(options, point) == MEASURED for point in options.workload.points())


def _standing(options: ProfileOptions, point: Point) -> str:
    """How a point stands in its model's file."""
    rows = read_rows(options.run_of(point.model) / "measurements.jsonl")
    device = _device_name(_device(options.device))
    return standing(rows, point, device, options.workload)


def move_foreign_aside(options: ProfileOptions, tell: Tell) -> None:
    """Rename run directories of another device, which cannot be continued here; they are kept."""
    for name in options.workload.models:
        root = options.run_of(name)
        if name in options.into or not (root / "run.json").is_file():
            continue
        theirs = read_run(root).get("config")
        if theirs == _config(options) or _is_in_use(root):
            continue
        kept = aside(root)
        root.rename(kept)
        card = theirs.get("card") if isinstance(theirs, dict) else None
        tell(f"{root} is of {card or 'another device'}; kept as {kept.name}")


def _is_in_use(root: Path) -> bool:
    """Whether another process has a run directory, which `RunStore.open` will say."""
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _check(options: ProfileOptions) -> None:
    """Whether all that is named is there, before anything is written.

    Raises:
        WorkloadError: a model or the video is not, or two models would share a folder.
        CheckpointError: the same, of a checkpoint.
    """
    for name in options.workload.models:
        _check_name(name)
        config_of(name)
    if len(set(options.runs())) < len(options.workload.models):
        raise WorkloadError(
            "two of the models have one run directory, since their names differ in signs only; "
            "give them separate --out folders."
        )
    if options.video is not None and not options.video.is_file():
        raise WorkloadError(f"there is no video {options.video}.")


def _check_name(name: str) -> None:
    """Whether a model's name can name its run directory.

    Raises:
        WorkloadError: it cannot.
    """
    if not name.isprintable() or not name.strip("./"):
        raise WorkloadError(
            f"the model {name!r} cannot name a run directory; give its folder another name, or "
            "its path in full."
        )


@dataclass(frozen=True)
class _Prepared:
    """A model that can be timed, in some forms at least."""

    subject: Subject
    gates: Mapping[Form, Gate | Row]
    """Or the row of each point of this form, if it cannot be timed."""

    def gate_of(self, point: Point) -> Gate | Row:
        """The gate of the form in which the point is timed."""
        return self.gates[_form_of(point)]


@dataclass(frozen=True)
class _Group:
    """Models of one number format that take turns."""

    options: ProfileOptions
    device: torch.device
    dtype: str
    ceilings: Ceilings
    deadline: float | None
    """Of `time.monotonic`."""
    tell: Tell
    red: list[str]
    """Gets the models whose gate is red, with the form."""
    unloaded: dict[str, str]
    """Gets the models that cannot be loaded, and why."""
    commit: str | None
    """Of this code; a run directory may hold rows of several."""

    def measure(self, names: Sequence[str]) -> None:
        """Load the models, hold them to the gate, measure what is missing of them."""
        wanted = list(self._wanted(names))
        needed = {point.model for turn in wanted for point in turn} | set(self._unseen(names))
        if not needed:
            self.tell(f"{', '.join(names)}: measured before, kept")
            return
        if self._is_over():
            return
        self._tell_of_other_code(wanted)
        forms = {name: {PLAIN} for name in names if name in needed}
        for point in (point for turn in wanted for point in turn):
            forms[point.model].add(_form_of(point))
        prepared = {name: self._prepared(name, forms[name]) for name in forms}
        for turn in wanted:
            if self._is_over():
                break
            self._measure_turn(turn, prepared)
        self._watch(prepared)
        prepared.clear()
        release()

    def _tell_of_other_code(self, wanted: Sequence[Sequence[Point]]) -> None:
        """Says why points are measured that have rows already."""
        points = [point for turn in wanted for point in turn]
        count = sum(_standing(self.options, point) == OTHER_CODE for point in points)
        if count:
            versions = ", ".join(f"{name} {found}" for name, found in made_by()["versions"].items())
            self.tell(
                f"{count} of {len(points)} points were measured by other code (other sources or "
                f"versions than {made_by()['code'][:12]}, {versions}): measured again"
            )

    def _measure_turn(self, turn: Sequence[Point], prepared: Mapping[str, _Prepared | Row]) -> None:
        """Measure points that differ in the model only; what cannot be timed is a row."""
        timed: dict[Point, Gate] = {}
        for point in turn:
            one = prepared[point.model]
            found = one if isinstance(one, dict) else one.gate_of(point)
            if isinstance(found, dict):
                self._write(point, None, [found])
            else:
                timed[point] = found
        models = {name: one.subject for name, one in prepared.items() if isinstance(one, _Prepared)}
        for point, rows in self._in_turns(list(timed), models):
            self._write(point, timed[point], rows)

    def _watch(self, prepared: Mapping[str, _Prepared | Row]) -> None:
        """Time decoding and encoding of the video, where that has not been done."""
        for name in self._unseen(tuple(prepared)):
            one = prepared[name]
            if isinstance(one, dict) or self.options.video is None or self._is_over():
                continue
            plain = one.gates[PLAIN]
            if not isinstance(plain, dict):
                self._stages(self.options.video, one.subject, plain)

    def _is_over(self) -> bool:
        over = self.deadline is not None and time.monotonic() > self.deadline
        if over:
            self.tell("the time is up; the same command goes on from here")
        return over

    def _unseen(self, names: Sequence[str]) -> list[str]:
        """Models for which the video's stages have not been timed."""
        video = self.options.video
        if video is None:
            return []
        about = {
            "video": video.name,
            "video_bytes": video.stat().st_size,
            "device": _device_name(self.device),
            "dtype": self.dtype,
            "status": "ok",
        }

        def seen(name: str) -> set[str]:
            rows = read_rows(self.options.run_of(name) / "measurements.jsonl")
            return {
                row["kind"]
                for row in rows
                if about.items() <= row.items()
                and is_of_this_code(row)
                and row.get("repeats", 0) >= self.options.workload.repeats
            }

        # Random weights have no processor, and so nothing to encode with.
        encoded = [name for name in names if not name.startswith("random:")]
        return [
            name
            for name in names
            if not {"video_decoding", *(["vision_encoding"] * (name in encoded))} <= seen(name)
        ]

    def _wanted(self, names: Sequence[str]) -> Iterator[list[Point]]:
        """Missing points, those that differ in the model only together."""
        alike: dict[str, list[Point]] = {}
        for point in self.options.workload.points():
            mine = point.dtype == self.dtype and point.model in names
            if mine and _standing(self.options, point) != MEASURED:
                alike.setdefault(point.key.removeprefix(point.model), []).append(point)
        yield from alike.values()

    def _prepared(self, name: str, forms: Iterable[Form]) -> _Prepared | Row:
        """A model and its gates; or the row of each of its points, if it cannot be timed."""
        refused = self._refusal_of_weights(name)
        if refused is not None:
            self.tell(f"{name}: does not fit: {refused}")
            return {"kind": "none", "status": "does not fit", "reason": refused}
        try:
            subject = load(name, self.device, self.dtype)
        except Exception as error:  # of weights, tokenizer, memory: other models go on
            row = self._told_failure(name, error)
            if row["status"] == "failed":
                self.unloaded[name] = row["reason"]
            return row
        self._tell_of_length(subject)
        plain = self._gated(subject, PLAIN)
        if isinstance(plain, dict):
            return plain
        others = {form: self._gated(subject, form) for form in sorted(forms) if form != PLAIN}
        return _Prepared(subject, {PLAIN: plain, **others})

    def _tell_of_length(self, subject: Subject) -> None:
        """Says where points go beyond what the model was made for; rates do not depend on it."""
        most = subject.model.config.text_config.max_position_embeddings
        deepest = max(point.depth + point.new_tokens for point in self.options.workload.points())
        if deepest > most:
            self.tell(
                f"{subject.name}: made for {most} positions (max_position_embeddings), measured up "
                f"to {deepest}; answers there may be poor, rates are what they are"
            )

    def _gated(self, subject: Subject, form: Form) -> Gate | Row:
        """The model's gate in one form; or the row of each point of this form, if it is red."""
        try:
            found = gate(subject, form)
        except Exception as error:  # of a kernel or its compiler, as in `_tried`
            row = self._told_failure(f"{subject.name}, {form}, gate", error)
            # Too little memory for the gate is not the point's result: it is tried again.
            return row | {"status": "failed", "reason": f"its gate: {row['reason']}"}
        named = subject.name if form == PLAIN else f"{subject.name} ({form})"
        self.tell(f"{named}: gate {'green' if found.is_green else 'RED'}, {_told(found)}")
        if found.is_green:
            return found
        self.red.append(named)
        return {"kind": "none", "status": "gate red", "reason": _told(found)}

    def _told_failure(self, name: str, error: Exception) -> Row:
        row = _failure(error)
        self.tell(f"{name}: {row['status']}: {row['reason']}")
        return row

    def _in_turns(
        self, turn: Sequence[Point], models: Mapping[str, Subject]
    ) -> Iterator[tuple[Point, list[Row]]]:
        """Repeat each point, in turns; rows of every point."""
        workload = self.options.workload
        runs: dict[Point, list[Run]] = {point: [] for point in turn}
        failed: dict[Point, Row] = {}
        for repeat in range(workload.warmups + workload.repeats):
            for point in turn:
                if point in failed:
                    continue
                found = self._tried(models[point.model], point)
                if isinstance(found, dict):
                    failed[point] = found
                elif repeat >= workload.warmups:
                    runs[point].append(found)
        for point in turn:
            if not runs[point]:
                yield point, [failed[point]]
                continue
            # What was measured before a later repeat failed stays.
            told = {"repeats": len(runs[point]), "warmups": workload.warmups, "status": "ok"}
            if point in failed:
                told["ended_by"] = f"{failed[point]['status']}: {failed[point]['reason']}"
            rows = rows_of(models[point.model], point, runs[point], self.ceilings)
            yield point, [row | told for row in rows]

    def _tried(self, subject: Subject, point: Point) -> Run | Row:
        """One run, or the row that says why there is none."""
        impossible = why_not(point, subject.attention)
        if impossible is not None:
            return {"kind": "none", "status": "not possible", "reason": impossible}
        refused = self._refusal(subject, point)
        if refused is not None:
            return {"kind": "none", "status": "does not fit", "reason": refused}
        try:
            return run_once(subject, point)
        except WorkloadError as error:
            return {"kind": "none", "status": "not possible", "reason": str(error)}
        except Exception as error:
            # Whatever a kernel, its compiler or a baseline comes up with is this point's result:
            # Triton's errors have no class in common, and other points are not to be lost.
            return _failure(error)

    def _refusal_of_weights(self, name: str) -> str | None:
        """Why a model is not loaded into the host's memory; a card says so itself."""
        config, left = config_of(name), available_bytes()
        if self.device.type == "cuda" or left is None:
            return None
        needed = weights_of(config, self.dtype)
        return None if needed <= left else _too_little("its weights take", needed, left)

    def _refusal(self, subject: Subject, point: Point) -> str | None:
        if self.device.type != "cuda":
            left = available_bytes()
            chunk = point.chunk or CHUNK["cpu"]
            need = need_of(replace(point, chunk=chunk), subject.model.config, weights=0, step=0)
            needed = need.cache + need.scratch
            fits = left is None or needed <= left
            return None if fits else _too_little("cache and scratch take", needed, left or 0)
        config = subject.model.config
        memory = torch.cuda.get_device_properties(self.device).total_memory
        weights = subject.weight_bytes + folded_bytes(config, point.dtype)
        return refusal(point, need_of(point, config, weights), memory)

    def _write(self, point: Point, found: Gate | None, rows: Sequence[Row]) -> None:
        common = self._common(point.model, _form_of(point), found) | {
            "point": point.key,
            "runner": point.runner,
            "context_tokens": point.context,
            "new_tokens": point.new_tokens,
            "batch": point.batch,
            "chunk": point.chunk,
            "prefill_chunk": point.chunk or CHUNK[self.device.type],
            "integrate": point.integrate,
            "cache": point.cache,
            "fill": point.fill,
            "depth": point.depth,
        }
        append_measurements(self.options.run_of(point.model), [common | row for row in rows])
        self.tell(_summary(point, rows))

    def _stages(self, video: Path, subject: Subject, found: Gate) -> None:
        """Time decoding and encoding of a video."""
        repeats = self.options.workload.repeats
        about = {"video": video.name, "video_bytes": video.stat().st_size, "repeats": repeats}
        common = self._common(subject.name, PLAIN, found) | about
        rows: list[Row] = []
        try:
            untimed = max(UNTIMED, self.options.workload.warmups)
            row, frames = decoding_row(video, FRAMES_PER_S, MAX_FRAMES, repeats, untimed)
            rows.append(row | {"status": "ok"})
            self.tell(
                f"{subject.name}: {row['frames']} of {row['of_frames']} frames of {video.name} "
                f"read in {row['median_s']:.3f} s"
            )
            if subject.processor is not None:
                row = encoding_row(subject, frames, repeats, untimed)
                rows.append(row | {"status": "ok"})
                self.tell(f"{subject.name}: encoded at {row['tokens_per_s']:.0f} vision tokens/s")
        except Exception as error:  # no decoder, a bad file, no memory: other models go on
            rows.append(self._told_failure(f"{subject.name}, {video.name}", error))
        append_measurements(self.options.run_of(subject.name), [common | one for one in rows])

    def _common(self, model: str, form: Form, found: Gate | None) -> Row:
        return {
            "attention": attention_of(config_of(model)),
            "model": model,
            "device": _device_name(self.device),
            "dtype": self.dtype,
            "threads": self.options.threads,
            "gate_engine_error": found and found.engine,
            "gate_forward_error": found and found.forward,
            "gate_fp8_rounding": found and found.rounding,
            "gate_scope": f"the engine, {form}, {sum(PIECES) + NEW_TOKENS} tokens",
            "label": label_of(model),
            "parameters": parameters_of(model),
            "copy_bytes_per_s": self.ceilings.copy_bytes_per_s,
            "matmul_flop_per_s": self.ceilings.matmul_flop_per_s,
            "device_state": device_state(self.device),
            "commit": self.commit,
            **made_by(),
        }


def _form_of(point: Point) -> Form:
    """What has to be right for this point to be timed; of baselines, the model's plain form."""
    possible = why_not(point, attention_of(config_of(point.model))) is None
    return Form(point.batch, point.cache) if point.runner == "engine" and possible else PLAIN


def _device(name: str) -> torch.device:
    try:
        return device_of(name)
    except DeviceError as error:
        raise WorkloadError(f"{error} --plan needs none.") from error


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(provenance.hardware()["cpu"])


def _ceilings(device: torch.device, dtype: str) -> Ceilings:
    """Copy bandwidth and matrix rate; on a CPU of a size that takes a moment."""
    real = device.type == "cuda"
    found = Ceilings(
        copy_bandwidth(device, 2**32 if real else 2**27),
        matmul_rate(device, 8192 if real else 1024, getattr(torch, dtype)),
    )
    release()
    return found


def _told(found: Gate) -> str:
    told = f"logits of the engine are {found.engine:.1e} from {found.reference}"
    if found.forward:
        told += f", those of the model's own forward pass {found.forward:.1e}"
    if found.rounding is not None:
        told += f"; a row in fp8 is at most {found.rounding:.1%} from what it was"
    return told


def _too_little(what: str, needed: int, left: int) -> str:
    return f"{what} {needed / 1e9:.1f} GB, and this machine has {left / 1e9:.1f} GB left to give."


def _is_of_memory(error: Exception) -> bool:
    """Whether there was too little memory, of the device or the host."""
    return isinstance(
        error, (MemoryError, torch.OutOfMemoryError)
    ) or "can't allocate memory" in str(error)


def _failure(error: Exception) -> Row:
    """The row of a point that ended so; the CPU's allocator has no error of its own."""
    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).split(". ", maxsplit=1)[0]
        return {"kind": "none", "status": "out of memory", "reason": reason}
    status = "out of memory" if _is_of_memory(error) else "failed"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return {"kind": "none", "status": status, "reason": reason}


def _summary(point: Point, rows: Sequence[Row]) -> str:
    if rows[0]["status"] != "ok":
        return f"{point.key}: {rows[0]['status']}: {rows[0]['reason']}"
    by_kind = {row["kind"]: row for row in rows}
    decode, cache = by_kind["decode"], by_kind["cache"]
    parts = [
        f"decode {decode['tokens_per_s']:.1f} tok/s",
        f"{decode['roofline_share']:.0%} of the roofline",
        f"cache {cache['cache_bytes'] / 2**20:.2f} MiB",
    ]
    for kind, name in (("prefill", "prefill"), ("last_chunk", "its last chunk")):
        if kind in by_kind:
            row = by_kind[kind]
            share = f"{row['flop_share']:.0%} of the matrix rate"
            parts.insert(0, f"{name} {row['tokens_per_s']:.0f} tok/s, {share}")
    return f"{point.key}: {', '.join(parts)}"


def _describe(name: str, options: ProfileOptions) -> Row:
    commit, dirty = provenance.revision()
    return {
        "schema": SCHEMA,
        "id": name,
        "created": provenance.now(),
        "command": list(options.command),
        "mode": "profile",
        "model": _described(name, options.workload.dtypes[0]),
        "suites": {},
        "config": _config(options),
        "commit": commit,
        "dirty": dirty,
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "comparable": {
            "paper": False,
            "reason": "see each row's device and label; the paper measured one H200",
        },
    }


def _config(options: ProfileOptions) -> Row:
    """What is measured grows from command to command; where it is measured does not."""
    return {
        "device": options.device,
        "card": _device_name(_device(options.device)),
        "threads": options.threads,
    }


def _described(name: str, dtype: str) -> Row:
    if name.startswith("random:"):
        attention = "m2la" if "m2la" in name else "gqa"
        return {"name": name, "digest": name, "attention": attention, "label": "random weights"}
    from internvideo3.harness.evaluate import describe_model

    return describe_model(name, dtype)
