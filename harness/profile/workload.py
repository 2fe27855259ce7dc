"""What a profile measures: a grid of models, lengths, batches, chunks and number formats.

From flags or from a YAML file with the same names; `figure6.yaml` is the paper's Figure 6.
"""

from __future__ import annotations

import difflib
import itertools
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

RUNNERS = ("engine", "sdpa", "flash", "static")
DTYPES = ("float32", "bfloat16")
FILLS = ("prefill", "random", "last")
CACHES = ("native", "fp8")
MOST = 2**31
"""Of any number of a workload."""
DIGITS = 30
"""Of a number in a file; what is longer is no number that a device could run."""
FIGURE6 = Path(__file__).parent / "figure6.yaml"


class WorkloadError(ValueError):
    """A workload that makes no sense; says what and what to give instead."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A grid; every combination is one point."""

    models: tuple[str, ...] = ("scale:base", "scale:m2la")
    """Checkpoints, or `random:8b-gqa`, `random:8b-m2la`, `random:8b-m2la-576`: the exact shape
    with random weights, since speed does not depend on values."""
    runners: tuple[str, ...] = ("engine",)
    """`engine`: ours. Baselines of transformers, for GQA models: `sdpa` and `flash` (flash-attn)
    with a growing cache, `static` with a static cache and torch.compile."""
    contexts: tuple[int, ...] = (512, 2048, 8192)
    """Tokens cached before decoding."""
    new_tokens: int = 16
    """Tokens decoded and timed."""
    integrate: int = 0
    """Tokens that a reply would have: decoding is timed at the middle of such a reply, and its
    end-to-end time extrapolated and labelled "integrated". 0: `new_tokens` are the reply."""
    batches: tuple[int, ...] = (1,)
    """Sequences decoded together, each with a context of its own."""
    chunks: tuple[int, ...] = (0,)
    """Most tokens prefilled at once; 0: what suits the device."""
    dtypes: tuple[str, ...] = ("float32",)
    caches: tuple[str, ...] = ("native",)
    """`native`: in the model's number format. `fp8`: latents compressed before decoding."""
    fill: str = "prefill"
    """`prefill`: contexts are prefilled, and that is timed too. `random`: the cache is filled with
    random numbers, and only decoding is timed. `last`: the last chunk is prefilled and timed on a
    cache of random numbers, since a whole long prefill takes minutes."""
    warmups: int = 0
    """Untimed runs of each point before the timed ones."""
    repeats: int = 5

    def __post_init__(self) -> None:
        """Checks names and numbers.

        Raises:
            WorkloadError: one makes no sense.
        """
        for name, known in (
            ("runners", RUNNERS),
            ("dtypes", DTYPES),
            ("fill", FILLS),
            ("caches", CACHES),
        ):
            value = getattr(self, name)
            for given in (value,) if isinstance(value, str) else value:
                if given not in known:
                    raise WorkloadError(f"{name}: {given!r} is not one of {', '.join(known)}.")
        for name in ("models", "runners", "contexts", "batches", "chunks", "dtypes", "caches"):
            values = getattr(self, name)
            if not values:
                raise WorkloadError(f"{name} is empty; give at least one.")
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise WorkloadError(f"{name}: {twice!r} is given twice; once is enough.")
        if self.integrate and self.fill != "random":
            raise WorkloadError(
                "integrate needs fill: random, which can begin in a reply's middle."
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Whether each is one that a device could run.

        Raises:
            WorkloadError: one is not.
        """
        least = {"contexts": 1, "batches": 1, "chunks": 0, "new_tokens": 1, "repeats": 1}
        for name, low in (least | {"warmups": 0, "integrate": 0}).items():
            value = getattr(self, name)
            if min((value,) if isinstance(value, int) else value) < low:
                raise WorkloadError(f"{name} is {value}; the least that makes sense is {low}.")
            if max((value,) if isinstance(value, int) else value) > MOST:
                raise WorkloadError(f"{name} is {value}; no device holds more than {MOST}.")

    def points(self) -> Iterator[Point]:
        """Every combination, models innermost, so that they can be measured in turns."""
        for dtype, runner, cache, chunk, batch, context, model in itertools.product(
            self.dtypes,
            self.runners,
            self.caches,
            self.chunks,
            self.batches,
            self.contexts,
            self.models,
        ):
            yield Point(
                model=model,
                runner=runner,
                context=context,
                batch=batch,
                chunk=chunk,
                dtype=dtype,
                new_tokens=self.new_tokens,
                fill=self.fill,
                integrate=self.integrate,
                cache=cache,
            )


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination."""

    model: str
    runner: str
    context: int
    batch: int
    chunk: int
    dtype: str
    new_tokens: int
    fill: str
    integrate: int = 0
    cache: str = "native"

    @property
    def depth(self) -> int:
        """Tokens cached when decoding begins."""
        return self.context + self.integrate // 2

    def prefilled(self, chunk: int) -> int:
        """Tokens of a sequence whose prefill is timed, in chunks of so many."""
        return {"prefill": self.context, "random": 0, "last": min(chunk, self.context)}[self.fill]

    @property
    def key(self) -> str:
        """Names the point in a file of measurements."""
        return (
            f"{self.model}/{self.runner}/{self.dtype}"
            + (f" {self.cache}" if self.cache != "native" else "")
            + f"/batch {self.batch}/chunk {self.chunk}/"
            + f"{self.context}+{self.new_tokens} {self.fill}"
            + (f" of {self.integrate}" if self.integrate else "")
        )


def why_not(point: Point, form: str) -> str | None:
    """Why a point cannot be run on any device; None if it can.

    Args:
        point: it.
        form: of what its model caches, "gqa" or a form of M²LA's rows (`config.ROW_FORMS`).
    """
    if point.cache == "fp8" and (form == "gqa" or point.runner != "engine"):
        return "only the engine has an fp8 cache, and only for M²LA."
    if form == "prerope" and point.cache == "fp8":
        return "rows before rotation have no fp8 form."
    if form == "prerope" and point.fill != "prefill":
        return "rows before rotation are not made up: the first layer's have their angles."
    if point.runner != "engine" and form != "gqa":
        return f"{point.runner}: transformers has no M²LA; baselines are for GQA models."
    return None


def read_workload(path: Path) -> Workload:
    """The workload of a YAML file.

    Raises:
        WorkloadError: the file is missing, no YAML mapping, or names what there is not.
    """
    if not path.is_file():
        raise WorkloadError(
            f"cannot read the workload {path}: "
            + ("it is no file." if path.exists() else "there is none.")
        )
    try:
        # The loader is a safe one, with fewer kinds of values.
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise WorkloadError(f"cannot read the workload {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise WorkloadError(f"{path} is not YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise WorkloadError(f"{path} must be a mapping of names to values; see {FIGURE6}.")
    empty = [str(name) for name, value in found.items() if value is None]
    if empty:
        raise WorkloadError(f"{path}: {empty[0]} has no value; give one, or leave the line out.")
    try:
        return changed(Workload(), found)
    except WorkloadError as error:
        raise WorkloadError(f"{path}: {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML without what it makes of innocent text: 1:30 is no 90, 010 no 8, and no date a date.

    A name that is given twice is an error, not the last one.
    """

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if not tag.endswith((":int", ":timestamp"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the safe loader's, of names that differ."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice!r} is given twice", node.start_mark
            )
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(rf"[-+]?(0|[1-9][0-9_]{{0,{DIGITS}}})$"),
    list("-+0123456789"),
)


def chosen(name: str | None, values: Mapping[str, Any]) -> Workload:
    """The workload of a command line: of a file or `figure6`, with what was given beside it.

    Raises:
        WorkloadError: see `read_workload` and `changed`.
    """
    if name is None:
        return changed(Workload(), values)
    return changed(read_workload(FIGURE6 if name == "figure6" else Path(name)), values)


def changed(workload: Workload, values: Mapping[str, Any]) -> Workload:
    """The workload with other values; None keeps the old one, a single value makes a list of one.

    Raises:
        WorkloadError: a name is unknown, or a value makes no sense.
    """
    known = {field.name: field for field in fields(Workload)}
    taken: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str) or name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Known are {', '.join(known)}."
            raise WorkloadError(f"a workload has no {name!r}.{hint}")
        if value is not None:
            taken[name] = _typed(name, value, like=getattr(workload, name))
    return replace(workload, **taken)


def _typed(name: str, value: object, like: object) -> object:
    """The value in the type of `like`."""
    if isinstance(like, tuple):
        listed = list(value) if isinstance(value, (list, tuple)) else [value]
        return tuple(_typed(name, one, like[0]) for one in listed)
    if type(value) is not type(like):
        kind = {int: "a whole number", str: "a name"}[type(like)]
        raise WorkloadError(f"{name}: {reprlib.repr(value)} should be {kind}.")
    return value
