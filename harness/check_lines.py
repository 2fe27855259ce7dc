"""The findings of `eval --check` in words."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from internvideo3.harness.check import Rates, SuiteCheck
from internvideo3.harness.options import EvalOptions
from internvideo3.reports.wording import suite_title
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS, SUBTITLED
from internvideo3.tasks.benchmarks.local import data_root
from internvideo3.tasks.benchmarks.protocol import Benchmark as Protocol
from internvideo3.tasks.world.build import world_root

GIB = 1 << 30
_SHOWN = 3


def lines(checks: Sequence[SuiteCheck], options: EvalOptions, rates: Rates | None) -> Iterator[str]:
    """The findings as text, a block for each suite and a verdict at the end."""
    if not options.model:
        yield "no --model is given; frames are counted as large as any model sees them"
    for suite, why in options.left_out.items():
        yield f"{suite_title(suite)} ({suite}): left out; {why}"
    for one in checks:
        yield f"{one.title} ({one.suite}): {_state(one)}"
        yield from (f"  {line}" for line in _block(one, options, rates))
    yield from _together(checks, options, rates)
    if options.agent is not None:
        yield "time is not estimated; an agent decides how much of its budget it spends"
    elif rates is None:
        yield "time is not estimated; give the rates with --profile RUN (`internvideo3 profile`)"
    yield from _places(options)
    ready = sum(one.ready for one in checks)
    yield f"{ready} of {len(checks)} suites are ready."


def _known(one: SuiteCheck) -> Protocol | None:
    return BENCHMARKS.get(one.suite.removesuffix(SUBTITLED))


def _state(one: SuiteCheck) -> str:
    known = _known(one)
    if not one.ready:
        return "NOT READY"
    if one.lost:
        return f"ready; {one.lost:,} questions will fail and count as wrong"
    part = known is not None and (one.holds or 0) < known.data.questions
    return "ready, a part of it" if part else "ready"


def _together(
    checks: Sequence[SuiteCheck], options: EvalOptions, rates: Rates | None
) -> Iterator[str]:
    """What all suites that can be read cost, where that is more than one."""
    read = [one for one in checks if one.problem is None]
    if len(read) < 2:
        return
    timed = rates is not None and options.agent is None
    hours = sum(one.seconds(rates) for one in read) / 3600 if rates is not None else 0.0
    yield (
        f"together: {sum(one.questions for one in read):,} questions, at most "
        f"{sum(one.tokens for one in read):,} visual tokens, about "
        f"{sum(one.text_tokens for one in read):,} of text, and at most "
        f"{sum(one.new_tokens for one in read):,} tokens of answers"
        + (f", about {hours:.2f} h" if timed else "")
    )


def _block(one: SuiteCheck, options: EvalOptions, rates: Rates | None) -> Iterator[str]:
    rates = None if one.agentic else rates
    known = _known(one)
    yield from _unread(one, options, rates) if one.problem else _read(one, options, rates)
    if known is not None:
        if known.verdict:
            yield known.verdict
        yield f"get: {known.data.get}"
        yield f"licence: {known.data.licence}"


def _unread(one: SuiteCheck, options: EvalOptions, rates: Rates | None) -> Iterator[str]:
    """A suite whose questions are not known."""
    known = _known(one)
    yield one.problem or ""
    if known is None:
        return
    yield f"the whole of it: {known.data.questions:,} questions"
    yield f"{_unread_cost(one, options)}, {_new_tokens(one)}"
    if rates is not None and one.tokens:
        yield f"at most {one.seconds(rates) / 3600:,.0f} h at the profile's rates"
    verdict = "; ".join(one.reasons)
    yield (
        f"not comparable with the paper: {verdict}"
        if verdict
        else "comparable with the paper, once all of it is answered"
    )


def _unread_cost(one: SuiteCheck, options: EvalOptions) -> str:
    if options.control == "text":
        return _BLANK
    if not one.tokens:
        return "how many images are shown only the annotations tell"
    return (
        f"at most {one.tokens:,} visual tokens, were each of {one.questions:,} questions about a "
        "longest video of its own"
    )


_BLANK = "no visual tokens, since the text control shows nothing"


def _read(one: SuiteCheck, options: EvalOptions, rates: Rates | None) -> Iterator[str]:
    """A suite whose questions are known."""
    known = _known(one)
    if known is not None and one.holds != known.data.questions:
        stated = "" if known.data.counted == "verified" else ", as commonly stated"
        yield (
            f"the annotations hold {one.holds:,} questions; published are "
            f"{known.data.questions:,}{stated}"
        )
    yield from one.notes
    yield f"{one.questions:,} questions, {one.videos:,} videos, {one.bytes_here / GIB:.2f} GiB"
    yield from _missing(one)
    yield f"{_cost(one, options)}, about {one.text_tokens:,} of text, {_new_tokens(one)}"
    if rates is not None:
        yield (
            f"about {one.seconds(rates) / 3600:.2f} h at the profile's rates "
            f"(measured at {rates.context:,} tokens; {_counted(rates)})"
        )
    verdict = "; ".join(one.reasons)
    yield f"not comparable with the paper: {verdict}" if verdict else "comparable"


def _cost(one: SuiteCheck, options: EvalOptions) -> str:
    if options.control == "text":
        return _BLANK
    guess = ", where no lengths are told as many as a video can have"
    first = " of first looks" if one.agentic else ""
    return f"at most {one.tokens:,} visual tokens{first}{guess if one.guessed_lengths else ''}"


def _new_tokens(one: SuiteCheck) -> str:
    if one.agentic:
        return f"at most {one.new_tokens:,} tokens of all that the agent does after them"
    return f"{one.new_tokens:,} tokens of answers"


def _counted(rates: Rates) -> str:
    """What of the way from file to answer is in the estimate."""
    if rates.encode is None or rates.frames is None:
        return "without the vision tower and decoding: give a profile that was made with --video"
    return "with the vision tower; videos are decoded meanwhile"


def _missing(one: SuiteCheck) -> Iterator[str]:
    if not one.missing:
        return
    yield f"{len(one.missing):,} files are missing or empty, of {one.lost:,} questions:"
    yield from (f"  {path}" for path in one.missing[:_SHOWN])
    if len(one.missing) > _SHOWN:
        yield f"  and {len(one.missing) - _SHOWN:,} more"
    if one.files_here:
        need = one.bytes_here / one.files_here * len(one.missing)
        yield f"they need about {need / GIB:.2f} GiB, if they are as large as those here"


def _places(options: EvalOptions) -> Iterator[str]:
    """Where the suites' files lie and what is free there, and what the archives take."""
    known = [BENCHMARKS.get(suite.removesuffix(SUBTITLED)) for suite in options.suites]
    data = {one.home: one for one in known if one is not None}.values()
    if None in known:
        yield _free(world_root(options.root))
    if not data:
        return
    needs = "".join(
        f"; {one.title}'s videos take {one.data.gigabytes:g} GB"
        for one in data
        if one.data.gigabytes
    )
    yield _free(data_root(options.data)) + needs
    unknown = [one.title for one in data if not one.data.gigabytes]
    if unknown and needs:
        yield f"how much the videos of the others take is not known: {', '.join(unknown)}"


def _free(root: Path) -> str:
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    return f"{root}: {shutil.disk_usage(there).free / GIB:,.0f} GiB free"
