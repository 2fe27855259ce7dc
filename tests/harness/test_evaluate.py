"""Evaluation through lmms-eval, in this process: records, resume, controls, bad input.

pytest tests/harness/test_evaluate.py
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from internvideo3.harness import cli, evaluate
from internvideo3.harness.evaluate import EvalSummary
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.store import StoreError, read_rows
from internvideo3.model.checkpoint import CheckpointError

SUITES = ("world_short", "world_long")
RECORD = {
    "id", "suite", "video_id", "family", "length_s", "question", "options", "answer",
    "answer_type", "evidence", "video", "prediction", "official", "plain", "tokens", "error",
}  # fmt: skip


@pytest.fixture(scope="module")
def options(world: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalOptions:
    return EvalOptions(
        model=str(checkpoint),
        suites=SUITES,
        out=tmp_path_factory.mktemp("runs") / "clean",
        root=world,
        max_new_tokens=8,
        command=("internvideo3", "eval"),
    )


@pytest.fixture(scope="module")
def clean(options: EvalOptions) -> EvalSummary:
    return evaluate.evaluate(options)


def samples(run: Path, suite: str = "world_short") -> list[dict[str, Any]]:
    return read_rows(run / "samples" / f"{suite}.jsonl")


def docs(world: Path, suite: str) -> list[dict[str, Any]]:
    return read_rows(world / "test" / f"{suite}.jsonl")


def predictions(run: Path) -> list[str]:
    return [row["prediction"] for suite in SUITES for row in samples(run, suite)]


def test_every_document_has_one_complete_record_in_order(clean: EvalSummary, world: Path) -> None:
    for suite in SUITES:
        rows, asked = samples(clean.run, suite), docs(world, suite)
        assert [row["id"] for row in rows] == [doc["id"] for doc in asked]
        for row, doc in zip(rows, asked, strict=True):
            assert set(row) == RECORD
            assert {key: row[key] for key in doc.keys() & row.keys() - {"video"}} == {
                key: doc[key] for key in doc.keys() & row.keys() - {"video"}
            }
            assert Path(row["video"]) == (world / "test" / doc["video"]).resolve()
            assert row["tokens"]["prompt"] > 20 and 1 <= row["tokens"]["new"] <= 8
            assert row["error"] is None and row["official"]["outcome"] != "error"
    assert clean.computed == sum(len(docs(world, suite)) for suite in SUITES)


def test_timings_are_beside_the_samples_and_not_in_them(clean: EvalSummary) -> None:
    for suite in SUITES:
        timings = read_rows(clean.run / "timings" / f"{suite}.jsonl")
        assert [row["id"] for row in timings] == [row["id"] for row in samples(clean.run, suite)]
        for row in timings:
            assert min(row["decode_s"], row["encode_s"], row["prefill_s"], row["generate_s"]) > 0


def test_run_json_says_where_the_result_comes_from(
    clean: EvalSummary, options: EvalOptions
) -> None:
    run = json.loads((clean.run / "run.json").read_text())
    assert run["schema"] == 1 and run["mode"] == "direct"
    assert run["command"] == ["internvideo3", "eval"]
    assert run["model"]["attention"] == "gqa" and run["model"]["parameters"] > 10**6
    text = json.loads((Path(options.model) / "config.json").read_text())["text_config"]
    keys_and_values = 2 * text["num_key_value_heads"] * text["head_dim"]
    assert run["model"]["cache_bytes_per_token"] == 4 * text["num_hidden_layers"] * keys_and_values
    assert run["config"]["fps"] == 2.0 and run["config"]["max_new_tokens"] == 8
    assert run["config"]["dtype"] == "float32" and run["config"]["threads"] == 1
    assert run["packages"]["lmms-eval"].startswith("0.7")
    assert run["suites"]["world_short"]["n"] == len(samples(clean.run))
    assert run["comparable"]["paper"] is False


def test_repeating_the_command_loads_no_model(
    clean: EvalSummary, options: EvalOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: EvalOptions) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(evaluate, "load_plugin", refuse)
    before = [(clean.run / "samples" / f"{suite}.jsonl").read_bytes() for suite in SUITES]
    again = evaluate.evaluate(options)
    assert (again.computed, again.kept) == (0, clean.computed)
    assert before == [(clean.run / "samples" / f"{suite}.jsonl").read_bytes() for suite in SUITES]


def test_one_by_one_gives_the_answers_of_batches(
    clean: EvalSummary, options: EvalOptions, tmp_path: Path
) -> None:
    single = evaluate.evaluate(replace(options, out=tmp_path / "single", batch=1))
    assert predictions(single.run) == predictions(clean.run)


def test_a_selection_is_a_part_of_the_whole(
    clean: EvalSummary, options: EvalOptions, tmp_path: Path
) -> None:
    ids = ("world_short/000006", "world_short/000001")
    chosen = replace(options, suites=("world_short",), out=tmp_path / "ids", sample_ids=ids)
    whole = {row["id"]: row for row in samples(clean.run)}
    picked = samples(evaluate.evaluate(chosen).run)
    assert [row["id"] for row in picked] == sorted(ids)
    limited = evaluate.evaluate(
        replace(options, suites=("world_short",), out=tmp_path / "limit", limit=3)
    )
    first = samples(limited.run)
    assert [row["id"] for row in first] == [row["id"] for row in samples(clean.run)][:3]
    for row in [*picked, *first]:
        assert row["prediction"] == whole[row["id"]]["prediction"]


def test_blind_asks_about_another_video(
    clean: EvalSummary, options: EvalOptions, tmp_path: Path
) -> None:
    blind = evaluate.evaluate(
        replace(options, suites=("world_short",), out=tmp_path / "blind", control="blind")
    )
    run = json.loads((blind.run / "run.json").read_text())
    assert run["config"]["control"] == "blind"
    for shown, own in zip(samples(blind.run), samples(clean.run), strict=True):
        assert shown["video"] != own["video"] and Path(shown["video"]).is_file()
        assert (shown["question"], shown["answer"]) == (own["question"], own["answer"])


def test_rescoring_is_the_first_score_and_imports_no_torch(clean: EvalSummary) -> None:
    before = {path.relative_to(clean.run): path.read_bytes() for path in clean.run.rglob("*.json*")}
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from internvideo3.harness.rescore import rescore\n"
        f"rescore(Path({str(clean.run)!r}))\n"
        "assert not {'torch', 'transformers', 'lmms_eval'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    after = {path.relative_to(clean.run): path.read_bytes() for path in clean.run.rglob("*.json*")}
    assert after == before


def test_a_corrupt_video_is_a_recorded_error_and_a_status(
    clean: EvalSummary, options: EvalOptions, world: Path, tmp_path: Path
) -> None:
    root = tmp_path / "world"
    shutil.copytree(world, root)
    for yaml in (root / "test/lmms").glob("*.yaml"):
        yaml.write_text(yaml.read_text().replace(str(world.resolve()), str(root.resolve())))
    video = root / "test" / docs(root, "world_short")[0]["video"]
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 3])
    out = tmp_path / "run"
    command = ["eval", "--model", options.model, "--suite", "world_short", "--out", str(out)]
    command += ["--root", str(root), "--max-new-tokens", "8"]

    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 1
    rows = samples(out)
    broken = [row for row in rows if row["error"] is not None]
    assert "samples failed and count as wrong" in result.output
    told = [line for line in result.output.splitlines() if video.name in line]
    assert len(told) == 1 and f"{rows[0]['id']} and {len(broken) - 1} more" in told[0]
    assert "--retry-errors" in result.output
    assert len(broken) > 1 and {row["video_id"] for row in broken} == {rows[0]["video_id"]}
    assert all(video.name in row["error"]["message"] for row in broken)
    assert all(
        row["official"] == {"value": 0.0, "parsed": None, "outcome": "error"} for row in broken
    )
    assert json.loads((out / "results.json").read_text())["world_short"]["errors"] == len(broken)
    assert CliRunner().invoke(cli.app, [*command, "--max-errors", "99"]).exit_code == 0

    video.write_bytes(content)
    repaired = CliRunner().invoke(cli.app, [*command, "--retry-errors"])
    assert repaired.exit_code == 0, repaired.output
    assert f"{len(broken)} samples answered" in repaired.output
    assert [row["prediction"] for row in samples(out)] == [
        row["prediction"] for row in samples(clean.run)
    ]


def test_a_missing_video_is_found_before_the_model_is_loaded(
    options: EvalOptions, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "world"
    shutil.copytree(world, root)
    (root / "test" / docs(root, "world_long")[0]["video"]).unlink()
    monkeypatch.setattr(evaluate, "load_plugin", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="1 of 7 videos are missing or empty"):
        evaluate.evaluate(replace(options, root=root, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_another_commands_directory_is_refused(clean: EvalSummary, options: EvalOptions) -> None:
    with pytest.raises(StoreError, match=r"config\.fps: 2\.0 in the directory, 1\.0 now"):
        evaluate.evaluate(replace(options, fps=1.0))


def test_a_checkpoint_of_another_architecture_or_name_is_refused(
    options: EvalOptions, tmp_path: Path
) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="'llama'"):
        evaluate.evaluate(replace(options, model=str(tmp_path / "llama"), out=tmp_path / "a"))
    with pytest.raises(CheckpointError, match="scale:m2la"):
        evaluate.evaluate(replace(options, model="scale:m2al", out=tmp_path / "b"))


def test_a_failing_question_does_not_fail_its_batch(
    clean: EvalSummary, options: EvalOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from internvideo3.harness.direct import Answerer

    generate = Answerer._generate
    unlucky = samples(clean.run)[1]["question"]

    def fail_on_one(self: Answerer, prefix: Any, batch: Any, shared: Any) -> Any:
        if any(unlucky in one.tail for one in batch):
            raise RuntimeError("out of memory")
        return generate(self, prefix, batch, shared)

    monkeypatch.setattr(Answerer, "_generate", fail_on_one)
    run = evaluate.evaluate(replace(options, suites=("world_short",), out=tmp_path / "run")).run
    failed = [row for row in samples(run) if row["error"] is not None]
    assert {row["question"] for row in failed} == {unlucky}
    assert failed[0]["error"] == {"type": "RuntimeError", "message": "out of memory"}
    assert failed[0]["prediction"] is None
    others = [row["prediction"] for row in samples(run) if row["question"] != unlucky]
    assert others == [row["prediction"] for row in samples(clean.run) if row["question"] != unlucky]
