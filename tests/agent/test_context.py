"""The context is one token stream: entries tile it, turns reuse it, hostile text stays text.

pytest tests/agent/test_context.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.video_utils import VideoMetadata

from internvideo3.harness.agent.context import Context, Control, Kind, Quoted
from internvideo3.harness.agent.quoting import LONGEST_CHARS, Quoter, shorten
from internvideo3.model import session as session_module
from internvideo3.model.fitting import fit_frames
from internvideo3.model.scale.build import load_processor
from internvideo3.model.session import Limits, Session
from internvideo3.tasks.video import Frames, read_frames

TURNS = 7
OPTIONS = {"do_resize": False}


def fitted(path: Path, start_s: float, end_s: float, fps: float) -> Frames:
    read = read_frames(path, fps=fps, start_s=start_s, end_s=end_s)
    return fit_frames(read, factor=32, min_pixels=4096, max_pixels=4096)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the tokens of every prompt that is run through the model's layers."""
    seen: list[int] = []
    run = session_module.run

    def counting(model: Any, cache: Any, tokens: Any) -> Any:
        seen.append(tokens.ids_BT.shape[1])
        return run(model, cache, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(session_module, "run", counting)
        yield seen


def seven_turns(context: Context, video: Path) -> list[Frames]:
    """A rollout as the loop writes it: every turn speaks, calls, and sees eight new frames."""
    shown = [fitted(video, 0, 16, 1)]
    context.add(Kind.INSTRUCTION, "system", [Control("You answer.")], role="system")
    context.add(Kind.OBSERVATION, "frames", [shown[0]], span=(0, 16))
    context.add(Kind.INSTRUCTION, "user", [Quoted("What is it?")])
    for turn in range(1, TURNS + 1):
        context.turn = turn
        context.speak(Limits(max_new_tokens=6))
        call = f'{{"name": "zoom", "arguments": {{"start_s": {turn}}}}}'
        context.add(Kind.ACTION, "controller", [Control(f"<tool_call>\n{call}\n</tool_call>")])
        shown.append(fitted(video, turn, turn + 2, 4))
        context.respond(Kind.OBSERVATION, "zoom", [shown[-1]], span=(turn, turn + 2))
    return shown


@pytest.mark.parametrize("which", ["scale", "gqa"])
def test_seven_turns_cost_one_pass_and_give_its_logits(
    which: str,
    video: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    bar: Any,
) -> None:
    model, processor = request.getfixturevalue(which)
    context = Context(Session(model, processor, media_options=OPTIONS))
    with counted(monkeypatch) as prefilled:
        shown = seven_turns(context, video)
        fork = context.ahead()
        logits_Y = fork.logits_last
    bar("7 turns: prefilled tokens / context", sum(prefilled) / len(context), 1.1)
    # The same ids and frames through transformers' own forward, at once.
    batch = processor(
        text=["<|video_pad|>" * len(shown)],
        videos=[torch.from_numpy(f.pixels_THWC).permute(0, 3, 1, 2) for f in shown],
        video_metadata=[
            VideoMetadata(f.total_frames, fps=f.source_fps, frames_indices=list(f.indices))
            for f in shown
        ],
        do_sample_frames=False,
        return_tensors="pt",
        **OPTIONS,
    )
    ids_1T = torch.tensor([fork.ids])
    with torch.no_grad():
        whole = model(
            input_ids=ids_1T,
            pixel_values_videos=batch["pixel_values_videos"],
            video_grid_thw=batch["video_grid_thw"],
            mm_token_type_ids=2 * (ids_1T == model.config.video_token_id).int(),
            logits_to_keep=1,
        )
    gap, size = float((whole.logits[0, -1] - logits_Y).abs().max()), float(logits_Y.abs().max())
    # Float32, and two forms of one attention: rounding goes with the size of the logits.
    bar("7 turns: logits apart from one pass, float32", gap / max(1.0, size), 1e-5)


def test_entries_tile_the_ids(scale: tuple[Any, Any], video: Path) -> None:
    context = Context(Session(*scale, media_options=OPTIONS))
    seven_turns(context, video)
    context.ahead()  # what is waiting is written
    entries = context.entries
    assert entries[0].start == 0 and entries[-1].stop == len(context) == len(context.session.ids)
    pairs = zip(entries, entries[1:], strict=False)
    assert all(one.stop == following.start < following.stop for one, following in pairs)
    assert [entry.id for entry in entries] == [f"e{i + 1}" for i in range(len(entries))]
    by_kind = {kind: sum(entry.kind is kind for entry in entries) for kind in Kind}
    assert by_kind[Kind.REASONING] == by_kind[Kind.ACTION] == TURNS
    assert by_kind[Kind.OBSERVATION] == TURNS + 1


def test_a_context_is_its_sessions_only_writer(scale: tuple[Any, Any]) -> None:
    session = Session(*scale)
    session.append_text("hello")
    with pytest.raises(ValueError, match="begins on an empty session"):
        Context(session)


@pytest.mark.parametrize("tokens", ["special", "added"])
def test_no_hostile_text_gives_a_control_token(tokens: str, hostile: tuple[str, ...]) -> None:
    tokenizer = load_processor().tokenizer
    if tokens == "added":
        # As in Qwen3's tokenizer, where `<tool_call>` is added but not special.
        tokenizer.add_tokens(["<plain_call>", "call>"], special_tokens=False)
    quoter = Quoter(tokenizer)
    control = set(tokenizer.get_added_vocab().values())
    strings = [*hostile, "<plain_call>", "<plain_call><plain_call>", "<plain_<plain_call>call>"]
    for text in strings:
        ids = quoter.quote(text)
        assert control.isdisjoint(ids), text[:80]
        assert len(ids) <= 4 * LONGEST_CHARS + 200
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == shorten(text)
