"""The quick form of Figure 6 on a GPU: the 8B shape with random weights, at synthetic depths.

    python -m internvideo3.harness.gpu.figure6 --out runs/gpu/figure6 --budget-s 240
    python -m internvideo3.harness.gpu.figure6 --out runs/gpu/last --last-chunk --contexts 786432

Decoding is timed in the middle of a reply of 16K tokens, 256 steps three times at each length, and
the reply's time is extrapolated: such rows and their figure say "integrated". The full form is
`internvideo3 profile --workload figure6` and takes GPU-hours. ``--prefill`` times true prefills
instead, once each after two chunks that warm the card up, and a short reply after each;
``--last-chunk`` only the last chunk of each, on a cache of random numbers, for lengths that would
take minutes. Needs torch, triton and transformers,
to draw matplotlib; nothing is downloaded. ``--device cpu`` rehearses it on a tiny shape.
"""

import sys
from importlib.util import find_spec
from typing import Any

from internvideo3.harness.gpu.measure import device_given, in_words, say, script_parser
from internvideo3.harness.profile.command import (
    ProfileOptions,
    UnfinishedError,
    move_foreign_aside,
    profile,
)
from internvideo3.harness.profile.workload import (
    FIGURE6,
    Workload,
    WorkloadError,
    changed,
    read_workload,
)
from internvideo3.harness.store import StoreError
from internvideo3.model.checkpoint import CheckpointError


def quick(device: str, *, fill: str = "random") -> Workload:
    """The workload: Figure 6's lengths, or a tiny shape to rehearse with."""
    given: dict[str, Any] = {"runners": ["engine"], "fill": fill, "warmups": 0, "repeats": 3}
    if fill != "random":
        given |= {"repeats": 1, "new_tokens": 64}
    if device == "cpu":
        tiny: dict[str, Any] = {
            "models": ["random:tiny-gqa", "random:tiny-m2la"],
            "contexts": [64, 256],
        }
        small: dict[str, Any] = {
            "new_tokens": 4,
            "chunks": 64,
            "dtypes": "float32",
        }
        small |= {"integrate": 16} if fill == "random" else {}
        return changed(read_workload(FIGURE6), given | tiny | small)
    if fill == "random":
        given |= {"new_tokens": 256, "integrate": 16384}
    return changed(read_workload(FIGURE6), given)


def main() -> None:
    """Measure what is missing, then draw; what was asked wrongly is said in words."""
    with in_words(WorkloadError, StoreError, CheckpointError):
        _main()


def _main() -> None:
    parser = script_parser(__doc__, 300.0)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse (%(default)s)")
    parser.add_argument("--draw-only", action="store_true", help="draw what is there already")
    parser.add_argument(
        "--prefill",
        dest="fill",
        action="store_const",
        const="prefill",
        default="random",
        help="time prefills instead",
    )
    parser.add_argument(
        "--last-chunk",
        dest="fill",
        action="store_const",
        const="last",
        help="time the last chunk of each prefill",
    )
    parser.add_argument("--contexts", type=int, nargs="+", help="other lengths than the figure's")
    parser.add_argument("--models", nargs="+", help="other models than the figure's")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences decoded together")
    parser.add_argument("--new-tokens", type=int, help="decoded and timed at each length")
    parser.add_argument("--caches", nargs="+", help="native, fp8 (M²LA only)")
    parser.add_argument("--runners", nargs="+", help="engine, sdpa, flash, static")
    given = parser.parse_args()
    if not given.draw_only:
        device_given(given.device)
    names = ("contexts", "models", "caches", "runners", "batches", "new_tokens")
    workload = changed(
        quick(given.device, fill=given.fill), {name: getattr(given, name) for name in names}
    )
    options = ProfileOptions(
        workload=workload,
        out=given.out,
        device=given.device,
        budget_s=given.budget_s,
        command=tuple(sys.argv),
    )
    if given.draw_only:
        _draw(options)
        return
    move_foreign_aside(options, say)
    try:
        profile(options, say)
    except UnfinishedError as amiss:
        _draw(options)
        raise SystemExit(str(amiss)) from amiss
    _draw(options)


def _draw(options: ProfileOptions) -> None:
    """Draw what has been measured, if that can be done here."""
    if find_spec("matplotlib") is None:
        say(f"no matplotlib here; the same with --draw-only draws {options.out} elsewhere")
        return
    from internvideo3.reports.efficiency import EfficiencyError, draw

    try:
        files = draw(options.drawn(), options.out)
    except EfficiencyError as nothing:
        say(f"nothing drawn: {nothing}")
        return
    for file in files:
        say(f"wrote {file}")


if __name__ == "__main__":
    main()
