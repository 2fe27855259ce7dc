"""What the policy may do, and how a call is read from the model's ids.

A call is Qwen3's: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. It counts only where the
markers are control tokens that the model itself wrote; quoted text holds none (`quoting.py`). A
call that cannot be read is not an exception but a `Malformed`, whose message says how to repair it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=2_000)]


class Action(BaseModel):
    """What every action is: fields as named, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str


class _Part(Action):
    start_s: Seconds = 0.0
    end_s: Seconds | None = None

    @model_validator(mode="after")
    def _in_order(self) -> _Part:
        if self.end_s is not None and self.end_s <= self.start_s:
            raise ValueError(f"end_s {self.end_s} must be greater than start_s {self.start_s}")
        return self


Also = Annotated[tuple[tuple[Seconds, Seconds], ...], Field(max_length=7)]


class Zoom(_Part):
    """Look again at a part of the video, or several, with more frames a second."""

    name: Literal["zoom"] = "zoom"
    fps: Annotated[float, Field(gt=0, le=30)] = 4.0
    also: Also = ()

    @model_validator(mode="after")
    def _all_in_order(self) -> Zoom:
        for start_s, end_s in self.also:
            if end_s <= start_s:
                raise ValueError(f"in also, {end_s} must be greater than {start_s}")
        return self


class Pick(Action):
    """Look closer around given moments; without any, where something new is shown."""

    name: Literal["pick_clips"] = "pick_clips"
    around_s: Annotated[tuple[Seconds, ...], Field(max_length=8)] = ()
    most: Annotated[int, Field(ge=1, le=8)] = 4


class Segment(_Part):
    """Find where scenes change, hard cuts and dissolves."""

    name: Literal["video_segmentation"] = "video_segmentation"


class Listen(_Part):
    """Read what is said, from subtitles if there are any, else from the sound."""

    name: Literal["asr"] = "asr"


class ReadText(_Part):
    """Read text in the picture, at some moments of a part of the video."""

    name: Literal["ocr"] = "ocr"
    frames: Annotated[int, Field(ge=1, le=16)] = 4


class Ground(_Part):
    """Find where something is seen, by asking about ever shorter parts of the video."""

    name: Literal["temporal_grounding"] = "temporal_grounding"
    query: Annotated[str, Field(min_length=1, max_length=500)]


class Search(Action):
    """Search the web for what the video cannot tell."""

    name: Literal["web_search"] = "web_search"
    query: Annotated[str, Field(min_length=1, max_length=500)]
    limit: Annotated[int, Field(ge=1, le=10)] = 5


class Recall(_Part):
    """Read from memory: what is nearest in meaning to the query, within a part of the video."""

    name: Literal["memory_read"] = "memory_read"
    query: Annotated[str, Field(max_length=2_000)] = ""
    limit: Annotated[int, Field(ge=1, le=20)] = 5


class Note(_Part):
    """Write a finding to memory."""

    name: Literal["memory_write"] = "memory_write"
    text: Text


class Claim(BaseModel):
    """A statement, the part of the video that it is about, and the entries that show it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: Text
    evidence: Annotated[tuple[str, ...], Field(max_length=20)]
    start_s: Seconds | None = None
    end_s: Seconds | None = None


class Verify(Action):
    """Check whether claims rest on evidence that is there."""

    name: Literal["verify"] = "verify"
    claims: Annotated[tuple[Claim, ...], Field(min_length=1, max_length=10)]


class Answer(Action):
    """Give the final answer, naming the entries that support it."""

    name: Literal["answer"] = "answer"
    text: Text
    evidence: Annotated[tuple[str, ...], Field(max_length=20)] = ()


ACTIONS: Mapping[str, type[Action]] = {
    kind.model_fields["name"].default: kind
    for kind in (
        Zoom,
        Pick,
        Segment,
        Listen,
        ReadText,
        Ground,
        Search,
        Recall,
        Note,
        Verify,
        Answer,
    )
}


@dataclass(frozen=True)
class Malformed:
    """A call that cannot be carried out."""

    text: str
    """What was written."""
    problem: str
    """What is wrong with it and how to repair it, for the model to read."""


def signatures(names: Sequence[str] = tuple(ACTIONS)) -> str:
    """The tools of a system prompt, one JSON line each, as Qwen3 wants them."""
    return "\n".join(json.dumps({"type": "function", "function": _signature(n)}) for n in names)


def _signature(name: str) -> dict[str, Any]:
    schema = ACTIONS[name].model_json_schema()
    del schema["properties"]["name"]
    about = schema.pop("description", "")
    return {"name": name, "description": about, "parameters": schema}


def parse_call(text: str) -> Action | Malformed:
    """Reads the inside of one `<tool_call>`.

    Args:
        text: JSON with `name` and `arguments`.
    """
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Malformed(text, f"the call is not JSON ({error}). {_FORM}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Malformed(text, f"the call has no name. {_FORM}")
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict) or set(call) - {"name", "arguments"}:
        return Malformed(text, f"a call is an object of name and arguments only. {_FORM}")
    return _build(text, call["name"], arguments)


def _build(text: str, name: str, arguments: dict[str, Any]) -> Action | Malformed:
    if name not in ACTIONS:
        near = get_close_matches(name, ACTIONS, 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        return Malformed(text, f"there is no tool {name!r}. {hint}Tools: {', '.join(ACTIONS)}.")
    if "name" in arguments:
        return Malformed(text, f"{name} takes no argument 'name'. {_usage(name)}")
    try:
        return ACTIONS[name].model_validate(arguments)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'arguments'}: {one['msg']}"
            for one in error.errors(include_url=False, include_input=False)[:5]
        )
        return Malformed(text, f"{name} cannot take these arguments ({problems}). {_usage(name)}")


def _usage(name: str) -> str:
    return f"Its parameters: {json.dumps(_signature(name)['parameters'])}"


_FORM = 'Write {"name": "zoom", "arguments": {"start_s": 3, "end_s": 5}} between the markers.'


def read_call(ids: Sequence[int], tokenizer: Any) -> Action | Malformed | None:
    """The first call among ids that the model wrote, or None if there is none.

    Args:
        ids: a reply's ids.
        tokenizer: the model's.
    """
    begin, end = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<tool_call>", "</tool_call>"))
    ids = list(ids)
    if begin not in ids:
        return None
    inside = ids[ids.index(begin) + 1 :]
    if end not in inside:
        text = tokenizer.decode(inside, skip_special_tokens=True)
        return Malformed(text, f"the call has no closing </tool_call>. {_FORM}")
    return parse_call(tokenizer.decode(inside[: inside.index(end)]))
