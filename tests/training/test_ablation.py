"""Ablation, from shared stages to the report: `pytest tests/training/test_ablation.py`."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvideo3.harness import ablate as ablate_module
from internvideo3.harness.ablate import AblateOptions, ablate, suites_of
from internvideo3.harness.ablate_jobs import AblationStoppedError, graph
from internvideo3.harness.preflight import PreflightError
from internvideo3.harness.train import alone_in
from internvideo3.model.checkpoint import weights_digest
from internvideo3.reports.ablation import (
    MAPPING,
    Change,
    _values,
    change,
    columns,
    is_hard,
    unmet,
)
from internvideo3.reports.load import Sample
from internvideo3.tasks.scoring import Outcome, Score
from internvideo3.tasks.world.build import build_suite
from internvideo3.training.loop import TrainingError
from internvideo3.training.recipe import Convert, RecipeError, load_recipe, load_variant, variants

TINY = """
extends: scale
about: test
stages:
  convert: {videos: 2, probe: 2}
  cpt: {steps: 1, documents: 4, probe: 2}
  sft_short: {steps: 1, documents: 2}
  sft_long: null
  gspo: null
  opd: {steps: 1, documents: 2, group: 2}
"""
SUITES = ("world_long", "world_grounding", "world_ego", "world_manyq")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    for name in SUITES:
        build_suite(name, root, limit_videos=1)
    return root


@pytest.mark.slow
def test_shared_stages_are_trained_once_and_a_stopped_ablation_goes_on(
    world: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(TINY)
    options = AblateOptions(
        recipes=("full", "no_opd"), preset=str(preset), seeds=(0,), out=tmp_path / "out",
        limit=2, root=world, command=("internvideo3", "ablate"),
    )  # fmt: skip

    class StoppedError(Exception):
        pass

    def stops(name: str, done: int, total: int) -> None:
        if name == "full 0 opd":
            raise StoppedError

    with pytest.raises(StoppedError):
        ablate(options, stops)
    stages = tmp_path / "out" / "stages"
    before = {path: path.stat().st_mtime_ns for path in stages.glob("*/checkpoint/trained.txt")}
    assert {path.parts[-3].rsplit("-", 1)[0] for path in before} == {"convert", "cpt", "sft_short"}
    table = ablate(options, lambda *_: None)
    after = {path: path.stat().st_mtime_ns for path in stages.glob("*/checkpoint/trained.txt")}
    assert before.items() <= after.items() and len(after) == 4
    assert table is not None
    text = table.read_text()
    assert "**scale**" in text and "| full |" in text
    assert "Bar not met: 2 questions in a suite, 2000 are asked." in text
    assert "GSPO over SFT, grounding mIoU: not measured." in text
    assert "no_cpt: no such row yet." in text and "full: no such row" not in text
    told = json.loads((tmp_path / "out" / "table5.json").read_text())
    assert told["rows"]["full"]["seeds"] == [0] and told["seeds"] == [0]
    moments = told["losses"]["full"]
    assert list(moments) == ["before conversion", "after conversion", "after CPT"]
    assert all(loss.keys() == {"text", "image", "video"} for loss in moments.values())
    # Answers and their times: another evaluation would have other times.
    evaluated = {p: p.read_bytes() for p in (tmp_path / "out" / "runs").rglob("*.jsonl")}
    ablate(options, lambda *_: None)
    assert all(path.read_bytes() == held for path, held in evaluated.items())
    ablate(replace(options, recipes=("no_opd",)), lambda *_: None)
    assert "| full |" in table.read_text(), "a later command adds to the table"


def small_benchmarks() -> dict[str, Any]:
    """Writers of benchmarks in their own layout, by name."""
    path = Path(__file__).parents[1] / "harness" / "small_benchmarks.py"
    return dict(runpy.run_path(str(path))["WRITERS"])


@pytest.mark.slow
def test_benchmarks_may_be_the_columns(tmp_path: Path) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(TINY)
    data = tmp_path / "data"
    for name in ("videomme", "mlvu"):
        small_benchmarks()[name](data / name)
    options = AblateOptions(
        recipes=("full", "no_opd"), preset=str(preset), seeds=(0,), out=tmp_path / "out",
        suites=suites_of("videomme,mlvu"), data=data, limit=6,
    )  # fmt: skip
    table = ablate(options, lambda *_: None)
    assert table is not None
    text = table.read_text()
    assert "a model of 1.5 million parameters on videomme, mlvu." in text
    head = next(line for line in text.splitlines() if line.startswith("| recipe | videomme"))
    assert head.split(" | ")[1:5] == ["videomme (↔ V-MME)", "mlvu (↔ MLVU)", "mean", "seeds"]
    assert "| full |" in text and "stand for" not in text and "GSPO over SFT" not in text
    told = json.loads((tmp_path / "out" / "table5.json").read_text())
    results = json.loads((tmp_path / "out" / "runs" / "full-s0" / "results.json").read_text())
    for suite in ("videomme", "mlvu"):
        # The table's number is the benchmark's own.
        row = told["rows"]["full"][suite]
        assert (row and row["mean"]) == pytest.approx(results[suite]["value"])
    with pytest.raises(RecipeError, match=r"is of videomme, mlvu, and this command asks for"):
        ablate(replace(options, suites=suites_of("videomme")), lambda *_: None)


def test_what_is_evaluated_is_missed_before_anything_is_trained(tmp_path: Path) -> None:
    options = AblateOptions(
        recipes=("full",), seeds=(0,), out=tmp_path / "out", root=tmp_path / "nowhere"
    )
    with pytest.raises(PreflightError, match="world build world_long"):
        ablate(options, lambda *_: None)
    with pytest.raises(PreflightError, match="Did you mean videomme"):
        suites_of("vidomme")
    with pytest.raises(RecipeError, match="stages.gspo.group.*nobody published"):
        ablate(replace(options, preset="paper"), lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_two_ablations_do_not_work_in_one_folder(world: Path, tmp_path: Path) -> None:
    """They would train one stage twice at once, and each write its own runs into the plan."""
    preset = tmp_path / "own.yaml"
    preset.write_text(TINY)
    options = AblateOptions(
        recipes=("full",), preset=str(preset), seeds=(0,), out=tmp_path / "out", limit=1,
        root=world,
    )  # fmt: skip
    with alone_in(options.out), pytest.raises(TrainingError, match="another command trains in"):
        ablate(options, lambda *_: None)
    assert not options.out.exists()


def test_a_signal_in_the_last_step_of_a_recipe_stops_the_ablation(
    world: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "one.yaml"
    preset.write_text(
        "extends: scale\nabout: t\nstart: scale:m2la\nstages: {convert: null, cpt: null, "
        "sft_long: null, gspo: null, sft_short: {steps: 1, documents: 2}, "
        "opd: {steps: 1, documents: 2, group: 2}}\n"
    )
    options = AblateOptions(
        recipes=("full", "no_opd"), preset=str(preset), seeds=(0,), out=tmp_path / "out", limit=1,
        root=world,
    )  # fmt: skip

    sent = threading.Event()

    def stops(name: str, done: int, total: int) -> None:
        if (name, done) == ("full 0 opd", 1) and not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGTERM)

    assert ablate(options, stops) is None
    assert not (tmp_path / "out" / "runs").exists()
    table = ablate(options, lambda *_: None)
    assert table is not None and "| no_opd |" in table.read_text()


def test_a_missing_file_of_a_variant_is_told_before_any_recipe_is_trained(
    world: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "own.yaml"
    preset.write_text(
        TINY + "variants: {no_long_video_data: {stages: {sft_short: {data: {files: "
        "{gone.jsonl: 1.0}}}}}}\n"
    )
    options = AblateOptions(
        recipes=("full", "no_long_video_data"), preset=str(preset), seeds=(0,), root=world,
        out=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"gone.jsonl \(stages.sft_short\) do not exist"):
        ablate(options, lambda *_: None)
    assert not (tmp_path / "out").exists()


def weights(out: Path) -> dict[str, str]:
    return {
        path.parts[-2]: weights_digest(path)
        for path in (out / "stages").glob("*/checkpoint")
    }  # fmt: skip


def answers(out: Path) -> dict[str, bytes]:
    found = (out / "runs").glob("*/samples/*.jsonl")
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@pytest.mark.slow
def test_two_processes_train_what_one_does_also_after_a_kill(world: Path, tmp_path: Path) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(TINY)
    alone = AblateOptions(
        recipes=("full", "no_opd", "no_cpt"), preset=str(preset), seeds=(0,), limit=1, root=world,
        out=tmp_path / "alone",
    )  # fmt: skip
    assert ablate(alone, lambda *_: None) is not None
    several = replace(alone, out=tmp_path / "several", jobs=2)
    begun = threading.Event()

    def kills(name: str, done: int, total: int) -> None:
        if not begun.is_set() and "sft_short" in name:
            begun.set()
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(AblationStoppedError, match="was killed.*Repeat the command"):
        ablate(several, kills)
    assert begun.is_set() and not multiprocessing.active_children()
    assert weights(several.out).items() < weights(alone.out).items()
    table = ablate(several, lambda *_: None)
    assert table is not None and "| no_cpt |" in table.read_text()
    assert weights(several.out) == weights(alone.out)
    assert answers(several.out) == answers(alone.out)


@pytest.mark.slow
def test_a_signal_saves_the_states_of_all_processes_and_leaves_none(
    world: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "long.yaml"
    preset.write_text(TINY.replace("sft_short: {steps: 1,", "sft_short: {steps: 400,"))
    command = [sys.executable, "-m", "internvideo3.harness.cli", "ablate", "sft_only", "--jobs=2",
               "--seeds", "0,1", "--preset", str(preset), "--out", str(tmp_path / "out"),
               "--root", str(world), "--limit", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stages = tmp_path / "out" / "stages"
    deadline = time.monotonic() + 200
    while len([p for p in stages.glob("sft_short-*/metrics.jsonl") if p.stat().st_size]) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "repeat the same command to continue" in said
    assert len(list(stages.glob("sft_short-*/states/*"))) == 2, "each saved its state"


def test_the_table_is_written_when_it_is_due_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table takes a second here; between two of them 20 seconds of work have to pass."""
    now, written = [0.0], []

    def write(folder: Path) -> None:
        written.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(ablate_module, "write_table5", write)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), ablate_module._Table(tmp_path) as table:
        for _ in range(30):
            table.changed()
            now[0] += 1.0
        raise KeyboardInterrupt
    assert written == [0.0, 21.0, 32.0]


def test_what_recipes_share_is_one_piece_of_work() -> None:
    recipes = {name: load_variant("scale", name) for name in variants()}
    work = graph(recipes, (0, 1, 2))
    of_first = [one for one in work if one.seed == 0]
    # 8 evaluations; convert, cpt, two of SFT, GSPO, OPD; what each variant has of its own.
    own = {"no_cpt": 4, "no_long_context": 3, "no_long_video_data": 3, "no_rl": 1, "no_m2la": 5}
    assert len(of_first) == 8 + 6 + sum(own.values())
    assert len(work) == 3 * len(of_first)
    assert all(before in work for waits in work.values() for before in waits)


def test_recipes_that_say_the_same_in_another_order_are_one_piece_of_work(tmp_path: Path) -> None:
    """Two processes would train in one folder; likewise where only `save_every` differs."""
    base = load_recipe("scale")
    cpt: Any = base.stages["cpt"]
    turned = dict(reversed(list(cpt.data.lengths.items())))
    others = [replace(cpt, data=replace(cpt.data, lengths=turned)), replace(cpt, save_every=7)]
    recipes = {"a": base} | {
        name: replace(base, stages={**base.stages, "cpt": stage})
        for name, stage in zip("bc", others, strict=True)
    }
    work = graph(recipes, (0,))
    assert {one.recipe for one in work if not one.evaluates} == {"a"}
    assert len(work) == len(base.stages) + 3


def test_two_recipes_of_one_name_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.yaml").write_text(TINY)
    (tmp_path / "full.yaml").write_text(TINY)

    def asked(*recipes: str) -> AblateOptions:
        return AblateOptions(recipes=recipes, seeds=(0,), out=tmp_path / "out")

    first, second = (str(tmp_path / folder / "own.yaml") for folder in "ab")
    for pair in [(first, second), ("full", str(tmp_path / "full.yaml"))]:
        with pytest.raises(RecipeError, match="would share the row.*Rename one of the files"):
            ablate(asked(*pair), lambda *_: None)
    assert not (tmp_path / "out").exists()
    # Nor may a later command put another recipe into a row that is there.
    (tmp_path / "out").mkdir()
    held = {"sources": {"own": str(Path(first).resolve())}, "runs": {}, "about": {}}
    (tmp_path / "out" / "ablation.json").write_text(json.dumps(held))
    with pytest.raises(RecipeError, match=f"{first} and {second}"):
        ablate(asked(second), lambda *_: None)


class TestVariants:
    GONE = {"no_cpt": {"cpt"}, "no_rl": {"gspo"}, "no_opd": {"opd"},
            "sft_only": {"gspo", "opd"}, "no_m2la": {"convert"}}  # fmt: skip

    def test_each_changes_what_it_names_and_nothing_else(self) -> None:
        full = load_variant("scale", "full")
        assert full == load_recipe("scale") == load_recipe("scale/full")
        for name, stages in self.GONE.items():
            made = load_variant("scale", name).stages
            assert made == {k: v for k, v in full.stages.items() if k not in stages}

    @pytest.mark.parametrize("name", ["no_long_context", "no_long_video_data"])
    def test_curriculum_variants_keep_steps_and_number_of_videos(self, name: str) -> None:
        full, made = load_variant("scale", "full").stages, load_variant("scale", name).stages
        assert [k for k in full if full[k] != made[k]] == ["sft_long"]
        ours: Any = made["sft_long"]
        theirs: Any = full["sft_long"]
        assert replace(ours, data=theirs.data) == theirs
        assert (ours.data.videos, ours.data.questions) == (
            theirs.data.videos,
            theirs.data.questions,
        )
        longest = max(length for length, share in ours.data.lengths.items() if share)
        assert longest == (16 if name == "no_long_context" else 120)

    @pytest.mark.parametrize("preset", ["scale", "paper", "official"])
    def test_all_variants_exist_in_every_preset(self, preset: str) -> None:
        made = {name: load_variant(preset, name).stages for name in variants()}
        full = made.pop("full")
        assert len(made) == 7 and all(stages != full for stages in made.values())
        for name, gone in self.GONE.items():
            assert list(made[name]) == [stage for stage in full if stage not in gone]
        for name in ("no_long_context", "no_long_video_data"):
            (changed, *_) = [k for k in reversed(full) if full[k] != made[name][k]]
            assert list(made[name]) == list(full) and changed == "sft_long"

    def test_a_wrong_name_is_told_with_the_nearest(self) -> None:
        with pytest.raises(RecipeError, match="no variant 'no_ctp'.*mean no_cpt"):
            load_recipe("scale/no_ctp")

    def test_conversion_is_the_stage_from_which_seeds_vary(self) -> None:
        assert isinstance(next(iter(load_recipe("scale").stages.values())), Convert)


def samples(values: Sequence[float], video: int = 2, **more: Any) -> list[Sample]:
    """Answered questions, so many about a video."""
    made = []
    for n, value in enumerate(values):
        score = Score(value, None, Outcome.ANSWERED)
        told: dict[str, Any] = {
            "id": str(n), "suite": "s", "video_id": str(n // video), "family": "order",
            "length_s": 64.0, "question": "q", "options": (), "answer": "a",
            "answer_type": "choice", "evidence": (), "video": None, "prediction": "a",
            "official": score, "plain": score, "error": None, "benchmark": "s", "doc": None,
        }  # fmt: skip
        made.append(Sample(**(told | more)))
    return made


class TestReading:
    def test_a_mean_of_tasks_weighs_questions_by_their_task(self) -> None:
        rows = [
            *samples([1.0] * 6, family="count", benchmark="mlvu"),
            *(replace(one, id=f"o{one.id}") for one in
              samples([0.0, 1.0], family="order", benchmark="mlvu")),
        ]  # fmt: skip
        values = [value for _, value in _values(rows).values()]
        assert sum(values) / len(values) == pytest.approx((1.0 + 0.5) / 2)
        assert [v for _, v in _values(samples([1.0, 0.0])).values()] == [1.0, 0.0]

    def test_what_a_rule_leaves_out_does_not_count_and_what_failed_counts_nothing(self) -> None:
        dropped = [replace(one, official=Score(None, None, Outcome.UNREADABLE)) for one in
                   samples([1.0])]  # fmt: skip
        failed = [replace(one, id="f", error="x") for one in dropped]
        assert [v for _, v in _values([*dropped, *failed]).values()] == [0.0]

    def test_columns_are_benchmarks_or_what_stands_for_them(self) -> None:
        assert columns(SUITES) == MAPPING
        assert columns(["mlvu", "world_ego", "tomato", "world_long"]) == {
            "V-MME": "world_long", "MLVU": "mlvu",
        }  # fmt: skip

    def test_a_change_is_paired_and_both_intervals_are_told(self) -> None:
        before = {seed: {"s": samples([1, 1, 1, 0] * 20)} for seed in range(3)}
        after = {seed: {"s": samples([0, 1, 1, 0] * (20 - seed) + [1, 1, 1, 0] * seed)}
                 for seed in range(3)}  # fmt: skip
        told = change(before, after, "s", lambda sample: True)
        assert told is not None and told.mean == pytest.approx(-(20 + 19 + 18) / 240)
        by_seed = [-(20 - seed) / 80 for seed in range(3)]
        half = 4.302653 * 0.0125 / 3**0.5
        assert told.over_seeds == pytest.approx((by_seed[1] - half, by_seed[1] + half), abs=1e-5)
        assert told.over_questions[0] < told.mean < told.over_questions[1]
        assert (told.questions, told.seeds, told.significant) == (80, 3, True)

    def test_one_seed_is_never_significant(self) -> None:
        told = change({0: {"s": samples([1.0] * 40)}}, {0: {"s": samples([0.0] * 40)}}, "s",
                      lambda sample: True)  # fmt: skip
        assert told is not None and told.over_seeds is None and not told.significant
        both = Change(-0.1, (-0.2, -0.1), (-0.3, 0.1), 10, 3)
        assert not both.significant

    def test_hard_questions_are_chosen_by_what_they_are(self) -> None:
        (hard,), (easy,), (short,) = (
            samples([1.0]), samples([1.0], family="shape"), samples([1.0], length_s=16.0),
        )  # fmt: skip
        assert [is_hard(one) for one in (hard, easy, short)] == [True, False, False]

    def test_bars_that_are_not_met_are_named(self) -> None:
        wide = {"over_questions": (-0.05, 0.05), "over_seeds": (-0.01, 0.01)}
        steps = {"steps_beyond_sft": {"GSPO over SFT, grounding mIoU": None}}
        made = {"questions": {"a": 2000}, "seeds": [0, 1, 2], "changes": {"x": {"a": wide}}}
        (line,) = unmet(made | steps)
        assert "half-width over questions is 5.0 points, 2 are asked" in line
        (line,) = unmet(made | {"changes": {}, "steps_beyond_sft": {"y": wide}})
        assert "half-width over questions is 5.0 points" in line, "a step's width counts too"
