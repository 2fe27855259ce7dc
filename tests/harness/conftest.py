"""Shared by the harness tests: a small world on disk and a random scale checkpoint."""

import os
from pathlib import Path

import pytest

# One thread: the suite runs beside others on few cores, and equal runs must be byte-equal.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

SUITES = {"world_short": 4, "world_long": 3}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a world with the first videos of two suites."""
    from internvideo3.tasks.world.build import build_suite
    from internvideo3.tasks.world.suites import SUITES as KNOWN

    root = tmp_path_factory.mktemp("world")
    for name, videos in SUITES.items():
        build_suite(KNOWN[name], root, limit_videos=videos)
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a scale model with random weights."""
    from internvideo3.model.scale.build import load_processor, random_model

    folder = tmp_path_factory.mktemp("checkpoint")
    random_model(0).save_pretrained(folder)
    load_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def manyq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a world with one video of many questions."""
    from internvideo3.tasks.world.build import build_suite

    root = tmp_path_factory.mktemp("manyq")
    build_suite("world_manyq", root, limit_videos=1)
    return root
