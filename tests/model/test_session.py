"""A session's ids and logits are those of one pass over the whole chat, for GQA and M²LA.

Run: .venv/bin/python -m pytest tests/model/test_session.py -q
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internvideo3.model import decoding
from internvideo3.model.cache import allocated_bytes
from internvideo3.model.engine import Engine
from internvideo3.model.prompt import Prompter, PromptError
from internvideo3.model.session import Limits, Session, StopReason
from internvideo3.model.vision import Encoded, FeatureCache

TOLERANCE = 1e-9
QUESTIONS = ("Why?", "Who moves left, then right of the red circle?", "How many squares are there?")
TWO = ((14, 5), (6, 6))
"""Frame counts and seeds of two videos."""


def gap(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


def split_chat(processor: Any, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """A chat's text up to its last video, and the rest."""
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    cut = text.rfind("<|vision_end|>") + len("<|vision_end|>")
    return text[:cut], text[cut:]


class Asker:
    """Sessions on two videos."""

    def __init__(self, processor: Any, chat: Any, frames: Any) -> None:
        self.processor, self.chat = processor, chat
        self.videos = tuple(frames(*which) for which in TWO)

    def prefix(self, model: Any, **options: Any) -> Session:
        session = Session(model, self.processor, **options)
        session.append_text(split_chat(self.processor, self.chat("", 2))[0], self.videos)
        return session

    def ask(self, prefix: Session, question: str) -> Session:
        fork = prefix.fork()
        fork.append_text(split_chat(self.processor, self.chat(question, 2))[1])
        return fork


@pytest.fixture
def asker(processor: Any, chat: Any, frames: Any) -> Asker:
    return Asker(processor, chat, frames)


@pytest.fixture
def whole(asker: Asker, inputs: Any) -> Callable[[str], dict[str, Any]]:
    return lambda question: inputs(question, asker.videos)


def steps_of(model: Any, run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What `run` returns, and the logits [Y] that tokens of a first row were chosen from."""
    caught: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _m, _i, out: caught.append(out[0, -1]))
    try:
        return run(), caught
    finally:
        hook.remove()


@pytest.mark.parametrize("chunk", [7, 4096])
def test_append_equals_one_pass(
    model: Any, asker: Asker, whole: Any, processor: Any, chunk: int
) -> None:
    """A chunk of 7 tokens ends inside a video, and inside a frame."""
    want = whole(QUESTIONS[1])
    session = Session(model, processor, chunk=chunk)
    count = session.append(asker.chat(QUESTIONS[1], 2), asker.videos)
    assert session.ids == want["input_ids"][0].tolist()
    assert count == len(session) == want["input_ids"].shape[1]
    assert gap(session.logits_last, model(**want).logits[0, -1]) <= TOLERANCE


def test_a_prefix_and_questions_have_the_ids_of_whole_chats(
    model: Any, asker: Asker, whole: Any
) -> None:
    prefix = asker.prefix(model)
    for question in QUESTIONS:
        want = whole(question)
        fork = asker.ask(prefix, question)
        assert fork.ids == want["input_ids"][0].tolist()
        assert gap(fork.logits_last, model(**want).logits[0, -1]) <= TOLERANCE


def test_text_in_any_pieces_has_the_ids_of_the_whole(source: Any, processor: Any) -> None:
    text = "<|im_start|>user\nWhich red circles moved before 12 seconds?<|im_end|>\n"
    want = processor.tokenizer(text)["input_ids"]
    for cut in range(1, len(text), 3):
        if "<|" in text[:cut].rpartition("|>")[2]:
            continue  # a special token cut in two is another text
        session = Session(source, processor)
        session.append_text(text[:cut])
        session.append_text(text[cut:])
        assert session.ids == want


def test_images_among_videos(
    model: Any, processor: Any, frames: Any, inputs: Any, chat: Any
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    video = frames(6, 5)
    want = inputs("Is it there?", (video,), (image,))
    messages = chat("Is it there?", 1, 1)
    messages[1]["content"][1]["image"] = image
    session = Session(model, processor, chunk=11)
    session.append(messages, [video])
    assert session.ids == want["input_ids"][0].tolist()
    assert gap(session.logits_last, model(**want).logits[0, -1]) <= TOLERANCE


def test_another_video_between_fork_and_question(
    model: Any, asker: Asker, whole: Any, inputs: Any, frames: Any
) -> None:
    """The model's own `rope_deltas` then belong to the other video."""
    fork = asker.prefix(model).fork()
    other = inputs("Something else?", (frames(30, 9),))
    model(**other)
    model.generate(**other, max_new_tokens=2, do_sample=False)
    deltas = model.model.rope_deltas.clone()
    fork.append_text(split_chat(asker.processor, asker.chat(QUESTIONS[0], 2))[1])
    got = fork.logits_last
    assert torch.equal(model.model.rope_deltas, deltas)
    assert gap(got, model(**whole(QUESTIONS[0])).logits[0, -1]) <= TOLERANCE


def test_a_conversation_in_pieces_equals_one_pass(
    model: Any, processor: Any, frames: Any, chat: Any
) -> None:
    """System turn, video, reply, second video: each appended alone, the second in the open."""
    first, second = frames(8, 3), frames(5, 4)
    session = Session(model, processor, chunk=13)
    turns = chat("What is first?", 1)
    session.append(turns[:1])
    session.append(turns[1:], [first])
    reply = session.generate(Limits(max_new_tokens=4, stop_ids=()))
    later = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "And now?"}]}
    session.append([later], [second])

    opened = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    closed = processor.apply_chat_template([later], tokenize=False, add_generation_prompt=True)
    before = as_inputs(processor, opened, [first])
    after = as_inputs(processor, "<|im_end|>\n" + closed, [second])
    said = torch.tensor([reply.token_ids])
    ids = torch.cat([before["input_ids"], said, after["input_ids"]], dim=1)
    assert session.ids == ids[0].tolist()
    types = torch.zeros_like(ids).masked_fill(ids == model.config.video_token_id, 2)
    want = model(
        input_ids=ids,
        mm_token_type_ids=types,
        pixel_values_videos=torch.cat([x["pixel_values_videos"] for x in (before, after)]),
        video_grid_thw=torch.cat([x["video_grid_thw"] for x in (before, after)]),
    ).logits
    assert gap(session.logits_last, want[0, -1]) <= TOLERANCE


def as_inputs(processor: Any, text: str, videos: list[Any]) -> dict[str, Any]:
    piece = Prompter(processor).piece(text, videos)
    return {
        "input_ids": torch.tensor([piece.ids]),
        "pixel_values_videos": torch.cat([m.pixels for m in piece.media]),
        "video_grid_thw": torch.stack([m.grid_thw for m in piece.media]),
    }


class CopyCounter(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes or changes."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.copied += sum(t.nbytes for t in (out,) if isinstance(t, Tensor))
        return out


def test_fork_copies_nothing(model: Any, asker: Asker) -> None:
    prefix = asker.prefix(model)
    prefix.prefill()
    with CopyCounter() as counter:
        forks = [prefix.fork() for _ in range(20)]
    assert counter.copied == 0
    together = allocated_bytes([prefix.cache, *(fork.cache for fork in forks)])
    assert together == prefix.bytes()
    with CopyCounter() as counter:
        prefix.cache.segmented(0).joined()[0].clone()
    assert counter.copied > 0


def test_fork_leaves_the_parent_untouched(model: Any, asker: Asker, whole: Any) -> None:
    prefix = asker.prefix(model)
    before = prefix.logits_last.clone()
    rows = [t.clone() for t in prefix.cache.segmented(0).joined()]
    one, other = asker.ask(prefix, QUESTIONS[0]), asker.ask(prefix, QUESTIONS[1])
    one.generate(Limits(max_new_tokens=70, stop_ids=()))
    prefix_ids = prefix.ids
    parent_question = asker.ask(prefix, QUESTIONS[2])
    prefix.append_text("Parent goes on. ")
    prefix.prefill()
    assert torch.equal(prefix.fork().logits_last, prefix.logits_last)
    for fork, question in ((other, QUESTIONS[1]), (parent_question, QUESTIONS[2])):
        assert gap(fork.logits_last, model(**whole(question)).logits[0, -1]) <= TOLERANCE
    after = [
        t[:, :, : r.shape[2]] for t, r in zip(prefix.cache.segmented(0).joined(), rows, strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(after, rows, strict=True))
    assert prefix.ids[: len(prefix_ids)] == prefix_ids
    assert not torch.equal(prefix.logits_last, before)


@pytest.fixture
def chosen_from(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """For every reply from here on, in order, the logits that its tokens were chosen from."""
    seen: list[list[Tensor]] = []

    class Recorder(decoding.Engine):
        def __init__(self, model: Any, replies: Any, logits_BY: Tensor) -> None:
            self.mine: list[list[Tensor]] = [[] for _ in replies]
            seen.extend(self.mine)
            super().__init__(model, replies, logits_BY)

        def choose(self, logits_BY: Tensor) -> None:
            for row, goes_on in enumerate(self.goes_on_B.tolist()):
                if goes_on:
                    self.mine[row].append(logits_BY[row])
            super().choose(logits_BY)

    monkeypatch.setattr(decoding, "Engine", Recorder)
    return seen


def test_generate_equals_transformers(
    model: Any, asker: Asker, whole: Any, chosen_from: list[list[Tensor]]
) -> None:
    case = whole(QUESTIONS[1])
    fork = asker.ask(asker.prefix(model), QUESTIONS[1])
    reply = fork.generate(Limits(max_new_tokens=5, stop_ids=()))
    (got,) = chosen_from
    ids, want = steps_of(
        model,
        lambda: model.generate(**case, max_new_tokens=5, do_sample=False, eos_token_id=-1),
    )
    assert ids[0].tolist() == fork.ids
    assert reply.prompt_tokens + reply.new_tokens == len(fork) == ids.shape[1]
    assert reply.stop_reason is StopReason.LENGTH
    assert max(gap(a, b) for a, b in zip(got, want, strict=True)) <= TOLERANCE


def test_transformers_generate_on_a_fork(model: Any, asker: Asker, whole: Any) -> None:
    """Given the whole ids and the right `rope_deltas`, `generate` goes on from a fork's cache."""
    case = whole(QUESTIONS[1])
    prefix = asker.prefix(model)
    position = prefix._position
    wanted, want = steps_of(
        model,
        lambda: model.generate(**case, max_new_tokens=4, do_sample=False, eos_token_id=-1),
    )
    model.model.rope_deltas = torch.tensor([[position - len(prefix)]])
    ids, got = steps_of(
        model,
        lambda: model.generate(
            input_ids=case["input_ids"],
            attention_mask=case["attention_mask"],
            past_key_values=prefix.fork().cache,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=-1,
        ),
    )
    assert torch.equal(ids, wanted)
    assert max(gap(a, b) for a, b in zip(got, want, strict=True)) <= TOLERANCE


def batch_of(asker: Asker, model: Any, private: str) -> list[Session]:
    """Three sessions that have asked; "private" says what they do not share."""
    prefix = asker.prefix(model, chunk=9)
    made = [prefix.fork() for _ in QUESTIONS]
    if private == "videos":
        made[1] = asker.prefix(model, chunk=9)
    tail = split_chat(asker.processor, asker.chat("{}", 2))[1]
    for session, question in zip(made, QUESTIONS, strict=True):
        session.append_text(tail.replace("{}", question))
    if private == "cached questions":
        made[0].prefill()
        made[2].prefill()
    return made


@pytest.mark.parametrize("private", ["nothing cached", "cached questions", "videos"])
def test_a_batch_equals_one_by_one(
    model: Any, asker: Asker, private: str, chosen_from: list[list[Tensor]]
) -> None:
    """Prompts and replies of different lengths, on shared, partly shared and separate pasts."""
    limits = [Limits(max_new_tokens=n, stop_ids=()) for n in (3, 6, 1)]
    alone = batch_of(asker, model, private)
    single = [s.generate(limit) for s, limit in zip(alone, limits, strict=True)]
    batch = batch_of(asker, model, private)
    assert Session.generate_batch(batch, limits) == single
    for row in range(3):
        got, want = torch.stack(chosen_from[3 + row]), torch.stack(chosen_from[row])
        assert gap(got, want) <= TOLERANCE
        assert batch[row].ids == alone[row].ids
        # And both go on alike.
        for session in (alone[row], batch[row]):
            session.append([{"role": "user", "content": "Go on?"}])
        assert gap(batch[row].logits_last, alone[row].logits_last) <= TOLERANCE


def test_a_batch_stores_the_prefix_once(model: Any, asker: Asker) -> None:
    prefix = asker.prefix(model)
    prefix.prefill()
    forks = [asker.ask(prefix, QUESTIONS[0]) for _ in range(8)]
    Session.generate_batch(forks, Limits(max_new_tokens=2, stop_ids=()))
    shared = prefix.cache.segmented(0).segments()[0].tensors[0]
    for fork in forks:
        assert fork.cache.segmented(0).segments()[0].tensors[0] is shared


def test_time_is_accounted_for(source: Any, asker: Asker) -> None:
    started = time.perf_counter()
    prefix = asker.prefix(source)
    assert prefix.encode_s > 0 and prefix.prefill_s > 0 and prefix.decode_s == 0
    forks = [asker.ask(prefix, question) for question in QUESTIONS]
    assert all(fork.encode_s == fork.prefill_s == fork.decode_s == 0 for fork in forks)
    Session.generate_batch(forks, Limits(max_new_tokens=3, stop_ids=()))
    spent = sum(s.encode_s + s.prefill_s + s.decode_s for s in (prefix, *forks))
    assert all(fork.prefill_s > 0 and fork.decode_s > 0 for fork in forks)
    assert spent <= time.perf_counter() - started


@contextmanager
def failing(model: Any, call: int) -> Iterator[None]:
    """The last layer runs out of memory when it is called so often."""
    calls = itertools.count(1)

    def fail(*_: Any) -> None:
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.model.language_model.layers[-1].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("start", [0, 40])
def test_a_failed_append_can_be_repeated(
    model: Any, processor: Any, asker: Asker, start: int
) -> None:
    """Layers before the one that failed have cached the tokens; a repeat must not see them."""
    session = Session(model, processor, chunk=32)
    ids = [300 + token for token in range(start)]
    if ids:
        session.append_ids(ids)
    child = session.fork() if ids else None
    more = list(range(400, 500))
    with failing(model, call=2), pytest.raises(torch.OutOfMemoryError):
        session.append_ids(more)
    assert session.ids == ids and session.cache.get_seq_length() == len(ids)
    with failing(model, call=1), pytest.raises(torch.OutOfMemoryError):
        session.append_text(split_chat(processor, asker.chat("", 2))[0], asker.videos)
    assert session.ids == ids
    session.append_ids(more)
    fresh = Session(model, processor, chunk=32)
    fresh.append_ids(ids + more)
    assert gap(session.logits_last, fresh.logits_last) < 1e-5
    if child is not None:
        child.append_ids(more)
        assert gap(child.logits_last, fresh.logits_last) < 1e-5


def test_a_failed_reply_can_be_repeated(
    model: Any, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = asker.prefix(model)
    limits = Limits(max_new_tokens=6, stop_ids=())
    want = asker.ask(prefix, QUESTIONS[0]).generate(limits)
    fork = asker.ask(prefix, QUESTIONS[0])
    before = fork.ids
    advance, calls = Engine.advance, itertools.count()

    def interrupted(engine: Engine) -> None:
        advance(engine)
        if next(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Engine, "advance", interrupted)
        fork.generate(limits)
    assert fork.ids == before
    assert fork.generate(limits).token_ids == want.token_ids


def test_stop_tokens_end_a_reply(source: Any, asker: Asker) -> None:
    prefix = asker.prefix(source)
    free = asker.ask(prefix, QUESTIONS[0]).generate(Limits(max_new_tokens=6, stop_ids=()))
    stop = free.token_ids[2]
    first = free.token_ids.index(stop)
    fork = asker.ask(prefix, QUESTIONS[0])
    reply = fork.generate(Limits(max_new_tokens=6, stop_ids=[stop]))
    assert reply.token_ids == free.token_ids[: first + 1]
    assert reply.stop_reason is StopReason.STOP
    assert fork.ids[-1] == stop


def test_the_turn_is_closed_once(source: Any, processor: Any, chat: Any) -> None:
    """A reply that ended by its end-of-turn token gets a line break, another one both."""
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for said in (None, end):
        session = Session(source, processor)
        session.append(chat("Hello?"))
        reply = session.generate(Limits(max_new_tokens=1, stop_ids=()))
        if said is not None:
            session._pending, session._said = [said], said
        session.append([{"role": "user", "content": "More?"}])
        text = processor.tokenizer.decode(session.ids)
        assert text.count("<|im_end|>\n") == text.count("<|im_end|>") == 4
        assert reply.new_tokens == 1


def test_sampling_follows_the_seed(source: Any, asker: Asker) -> None:
    prefix = asker.prefix(source)

    def draw(seed: int) -> tuple[int, ...]:
        limits = Limits(max_new_tokens=8, stop_ids=(), temperature=2.0, seed=seed)
        return asker.ask(prefix, QUESTIONS[0]).generate(limits).token_ids

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    limits = [Limits(max_new_tokens=8, stop_ids=(), temperature=2.0, seed=s) for s in (1, 2)]
    forks = [asker.ask(prefix, QUESTIONS[0]) for _ in limits]
    replies = Session.generate_batch(forks, limits)
    assert [reply.token_ids for reply in replies] == [draw(1), draw(2)]


def test_drawn_replies_tell_their_odds_and_never_say_what_is_barred(
    source: Any, asker: Asker
) -> None:
    """Log-probabilities are those of the ids appended by hand, each at its row's temperature."""
    prefix = asker.prefix(source)
    free = Limits(max_new_tokens=6, stop_ids=(), temperature=3.0, seed=5)
    said = set(asker.ask(prefix, QUESTIONS[0]).generate(free).token_ids)
    barred = tuple(sorted(said))
    limits = [
        Limits(max_new_tokens=6, stop_ids=(), temperature=3.0, seed=5, barred_ids=barred),
        Limits(max_new_tokens=4, stop_ids=(), temperature=1.0, seed=6),
        Limits(max_new_tokens=6, stop_ids=(), barred_ids=barred),
    ]
    forks = [asker.ask(prefix, QUESTIONS[0]) for _ in limits]
    replies = Session.generate_batch(forks, limits)
    assert not said & {*replies[0].token_ids, *replies[2].token_ids}
    assert replies[2].logps is None
    for reply, limit in zip(replies, limits, strict=True):
        again = asker.ask(prefix, QUESTIONS[0])
        expected, likeliest = [], []
        for one in reply.token_ids:
            scores = again.logits_last.float() / (limit.temperature or 1.0)
            scores[list(limit.barred_ids)] = -torch.inf
            expected.append(float(scores.log_softmax(-1)[one]))
            likeliest.append(int(scores.argmax()))
            again.append_ids([one])
        if reply.logps is None:
            assert list(reply.token_ids) == likeliest
        else:
            assert reply.logps == pytest.approx(expected, abs=1e-4)


def test_half_the_cache_takes_half_the_bytes(source: Any, half: Any, asker: Asker) -> None:
    for ask_too in (False, True):
        sizes = []
        for model in (source, half):
            session = asker.prefix(model)
            if ask_too:
                session = asker.ask(session, QUESTIONS[1])
                session.generate(Limits(max_new_tokens=80, stop_ids=()))
            sizes.append(session.bytes())
            stored = sum(s.nbytes() for s in session.cache.segmented(0).storages())
            assert session.bytes() == stored * len(session.cache.layers)
        assert sizes[1] <= 0.5 * sizes[0]


def test_no_frames_are_encoded_twice(source: Any, asker: Asker) -> None:
    features = FeatureCache()
    sessions = [asker.prefix(source, features=features) for _ in range(3)]
    assert (features.misses, features.hits, len(features)) == (2, 4, 2)
    assert gap(sessions[0].logits_last, sessions[2].logits_last) == 0.0
    assert sessions[0].encode_s > 0
    small = FeatureCache(max_bytes=1)
    asker.prefix(source, features=small)
    assert len(small) <= 1


def test_a_medium_larger_than_the_store_pushes_nothing_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "internvideo3.model.vision.encode",
        lambda model, kind, pixels, grid: Encoded(torch.zeros(len(pixels), 1), ()),
    )
    features, grid = FeatureCache(max_bytes=1_000), torch.tensor([1, 1, 1])
    for key, tokens in [("zoom", 100), ("film", 300), ("film", 300), ("zoom", 100)]:
        kept = features.encode(None, "video", torch.zeros(tokens, 1), grid, key)
        assert len(kept.tokens_VX) == tokens
    assert (features.hits, features.misses, len(features)) == (1, 3, 1)


def test_long_videos_are_encoded_in_runs(
    source: Any, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = asker.prefix(source).logits_last
    monkeypatch.setattr("internvideo3.model.vision.PATCHES_PER_CALL", 40)
    assert gap(asker.prefix(source).logits_last, want) <= TOLERANCE


def test_long_inputs_are_attended_in_runs(
    model: Any, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = asker.ask(asker.prefix(model), QUESTIONS[1]).logits_last
    monkeypatch.setattr("internvideo3.model.segments.MAX_SCORES", 8 * 128 * 5)
    assert gap(asker.ask(asker.prefix(model), QUESTIONS[1]).logits_last, want) <= TOLERANCE


def test_a_context_beyond_what_the_model_was_made_for_is_told_once(
    source: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source.config.text_config, "max_position_embeddings", 40)
    session = Session(source, processor)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        session.append_ids(range(100, 140))
        assert not told
        session.append_ids([100])
        session.append_ids([101])
    assert [str(one.message)[:31] for one in told] == ["the context reaches position 41"]
    assert len(session) == 42


def test_a_prompt_or_reply_that_goes_beyond_is_told_of_where_it_was_asked_for(
    source: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source.config.text_config, "max_position_embeddings", 40)
    deferred, replying = Session(source, processor), Session(source, processor)
    deferred.append_text("one word after another " * 20)
    replying.append_ids(range(100, 135))
    limits = Limits(max_new_tokens=12, stop_ids=())
    for session in (deferred, replying):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            session.fork().generate(limits)
            (one,) = told
        assert "the context reaches position" in str(one.message)
        assert one.filename == __file__


def test_mistakes_are_explained(source: Any, processor: Any, asker: Asker, chat: Any) -> None:
    session = Session(source, processor)
    with pytest.raises(PromptError, match="empty session"):
        session.generate(Limits(max_new_tokens=1))
    with pytest.raises(PromptError, match="1 video placeholders .* for 0 videos"):
        session.append(chat("What?", 1))
    with pytest.raises(PromptError, match="vision tokens"):
        session.append_ids([source.config.video_token_id])
    with pytest.raises(PromptError, match="different sessions"):
        session.append_text("Hello")
        Session.generate_batch([session, session], Limits(max_new_tokens=1))
    for wrong, said in (
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 1e-39}, "at least 1e-06"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": 10**20}, "64 bits"),
        ({"barred_ids": (3, -1)}, "begin at 0"),
    ):
        with pytest.raises(ValueError, match=said):
            Limits(**({"max_new_tokens": 1} | wrong))
    size = source.config.text_config.vocab_size
    for ids, said in (((size,), "vocabulary ends"), (tuple(range(size)), "every token")):
        with pytest.raises(ValueError, match=said):
            session.generate(Limits(max_new_tokens=1, barred_ids=ids))
    with pytest.raises(ValueError, match="chunk is -1"):
        Session(source, processor, chunk=-1)
    fork = session.fork()
    with pytest.raises(PromptError, match="special token"):
        for letters in ("lo", "ow", "s", "ing"):
            fork.append_text(letters)
            fork.prefill()
