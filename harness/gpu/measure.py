"""Timing, ceilings and the results file of the GPU benchmarks."""

import argparse
import contextlib
import gc
import itertools
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from internvideo3.harness import provenance
from internvideo3.harness.locks import lock
from internvideo3.harness.profile import host
from internvideo3.model.device import DeviceError, device_of, use

SCHEMA = 1
MEASURED_CODE = ("kernels", "model", "harness/gpu", "harness/profile")
"""Folders of the package: results of other sources are not those of these."""
ROTATED_BYTES = 256 * 2**20
"""More than twice the L2 cache of an H200."""
SMI_S = 20
"""Longer than that nvidia-smi is not waited for."""
NVIDIA_FIELDS = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw,"
    "clocks_event_reasons.active"
)


def say(text: str) -> None:
    """Tell progress at once, with the time of day."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    low_s: float
    """25th percentile."""
    high_s: float
    """75th percentile."""
    repeats: int
    calls_per_repeat: int


def summarize(seconds: Sequence[float], calls: int) -> Timing:
    """Median and quartiles of repeated measurements of ``calls`` calls each."""
    per_call = sorted(s / calls for s in seconds)
    low, _, high = statistics.quantiles(per_call, n=4) if len(per_call) > 1 else [per_call[0]] * 3
    return Timing(statistics.median(per_call), low, high, len(per_call), calls)


def rotation(device: torch.device, size_bytes: int) -> int:
    """How many sets of inputs of this size no L2 cache holds together."""
    return max(1, -(-ROTATED_BYTES // size_bytes)) if device.type == "cuda" else 1


def time_calls(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int = 15,
    target_s: float = 0.006,
) -> Timing:
    """Time calls that rotate over different buffers, as replays of one CUDA graph.

    Args:
        calls: the same work on different memory, so that no call finds its input in the L2 cache.
        device: on a CPU the calls are timed directly (a rehearsal, not a result).
        repeats: graph replays.
        target_s: aimed length of one replay.
    """
    if device.type != "cuda":
        seconds = []
        for call in calls:
            began_s = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began_s)
        return summarize(seconds, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        stream.synchronize()
    once_s = max(start.elapsed_time(end) / 1e3, 1e-6)
    rounds = max(1, min(200, int(target_s / once_s)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    graph.replay()
    seconds = []
    for _ in range(repeats if once_s < 0.05 else 4):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    del graph
    return summarize(seconds, rounds * len(calls))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every torch.empty with NaN, by torch's own deterministic mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def release() -> None:
    """Give freed memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        # After a kernel's fault every call fails: what is measured next says so, and what was
        # measured is still to be written.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def copy_bandwidth(device: torch.device, size_bytes: int) -> float:
    """Bytes read plus written per second by a device-to-device copy."""
    source = torch.empty(size_bytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    # Not in a graph: there a copy is a node for the copy engines, which reach 2.7 of 4.3 TB/s.
    return 2 * size_bytes / _median_s(lambda: target.copy_(source), device)


def _median_s(call: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of a call that takes long beside its launch."""
    if device.type != "cuda":
        return time_calls([call] * 3, device).median_s
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    call()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    pairs = zip(events, events[1:], strict=False)
    return float(statistics.median(a.elapsed_time(b) / 1e3 for a, b in pairs))


def matmul_rate(device: torch.device, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a square matrix product on random data."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    timing = time_calls([lambda: a @ b], device)
    return 2 * size**3 / timing.median_s


def card_of(device: torch.device) -> str:
    """The card as its driver names it, which counts cards that torch may not see."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


_hangs: list[str] = []
"""What became of nvidia-smi, once it has not answered."""


def device_state(device: torch.device) -> dict[str, Any]:
    """What nvidia-smi says of the card now: clocks, temperature, power, throttle reasons."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    if _hangs:
        return {"nvidia-smi": _hangs[0]}
    command = ["nvidia-smi", f"--query-gpu=uuid,{NVIDIA_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SMI_S)
    except subprocess.TimeoutExpired:
        # A driver that hangs is worth knowing of, and not worth a point; nor asking again.
        _hangs.append(f"no answer in {SMI_S} s")
        return {"nvidia-smi": _hangs[0]}
    answer = done.stdout
    lines = [[value.strip() for value in line.split(",")] for line in answer.splitlines() if line]
    # Of a single card there is nothing to choose, should its names differ in form.
    mine = [line for line in lines if line[0] == card_of(device)] or lines[: len(lines) == 1]
    return dict(zip(NVIDIA_FIELDS.split(","), mine[0][1:], strict=False)) if mine else {}


def script_parser(description: str | None, budget_s: float) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="for results; what is there is not measured again"
    )
    told = "seconds; nothing is begun after (%(default)s)"
    parser.add_argument("--budget-s", type=float, default=budget_s, help=told)
    return parser


def device_given(name: str) -> torch.device:
    """The device of a script's command line; says what is missing and ends if it is not there."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "this measures an NVIDIA GPU, and torch sees none. `kernels` and `figure6` rehearse on "
            "tiny shapes with --device cpu (kernels with TRITON_INTERPRET=1); `internvideo3 "
            "profile` measures a CPU."
        )
    try:
        device = device_of(name)
    except DeviceError as error:
        raise SystemExit(str(error)) from error
    use(device)
    return device


@contextlib.contextmanager
def in_words(*kinds: type[Exception]) -> Iterator[None]:
    """End a script with one line where what was asked of it, or where it writes, is amiss."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise SystemExit(f"{error.filename}: {error.strerror}. Give another place.") from error
    except kinds as error:
        raise SystemExit(str(error)) from error


def aside(path: Path, earlier: Sequence[Path]) -> Path:
    """A free name beside a file or folder, with a higher number than those moved there earlier."""
    last = int(earlier[-1].stem.rpartition("-")[2]) if earlier else 0
    names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(last + 1))
    return next(name for name in names if not name.exists())


def _mark_of(kept: Path) -> Path:
    return kept.with_name(f".{kept.name}.aside")


def mark_aside(kept: Path) -> None:
    """Notes that it was moved there and not put there by somebody, who may want it where it is."""
    _mark_of(kept).touch()


def is_marked(kept: Path) -> bool:
    """Whether it was moved there; what was just before a process ended is not known of."""
    return _mark_of(kept).exists()


def unmark(kept: Path) -> None:
    """Forgets that something was moved there, where it is no more."""
    _mark_of(kept).unlink(missing_ok=True)


def kept_aside(path: Path) -> list[Path]:
    """What has the name of something that was moved aside, oldest first."""
    name = re.compile(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    found = [(name.fullmatch(one.name), one) for one in beside]
    return [one for _, one in sorted((int(match[1]), one) for match, one in found if match)]


def _locked(path: Path) -> IO[str]:
    """The lock of a file that is replaced whole, and so cannot be locked itself.

    Raises:
        ResultsError: another process has it.
    """
    try:
        return lock(path.with_name(f".{path.name}.lock"))
    except BlockingIOError:
        raise ResultsError(
            f"{path} is being written by another process. Wait for it, or give another --out."
        ) from None


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, memory and versions; a CPU is labelled a rehearsal."""
    from importlib.metadata import version

    about: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
    if device.type != "cuda":
        return {"name": f"rehearsal on {platform.processor() or 'cpu'}"} | about
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    } | about


def is_tried_again(point: dict[str, Any]) -> bool:
    """Whether a known point is measured again: it failed, or others may have had the memory."""
    return bool(point["status"] == "failed" or point.get("retry"))


def _points_of(file: Path) -> dict[str, Any] | None:
    """A file of results; None of one that is torn, empty, or no text."""
    if not file.is_file():
        return None
    try:
        old = json.loads(file.read_text())
    except ValueError:
        return None
    whole = isinstance(old, dict) and isinstance(old.get("points"), dict)
    return old if whole else None


class ResultsError(ValueError):
    """A file of results that cannot be written, or a card that cannot be measured now."""


class Results:
    """Measured points in one JSON file, rewritten whole and atomically after each point.

    The file is this process's alone until it is closed, or the process ends.
    """

    def __init__(self, path: Path, device: torch.device, budget_s: float) -> None:
        """Open the file; points of the same device, versions and code are not measured again.

        A file of others is moved aside, and stays: its checks say nothing of what runs now. So is
        one that is torn.

        Raises:
            ResultsError: another process writes the file.
        """
        self.path = path
        self.budget_s = budget_s
        self.deadline = time.monotonic() + budget_s
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(path)
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "device": describe_device(device),
            "code": provenance.code_digest(MEASURED_CODE),
            "ceilings": {},
            "points": {},
        }
        self._continue()
        commit, dirty = provenance.revision()
        self.data |= {"command": sys.argv, "commit": commit, "dirty": dirty}
        # Clocks and heat differ from start to start: each measures its own.
        self.data["ceilings"] = {}
        self.device = device
        self.data["state_at_start"] = device_state(device)
        self.write()

    def _continue(self) -> None:
        """Take over what an earlier process measured, or move it aside.

        What was measured on this device before another one's file took its place is taken up again,
        also where a process ended between the two.
        """
        old = _points_of(self.path)
        if self._is_ours(old):
            self.data = old or self.data
            return
        earlier = kept_aside(self.path)
        if self.path.exists():
            device = (old or {}).get("device")
            name = device.get("name") if isinstance(device, dict) else None
            why = f"is of {name}, or of other versions or code than this"
            kept = aside(self.path, earlier)
            self.path.rename(kept)
            mark_aside(kept)
            say(f"{self.path} {why if old else 'is no whole file of results'}; kept as {kept.name}")
        ours = [one for one in earlier if is_marked(one) and self._is_ours(_points_of(one))]
        if ours:
            self.data = _points_of(ours[-1]) or self.data
            ours[-1].rename(self.path)
            unmark(ours[-1])
            say(f"{ours[-1].name} is of this device, and continued as {self.path.name}")

    def _is_ours(self, old: dict[str, Any] | None) -> bool:
        named = ("schema", "device", "code")
        return old is not None and all(old.get(name) == self.data[name] for name in named)

    def write(self) -> None:
        """Replace the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1) + "\n")
        Path(new).replace(self.path)

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.deadline - time.monotonic()

    def point(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Measure a point unless it is known or the budget is spent.

        Running out of memory is recorded as the point's result; it is tried again where others
        may have had the memory.

        Returns:
            The point, or None when the budget was spent before it.
        """
        known: dict[str, Any] | None = self.data["points"].get(key)
        if known is not None and not is_tried_again(known):
            return known
        if self.left_s() <= 0:
            return None
        start = time.monotonic()
        try:
            found = {"status": "ok"} | measure()
        except torch.OutOfMemoryError as error:
            memory = host.card_memory(self.device)
            shared = memory is None or memory.is_shared
            told = str(error).split(". ")[0]
            found = {"status": "out of memory", "error": told, "retry": shared}
        except Exception as error:
            # A compiler's errors have no class in common with torch's, and the next point waits.
            found = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:400]}
        release()
        found["wall_s"] = round(time.monotonic() - start, 2)
        found["ceilings"] = dict(self.data["ceilings"])
        self.data["points"][key] = found
        self.write()
        return found

    def ceilings(self, device: torch.device) -> dict[str, float]:
        """Copy bandwidth and matrix rate of this device, measured once by each process.

        Each point keeps those that it was measured with.

        Raises:
            ResultsError: there is no memory for it.
        """
        known: dict[str, float] = self.data["ceilings"]
        if not known:
            real = device.type == "cuda"
            try:
                copied = copy_bandwidth(device, 2**32 if real else 2**20)
                multiplied = matmul_rate(device, 8192 if real else 128)
            except torch.OutOfMemoryError as error:
                told = str(error).split(". ", maxsplit=1)[0]
                raise ResultsError(
                    f"the device's ceilings cannot be measured ({told}), so no share of them can "
                    "be told. End what else runs on it, and repeat the command."
                ) from error
            known |= {"copy_bytes_per_s": copied, "matmul_flop_per_s": multiplied}
            release()
            self.write()
        return known

    def share(self, point: dict[str, Any], rate: str, ceiling: str) -> float:
        """A point's rate as a share of a ceiling, as it was when the point was measured."""
        ceilings = point.get("ceilings") or self.data["ceilings"]
        return float(point[rate] / ceilings[ceiling])

    def close(self) -> None:
        """Record the card's state at the end."""
        self.data["state_at_end"] = device_state(self.device)
        self.write()
        self._lock.close()


def timing_fields(timing: Timing) -> dict[str, Any]:
    """A timing as JSON fields."""
    return asdict(timing)
