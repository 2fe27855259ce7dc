"""Where a decode step's time goes: GPU seconds of each kernel in one captured step.

    python -m internvideo3.harness.gpu.step --out step.json --contexts 32768 131072

The 8B shape with random weights and a random cache, as in Figure 6's quick form. Replays of the
captured step are recorded by torch's profiler; `step_s` is timed without it. Kernels start before
those ahead of them have ended, and wait: each is given the time for which it runs behind all of
them, so that the kernels' sum is the time in which anything runs, and `gaps_s` the rest. A model is
held to its gate first, and a step to float32 at its depth; what is red is not timed.
"""

import functools
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity

from internvideo3.harness.gpu.measure import (
    Results,
    ResultsError,
    device_given,
    in_words,
    is_tried_again,
    release,
    say,
    script_parser,
)
from internvideo3.harness.profile.gate import Form, gate
from internvideo3.harness.profile.measure import Look
from internvideo3.harness.profile.plan import fp8_bytes
from internvideo3.harness.profile.runners import Clock, EngineRunner
from internvideo3.harness.profile.subjects import Subject, attention_of, config_of, load

MODELS = ("random:8b-gqa", "random:8b-m2la")
TIMED, RECORDED = 64, 4
SHOWN = 8


def examine(subject: Subject, context: int, *, fp8: bool) -> dict[str, Any]:
    """Time a step with so many tokens cached, then record its kernels.

    Raises:
        DepthError: the step is not right there.
    """
    runner = EngineRunner(subject, 1, 0, fp8=fp8)
    look = Look(runner.device, asks=True)
    runner.before_timing = look
    steps = TIMED + RECORDED
    logits_1Y = runner.fill(context, steps)
    clock = Clock(runner.device)
    runner.decode(logits_1Y, TIMED, clock)
    engine = runner._engine
    assert engine is not None, "decoded above"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(RECORDED):
            engine.advance()
        torch.cuda.synchronize()
    on_card = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    times = [(one.name, one.time_range.start, one.time_range.end) for one in on_card]
    launches = Counter(one.name for one in on_card)
    seconds, gaps_s = shares(times)
    step_s = statistics.median(clock.seconds())
    per_token = subject.bytes_per_token
    if fp8:
        per_token = fp8_bytes(subject.model.config, "bfloat16")
    kernels = [
        {
            "name": name[:80],
            "seconds": seconds[name] / RECORDED,
            "launches": launches[name] // RECORDED,
        }
        for name in sorted(seconds, key=lambda n: -seconds[n])
    ]
    return {
        "step_s": step_s,
        "kernels_s": sum(seconds.values()) / RECORDED,
        "gaps_s": gaps_s / RECORDED,
        "launches": sum(launches.values()) // RECORDED,
        "weight_bytes": runner.step_bytes(),
        "cache_bytes": per_token * context,
        "kernels": kernels,
        "depth_error": look.found and look.found.error,
    }


def shares(times: Sequence[tuple[str, float, float]]) -> tuple[dict[str, float], float]:
    """Seconds of each kernel behind the ends of all before it, and seconds in which none runs.

    Args:
        times: names, with starts and ends in microseconds.
    """
    seconds: dict[str, float] = defaultdict(float)
    gaps, reached = 0.0, min((start for _, start, _ in times), default=0.0)
    for name, start, end in sorted(times, key=lambda one: one[1:]):
        gaps += max(0.0, start - reached) / 1e6
        seconds[name] += max(0.0, end - max(start, reached)) / 1e6
        reached = max(reached, end)
    return dict(seconds), gaps


def main() -> None:
    """Measure; what is amiss with the file or the card is said in words."""
    with in_words(ResultsError):
        _main()


def _main() -> None:
    """Measure each model at each length, with rows in fp8 where there are latents."""
    parser = script_parser(__doc__, 100.0)
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[32768, 131072], help="tokens (%(default)s)"
    )
    parser.add_argument(
        "--caches", nargs="+", default=["native", "fp8"], help="native, fp8: of M²LA (%(default)s)"
    )
    given = parser.parse_args()
    device = device_given("cuda")
    results = Results(given.out, device, given.budget_s)
    results.ceilings(device)
    amiss: list[str] = []
    for name in MODELS:
        amiss += measure(results, name, given.contexts, given.caches)
        release()
    results.close()
    if amiss:
        raise SystemExit(f"not timed, see above: {', '.join(amiss)}")


def measure(
    results: Results, name: str, contexts: Sequence[int], caches: Sequence[str]
) -> list[str]:
    """Every length of one model, in every number format of its cache.

    Returns:
        What was not timed, since its gate is red or it failed.
    """
    attention = attention_of(config_of(name))
    wanted = caches if attention == "m2la" else ("native",)
    subject: Subject | None = None
    amiss: list[str] = []
    for cache in wanted:
        points = {key_of(name, cache, context): context for context in contexts}
        known = results.data["points"]
        absent = [key for key in points if key not in known or is_tried_again(known[key])]
        if absent and results.left_s() > 0:
            subject = subject or loaded(name, results.device)
            if subject is None or not is_green(subject, cache):
                amiss.append(f"{name}, {cache} cache")
                continue
        for key, context in points.items():
            point = known.get(key)
            if subject is not None:
                run = functools.partial(examine, subject, context, fp8=cache == "fp8")
                point = results.point(key, run)
            report(key, point, results)
            if point is not None and point["status"] == "failed":
                amiss.append(key)
    return amiss


def key_of(name: str, cache: str, context: int) -> str:
    """A point's name in the file."""
    return f"{name}{' fp8' if cache == 'fp8' else ''}/{context}"


def loaded(name: str, device: torch.device) -> Subject | None:
    """A model; None if it cannot be loaded, which is said."""
    try:
        return load(name, device, "bfloat16")
    except Exception as error:  # of memory, above all: other models go on
        say(f"{name}: not loaded: {type(error).__name__}: {error}"[:400])
        return None


def is_green(subject: Subject, cache: str) -> bool:
    """Whether the engine says what the model's own pass says; says so."""
    try:
        found = gate(subject, Form(1, cache))
    except Exception as error:  # of a kernel, its compiler, or memory: other models go on
        say(f"{subject.name}, {cache} cache: gate failed: {type(error).__name__}: {error}"[:400])
        return False
    told = f"{found.engine:.1e} from {found.reference}, whose own pass is {found.forward:.1e}"
    colour = "green" if found.is_green else "RED"
    say(f"{subject.name}, {cache} cache: gate {colour}, logits of the engine are {told}")
    return found.is_green


def report(key: str, point: dict[str, Any] | None, results: Results) -> None:
    """Say a step's time, its share of the roofline, and the kernels that take most of it."""
    if point is None or point["status"] != "ok":
        say(f"{key}: {'not run, budget spent' if point is None else point}")
        return
    moved = (point["weight_bytes"] + point["cache_bytes"]) / point["step_s"]
    share = results.share({**point, "moved": moved}, "moved", "copy_bytes_per_s")
    say(
        f"{key}: {1e3 * point['step_s']:.3f} ms, {share:.1%} of the roofline, "
        f"kernels {1e3 * point['kernels_s']:.3f} ms in {point['launches']} launches, "
        f"gaps {1e3 * point['gaps_s']:.3f} ms"
    )
    for kernel in point["kernels"][:SHOWN]:
        say(f"    {1e3 * kernel['seconds']:8.3f} ms {kernel['launches']:5} x {kernel['name']}")


if __name__ == "__main__":
    main()
