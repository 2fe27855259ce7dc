"""`internvideo3 convert`: the shipped scale model in, a checkpoint and a report out; or words.

Run: .venv/bin/python -m pytest tests/harness/test_convert.py -q
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from internvideo3.harness.calibration import (
    DEFAULT_TEXT,
    HELD_OUT_TEXT,
    HELD_OUT_VIDEOS,
    UNLABELLED,
    CalibrationError,
    Reader,
    answer_labelled,
)
from internvideo3.harness.cli import convert_command
from internvideo3.harness.convert import (
    ConvertCommand,
    ConvertError,
    convert_checkpoint,
    lines,
)
from internvideo3.harness.convert_options import choices_help, conversion_options
from internvideo3.harness.inspection import describe
from internvideo3.model.checkpoint import (
    cache_bytes_per_token,
    load_model,
    resolve_checkpoint,
    weights_digest,
)
from internvideo3.model.conversion.options import PRESETS, preset
from internvideo3.model.conversion.recovery import recover
from internvideo3.model.scale.build import load_processor
from internvideo3.model.session import Limits, Session


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A short calibration text."""
    file = tmp_path / "own.txt"
    file.write_text("\f".join(DEFAULT_TEXT.read_text(encoding="utf-8").split("\f")[:2]))
    return file


@pytest.fixture
def given(tmp_path: Path, text: Path) -> ConvertCommand:
    return ConvertCommand(
        source="scale:base",
        out=tmp_path / "converted",
        calibration=(text,),
        tokens=256,
        dtype="float32",
        command=("internvideo3", "convert"),
    )


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The scale model converted as the command line does by default."""
    out = tmp_path_factory.mktemp("whole") / "converted"
    report = convert_checkpoint(ConvertCommand(source="scale:base", out=out, dtype="float32"))
    return out, report


def test_the_output_is_a_checkpoint_with_a_report(
    converted: tuple[Path, dict[str, Any]],
) -> None:
    out, report = converted
    assert json.loads((out / "conversion.json").read_text()) == json.loads(json.dumps(report))
    page = (out / "conversion.html").read_text()
    assert "Layers" in page and "rotary slots" in page
    assert page.count("<svg") == 5 and "Figure 3, left" in page and "Figure 3, right" in page
    outside = [word for word in ("src=", "href=", "url(http") if word in page]
    assert not [word for word in outside if word != "href="] and 'href="http' not in page
    assert report["cache_share"] == 0.5 and len(report["layers"]) == 4
    held_out = report["held_out"]
    assert 0 < held_out["kl"] < 5  # the scale model knows no prose: its perplexity says nothing
    assert held_out["tokens"] > 1000 and 0 < held_out["top1"] <= 1
    videos = report["held_out_videos"]
    assert videos["tokens"] == 52 and 1 < videos["source_perplexity"] < 1.5
    assert 0 < videos["kl"] < 0.3 and 0.8 < videos["perplexity_ratio"] < 1.3
    assert report["norm_alone"] == {}
    alone = report["layers_alone"]
    assert all(len(values) == 4 and min(values) > 0 for values in alone.values())
    assert max(alone["held_out"]) < 2 * held_out["kl"]
    assert "does not know the held-out text" in report["warnings"][0]
    assert all(0 < cv < 2 for layer in report["layers"] for cv in layer["concentration"]["key_cv"])
    assert not out.with_name("converted.work").exists()
    assert any("ratio" in line for line in lines(report, out))
    model, processor = load_model(out, "cpu")
    ids = processor.tokenizer("What moves?", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=ids).logits).all()
    said = "\n".join(describe(str(out)))
    assert "50% of GQA" in said and "on 80 GB" in said


def test_a_linear_norm_is_judged_alone(given: ConvertCommand) -> None:
    report = convert_checkpoint(replace(given, preset="official"))
    for name, found in report["norm_alone"].items():
        assert found["kl"] > 0 and found["tokens"] == report[name]["tokens"]
    assert report["norm_alone"]["held_out_videos"]["kl"] < report["held_out_videos"]["kl"]
    assert any("norm was replaced" in text for text in report["warnings"])
    said = lines(report, given.out)
    assert any(line.startswith("norm, video") for line in said)
    assert "text, norm alone" in (given.out / "conversion.html").read_text()


def killed(given: ConvertCommand, when: tuple[str, int]) -> None:
    """Converts in a child process that is killed at a step."""
    child = os.fork()
    if child == 0:

        def kill(step: str, done: int, total: int) -> None:
            if (step, done) == when:
                os.kill(os.getpid(), signal.SIGKILL)

        convert_checkpoint(given, kill)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_killed_conversion_continues(given: ConvertCommand) -> None:
    """Killed after a layer, the same command ends with the weights of an unbroken run."""
    unbroken = replace(given, out=given.out.with_name("unbroken"))
    convert_checkpoint(unbroken)
    killed(given, ("layers", 2))
    assert not given.out.exists() and len(list(given.work.glob("result-*/*.json"))) == 3
    # The source may have been moved, and be named by another path.
    moved = given.out.with_name("source")
    shutil.copytree(resolve_checkpoint(given.source), moved)
    given = replace(given, source=str(moved))
    before = {file: file.stat().st_mtime_ns for file in given.work.rglob("*.safetensors")}
    touched = []

    def watch(step: str, done: int, total: int) -> None:
        touched.extend(file for file, when in before.items() if file.stat().st_mtime_ns != when)

    convert_checkpoint(given, watch)
    assert touched == [] and before
    assert weights_digest(given.out) == weights_digest(unbroken.out)


def test_an_output_appears_when_it_is_whole(
    given: ConvertCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the output is written: weights are there, the tokenizer is not."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("internvideo3.harness.convert.shutil.copy2", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(given)
    assert (given.work / "output" / "model.safetensors").is_file() and not given.out.exists()
    convert_checkpoint(given)
    load_model(given.out, "cpu")


def test_a_full_disk_is_explained_and_the_command_repeated(
    given: ConvertCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("internvideo3.model.conversion.finished.save_file", full)
        with pytest.raises(OSError, match=r"converted.work cannot be written: No space left"):
            convert_checkpoint(given)
    assert not given.out.exists()
    convert_checkpoint(given)
    assert (given.out / "config.json").is_file()


def test_a_work_folder_of_another_calibration_set_or_source_is_refused(
    given: ConvertCommand, text: Path, tmp_path: Path
) -> None:
    def stop(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(given, stop)
    tuned = edited(tmp_path / "tuned")
    weights = load_file(tuned / "model.safetensors")
    weights["model.language_model.layers.3.mlp.up_proj.weight"] *= 1.1
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="made with another weights; delete it"):
        convert_checkpoint(replace(given, source=str(tuned)))
    text.write_text("Other words that fill more than sixteen tokens, all of them new. " * 4)
    with pytest.raises(ValueError, match="made with another calibration; delete it"):
        convert_checkpoint(given)


def test_recovery_brings_the_model_closer(given: ConvertCommand, text: Path) -> None:
    before = convert_checkpoint(replace(given, cache_share=0.35, held_out=text))
    again = replace(given, cache_share=0.35, held_out=text, out=given.out.with_name("recovered"))
    after = convert_checkpoint(replace(again, distil_minutes=0.1))
    assert after["recovery"]["steps"] >= 2
    assert after["held_out"]["kl"] < before["held_out"]["kl"]


def text_model(kind: type[PreTrainedConfig], kv_heads: int, folder: Path) -> Path:
    """A random model with four query heads of 16."""
    tokenizer = load_processor().tokenizer
    config = kind(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "kv_heads"),
    [(LlamaConfig, 2), (Qwen3Config, 2), (LlamaConfig, 4), (LlamaConfig, 1)],
    ids=["llama", "qwen3", "a key head for each query head", "one key head"],
)
def test_a_text_model_is_converted(
    kind: type[PreTrainedConfig], kv_heads: int, given: ConvertCommand, tmp_path: Path
) -> None:
    """No vision; Llama-style without QK-norm, Qwen3 with it; groups of any size."""
    source = text_model(kind, kv_heads, tmp_path / "source")
    own = replace(given, source=str(source), preset="full")
    report = convert_checkpoint(own)
    assert report["held_out"]["kl"] <= 1e-6 and report["held_out"]["top1"] >= 0.999
    assert (report["layers"][0]["concentration"] is None) == (kind is LlamaConfig)
    assert report["held_out_videos"] is None
    model, _ = load_model(own.out, "cpu")
    ids = torch.arange(20)[None]
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "source")(ids).logits
    error = (model(ids).logits - want).abs().max() / want.abs().max()
    assert error.item() <= 1e-5
    halved = replace(own, preset="best", out=tmp_path / "halved")
    report = convert_checkpoint(halved)
    assert report["cache_share"] == 0.5 and 0 < report["held_out"]["kl"] < 1
    assert report["cache_bytes_per_token"] == 2 * 2 * 16 * kv_heads


def test_one_key_head_has_no_room_for_every_frequency_at_half(
    given: ConvertCommand, tmp_path: Path
) -> None:
    source = text_model(LlamaConfig, 1, tmp_path / "source")
    with pytest.raises(ValueError, match="a row of 16 numbers has no room for 8 rotary slots"):
        convert_checkpoint(replace(given, source=str(source), preset="half"))
    assert not given.work.exists()


def test_a_budget_in_bytes_and_single_choices_are_kept_and_recorded(given: ConvertCommand) -> None:
    made = replace(
        given,
        preset="best",
        bytes_per_token=700,
        choices="rope_slots=10, tempered=off,mixing=real,gain=off,adapters=off",
    )
    report = convert_checkpoint(made)
    # 700 bytes are 87 numbers in each of four layers.
    assert report["cache_bytes_per_token"] == 2 * 4 * 87 <= 700
    assert cache_bytes_per_token(given.out, "bfloat16") == 2 * 4 * 87
    assert {layer["rank"] for layer in report["layers"]} == {87 - 2 * 10}
    assert {layer["rope_slots"] for layer in report["layers"]} == {10}
    assert report["budget"] == {"cache_share": None, "bytes_per_token": 700}
    assert report["choices"] == {
        "rope_slots": 10, "tempered": False, "mixing": "real", "gain": False, "adapters": False,
    }  # fmt: skip
    assert report["options"].items() >= report["choices"].items()
    page = (given.out / "conversion.html").read_text()
    assert "<code>gain=False</code>" in page and "696 bytes a token" in page
    model, _ = load_model(given.out, "cpu")
    gain = model.model.language_model.layers[0].self_attn.nope_gain
    assert torch.equal(gain[0], torch.ones_like(gain[0])) and not gain[1].any()


def test_what_vision_tokens_save_goes_to_text_within_the_budget(given: ConvertCommand) -> None:
    # The shipped calibration set has videos.
    made = replace(
        given,
        calibration=(),
        preset="best",
        bytes_per_token=700,
        choices="rope_slots=10,vision_rank_share=0.6",
    )
    report = convert_checkpoint(made)
    text, vision = report["cache_bytes_per_token"], report["cache_bytes_per_vision_token"]
    seen = report["vision_tokens"]
    assert 0.05 < seen < 0.95
    assert vision < 696 < text
    # A text rank is a whole number in each of four layers.
    assert 700 - 2 * 4 * 2 <= (1 - seen) * text + seen * vision <= 700
    ranks, nested = (
        sum(layer[name] for layer in report["layers"]) for name in ("rank", "vision_rank")
    )
    assert abs(nested - 0.6 * ranks) <= 1
    said = "\n".join(describe(str(given.out)))
    assert f"{text:,} bytes a token" in said and f"{vision:,} bytes a vision token" in said
    page = (given.out / "conversion.html").read_text()
    assert f"{vision:,} a vision token" in page
    model, processor = load_model(given.out, "cpu")
    session = Session(model, processor)
    session.append_text("Why?")
    assert len(session.generate(Limits(max_new_tokens=2, stop_ids=())).token_ids) == 2


def test_a_choice_left_to_the_preset_changes_nothing() -> None:
    config = PreTrainedConfig(
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=2
    )
    for name in PRESETS:
        assert conversion_options(name, config, seed=0) == preset(name, config)
    said = "rope_slots=auto,adapters=auto,token_floor=0.5,norm=linear,vision_rank_share=auto"
    found = conversion_options("half", config, seed=3, choices=said)
    assert (found.rope_slots, found.adapters, found.token_floor) == (None, None, 0.5)
    assert (found.norm, found.seed, found.vision_rank_share) == ("linear", 3, None)


def test_help_names_every_choice_with_its_values() -> None:
    words = set((convert_command.__doc__ or "").split())
    assert [choice for choice in choices_help() if choice not in words] == []


def edited(folder: Path, **changes: Any) -> Path:
    """A copy of the scale model with another config.json."""
    shutil.copytree(resolve_checkpoint("scale:base"), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= changes
    file.write_text(json.dumps(config))
    return folder


def bad_sources(tmp_path: Path) -> dict[str, Path | str]:
    sliding = edited(tmp_path / "sliding", layer_types=["sliding_attention"] * 4)
    pickled = edited(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    lacking = edited(tmp_path / "lacking")
    (lacking / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}})
    )
    other = edited(tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return {
        "sliding": sliding, "pickled": pickled, "lacking": lacking, "other": other,
        "latent": "scale:m2la", "absent": tmp_path / "absent",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("sliding", "sliding-window layers"),
        ("pickled", "pickled weights only"),
        ("lacking", "lacks 1 of its weight files .model-00002"),
        ("other", "'gpt2' models cannot be converted"),
        ("latent", "latent already"),
        ("absent", "no checkpoint"),
    ],
)
def test_a_bad_source_is_explained_before_any_work(
    given: ConvertCommand, tmp_path: Path, which: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(replace(given, source=str(bad_sources(tmp_path)[which])))
    assert not given.out.exists() and not given.work.exists()


def test_bad_options_are_explained_before_any_work(given: ConvertCommand, tmp_path: Path) -> None:
    cases = {
        "below the feasible minimum|no room": replace(given, cache_share=0.1),
        "not above 0, up to 1": replace(given, cache_share=1.5),
        "no preset 'hlf'. Did you mean half": replace(given, preset="hlf"),
        "7 bytes a token are less than one": replace(given, bytes_per_token=7),
        "budget is below the feasible minimum": replace(given, bytes_per_token=7),
        "no room for 16 rotary slots": replace(given, bytes_per_token=200),
        "wider than the 128": replace(given, bytes_per_token=2000),
        "give one": replace(given, cache_share=0.5, bytes_per_token=512),
        "no 'gian'. Did you mean gain": replace(given, choices="gian=off"),
        "mixing has no 'reel'. Did you mean real": replace(given, choices="mixing=reel"),
        "gain is 'maybe'; write on.off": replace(given, choices="gain=maybe"),
        "adapters is '2'; write on.off.auto": replace(given, choices="adapters=2"),
        "rope_slots is '1.5'; write INTEGER": replace(given, choices="rope_slots=1.5"),
        "write NAME=VALUE": replace(given, choices="gain"),
        "says twice what gain is": replace(given, choices="gain=on,gain=off"),
        "rope_slots is 0": replace(given, choices="rope_slots=0"),
        "token_floor is nan": replace(given, choices="token_floor=nan"),
        "vision_rank_share is 1.5": replace(given, choices="vision_rank_share=1.5"),
        "Use the preset `official`": replace(given, choices="row_form=released"),
        "exists already": replace(given, out=tmp_path),
        "no file .*none.txt": replace(given, calibration=(tmp_path / "none.txt",)),
        "no file .*other.txt": replace(given, held_out=tmp_path / "other.txt"),
        "no folder one may write to": replace(given, out=given.calibration[0] / "converted"),
        "no weight type 'int3'": replace(given, dtype="int3"),
    }
    for words, case in cases.items():
        with pytest.raises(ValueError, match=words):
            convert_checkpoint(case)
        assert not given.work.exists()


def test_calibration_files_are_read_or_refused(tmp_path: Path) -> None:
    reader = Reader(tokenizer=load_processor().tokenizer, processor=None, tokens=64)
    batches = reader.texts(HELD_OUT_TEXT)
    assert len(batches) == 6 and all(b["input_ids"].shape == (1, 64) for b in batches)
    (tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 40)
    (tmp_path / "table.csv").write_text("a,b")
    for name, words in {
        "clip.mp4": "reads text only",
        "short.txt": "no document of at least 16 tokens",
        "latin.txt": "not UTF-8",
        "table.csv": "neither text",
    }.items():
        with pytest.raises(CalibrationError, match=words):
            reader.read([tmp_path / name])


def test_videos_are_judged_by_their_answers_alone() -> None:
    processor = load_processor()
    tokenizer = processor.tokenizer
    # A source that writes a space first, as the scale model does.
    space = tokenizer(" left", add_special_tokens=False)["input_ids"][0]
    reader = Reader(
        tokenizer=tokenizer,
        processor=processor,
        tokens=64,
        loss=lambda batch: float(space not in batch["input_ids"]),
    )
    batches = reader.held_out_videos()
    assert len(batches) == HELD_OUT_VIDEOS
    for batch in batches:
        judged = batch["input_ids"][batch["labels"] != UNLABELLED]
        said = tokenizer.decode(judged)
        assert said.endswith("<|im_end|>") and said.count("<|") == 1
        shapes = {batch[n].shape for n in ("input_ids", "labels", "mm_token_type_ids")}
        assert shapes == {batch["attention_mask"].shape}
        assert said in tokenizer.decode(batch["input_ids"][0])
    with pytest.raises(CalibrationError, match="no reply begins"):
        answer_labelled(reader.texts(HELD_OUT_TEXT)[0], tokenizer)


def test_calibration_and_held_out_text_share_no_section() -> None:
    calibration, held_out = (
        {part.strip() for part in file.read_text(encoding="utf-8").split("\f")}
        for file in (DEFAULT_TEXT, HELD_OUT_TEXT)
    )
    assert not calibration & held_out


def tied_as(folder: Path, whole: bool | None, inner: bool | None, *, head: bool) -> Path:
    """The scale model, its tying said in either place or nowhere, with a head of its own or not."""
    source = resolve_checkpoint("scale:base")
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    for place, said in ((config, whole), (config["text_config"], inner)):
        place.pop("tie_word_embeddings")
        place |= {} if said is None else {"tie_word_embeddings": said}
    (folder / "config.json").write_text(json.dumps(config))
    if head:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = -tensors["model.language_model.embed_tokens.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("whole", "inner", "head"),
    [(False, None, True), (None, None, True), (False, True, True), (True, None, False),
     (True, False, False)],
)  # fmt: skip
def test_the_whole_models_configuration_says_whether_the_head_is_tied(
    given: ConvertCommand, tmp_path: Path, whole: bool | None, inner: bool | None, head: bool
) -> None:
    """transformers reads it there; the text's own part need not say, or says something else."""
    source = tied_as(tmp_path / "source", whole, inner, head=head)
    convert_checkpoint(replace(given, source=str(source), preset="full"))
    model, _ = load_model(given.out, "cpu", "float32")
    other, _ = load_model(source, "cpu", "float32")
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        want, got = (one(input_ids=ids).logits for one in (other, model))
    assert float((want - got).abs().max()) < 1e-3 * float(want.abs().max())


def test_files_of_others_where_work_would_be_are_left_alone(given: ConvertCommand) -> None:
    given.work.mkdir()
    (given.work / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds files of others .notes.txt."):
        convert_checkpoint(given)
    assert (given.work / "notes.txt").read_text() == "precious" and not given.out.exists()


def test_one_conversion_at_a_time_works_in_a_folder(given: ConvertCommand) -> None:
    given.work.mkdir()
    with (given.work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConvertError, match="another `convert` is writing"):
            convert_checkpoint(given)
    assert given.work.is_dir()


def test_what_is_calibrated_on_is_not_called_held_out(given: ConvertCommand, text: Path) -> None:
    copy = text.with_name("copy.txt")
    copy.write_bytes(text.read_bytes())
    report = convert_checkpoint(replace(given, held_out=copy))
    assert any("copy.txt is among the calibration files" in one for one in report["warnings"])
    assert "is among the calibration files" in (given.out / "conversion.html").read_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_recovery_is_computed_in_float32(
    given: ConvertCommand, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Steps that a half type would round away add up, and none is no number."""
    ticks = count()  # so that how many steps there are is not this machine's speed
    patient = partial(recover, clock=lambda: 0.1 * next(ticks))
    monkeypatch.setattr("internvideo3.harness.convert.recover", patient)
    convert_checkpoint(replace(given, dtype=dtype))
    again = replace(given, dtype=dtype, out=given.out.with_name("again"), distil_minutes=0.15)
    found = convert_checkpoint(again)
    assert all(math.isfinite(one) for one in found["recovery"]["losses"])
    name = "model.language_model.layers.0.self_attn.latent_proj.weight"
    before, after = (load_file(one.out / "model.safetensors")[name] for one in (given, again))
    # Rounded step by step, a fifth of them moved.
    assert bool(after.isfinite().all())
    # Of the larger half no step is large enough to move one; rounded step by step, none did.
    large = before.abs() > before.abs().float().median()
    assert float((before != after)[large].float().mean()) > 0.03
