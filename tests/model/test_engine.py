"""The engine on the shipped scale models: its greedy tokens are those of transformers' `generate`.

Run: .venv/bin/python -m pytest tests/model/test_engine.py -q
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internvideo3.model import cache, decoding, segments
from internvideo3.model.cache import Segment, allocated_bytes
from internvideo3.model.checkpoint import load_model, resolve_checkpoint
from internvideo3.model.config import InternVideo3Config
from internvideo3.model.engine import Engine, Reply
from internvideo3.model.engine_layers import MergedLinear, check_plain
from internvideo3.model.modeling import InternVideo3ForConditionalGeneration
from internvideo3.model.session import Limits, Session

PLACE = {
    "latent_proj": "self_attn.latent_proj", "q_proj": "self_attn.q_proj",
    "down_proj": "mlp.down_proj",
}  # fmt: skip
NEW = 48
BARRED = (2, 349, 353, 356, 376, 387, 390, 461)
"""What trained models repeat once they have answered, the end of the turn above all: without it
they say many different tokens, and a decode step that is wrong says others."""
VIDEO_TEXT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
QUESTION = "What shape is the red object?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", params=["scale:base", "scale:m2la"], ids=["gqa", "m2la"])
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return load_model(request.param, "cpu", "float32")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past tokens are rebuilt 16 at a time, so that the prefill merges many blocks."""
    monkeypatch.setattr(segments, "BLOCK", 16)


def transformers_says(
    model: Any, processor: Any, video: Any, new: int = NEW, question: str = QUESTION
) -> list[int]:
    session = Session(model, processor)
    piece = session._prompter.piece(VIDEO_TEXT + question, [video])
    (medium,) = piece.media
    ids = torch.tensor([piece.ids])
    video_token = model.config.video_token_id
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=2 * (ids == video_token).int(),
        pixel_values_videos=medium.pixels,
        video_grid_thw=medium.grid_thw[None],
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=-1,
        suppress_tokens=list(BARRED),
    )
    return list(out[0, len(piece.ids) :].tolist())


def free(new: int = NEW, **limits: Any) -> Limits:
    return Limits(max_new_tokens=new, stop_ids=(), barred_ids=BARRED, **limits)


def engine_says(
    model: Any, processor: Any, video: Any, chunk: int, new: int = NEW, **limits: Any
) -> list[int]:
    session = Session(model, processor, chunk=chunk)
    session.append_text(VIDEO_TEXT + QUESTION, [video])
    return list(session.generate(free(new, **limits)).token_ids)


@pytest.mark.parametrize("chunk", [23, 4096], ids=["chunked", "unchunked"])
def test_greedy_tokens_are_those_of_generate(
    loaded: tuple[Any, Any], frames: Any, chunk: int, small_blocks: None
) -> None:
    replies = set()
    for seed in (1, 2, 3):
        video = frames(20, seed)
        want = transformers_says(*loaded, video)
        assert engine_says(*loaded, video, chunk) == want
        assert len(set(want)) >= 10
        replies.add(tuple(want))
    assert len(replies) == 3


def test_a_batch_says_what_generate_says_of_each(loaded: tuple[Any, Any], frames: Any) -> None:
    """Forks of one prefix with questions of different lengths, and a prompt of its own."""
    model, processor = loaded
    prefix = Session(model, processor)
    prefix.append_text(VIDEO_TEXT, [frames(20, 1)])
    questions = (QUESTION, "Is anything red?<|im_end|>\n<|im_start|>assistant\n")
    forks = [prefix.fork() for _ in questions]
    for fork, question in zip(forks, questions, strict=True):
        fork.append_text(question)
    alone = Session(model, processor)
    alone.append_text(VIDEO_TEXT + QUESTION, [frames(6, 2)])
    replies = Session.generate_batch([*forks, alone], free())
    wants = [
        transformers_says(model, processor, frames(20, 1)),
        transformers_says(model, processor, frames(20, 1), question=questions[1]),
        transformers_says(model, processor, frames(6, 2)),
    ]
    assert [list(reply.token_ids) for reply in replies] == wants


@pytest.mark.parametrize("form", ["absorbed", "reconstruct"])
def test_a_prompt_in_either_form_gives_the_same_tokens(
    frames: Any, form: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_model("scale:m2la", "cpu", "float32")
    monkeypatch.setattr(model.config.text_config, "attention_form", form)
    video = frames(20, 1)
    assert engine_says(model, processor, video, 23) == transformers_says(model, processor, video)


def test_a_compressed_session_reads_fp8_and_goes_on(frames: Any) -> None:
    """Half the bytes; decoding it is decoding its rows widened, and close to the full ones."""
    model, processor = load_model("scale:m2la", "cpu", "float32")
    full = Session(model, processor)
    full.append_text(VIDEO_TEXT + QUESTION, [frames(20, 1)])
    short = full.fork()
    short.compress()
    widened = full.fork()
    for index in range(len(widened.cache.layers)):
        layer = widened.cache.segmented(index)
        runs = [segment.compress(model.config.text_config.rank(index)) for segment in layer.frozen]
        layer.frozen = tuple(Segment(run.views(), run.length) for run in runs)
    limits = free()
    said = {name: s.generate(limits) for name, s in (("short", short), ("wide", widened))}
    assert said["short"].token_ids == said["wide"].token_ids
    assert all(s.compressed for s in short.cache.segmented(0).frozen[:-1])
    more = "What comes next?<|im_end|>\n"
    for session in (short, widened, full):
        session.append_text(more)
    gap = (short.logits_last - widened.logits_last).abs().max()
    assert float(gap) <= 1e-4 * float(widened.logits_last.abs().max())
    text = model.config.text_config
    per_token = sum(text.rank(i) + 4 + 8 * text.slots(i) for i in range(text.num_hidden_layers))
    held = sum(
        t.nbytes
        for i in range(len(short.cache.layers))
        for s in short.cache.segmented(i).frozen
        if s.compressed
        for t in s.tensors
    )
    assert held == per_token * short.cache.segmented(0).frozen[0].length


def test_only_latents_are_compressed() -> None:
    session = Session(*load_model("scale:base", "cpu", "float32"))
    session.append_ids([100, 101])
    with pytest.raises(ValueError, match="GQA"):
        session.compress()


@pytest.mark.parametrize("row_form", ["prerope", "released"])
def test_other_rows_decode_too(frames: Any, row_form: str) -> None:
    """Random weights: the forms that have no fused path, or cannot be absorbed at all."""
    config = InternVideo3Config.from_pretrained(resolve_checkpoint("scale:m2la"))
    text = config.text_config
    text.row_form, text.rope_slot_frequencies, text.modality_adapters = row_form, None, False
    text.rope_slots = text.head_dim // 2 if row_form == "released" else 0
    text.qk_norm = "linear" if row_form == "released" else "exact"
    text.initializer_range = 0.3  # at the usual one a random model repeats a single token
    torch.manual_seed(0)
    model = InternVideo3ForConditionalGeneration(config).eval()
    processor = load_model("scale:m2la", "cpu", "float32")[1]
    video = frames(8, 5)
    want = transformers_says(model, processor, video)
    assert engine_says(model, processor, video, 4096) == want
    assert len(set(want)) > 1


def test_replies_longer_than_a_round_go_on(
    loaded: tuple[Any, Any], frames: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tails are reallocated, or frozen where they are long, between rounds."""
    video = frames(8, 4)
    want = transformers_says(*loaded, video, new=40)
    monkeypatch.setattr(decoding, "ROUND", 7)
    assert engine_says(*loaded, video, 4096, new=40) == want
    monkeypatch.setattr("internvideo3.model.cache.COPIED_TOKENS", 5)
    monkeypatch.setattr("internvideo3.model.cache.BLOCK_TOKENS", 1)
    model, processor = loaded
    session = Session(model, processor)
    session.append_text(VIDEO_TEXT + QUESTION, [video])
    reply = session.generate(free(40))
    assert list(reply.token_ids) == want
    assert len(session.cache.segmented(0).frozen) > 3


class FakeGraph:
    """A CUDA graph on a CPU: capturing executes nothing, a replay runs on what was bound then."""

    capturing: FakeGraph | None = None
    made: list[FakeGraph] = []

    def __init__(self) -> None:
        self.generators: list[torch.Generator] = []
        self.call: Callable[[], None] | None = None
        self.replays = 0
        FakeGraph.made.append(self)

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def replay(self) -> None:
        assert self.call is not None
        self.replays += 1
        self.call()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """CUDA graphs that were made."""
    step = Engine.step

    def captured(engine: Engine) -> None:
        graph = FakeGraph.capturing
        if graph is None:
            return step(engine)
        layers = engine._layers

        def replay() -> None:
            now, engine._layers = engine._layers, layers
            step(engine)
            engine._layers = now

        graph.call = replay
        return None

    @contextmanager
    def capture(graph: FakeGraph, stream: str) -> Iterator[None]:
        assert stream == "a stream of cpu"
        FakeGraph.capturing = graph
        yield
        FakeGraph.capturing = None

    monkeypatch.setattr(FakeGraph, "made", [])
    monkeypatch.setattr(Engine, "step", captured)
    monkeypatch.setattr(Engine, "capturable", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return FakeGraph.made


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_each_round_replays_a_graph_of_its_own(
    loaded: tuple[Any, Any],
    frames: Any,
    temperature: float,
    graphs: list[FakeGraph],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Growth moves the tail: a graph from before it would write where nothing is read any more."""
    video = frames(8, 4)
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "capturable", property(lambda _: False))
        want = engine_says(*loaded, video, 4096, new=100, temperature=temperature)
    assert not graphs
    monkeypatch.setattr(decoding, "ROUND", 40)
    monkeypatch.setattr("internvideo3.model.cache.GROWTH", 1.0)
    monkeypatch.setattr("internvideo3.model.cache.BLOCK_TOKENS", 1)
    assert engine_says(*loaded, video, 4096, new=100, temperature=temperature) == want
    # The last 19 steps are not worth a graph, and three steps before each one compile the kernels.
    assert [graph.replays for graph in graphs] == [37, 37]
    assert all(len(graph.generators) == bool(temperature) for graph in graphs)


def test_the_host_looks_only_now_and_then(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a look waits for the device."""
    looks = []
    ended = Engine.ended.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Engine, "ended", property(lambda e: looks.append(1) or ended(e)))
    session = Session(*loaded)
    session.append_ids(list(range(100, 140)))
    engine = prepared_engine([session], steps=40)
    monkeypatch.setattr("internvideo3.model.engine.LOOK_EVERY", {"cpu": 16})
    engine.run(40)
    assert len(looks) == 3


def test_draws_have_the_odds_of_their_temperature() -> None:
    """20,000 rows of one distribution, a seed each: counts within five standard errors."""
    count, logits_Y = 20_000, torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 2.0):
        model: Any = None
        replies = [Reply(0, 0, 1, (), temperature, seed) for seed in range(count)]
        engine = Engine(model, replies, logits_Y.expand(count, -1).contiguous())
        odds_Y = (logits_Y / temperature).softmax(-1)
        counts_Y = engine.token_B.bincount(minlength=4) / count
        error_Y = (odds_Y * (1 - odds_Y) / count).sqrt()
        assert ((counts_Y - odds_Y).abs() <= 5 * error_Y).all()
        assert torch.allclose(engine.logp_BN[:, 0], odds_Y.log()[engine.token_B], atol=1e-5)


def test_seeds_differ_beyond_the_first_token() -> None:
    """Rows of one seed draw alike at every token, of another seed not."""
    model: Any = None
    replies = [Reply(0, 0, 12, (), 1.0, seed) for seed in (3, 3, 4)]
    engine = Engine(model, replies, torch.zeros(3, 50))
    for _ in range(11):
        engine.choose(torch.zeros(3, 50))
    first, same, other = engine.said()
    assert first == same and len(set(first)) > 6
    assert sum(a == b for a, b in zip(first[1:], other[1:], strict=True)) <= 3


@pytest.mark.parametrize("drawn", [False, True])
def test_the_step_reads_nothing_on_the_host(
    loaded: tuple[Any, Any], drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph needs: the same operators on the same storage whatever the length.

    The definitions of the two attention kernels, which stand in for them on a CPU, do read lengths
    on the host: they are replaced by ones that do not.
    """
    model, processor = loaded
    session = Session(model, processor)
    session.append_ids(list(range(100, 140)))
    sessions = [session]
    if drawn:
        sessions = [session.fork(), session.fork()]
        sessions[1].append_ids([100, 101])
    engine = prepared_engine(sessions, steps=4, temperature=float(drawn))
    zeros = torch.zeros(1, model.config.text_config.num_attention_heads, 1)

    def without_lengths(q: Tensor, runs: Any, *, scale: float, **widths: int) -> Any:
        width = widths.get("value_width", q.shape[-1])
        return zeros.expand(-1, -1, width) + q.mean(), None

    monkeypatch.setattr("internvideo3.model.engine_layers.latent_decode", without_lengths)
    monkeypatch.setattr("internvideo3.model.engine_layers.gqa_decode", without_lengths)
    with Watch() as first:
        engine.step()

    def read(*_: Any) -> Any:
        raise AssertionError("the step reads a tensor on the host")

    with monkeypatch.context() as patched, Watch() as second:
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            patched.setattr(Tensor, name, read)
        engine.step()
    assert first.operators == second.operators
    assert not {"_local_scalar_dense", "nonzero", "item"} & set(first.operators)


def prepared_engine(sessions: list[Session], steps: int, temperature: float = 0.0) -> Engine:
    """An engine after the sessions' last tokens, ready for some steps."""
    logits_BY = torch.stack([session.logits_last for session in sessions])
    limits = free(steps + 1, temperature=temperature)
    rows = [session._row(limits) for session in sessions]
    model = sessions[0].model
    batch = decoding._Batch(model, rows)
    replies = batch.continuations([limits] * len(rows), [()] * len(rows))
    engine = Engine(model, replies, logits_BY)
    batch.make_room(steps)
    engine.bind(batch.cache)
    return engine


class Watch(TorchDispatchMode):
    """Names of the operators that run, and the largest tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.append(func._schema.name.removeprefix("aten::"))
        if not func.is_view:
            made = out if isinstance(out, (tuple, list)) else (out,)
            self.largest = max([self.largest, *(t.nbytes for t in made if isinstance(t, Tensor))])
        return out


def test_scratch_does_not_grow_with_the_context(
    loaded: tuple[Any, Any], small_blocks: None
) -> None:
    """The largest tensor made while a chunk is prefilled, cache storage apart."""
    model, processor = loaded
    largest = []
    for context in (256, 1024):
        session = Session(model, processor, chunk=128)
        session.cache.expect(context + 128)
        session.append_ids([100 + i % 200 for i in range(context)])
        with Watch() as watch:
            session.append_ids([100 + i % 200 for i in range(128)])
        largest.append(watch.largest)
    assert largest[0] == largest[1]


@pytest.mark.parametrize("kind", ["forks", "compressed", "compressed forks"])
@pytest.mark.parametrize("form", ["absorbed", "reconstruct"])
def test_scratch_of_questions_does_not_grow_with_their_prefix(
    form: str, kind: str, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four forks' questions over one prefix, and over latents in fp8; the largest tensor made."""
    model, processor = load_model("scale:m2la", "cpu", "float32")
    monkeypatch.setattr(model.config.text_config, "attention_form", form)
    monkeypatch.setattr(segments, "MAX_SCORES", 1 << 14)
    largest = []
    for context in (1024, 4096):
        session = Session(model, processor)
        session.append_ids([100 + i % 200 for i in range(context)])
        if kind.startswith("compressed"):
            session.compress()
        forks = [session.fork() for _ in range(4 if kind.endswith("forks") else 1)]
        rows = [fork._row(free(4)) for fork in forks]
        batch = decoding._Batch(model, rows)
        pending = [[100 + i for i in range(20 + 3 * n)] for n in range(len(rows))]
        with Watch() as watch, torch.no_grad():
            batch.prefill(pending, 64)
        largest.append(watch.largest)
    assert largest[0] == largest[1]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_session_that_could_not_be_compressed_goes_on(
    frames: Any, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers before the failure are compressed, the others not: all hold the same tokens."""
    model, processor = load_model("scale:m2la", "cpu", "float32")

    def asked() -> Session:
        session = Session(model, processor)
        session.append_text(VIDEO_TEXT + QUESTION, [frames(20, 1)])
        return session

    session, whole, done = asked(), asked(), itertools.count()
    compress = Segment.compress

    def out_of_memory(segment: Segment, rank: int) -> Segment:
        if next(done) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compress(segment, rank)

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(Segment, "compress", out_of_memory)
        session.compress()
    layers = [session.cache.segmented(i) for i in range(len(session.cache.layers))]
    assert [one.frozen[0].compressed for one in layers] == [i < failing for i in range(len(layers))]
    if not failing:
        assert (
            session.fork().generate(free(24)).token_ids == whole.fork().generate(free(24)).token_ids
        )
    session.compress()
    whole.compress()
    assert session.generate(free(24)).token_ids == whole.generate(free(24)).token_ids
    assert {one.get_seq_length() for one in layers} == {len(whole) - 1}


def test_a_compressed_row_is_decoded_once_a_question(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few queries take their scores at once."""
    model, processor = load_model("scale:m2la", "cpu", "float32")
    monkeypatch.setattr(model.config.text_config, "attention_form", "absorbed")
    monkeypatch.setattr(segments, "FUSED_WIDTH", 1)
    session = Session(model, processor)
    session.append_ids([100 + i % 200 for i in range(500)])
    session.compress()
    widened, decode = [], cache._widened

    def counted(latent: Any, *others: Any) -> Any:
        widened.append(latent.shape[2])
        return decode(latent, *others)

    monkeypatch.setattr(cache, "_widened", counted)
    found = []
    for scores in (1 << 26, 1 << 12):
        monkeypatch.setattr(segments, "MAX_SCORES", scores)
        fork = session.fork()
        widened.clear()
        fork.append_ids(list(range(100, 120)))
        assert sum(widened) == 500 * model.config.text_config.num_hidden_layers
        found.append(fork.logits_last)
    assert torch.allclose(*found, atol=1e-4)


def test_compressed_forks_say_what_they_say_alone(frames: Any, small_blocks: None) -> None:
    """Questions of a batch are prefilled under a mask, over stretches that are decoded in turn."""
    model, processor = load_model("scale:m2la", "cpu", "float32")
    prefix = Session(model, processor)
    prefix.append_text(VIDEO_TEXT, [frames(20, 1)])
    prefix.compress()
    questions = (QUESTION, "Is anything red?<|im_end|>\n<|im_start|>assistant\n")

    def forks() -> list[Session]:
        made = [prefix.fork() for _ in questions]
        for fork, question in zip(made, questions, strict=True):
            fork.append_text(question)
        return made

    together = Session.generate_batch(forks(), free(24))
    alone = [fork.generate(free(24)) for fork in forks()]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert together[0].token_ids != together[1].token_ids


def test_a_session_that_is_dropped_takes_its_cache_along(loaded: tuple[Any, Any]) -> None:
    """At once: what waits for Python's collector fills the device before that runs."""
    session = Session(*loaded)
    session.append_ids(list(range(100, 140)))
    session.generate(free(8))
    layers = [session.cache.segmented(index) for index in range(len(session.cache.layers))]
    kept = [weakref.ref(t) for layer in layers for t in layer.tail]
    gc.collect()
    gc.disable()
    try:
        del session, layers
        assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("module", ["latent_proj", "q_proj", "down_proj"])
def test_adapters_are_not_left_out_in_inference(module: str) -> None:
    """They count without gradients too; a step that reads weights itself says that it cannot."""
    model, processor = load_model("scale:m2la", "cpu", "float32")
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    named = dict(model.named_modules())
    name = next(name for name in named if name.endswith(f"layers.0.{PLACE[module]}"))
    linear, parent = named[name], named[name.rpartition(".")[0]]
    assert isinstance(linear, torch.nn.Linear)
    gains = torch.linspace(0.5, 1.5, linear.in_features)

    class Adapted(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * gains)

    adapted = Adapted(linear.in_features, linear.out_features, bias=linear.bias is not None)
    adapted.load_state_dict(linear.state_dict())
    setattr(parent, module, adapted)
    with torch.enable_grad():
        want = model(input_ids=ids).logits.detach()
    with torch.no_grad():
        got = model(input_ids=ids).logits
    assert float((got - want).abs().max()) < 1e-3 < float((got - before).abs().max())
    session = Session(model, processor)
    session.append_ids(ids[0].tolist())
    with pytest.raises(ValueError, match=f"{module} have more than their weights"):
        session.generate(free(4))
    # Merged by way of `.data`, as peft does.
    linear.weight.data *= gains
    setattr(parent, module, linear)
    model.eval()
    with torch.no_grad():
        assert float((model(input_ids=ids).logits - want).abs().max()) < 1e-3


@pytest.mark.parametrize("name", ["scale:base", "scale:m2la"])
@pytest.mark.parametrize(
    "place", ["norm", "layers.1", "layers.1.self_attn", "layers.1.mlp", "layers.1.input_layernorm"]
)
def test_hooks_are_not_left_out_of_replies(name: str, place: str) -> None:
    model, processor = load_model(name, "cpu", "float32")
    session = Session(model, processor)
    session.append_ids(list(range(100, 130)))
    part = model.get_submodule(f"model.language_model.{place}")
    hook = part.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"{place} have more than their weights"):
        session.generate(free(4))
    hook.remove()
    want = session.fork().generate(free(4)).token_ids
    # transformers leaves hooks of its own where hidden states were asked for.
    with torch.no_grad():
        model(input_ids=torch.arange(100, 130)[None], output_hidden_states=True)
    assert session.generate(free(4)).token_ids == want


def test_an_adapter_on_the_head_is_not_left_out_of_replies() -> None:
    model, processor = load_model("scale:m2la", "cpu", "float32")
    head = model.lm_head

    class Adapted(torch.nn.Linear):
        pass

    model.lm_head = Adapted(head.in_features, head.out_features, bias=False)
    model.lm_head.load_state_dict(head.state_dict())
    session = Session(model, processor)
    session.append_ids(list(range(100, 130)))
    with pytest.raises(ValueError, match="lm_head have more than their weights"):
        session.generate(free(4))


@pytest.mark.parametrize("name", ["scale:base", "scale:m2la"])
def test_weights_that_accelerate_keeps_elsewhere(name: str) -> None:
    """The model's own passes are what they were; a session says that it cannot."""
    accelerate = pytest.importorskip("accelerate")
    model, processor = load_model(name, "cpu", "float32")
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits
        moved = accelerate.cpu_offload(model, execution_device="cpu")
        assert torch.allclose(moved(input_ids=ids).logits, want, atol=1e-4)
        assert moved.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 33)
    with pytest.raises(ValueError, match="kept elsewhere by accelerate"):
        Session(model, processor)
    model.base_model.language_model.layers[0].self_attn._hf_hook = None
    with pytest.raises(ValueError, match="weights kept elsewhere by accelerate"):
        check_plain(model)


@pytest.mark.parametrize("name", ["scale:base", "scale:m2la"])
def test_a_model_that_was_cast_in_inference_mode(name: str) -> None:
    """Its parameters have no versions."""
    usual, processor = load_model(name, "cpu", "float32")
    with torch.inference_mode():
        cast = load_model(name, "cpu", "float32")[0].to(torch.bfloat16)
    said = []
    for model in (usual.to(torch.bfloat16), cast):
        session = Session(model, processor)
        session.append_ids(list(range(100, 130)))
        said.append(session.generate(free(6)).token_ids)
    assert said[0] == said[1]


@pytest.mark.parametrize("look_between", [False, True])
def test_steps_of_a_fused_optimiser_are_seen(*, look_between: bool) -> None:
    """They leave no trace in a parameter's version."""
    model, processor = load_model("scale:m2la", "cpu", "float32")
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    ids = torch.arange(100, 130)[None]

    def answered() -> Tensor:
        session = Session(model, processor)
        session.append_ids(ids[0].tolist())
        return session.logits_last.clone()

    before = answered()
    with torch.enable_grad():
        model(input_ids=ids, labels=ids).loss.backward()
    if look_between:
        answered()
    optimiser.step()
    after = answered()
    model.eval()  # what was multiplied out is forgotten
    assert torch.equal(after, answered()) and not torch.allclose(after, before, atol=0.1)


@pytest.mark.parametrize("name", ["scale:base", "scale:m2la"])
def test_media_follow_a_reply_that_ends_in_a_vision_token(name: str, frames: Any) -> None:
    """The token is the model's own word; no medium belongs to it."""
    model, processor = load_model(name, "cpu", "float32")
    token, entries = model.config.video_token_id, model.config.text_config.vocab_size
    others = tuple(entry for entry in range(entries) if entry != token)

    def said(*, cached: bool) -> Session:
        session = Session(model, processor)
        session.append_ids(list(range(100, 140)))
        session.generate(Limits(max_new_tokens=2, stop_ids=(), barred_ids=others))
        if cached:
            session.prefill()
        session.append_text(VIDEO_TEXT, [frames(4, 1)])
        return session

    session, cached = said(cached=False), said(cached=True)
    assert session.ids == cached.ids and session.ids[40:42] == [token, token]
    assert torch.allclose(session.logits_last, cached.logits_last, atol=1e-5)


def test_a_past_is_shared_also_with_a_session_that_went_on_behind_its_fork() -> None:
    """The first fork knows a run up to its fork, the second one further on."""
    model, processor = load_model("scale:m2la", "cpu", "float32")
    session = Session(model, processor)
    session.append_ids([100 + i % 200 for i in range(3000)])
    first = session.fork()
    session.append_ids(list(range(100, 105)))  # in the room that is left of the run's block
    second = session.fork()
    pairs = ([first, second], [first.fork(), session.fork()])
    for forks in pairs:
        before = allocated_bytes(one.cache for one in forks)
        drawn = free(8, temperature=1.0, seed=1)
        alone = [one.fork().generate(drawn).logps for one in forks]
        together = Session.generate_batch(forks, drawn)
        for reply, want in zip(together, alone, strict=True):
            assert reply.logps is not None and reply.logps == pytest.approx(want, abs=1e-4)
        # What each has of its own is a hundredth of what they share.
        assert allocated_bytes(one.cache for one in forks) < 1.1 * before


def test_forks_of_a_half_compressed_session_say_what_they_say_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parent is compressed whole in a second try; its fork keeps some layers in full."""
    model, processor = load_model("scale:m2la", "cpu", "float32")
    session, done = Session(model, processor), itertools.count()
    session.append_ids([100 + i % 200 for i in range(300)])
    compress = Segment.compress

    def out_of_memory(segment: Segment, rank: int) -> Segment:
        if next(done) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compress(segment, rank)

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(Segment, "compress", out_of_memory)
        session.compress()
    child = session.fork()
    session.compress()

    def logits_of(sessions: list[Session]) -> list[torch.Tensor]:
        for one in sessions:
            one.append_text("A few words.")
        Session.generate_batch(sessions, free(1))
        return [one.logits_last for one in sessions]

    alone = [logits_of([one.fork()])[0] for one in (session, child)]
    for order in ((0, 1), (1, 0)):
        found = logits_of([(session, child)[i].fork() for i in order])
        for index, scores in zip(order, found, strict=True):
            assert torch.allclose(scores, alone[index], atol=1e-4)
    assert not torch.allclose(*alone, atol=1e-4)


def test_a_long_prompt_is_allocated_once(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    session = Session(model, processor, chunk=64)
    seen = set()
    write = type(session.cache.segmented(0)).write

    def spy(self: Any, *args: Any) -> None:
        write(self, *args)
        if self is session.cache.segmented(0):
            seen.add(self.tail[0].data_ptr())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(session.cache.segmented(0)), "write", spy)
        session.append_ids([100 + i % 200 for i in range(1000)])
    assert len(seen) == 1


@pytest.fixture
def unmerged() -> Iterator[Callable[[], list[torch.nn.Linear]]]:
    yield lambda: [torch.nn.Linear(6, width, bias=False) for width in (4, 2, 3)]


def test_merged_weights_are_the_linears_own(
    unmerged: Callable[[], list[torch.nn.Linear]],
) -> None:
    """Training the model after its engine has run trains what the engine reads."""
    linears = unmerged()
    want = torch.cat([linear.weight for linear in linears])
    merged = MergedLinear(linears)
    assert torch.equal(merged.weight_NK, want)
    with torch.no_grad():
        linears[1].weight.mul_(2)
    assert torch.equal(merged.weight_NK[4:6], 2 * want[4:6])
    again = MergedLinear(linears)
    assert again.weight_NK.data_ptr() == merged.weight_NK.data_ptr()
    linears[0].weight.data = linears[0].weight.data.clone()
    third = MergedLinear(linears)
    assert third.weight_NK.data_ptr() != merged.weight_NK.data_ptr()
    assert torch.equal(third.weight_NK, torch.cat([linear.weight for linear in linears]))


@pytest.mark.parametrize("name", ["scale:base", "scale:m2la"])
def test_a_model_that_replied_under_inference_mode_can_be_trained(name: str) -> None:
    model, processor = load_model(name, "cpu", "float32")
    session = Session(model, processor)
    with torch.inference_mode():
        session.append_ids([100, 101, 102])
        session.generate(Limits(max_new_tokens=2, stop_ids=()))
    # And its session goes on outside.
    session.append_ids([103, 104])
    session.generate(Limits(max_new_tokens=2, stop_ids=()))
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight.requires_grad_()
    with torch.enable_grad():
        model(input_ids=torch.tensor([[100, 101]])).logits.sum().backward()
    assert float(weight.grad.abs().max()) > 0


def test_a_model_whose_weights_were_merged_saves_and_loads(tmp_path: Any) -> None:
    model, processor = load_model("scale:base", "cpu", "float32")
    session = Session(model, processor)
    session.append_ids([100, 101, 102])
    session.generate(Limits(max_new_tokens=2, stop_ids=()))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for (name, one), other in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
