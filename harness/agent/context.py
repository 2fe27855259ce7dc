"""The growing context of Multimodal Contextual Reasoning: typed entries on one token stream.

`Context` is C of equations (1)-(5) of the paper (section 3.1). It only grows. Its entries lie one
behind the other on the ids of one `Session` without gap or overlap, so that a turn prefills its
new tokens and no other, and a trace can say of every token who wrote it.

The chat form is Qwen3's: the model's and the controller's words are assistant turns, calls stand in
`<tool_call>`, and what the world answers stands in `<tool_response>` in a user turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from internvideo3.harness.agent.quoting import Quoter, shorten
from internvideo3.model.session import Limits, Session
from internvideo3.tasks.video import Frames

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
END = "<|im_end|>"
CALL = ("<tool_call>\n", "\n</tool_call>")
RESPONSE = ("<tool_response>\n", "\n</tool_response>")


class Kind(StrEnum):
    """What an entry is."""

    INSTRUCTION = "instruction"
    """The system prompt T_sys or the query Q."""
    OBSERVATION = "observation"
    """Visual evidence V."""
    REASONING = "reasoning"
    """What the model said, R."""
    ACTION = "action"
    """A call, A."""
    FEEDBACK = "feedback"
    """What a tool or the loop answered, F."""
    MEMORY = "memory"
    """What was read from memory."""
    BELIEF = "belief"
    """A summary of hypothesis, uncertainty and candidate times."""


ROLES: Mapping[Kind, str] = {
    Kind.INSTRUCTION: "user",
    Kind.OBSERVATION: "user",
    Kind.REASONING: "assistant",
    Kind.ACTION: "assistant",
    Kind.FEEDBACK: "user",
    Kind.MEMORY: "user",
    Kind.BELIEF: "assistant",
}

Span = tuple[float, float]
"""Start and end in seconds of the video."""


@dataclass(frozen=True)
class Control:
    """Text of our own; special tokens in it count as such."""

    text: str


@dataclass(frozen=True)
class Quoted:
    """Text of anyone; no special token can come of it."""

    text: str
    whole: bool = False
    """Whether all of it is shown, however long: a question, and not what a tool came up with."""


@dataclass(frozen=True)
class Said:
    """The model's own words, by id."""

    ids: tuple[int, ...]


def _told(part: Control | Quoted) -> str:
    """A part as a trace has it."""
    whole = isinstance(part, Quoted) and part.whole
    return shorten(part.text, len(part.text)) if whole else shorten(part.text)


Part = Control | Quoted | Frames | Said
MARKERS = tuple(Control(text) for text in (*CALL, *RESPONSE))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One piece of the context."""

    id: str
    """Names the entry: "e1", "e2", … in order."""
    kind: Kind
    turn: int
    """The turn i in which it was written; 0 before the first."""
    source: str
    """Who wrote it: system, user, model, controller, loop, or a tool's name."""
    text: str
    """What it says, without special tokens of ours."""
    start: int
    """Number of tokens before it."""
    stop: int
    """Number of tokens up to its end."""
    span: Span | None = None
    """The part of the video that it is about."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to its kind, as JSON."""


class Context:
    """An append-only list of entries over one session.

    Args:
        session: an empty session; the context is its only writer.
        opens: makes the session of a stream that is begun anew; None if none ever is, so that
            frames need not be kept.
    """

    def __init__(self, session: Session, opens: Callable[[], Session] | None = None) -> None:
        if len(session):
            raise ValueError(
                f"a context begins on an empty session, and this one holds {len(session)} tokens. "
                "Give a new session."
            )
        self.session = session
        self.turn = 0
        self.generated = 0
        """Tokens that the model wrote."""
        self.quoter = Quoter(session.processor.tokenizer)
        self.offset = 0
        """Tokens of the streams before the present one."""
        self.present: set[str] = set()
        """Entries whose tokens are in the present stream as they were written."""
        self._opens = opens
        self._written: dict[str, tuple[str, tuple[Part, ...]]] = {}
        self._entries: list[Entry] = []
        self._waiting: list[int] = []
        self._role: str | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, in order."""
        return tuple(self._entries)

    def __len__(self) -> int:
        """Number of tokens, those of earlier streams included."""
        return self.offset + self.held

    @property
    def held(self) -> int:
        """Number of tokens of the present stream, which the model sees."""
        return len(self.session) + len(self._waiting)

    @property
    def next_id(self) -> str:
        """The id that the next entry will have."""
        return f"e{len(self._entries) + 1}"

    def find(self, entry_id: str) -> Entry | None:
        """The entry of that id, if there is one."""
        return next((entry for entry in self._entries if entry.id == entry_id), None)

    def add(
        self,
        kind: Kind,
        source: str,
        parts: Sequence[Part],
        *,
        role: str | None = None,
        span: Span | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Appends an entry: C ⊕ (entry), equation (5).

        Args:
            kind: what it is; decides whose turn it stands in.
            source: who wrote it.
            parts: our text, quoted text and frames, in order.
            role: the turn, where the kind's own is wrong: "system" for T_sys.
            span: the part of the video that it is about.
            data: further JSON for the trace.
        """
        start, role = len(self), role or ROLES[kind]
        self._open(role)
        for part in parts:
            self._write(part)
        said = (p for p in parts if isinstance(p, (Control, Quoted)) and p not in MARKERS)
        text = "".join(_told(one) for one in said).strip()
        self._keep(role, parts)
        return self._record(kind, source, text, start, span=span, data=data)

    def tell(self, role: str, parts: Sequence[Part]) -> Entry:
        """Appends a turn of a conversation; two of one role become one, on lines of their own."""
        again = [Control("\n")] if role == self._role else []
        return self.add(Kind.INSTRUCTION, role, [*again, *parts], role=role)

    def respond(
        self,
        kind: Kind,
        source: str,
        parts: Sequence[Part],
        *,
        span: Span | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Appends an entry as a tool's response: `add` with the parts in `<tool_response>`."""
        wrapped = [Control(RESPONSE[0]), *parts, Control(RESPONSE[1])]
        return self.add(kind, source, wrapped, span=span, data=data)

    def mark(self, kind: Kind, source: str, text: str, **data: Any) -> Entry:
        """Appends an entry without tokens of its own: a call that the model wrote itself."""
        return self._record(kind, source, shorten(text), len(self), data=data)

    def speak(self, limits: Limits) -> Entry:
        """The model's own words, R_i ~ f(Q | V_i, A_i, F_i, C_i): equation (1)."""
        start = len(self)
        self._open("assistant")
        self._flush()
        reply = self.session.generate(limits)
        self.generated += reply.new_tokens
        # The end of the turn, if the model wrote it, is written already.
        if reply.token_ids and reply.token_ids[-1] in self._end_ids():
            self._role = ""
        data = {"ids": list(reply.token_ids), "stop": str(reply.stop_reason)}
        self._keep("assistant", [Said(reply.token_ids)])
        return self._record(Kind.REASONING, "model", reply.text, start, data=data)

    def ahead(self) -> Session:
        """A fork in which the model is about to speak; what happens there stays there."""
        fork_ids = self._opening("assistant")
        self._flush()
        fork = self.session.fork()
        if fork_ids:
            fork.append_ids(fork_ids)
        return fork

    def restart(self, kept: Sequence[str], note: str) -> Entry:
        """Begins the token stream anew; entries stay, and so do their ids.

        Args:
            kept: entries of the present stream that are written again, in order.
            note: what is said of the others, after the instructions before the first turn.
        """
        assert self._opens is not None, "a context that may restart is given `opens`"
        start, before, dropped = len(self), self.session, self.present - {*kept}
        self.session, self.offset = self._opens(), start
        self.session.features = before.features
        self.session.encode_s, self.session.prefill_s = before.encode_s, before.prefill_s
        self.session.decode_s = before.decode_s
        self._waiting, self._role, self.present = [], None, set()
        rest = [one for one in kept if not self._is_first(one)]
        for one in (one for one in kept if self._is_first(one)):
            self._write_again(one)
        self._open("user")
        for part in (Control("\n"), Quoted(note), Control("\n")):
            self._write(part)
        for one in rest:
            self._write_again(one)
        data = {"kept": list(kept), "dropped": sorted(dropped, key=lambda e: int(e[1:]))}
        entry = self._record(Kind.MEMORY, "compression", note, start, data=data | {"ok": False})
        self.present = {*kept}
        return entry

    def _is_first(self, entry_id: str) -> bool:
        entry = self.find(entry_id)
        return entry is not None and entry.kind is Kind.INSTRUCTION and not entry.turn

    def _write_again(self, entry_id: str) -> None:
        role, parts = self._written[entry_id]
        self._open(role)
        for part in parts:
            self._write(part)

    def _keep(self, role: str, parts: Sequence[Part]) -> None:
        """Keeps what was written under the next entry's id, if it may be written again."""
        if self._opens is not None:
            self._written[self.next_id] = (role, tuple(parts))

    def _end_ids(self) -> list[int]:
        return self.quoter.control(END)

    def _opening(self, role: str) -> list[int]:
        """Ids that close the open turn and open another, none if it is open already."""
        if role == self._role:
            return []
        closing = {None: "", "": "\n"}.get(self._role, f"{END}\n")
        return self.quoter.control(f"{closing}<|im_start|>{role}\n")

    def _open(self, role: str) -> None:
        self._waiting += self._opening(role)
        self._role = role

    def _write(self, part: Part) -> None:
        if isinstance(part, Control):
            self._waiting += self.quoter.control(part.text)
        elif isinstance(part, Quoted):
            self._waiting += self.quoter.quote(part.text, whole=part.whole)
        elif isinstance(part, Said):
            self._waiting += part.ids
            self._role = "" if part.ids and part.ids[-1] in self._end_ids() else self._role
        else:
            self._flush()
            self.session.append_text(VIDEO, [part])

    def _flush(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self.session.append_ids(waiting)

    def _record(
        self,
        kind: Kind,
        source: str,
        text: str,
        start: int,
        *,
        span: Span | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Entry:
        entry = Entry(
            id=self.next_id,
            kind=kind,
            turn=self.turn,
            source=source,
            text=text,
            start=start,
            stop=len(self),
            span=span,
            data=dict(data or {}),
        )
        self._entries.append(entry)
        if self._opens is not None and entry.stop > entry.start:
            self.present.add(entry.id)
        return entry
