"""What is found out before weights are read.

pytest tests/harness/test_preflight.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from internvideo3.harness import preflight
from internvideo3.harness.preflight import PreflightError


def a_world(root: Path, lengths: list[float], missing: frozenset[int] = frozenset()) -> Path:
    folder = root / "test"
    (folder / "videos").mkdir(parents=True)
    (folder / "lmms").mkdir()
    (folder / "lmms/iv3_world_long.yaml").write_text("task: iv3_world_long")
    docs: list[dict[str, Any]] = []
    for number, length in enumerate(lengths):
        video = f"videos/v{number}.mp4"
        if number not in missing:
            (folder / video).write_bytes(b"x")
        for _ in range(2):
            docs.append(
                {
                    "id": f"world_long/{len(docs):06}",
                    "video_id": f"v{number}",
                    "video": video,
                    "length_s": length,
                }
            )
    lines = "".join(json.dumps(doc) + "\n" for doc in docs)
    (folder / "world_long.jsonl").write_text(lines)
    return root


def load(root: Path, **options: Any) -> preflight.Benchmark:
    return preflight.load_benchmark(
        "world_long", root, "test", **({"limit": None, "sample_ids": ()} | options)
    )


def test_suite_names_are_split_expanded_and_not_repeated() -> None:
    assert preflight.suite_names("world_ego, world_long") == ["world_ego", "world_long"]
    whole = preflight.suite_names("world_short,scale")
    assert whole[0] == "world_short"
    assert sorted(whole) == sorted(set(whole)) == sorted(preflight.SUITES)


def test_limit_takes_the_first_and_ids_take_theirs(tmp_path: Path) -> None:
    root = a_world(tmp_path, [4, 8, 8])
    assert [doc["id"][-1] for doc in load(root, limit=3).docs] == ["0", "1", "2"]
    chosen = load(root, sample_ids=("world_long/000004", "world_long/000001"))
    assert [doc["id"][-1] for doc in chosen.docs] == ["1", "4"]
    assert chosen.selected and chosen.whole == 6
    assert load(root).selected is False


def test_a_suite_without_documents_or_task_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="jsonl is missing. Build it with `internvideo3 world"):
        load(tmp_path)
    (a_world(tmp_path, [4]) / "test/lmms/iv3_world_long.yaml").unlink()
    with pytest.raises(PreflightError, match="iv3_world_long.yaml is missing"):
        load(tmp_path)


def test_an_unknown_id_offers_near_ones(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="Near: world_long/00000"):
        load(a_world(tmp_path, [4]), sample_ids=("world_long/000009",))


def test_missing_and_empty_videos_are_listed(tmp_path: Path) -> None:
    root = a_world(tmp_path, [4] * 9, missing=frozenset(range(1, 8)))
    (root / "test/videos/v8.mp4").write_bytes(b"")
    with pytest.raises(PreflightError) as refusal:
        preflight.check_videos([load(root)])
    message = str(refusal.value)
    assert "8 of 9 videos are missing or empty" in message
    assert "v1.mp4" in message and "and 3 more" in message
    assert "internvideo3 world build" in message


def test_blind_shows_another_video_of_the_same_length(tmp_path: Path) -> None:
    root = a_world(tmp_path, [4, 8, 4, 16, 8, 4])
    partner = {key: path.stem for key, path in preflight.blind_videos(load(root)).items()}
    assert all(key != other for key, other in partner.items())
    assert {partner[key] for key in ("v0", "v2", "v5")} == {"v0", "v2", "v5"}
    assert partner["v1"] == "v4" and partner["v4"] == "v1"
    assert partner["v3"] in {"v1", "v4"}
    limited = preflight.blind_videos(load(root, limit=2))
    assert {key: path.stem for key, path in limited.items()} == partner


def test_blind_needs_two_videos(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="needs two videos"):
        preflight.blind_videos(load(a_world(tmp_path, [4])))
