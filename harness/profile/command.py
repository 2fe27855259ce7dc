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
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers

from internvideo3.harness import provenance
from internvideo3.harness.gpu.measure import copy_bandwidth, device_state, matmul_rate, release
from internvideo3.harness.profile import host
from internvideo3.harness.profile.amiss import (
    Amiss,
    GateError,
    Row,
    UnfinishedError,
    failure,
    reasons,
    unmeasured,
)
from internvideo3.harness.profile.depth import Depth, DepthError
from internvideo3.harness.profile.gate import Form, Gate, gate
from internvideo3.harness.profile.known import (
    MEASURED,
    OTHER_CODE,
    made_by,
    stages_made_by,
    standing,
)
from internvideo3.harness.profile.measure import (
    Ceilings,
    Run,
    power_w,
    rows_of,
    run_once,
    warm_up,
)
from internvideo3.harness.profile.options import (
    ProfileOptions,
    Tell,
    check,
    describe,
    device_given,
    move_foreign_aside,
)
from internvideo3.harness.profile.plan import (
    folded_bytes,
    gate_batch,
    need_of,
    refusal,
    size_told,
    weights_of,
)
from internvideo3.harness.profile.runners import MissingPackageError, static_room
from internvideo3.harness.profile.stages import UNTIMED, decoding_row, encoding_row
from internvideo3.harness.profile.subjects import (
    Subject,
    attention_of,
    config_of,
    form_of,
    label_of,
    load,
    parameters_of,
)
from internvideo3.harness.profile.workload import Point, why_not
from internvideo3.harness.store import RunStore, append_measurements, read_rows
from internvideo3.model.device import is_of_memory, use
from internvideo3.model.session import CHUNK

__all__ = [
    "GateError",
    "ProfileOptions",
    "UnfinishedError",
    "is_complete",
    "move_foreign_aside",
    "profile",
]
PLAIN = Form()
"""The form in which a model is held to the gate whatever is timed."""
FRAMES_PER_S, MAX_FRAMES = 2.0, 64


def profile(options: ProfileOptions, tell: Tell = lambda _: None) -> list[Path]:
    """Measure what is missing of a workload.

    Args:
        options: the command.
        tell: gets one line for each step.

    Returns:
        The run directories, in the order of the models.

    Raises:
        GateError: a model's engine disagrees with its forward pass; raised when all else is done.
        UnfinishedError: a model cannot be loaded, or points failed; likewise.
        WorkloadError: a model, video or device that there is not.
    """
    workload, device = options.workload, device_given(options.device)
    check(options)
    use(device)
    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    deadline = None if options.budget_s is None else time.monotonic() + options.budget_s
    amiss = Amiss()
    commit, _ = provenance.revision()
    with contextlib.ExitStack() as held:
        for name in workload.models:
            if name not in options.into:
                opened = RunStore.open(options.run_of(name), describe(name, options))
                held.enter_context(opened)
        together = device.type == "cpu"
        groups = [workload.models] if together else [(name,) for name in workload.models]
        idle_w = power_w(device)
        for dtype in workload.dtypes:
            ceilings: list[Ceilings] = []
            for names in groups:
                group = _Group(
                    options, device, dtype, deadline, tell, amiss, commit, idle_w, ceilings
                )
                group.measure(names)
    amiss.raise_if_any()
    return options.runs()


def is_complete(options: ProfileOptions) -> bool:
    """Whether an earlier command has measured every point on this device with this code."""
    return all(_standing(options, point) == MEASURED for point in options.workload.points())


def _standing(options: ProfileOptions, point: Point) -> str:
    """How a point stands in its model's file."""
    rows = read_rows(options.run_of(point.model) / "measurements.jsonl")
    device = host.name_of(device_given(options.device))
    return standing(rows, point, device, options.workload)


@dataclass(frozen=True)
class _Prepared:
    """A model that can be timed, in some forms at least."""

    subject: Subject
    gates: dict[Form, Gate | Row]
    """Of the forms that were timed so far; or the row of each point, if it cannot be timed."""


@dataclass(frozen=True)
class _Group:
    """Models of one number format that take turns."""

    options: ProfileOptions
    device: torch.device
    dtype: str
    deadline: float | None
    """Of `time.monotonic`."""
    tell: Tell
    amiss: Amiss
    commit: str | None
    """Of this code; a run directory may hold rows of several."""
    idle_w: float | None
    """Watts that the card drew before anything ran."""
    ceilings: list[Ceilings] = field(default_factory=list)
    """Of this format: none until they are needed, then one."""

    def measure(self, names: Sequence[str]) -> None:
        """Load the models, hold them to the gate, measure what is missing of them."""
        wanted = list(self._wanted(names))
        unseen = set(self._unseen(names))
        if not wanted and not unseen:
            self.tell(f"{', '.join(names)}: measured before, kept")
            return
        if self._is_over():
            return
        self._tell_of_other_code(wanted)
        wanted = self._within_plan(wanted)
        points = [point for turn in wanted for point in turn]
        if points and not self._has_ceilings(points):
            wanted, points = [], []
        needed = {point.model for point in points} | unseen
        if not needed:
            return
        prepared = {name: self._prepared(name) for name in names if name in needed}
        for turn in wanted:
            if self._is_over():
                break
            self._measure_turn(turn, prepared)
        self._watch(prepared)
        prepared.clear()
        release()

    def _has_ceilings(self, points: Sequence[Point]) -> bool:
        """Whether the device's ceilings are known, which are measured while it is empty.

        Where they cannot be, the points are rows that say why.
        """
        if self.ceilings:
            return True
        try:
            found = _ceilings(self.device, self.dtype)
        except Exception as error:  # no memory, above all: other programs may have it
            why = failure(error)["reason"]
            self.tell(f"ceilings in {self.dtype}: failed: {why}")
            for point in points:
                reason = f"the device's ceilings could not be measured: {why}"
                self._write(point, None, [unmeasured("failed", reason, retry=True)])
            return False
        self.ceilings.append(found)
        self.tell(
            f"{host.name_of(self.device)}: copies {found.copy_bytes_per_s / 1e9:.1f} GB/s, "
            f"multiplies {found.matmul_flop_per_s / 1e9:.0f} GFLOP/s in {self.dtype}"
        )
        return True

    def _within_plan(self, wanted: Sequence[Sequence[Point]]) -> list[list[Point]]:
        """The points that can be run here; of the others rows are written before any loading."""
        found = []
        for turn in wanted:
            refused = {point: self._refused_ahead(point) for point in turn}
            for point, row in refused.items():
                if row is not None:
                    self._write(point, None, [row])
            found.append([point for point, row in refused.items() if row is None])
        return [turn for turn in found if turn]

    def _refused_ahead(self, point: Point) -> Row | None:
        config = config_of(point.model)
        impossible = why_not(point, form_of(config))
        if impossible is not None:
            return unmeasured("not possible", impossible, retry=False)
        try:
            # Of a CPU's memory the weights take their part when they are loaded.
            on_card = self.device.type == "cuda"
            weights = _weights(point.model, point.dtype) if on_card else 0
            return self._refusal(point, config, weights)
        except Exception as error:  # a shape of which no model can be made
            return self._told_failure(point.key, error)

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
            found = one if isinstance(one, dict) else self._gate_of(one, point)
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
            "device": host.name_of(self.device),
            "dtype": self.dtype,
            "status": "ok",
        }

        def seen(name: str) -> set[str]:
            rows = read_rows(self.options.run_of(name) / "measurements.jsonl")
            return {
                row["kind"]
                for row in rows
                if {**about, **stages_made_by()}.items() <= row.items()
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

    def _gate_of(self, one: _Prepared, point: Point) -> Gate | Row:
        """The gate of the form in which a point is timed, which may be compiled for that point."""
        form = self._form_of(point)
        if form not in one.gates:
            one.gates[form] = self._gated(one.subject, form)
        return one.gates[form]

    def _prepared(self, name: str) -> _Prepared | Row:
        """A model that passed its gate; or the row of each of its points, if it cannot be timed."""
        try:
            refused = self._refusal_of_weights(name)
            if refused is not None:
                self.tell(f"{name}: {reasons([refused])}")
                return refused
            subject = load(name, self.device, self.dtype)
        except Exception as error:  # of shape, weights, tokenizer, memory: other models go on
            row = self._told_failure(name, error)
            # Too little memory for loading is not the points' result: they are tried again.
            if row["status"] != "failed":
                row = unmeasured("failed", f"while it was loaded: {row['reason']}", retry=True)
            self.amiss.unloaded[name] = row["reason"]
            return row
        self._tell_of_length(subject)
        plain = self._gated(subject, PLAIN)
        return plain if isinstance(plain, dict) else _Prepared(subject, {PLAIN: plain})

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
            release()
            found = gate(subject, form)
        except MissingPackageError as error:
            self.tell(f"{subject.name}: not possible: {error}")
            return unmeasured("not possible", str(error), retry=True)
        except Exception as error:  # of a kernel or its compiler, as in `_tried`
            row = self._told_failure(f"{subject.name}, {form}, gate", error)
            # Too little memory for the gate is not the point's result: it is tried again.
            return unmeasured("failed", f"its gate: {row['reason']}", retry=True)
        named = subject.name if form == PLAIN else f"{subject.name} ({form})"
        self.tell(f"{named}: gate {'green' if found.is_green else 'RED'}, {_told(found)}")
        if found.is_green:
            return found
        self.amiss.red.append(named)
        return unmeasured("gate red", _told(found), retry=True)

    def _told_failure(self, name: str, error: Exception) -> Row:
        row = failure(error, shared=self._is_shared())
        self.tell(f"{name}: {reasons([row])}")
        return row

    def _memory(self) -> host.CardMemory | None:
        """The card's memory; None of a CPU, and of a card that answers no more."""
        try:
            return host.card_memory(self.device)
        except RuntimeError:
            # After a kernel's fault every call fails: the points that follow say so themselves.
            return None

    def _is_shared(self, before: host.CardMemory | None = None) -> bool:
        """Whether other programs have, or had before, memory of the device; a CPU's always."""
        moments = [one for one in (before, self._memory()) if one is not None]
        return not moments or any(one.is_shared for one in moments)

    def _in_turns(
        self, turn: Sequence[Point], models: Mapping[str, Subject]
    ) -> Iterator[tuple[Point, list[Row]]]:
        """Repeat each point, in turns; rows of every point."""
        workload = self.options.workload
        runs: dict[Point, list[Run]] = {point: [] for point in turn}
        failed: dict[Point, Row] = {}
        depths: dict[Point, Depth | None] = {}
        told: dict[Point, Row] = {point: self._circumstances() for point in turn}
        for repeat in range(workload.warmups + workload.repeats):
            for point in turn:
                if point in failed:
                    continue
                found = self._tried(models[point.model], point, told[point], first=repeat == 0)
                if isinstance(found, dict):
                    failed[point] = found
                    continue
                # Only the first run is looked at, which may be one that warms up.
                depths.setdefault(point, found.depth)
                if repeat >= workload.warmups:
                    runs[point].append(replace(found, depth=depths[point]))
        for point in turn:
            if not runs[point]:
                yield point, [told[point] | failed[point]]
                continue
            # What was measured before a later repeat failed stays.
            counted = {"repeats": len(runs[point]), "warmups": workload.warmups, "status": "ok"}
            if point in failed:
                counted["ended_by"] = reasons([failed[point]])
                counted["retry"] = failed[point]["retry"]
            rows = rows_of(models[point.model], point, runs[point], self.ceilings[0])
            yield point, [row | told[point] | counted for row in rows]

    def _circumstances(self) -> Row:
        """What a point finds where it begins."""
        memory = self._memory()
        if memory is None:
            return {}
        return {"device_total_bytes": memory.total, "device_unclaimed_bytes": memory.unclaimed}

    def _tried(self, subject: Subject, point: Point, told: Row, *, first: bool) -> Run | Row:
        """One run, or the row that says why there is none."""
        before = self._memory()
        weights = subject.weight_bytes + folded_bytes(subject.model.config, point.dtype)
        refused = self._refusal(point, subject.model.config, weights)
        if refused is not None:
            return refused
        try:
            if first:
                # What another point had is of other sizes.
                release()
                told |= self._warmed_up(subject, point)
            return run_once(subject, point, first=first)
        except MissingPackageError as error:
            return unmeasured("not possible", str(error), retry=True)
        except DepthError as error:
            self.amiss.red.append(point.key)
            return unmeasured("gate red", str(error), retry=True)
        except Exception as error:
            # Whatever a kernel, its compiler or a baseline comes up with is this point's result:
            # Triton's errors have no class in common, and other points are not to be lost.
            return failure(error, shared=is_of_memory(error) and self._is_shared(before))

    def _warmed_up(self, subject: Subject, point: Point) -> Row:
        """Warm a GPU up where whole untimed runs, which take minutes, are not asked for."""
        if self.device.type != "cuda" or self.options.workload.warmups:
            return {}
        return {"warmup_tokens": warm_up(subject, point)}

    def _refusal_of_weights(self, name: str) -> Row | None:
        """Why a model is not loaded into the host's memory; a card says so itself."""
        left = host.available_bytes()
        if self.device.type == "cuda" or left is None:
            return None
        needed = _weights(name, self.dtype)
        if needed <= left:
            return None
        return unmeasured("does not fit", _too_little("its weights take", needed, left), retry=True)

    def _refusal(self, point: Point, config: object, weights: int) -> Row | None:
        """The row of a point for which there is not the memory."""
        if self.device.type != "cuda":
            left = host.available_bytes()
            chunk = point.chunk or CHUNK["cpu"]
            need = need_of(replace(point, chunk=chunk), config, weights=0, step=0)
            needed = need.cache + need.scratch
            if left is None or needed <= left:
                return None
            told = _too_little("cache and scratch take", needed, left)
            return unmeasured("does not fit", told, retry=True)
        memory = self._memory()
        if memory is None:
            return None
        need = need_of(point, config, weights)
        reason = refusal(point, need, memory.total)
        if reason is not None:
            return unmeasured("does not fit", reason, retry=False)
        held = memory.total - memory.unclaimed
        if not memory.is_shared or need.fits(memory.unclaimed):
            return None
        return unmeasured(
            "does not fit",
            f"needs {size_told(need.total)}, and other programs hold {size_told(held)} of the "
            f"device's {size_told(memory.total)}. End them, and repeat the command.",
            retry=True,
        )

    def _form_of(self, point: Point) -> Form:
        """What has to be right for this point to be timed."""
        batch = gate_batch(point, config_of(point.model))
        if point.runner == "engine":
            return Form(batch, point.cache)
        static = point.runner == "static"
        return Form(batch, "native", point.runner, static_room(point, self.device) if static else 0)

    def _write(self, point: Point, found: Gate | None, rows: Sequence[Row]) -> None:
        row = rows[0]
        if row["status"] == "failed" and point.model not in self.amiss.unloaded:
            self.amiss.failed[point.key] = row["reason"]
        elif row.get("retry") and "ended_by" in row:
            self.amiss.failed[point.key] = f"after {row['repeats']} repeats: {row['ended_by']}"
        common = self._common(point.model, found, self._scope_of(point)) | {
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
        common = {**self._common(subject.name, found, PLAIN.scope), **about, **stages_made_by()}
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

    def _scope_of(self, point: Point) -> str | None:
        """What the point's gate looks at; nothing of what can be run nowhere."""
        possible = why_not(point, form_of(config_of(point.model))) is None
        return self._form_of(point).scope if possible else None

    def _common(self, model: str, found: Gate | None, scope: str | None) -> Row:
        ceilings = self.ceilings[0] if self.ceilings else None
        return {
            "attention": attention_of(config_of(model)),
            "model": model,
            "device": host.name_of(self.device),
            "dtype": self.dtype,
            "threads": self.options.threads,
            "gate_engine_error": found and found.engine,
            "gate_forward_error": found and found.forward,
            "gate_fp8_rounding": found and found.rounding,
            "gate_scope": scope,
            "label": label_of(model),
            "parameters": parameters_of(model),
            "copy_bytes_per_s": ceilings and ceilings.copy_bytes_per_s,
            "matmul_flop_per_s": ceilings and ceilings.matmul_flop_per_s,
            "idle_power_w": self.idle_w,
            "device_state": device_state(self.device),
            "commit": self.commit,
            **made_by(),
        }


def _ceilings(device: torch.device, dtype: str) -> Ceilings:
    """Copy bandwidth and matrix rate; on a CPU of a size that takes a moment."""
    real = device.type == "cuda"
    found = Ceilings(
        copy_bandwidth(device, 2**32 if real else 2**27),
        matmul_rate(device, 8192 if real else 1024, getattr(torch, dtype)),
    )
    release()
    return found


@functools.cache
def _weights(model: str, dtype: str) -> int:
    return weights_of(config_of(model), dtype)


def _told(found: Gate) -> str:
    told = f"its logits are {found.engine:.1e} from {found.reference}"
    if found.forward:
        told += f", those of the model's own forward pass {found.forward:.1e}"
    if found.rounding is not None:
        told += f"; a row in fp8 is at most {found.rounding:.1%} from what it was"
    return told


def _too_little(what: str, needed: int, left: int) -> str:
    return f"{what} {size_told(needed)}, and this machine has {size_told(left)} left to give."


def _summary(point: Point, rows: Sequence[Row]) -> str:
    if rows[0]["status"] != "ok":
        return f"{point.key}: {reasons(rows)}"
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
    if "ended_by" in decode:
        parts.append(f"after {decode['repeats']} repeats {decode['ended_by']}")
    return f"{point.key}: {', '.join(parts)}"
