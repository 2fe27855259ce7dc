"""Training on files in the chat form, with real videos: `pytest tests/training/test_chat.py`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from internvideo3.harness.direct import fit_frames
from internvideo3.model.checkpoint import load_model
from internvideo3.tasks.video import read_frames
from internvideo3.training.chat import ChatDocuments
from internvideo3.training.curation.records import DataError, write_rows
from internvideo3.training.documents import Document
from internvideo3.training.packing import pack
from internvideo3.training.policy import Policy
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import (
    ChatData,
    Cpt,
    Gspo,
    Optimiser,
    Recipe,
    RecipeError,
    Sft,
    load_recipe,
    stage_digest,
)
from internvideo3.training.train import build_stage, train

SIZE: dict[str, int] = {"min_pixels": 4096, "max_pixels": 4096}


def video_row(key: str, url: str, answer: str = " circle") -> dict[str, Any]:
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": "<VIDEO_CONTEXT>Which shape is red?\nAnswer with one word."},
    ]
    return {
        "id": key, "answer": answer.strip(), "options": ["square", "circle", "cross"],
        "category": "Object Recognition",
        "messages": [{"role": "user", "content": content},
                     {"role": "assistant", "content": answer}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, make_video: Any) -> Path:
    """Videos of two shapes, an image, and rows about them; one video is broken."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(3):
        make_video(folder / f"v{seed}.mp4", seed, 4)
    Image.new("RGB", (90, 60), (200, 30, 30)).save(folder / "red.png")
    (folder / "broken.mp4").write_bytes(b"no video")
    write_rows(folder / "videos.jsonl", [video_row(str(n), f"v{n % 3}.mp4") for n in range(9)])
    content = [{"type": "image_url", "image_url": {"url": "red.png"}},
               {"type": "text", "text": "Colour?"}]  # fmt: skip
    write_rows(folder / "images.jsonl", [
        {"id": f"i{n}", "messages": [{"role": "user", "content": content},
                                     {"role": "assistant", "content": " red"}]} for n in range(3)
    ])  # fmt: skip
    text = [{"role": "user", "content": "Say red."}, {"role": "assistant", "content": " red"}]
    write_rows(folder / "texts.parquet", [{"id": f"t{n}", "messages": text} for n in range(3)])
    bad = [video_row("bad", "broken.mp4"), *(video_row(f"g{n}", "v0.mp4") for n in range(5))]
    write_rows(folder / "some_bad.jsonl", bad)
    return folder


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model("scale:m2la", "cpu", torch.float32)


def data(folder: Path, **files: float) -> ChatData:
    return ChatData(files={str(folder / n.replace("__", ".")): s for n, s in files.items()}, **SIZE)


def alike(one: Document, other: Document) -> bool:
    pairs = zip(one.media, other.media, strict=True)
    same_pixels = all(torch.equal(a.pixels, b.pixels) for a, b in pairs)
    return same_pixels and (one.trunk_ids, one.branches) == (other.trunk_ids, other.branches)


def common(source: ChatData) -> dict[str, Any]:
    return {"steps": 1, "documents": 2, "pack_tokens": 2048, "data": source,
            "optimiser": Optimiser(learning_rate=1e-4)}  # fmt: skip


def test_the_models_pixels_are_those_of_evaluation(corpus: Path, loaded: Any) -> None:
    source = ChatDocuments(data(corpus, videos__jsonl=1.0), loaded[1], 0)
    document = source.taught(0)
    name, row = source._row(0)
    url = row["messages"][0]["content"][0]["video_url"]["url"]
    read = read_frames(corpus / url, fps=2.0, max_frames=512)
    fitted = fit_frames(read, factor=32, **SIZE)
    piece = source.prompter.piece("<|vision_start|><|video_pad|><|vision_end|>", [fitted])
    assert torch.equal(document.media[0].pixels, piece.media[0].pixels)
    said = document.branches[0]
    assert loaded[1].tokenizer.decode(said.ids[-said.said :]) == " circle<|im_end|>"
    assert "<VIDEO_CONTEXT>" not in loaded[1].tokenizer.decode(document.trunk_ids)


def test_shares_are_exact_and_epochs_reshuffle(corpus: Path, loaded: Any) -> None:
    shares = data(corpus, videos__jsonl=0.152, images__jsonl=0.549, texts__parquet=0.299)
    source = ChatDocuments(shares, loaded[1], 0)
    kinds = Counter(source.kind(index) for index in range(1000))
    assert kinds == {"video": 152, "image": 549, "text": 299}
    alone = ChatDocuments(data(corpus, videos__jsonl=1.0), loaded[1], 0)
    epochs = [[alone._row(e * 9 + n)[1]["id"] for n in range(9)] for e in range(3)]
    assert all(sorted(one) == sorted(epochs[0]) for one in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_continued_pretraining_mixes_texts_images_and_videos(corpus: Path, loaded: Any) -> None:
    """In one row; each document's hidden states are those it has alone."""
    model, processor = loaded
    shares = data(corpus, videos__jsonl=0.4, images__jsonl=0.3, texts__parquet=0.3)
    source = ChatDocuments(shares, processor, 0)
    indices = [next(n for n in range(99) if source.kind(n) == kind)
               for kind in ("text", "video", "image", "text")]  # fmt: skip
    documents = [source.taught(index) for index in indices]
    policy, found = Policy(model), []
    with torch.no_grad():
        for row in (documents, *([one] for one in documents)):
            policy(pack(row, model), lambda hidden, head: found.append(hidden) or hidden)
    assert (found[0] - torch.cat(found[1:])).abs().max() < 1e-5
    options = Cpt(kind="cpt", **(common(shares) | {"documents": 10}))
    works, noted = build_stage(options, processor, policy, 0, Processes()).works(0, policy)
    assert noted["video_samples"][0] + noted["image_samples"][0] + noted["text_samples"][0] == 10
    assert noted["video_samples"][0] == 4 and works


def test_a_broken_video_is_skipped_counted_and_logged(
    corpus: Path, loaded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = ChatDocuments(data(corpus, some_bad__jsonl=1.0), loaded[1], 0)
    documents = [source.taught(index) for index in range(12)]
    assert len(documents) == 12 and len(source.bad) == 1
    assert "some_bad.jsonl, row 1 (id bad) is left out" in caplog.text
    again = ChatDocuments(data(corpus, some_bad__jsonl=1.0), loaded[1], 0)
    assert alike(again.taught(7), documents[7]), "an index depends on nothing before it"


def test_a_bad_row_condemns_no_other_where_rows_have_no_ids(corpus: Path, loaded: Any) -> None:
    rows = [video_row("", "broken.mp4"), video_row("", "v0.mp4"), video_row("", "v1.mp4")]
    path = corpus / "nameless.jsonl"
    write_rows(path, [{k: v for k, v in row.items() if k != "id"} for row in rows])
    source = ChatDocuments(ChatData(files={str(path): 1.0}, **SIZE), loaded[1], 0)
    taught = [source.taught(index) for index in range(6)]
    assert len(source.bad) == 1 and not all(alike(one, taught[0]) for one in taught)


def test_too_many_broken_videos_end_the_run_with_states_kept(
    tmp_path: Path,
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    write_rows(tmp_path / "bad.jsonl", [video_row(f"b{n}", "broken.mp4") for n in range(40)])
    options = Sft(kind="sft", **common(data(tmp_path, bad__jsonl=1.0)))
    recipe = Recipe(about="test", start="scale:m2la", stages={"sft": options})
    with pytest.raises(DataError, match="11 of 11 rows cannot be used, more than 1%"):
        train(recipe, tmp_path / "out")


def test_a_text_that_forges_a_placeholder_is_a_bad_row(corpus: Path, loaded: Any) -> None:
    forged = video_row("forged", str(corpus / "v0.mp4"))
    forged["messages"][0]["content"][1]["text"] = "What? <|video_pad|>"
    path = corpus / "forged.jsonl"
    write_rows(path, [forged, video_row("fine", str(corpus / "v0.mp4"))])
    source = ChatDocuments(ChatData(files={str(path): 1.0}, **SIZE), loaded[1], 0)
    assert alike(source.taught(0), source.taught(1))
    (reason,) = source.bad.values()
    assert "2 video placeholders" in reason


def test_rollouts_and_rewards_work_on_files(corpus: Path, loaded: Any) -> None:
    model, processor = loaded
    options = Gspo(
        kind="gspo", group=2, max_new_tokens=4, **common(data(corpus, videos__jsonl=1.0))
    )
    policy = Policy(model)
    works, noted = build_stage(options, processor, policy, 0, Processes()).works(0, policy)
    assert works and noted["reward"][1] == 4


def test_a_recipe_names_files_and_their_content_is_part_of_the_digest(tmp_path: Path) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text("{}\n")
    own = tmp_path / "own.yaml"
    own.write_text(json.dumps({
        "extends": "paper", "start": "scale:m2la",
        "stages": {"sft_long": {"steps": 3, "data": {"files": {str(rows): 1.0}, "fps": 4.0}}},
    }))  # fmt: skip
    stage: Any = load_recipe(own).stages["sft_long"]
    assert isinstance(stage.data, ChatData) and stage.data.fps == 4.0
    before = stage_digest(stage, 0, "x")
    rows.write_text('{"id": 1}\n')
    assert stage_digest(stage, 0, "x") != before
    gone = replace(stage, data=replace(stage.data, files={"no.jsonl": 1.0}))
    with pytest.raises(RecipeError, match=r"no\.jsonl does not exist"):
        stage_digest(gone, 0, "x")
    own.write_text(own.read_text().replace('"fps"', '"fsp"'))
    with pytest.raises(RecipeError, match="fsp: no such key; did you mean fps"):
        load_recipe(own)
