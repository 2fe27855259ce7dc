"""Run with: pytest tests/reports/test_page.py -q (the browser tests need Chromium)."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

from internvideo3.reports import figures, table6, thumbnails
from internvideo3.reports.browser import collect
from internvideo3.reports.page import build_report
from internvideo3.reports.summary import summarise_paths
from internvideo3.reports.thumbnails import Sampling, Thumbnailer, Wanted, moments
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS
from internvideo3.tasks.video import read_frames

# The system's Chromium, or else the one that `playwright install chromium` fetched.
CHROMIUM = (
    os.environ.get("IV3_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
)
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def report(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(runs, tmp_path_factory.mktemp("report"), title="Runs <i>& more</i>")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
        except Error as error:
            pytest.fail(
                "This test opens the page in Chromium, which did not start. Install it with "
                "`sudo apt-get install chromium` (or `.venv/bin/playwright install chromium`), or "
                f"name its program in IV3_CHROMIUM.\n{error}"
            )
        yield opened
        opened.close()


@dataclass
class Visit:
    """An open page and what went wrong on it."""

    page: Page
    trouble: list[str] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)


@pytest.fixture
def visit(browser: Browser, report: Path) -> Iterator[Callable[..., Visit]]:
    opened: list[Page] = []

    def go(width: int = 1280, height: int = 900, scheme: str = "light") -> Visit:
        page = browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        opened.append(page)
        seen = Visit(page)
        page.on("console", lambda m: seen.trouble.append(m.text) if m.type != "log" else None)
        page.on("pageerror", lambda e: seen.trouble.append(str(e)))
        page.on("response", lambda r: seen.responses.append(r.url))
        page.goto(report.as_uri())
        return seen

    yield go
    for page in opened:
        page.close()


def test_the_page_is_one_small_file_with_a_strict_policy(report: Path) -> None:
    text = report.read_text()
    assert report.stat().st_size < 6_000_000
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert policy.group(1).startswith("default-src &#39;none&#39;") or policy.group(1).startswith(
        "default-src 'none'"
    )
    assert "unsafe" not in policy.group(1)
    assert " style=" not in text.split("<script>")[0].split("</style>")[1]
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text)


def test_the_files_beside_the_page(report: Path) -> None:
    names = {p.name for p in report.parent.iterdir()}
    assert {"report.html", "report.md", "leaderboard.csv", "plots"} <= names
    drawings = sorted((report.parent / "plots").glob("*.svg"))
    assert len(drawings) >= 6
    for drawing in drawings:
        root = ElementTree.fromstring(drawing.read_text())
        assert root.tag.endswith("svg") and "#0a000" not in drawing.read_text()


def test_building_twice_gives_the_same_bytes(report: Path, runs: list[Path]) -> None:
    before = report.read_bytes()
    assert build_report(runs, report.parent, title="Runs <i>& more</i>").read_bytes() == before


def test_a_report_in_a_used_folder_leaves_nothing_of_the_former_one(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Its tables and drawings would be taken for those of the runs that the page shows."""
    out, folder = tmp_path / "page", make_run()
    shutil.copy(folder / "samples/world_long.jsonl", folder / "samples/videomme.jsonl")
    build_report([folder], out, title="with a benchmark")
    drawn = {path.stem for path in (out / "plots").iterdir()}
    assert "family-videomme" in drawn and all(map(figures.NAMES.fullmatch, drawn))
    assert {path.suffix for path in out.glob("tables.*")} == {".md", ".tex", ".csv"}
    others = {
        out / "notes.txt": "mine",
        out / "plots/thesis.svg": "<svg/>",
        out / "plots/family-photo.svg": "<svg/>",
        out / "plots/length-notes.txt": "x",
    }
    for path, text in others.items():
        path.write_text(text)

    (folder / "samples/videomme.jsonl").unlink()
    build_report([folder], out, title="without")
    alone = build_report([folder], tmp_path / "alone", title="without").parent
    left = {path.relative_to(out) for path in out.rglob("*.*")}
    fresh = {path.relative_to(alone) for path in alone.rglob("*.*")}
    assert left == fresh | {path.relative_to(out) for path in others}
    assert {path: path.read_text() for path in others} == others


def test_it_loads_alone_and_without_trouble(visit: Callable[..., Visit], report: Path) -> None:
    seen = visit()
    page = seen.page
    assert page.title() == "Runs <i>& more</i>"
    assert page.locator("#browser").is_visible()
    assert page.locator("figure.plot svg").count() >= 6
    assert page.locator(".frames img").count() >= 3
    loaded = page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert loaded
    assert [u for u in seen.responses if not u.startswith(("file:", "data:"))] == []
    assert seen.trouble == []


def test_the_leaderboard_shows_the_recorded_numbers(
    visit: Callable[..., Visit], runs: list[Path]
) -> None:
    page = visit().page
    for path, name in zip(runs, ("GQA base", "M²LA"), strict=False):
        value = json.loads((path / "results.json").read_text())["world_long"]["value"]
        row = page.locator(".board tr", has=page.locator("th", has_text=name)).first
        assert f"{100 * value:.1f}" in row.inner_text()
        assert "scale" in row.inner_text()
    assert "Not comparable with the paper" in page.locator(".notice").inner_text()


def test_hostile_text_is_shown_and_does_not_run(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    page.select_option("#filter-suite", "world_long")
    hostile = page.locator("#sample h3", has_text="<script>window.pwned=1</script>")
    for _ in range(40):
        if hostile.count():
            break
        page.keyboard.press("j")
    assert "{{7*7}}" in hostile.inner_text()
    assert "onerror" in page.locator(".said").first.inner_text()
    assert page.evaluate("window.pwned") is None
    assert page.locator("#sample script, #sample img[onerror]").count() == 0
    assert seen.trouble == []


def test_keys_move_through_the_answers(visit: Callable[..., Visit]) -> None:
    page = visit().page

    def position() -> str:
        return page.locator(".step small").inner_text()

    total = page.locator("#list .item").count()
    assert position() == f"1 / {total}"
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert position() == f"3 / {total}"
    page.keyboard.press("k")
    assert position() == f"2 / {total}"
    page.locator("#list").focus()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("ArrowDown")
    assert position() == f"3 / {total}"
    assert page.locator('.item[aria-selected="true"]').get_attribute("id") == "item-2"
    page.keyboard.press("End")
    assert position() == f"{total} / {total}"
    page.keyboard.press("j")
    assert position() == f"{total} / {total}"
    page.locator("#previous").focus()
    page.keyboard.press("Enter")
    assert position() == f"{total - 1} / {total}"
    assert page.evaluate("document.activeElement.id") == "previous"


def test_tab_reaches_every_control(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.evaluate("""() => {
      window.reached = [];
      document.addEventListener(
        'focusin', e => window.reached.push(e.target.id || e.target.tagName));
    }""")
    for _ in range(30):
        page.keyboard.press("Tab")
    reached = set(page.evaluate("window.reached"))
    wanted = {"filter-suite", "filter-family", "filter-result", "list", "next", "SUMMARY", "A"}
    assert wanted <= reached


def test_filters_narrow_the_list(visit: Callable[..., Visit]) -> None:
    page = visit().page
    total = page.locator("#list .item").count()
    page.select_option("#filter-suite", "world_grounding")
    spans = page.locator("#list .item").count()
    assert 0 < spans < total
    assert page.locator(".timeline .track").count() >= 2
    page.select_option("#filter-suite", "")
    page.select_option("#filter-result", "wrong0")
    assert page.locator("#list .item").count() < total
    first = page.locator(".answers .verdict").first.inner_text()
    assert "right" not in first
    page.select_option("#filter-result", "differ")
    page.select_option("#filter-family", "needle")
    marks = page.locator("#list .item").first.locator(".mark").all_inner_texts()
    assert len(set(marks)) > 1
    page.select_option("#filter-family", "")
    values = page.locator("#filter-result option").evaluate_all(
        "options => options.filter(o => o.text.includes(' better than ')).map(o => o.value)"
    )
    # Each pair of the table of differences, both ways.
    assert len(values) == 6
    counts = []
    for value in values[:2]:
        page.select_option("#filter-result", value)
        counts.append(page.locator("#list .item").count())
        for item in page.locator("#list .item").all()[:5]:
            first, second = item.locator(".mark").all_inner_texts()[:2]
            assert (first, second) != ("✓", "✓") or "Grounding" in item.inner_text()
    assert sum(counts) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_horizontal_scroll(visit: Callable[..., Visit], scheme: str) -> None:
    seen = visit(390, 844, scheme)
    page = seen.page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for suite in ("world_long", "world_grounding"):
        page.select_option("#filter-suite", suite)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        wide = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => "
            "e.getBoundingClientRect().right > 391 && !e.closest('svg, thead')).length"
        )
        assert wide == 0
    assert page.locator("#next").is_visible()
    page.locator("#next").click()
    assert page.locator(".step small").inner_text().startswith("2 /")
    assert seen.trouble == []


def test_a_phone_shows_all_of_table_6(browser: Browser, tmp_path: Path) -> None:
    """Each system with its numbers below it; of a wide table most was beyond the edge."""
    file = tmp_path / "table6.html"
    run = {"run": "r", "command": "internvideo3 eval --mode agentic", "commit": "a", "dirty": True}
    file.write_text(table6.html([], [run]))
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(file.as_uri())
    wide = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => "
        "e.getBoundingClientRect().right > 391 && !e.closest('thead')).length"
    )
    assert (page.evaluate("document.documentElement.scrollWidth"), wide) == (390, 0)
    number = page.locator("td", has_text="+2.7")
    assert number.get_attribute("data-label") == "− direct" and number.is_visible()
    assert page.locator("td", has_text="–").first.is_hidden()
    # A command is not broken within an option.
    tops = page.locator(".word").evaluate_all("words => words.map(word => word.offsetHeight)")
    assert len(tops) == 4 and len(set(tops)) == 1
    page.close()


@pytest.mark.parametrize("systems", [2, 6])
@pytest.mark.parametrize("width", [390, 1280])
def test_thirty_suites_stand_below_one_another(
    browser: Browser, runs: list[Path], tmp_path: Path, width: int, systems: int
) -> None:
    names = [*BENCHMARKS, "videomme_subtitles"]
    copies = [
        Path(shutil.copytree(runs[number % 2], tmp_path / f"run_{number}"))
        for number in range(systems)
    ]
    for copy in copies:
        for name in names:
            shutil.copy(copy / "samples/world_long.jsonl", copy / f"samples/{name}.jsonl")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(build_report(copies, tmp_path / "page", title="All").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    rows = page.locator(".board.tall tbody tr")
    assert rows.count() == len(names) + 2 + 1, "the suites, the world's two, the mean"
    assert rows.nth(0).locator("td b").count() == systems
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width == 1280:  # words and numbers are not broken into letters
        heights = page.locator(".board.tall tr").evaluate_all(
            "rows => rows.map(row => row.offsetHeight)"
        )
        assert max(heights) < 130
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(visit: Callable[..., Visit], scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for the marks of figures."""
    page = visit(scheme=scheme).page
    ratio = """(name) => {
      const style = getComputedStyle(document.documentElement);
      const light = (hex) => {
        const parts = [1, 3, 5].map(i => parseInt(hex.trim().slice(i, i + 2), 16) / 255)
          .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
      };
      const [a, b] = [light(style.getPropertyValue(name)), light(style.getPropertyValue('--bg'))];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }"""
    for name in ("--ink", "--muted", "--warn", "--right", "--wrong"):
        assert page.evaluate(ratio, name) >= 4.5, name
    for name in ("--s0", "--s1", "--s2", "--s3", "--s4", "--s5", "--control"):
        assert page.evaluate(ratio, name) >= 3.0, name


def test_without_scripts_everything_else_is_there(browser: Browser, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".board").is_visible()
    assert "needs JavaScript" in page.locator("body").inner_text()
    context.close()


def test_samples_cover_families_and_patterns(runs: list[Path]) -> None:
    got = collect(summarise_paths(runs))
    rows = [r for r in got.payload["samples"] if r["suite"] == "world_long"]
    assert {r["family"] for r in rows} == {"needle", "order", "count"}
    assert got.shown == len(got.payload["samples"]) and got.total == 72
    ids = [r["id"] for r in rows]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)
    assert all(len(r["frames"]) >= 3 for r in rows)
    assert any(f["evidence"] for r in rows for f in r["frames"])
    assert any(a["error"] for r in got.payload["samples"] for a in r["answers"])


def test_a_missing_video_leaves_its_samples_without_pictures(make_run: MakeRun) -> None:
    folder = make_run()
    shutil.rmtree(folder.parent / "videos")
    got = collect(summarise_paths([folder]))
    assert all(r["frames"] == [] for r in got.payload["samples"])
    assert "no pictures" in got.notes[0]


def test_pictures_stop_at_their_budget(make_run: MakeRun) -> None:
    folder = make_run()
    video = next((folder.parent / "videos").glob("*.mp4"))
    camera = Thumbnailer(budget_bytes=1)
    wanted = Wanted((0.5, 1.5), 2, Sampling(2.0, 768))
    assert len(camera.take(video, wanted)) == 2
    assert camera.take(video, wanted) == []


@pytest.mark.parametrize("short_s", [0.0, 180.0], ids=["long", "short"])
@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({"fps": 2.0, "max_frames": 4}, {}),
        ({"fps": 0.7, "max_frames": 768}, {}),
        ({"fps": 2.0, "max_frames": 768}, {"fps": 0.4}),
        ({"fps": 2.0, "max_frames": 5}, {"steps_over_s": 23.0}),
    ],
    ids=["few", "slow", "of the question", "single pictures"],
)
def test_frames_are_those_that_the_model_was_given(
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, float],
    own: dict[str, float],
    short_s: float,
) -> None:
    """By the reader's own choice, whether a video is decoded whole or around each frame."""
    monkeypatch.setattr(thumbnails, "WHOLE_VIDEO_S", short_s)
    folder = make_run()
    meta = json.loads((folder / "run.json").read_text())
    meta["config"] |= settings
    (folder / "run.json").write_text(json.dumps(meta))
    file = folder / "samples/world_long.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"sampling": own} for row in rows if row["video_id"] == "v2"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples/world_grounding.jsonl").unlink()

    given = read_frames(folder.parent / "videos/v2.mp4", **(settings | own))  # type: ignore[arg-type]
    seen = {
        round(number / given.source_fps, 3): place for place, number in enumerate(given.indices)
    }
    payload = collect(summarise_paths([folder])).payload
    assert len(payload["samples"]) == 3
    for row in payload["samples"]:
        assert len(row["frames"]) >= min(4, len(given.indices))
        for frame in row["frames"]:
            pixels_HWC = given.pixels_THWC[seen[frame["t"]]]
            assert payload["images"][frame["image"]] == thumbnails.encode(pixels_HWC)


def test_pictures_of_a_moment_are_of_the_frame_at_it(make_run: MakeRun) -> None:
    """As a look of an agent has times of its own, and no sampler of the whole video."""
    video = make_run().parent / "videos" / "v2.mp4"
    wanted = Wanted((3.0, 20.0, 0.0, 23.875), 4)
    taken = Thumbnailer(10**6).take(video, wanted)
    assert [one.time_s for one in taken] == [0.0, 3.0, 20.0, 23.875]
    every = read_frames(video, fps=8.0)
    assert [one.uri for one in taken] == [
        thumbnails.encode(every.pixels_THWC[int(8 * one.time_s)]) for one in taken
    ]


def test_a_text_only_run_has_no_pictures(make_run: MakeRun) -> None:
    folder = make_run()
    meta = json.loads((folder / "run.json").read_text())
    meta["config"]["control"] = "text"
    (folder / "run.json").write_text(json.dumps(meta))
    assert all(row["frames"] == [] for row in collect(summarise_paths([folder])).payload["samples"])


@pytest.mark.parametrize(("own", "told"), [(None, 1), ({}, 0)])
def test_frames_that_a_run_does_not_tell_are_said_to_be_unknown(
    make_run: MakeRun, own: dict[str, float] | None, told: int
) -> None:
    folder = make_run()
    name = "longvideobench_interleaved"
    rows = (folder / "samples/world_long.jsonl").read_text().splitlines()
    text = "".join(json.dumps(json.loads(row) | {"sampling": own}) + "\n" for row in rows)
    (folder / f"samples/{name}.jsonl").write_text(text)
    notes = collect(summarise_paths([folder])).notes
    assert sum("how frames were taken depends on the question" in note for note in notes) == told


def test_moments_put_the_evidence_first() -> None:
    assert moments([(4.0, 6.0), (10.0, 11.0)], 20.0)[:2] == [5.0, 10.5]
    assert moments([], None) == []
    assert len(moments([(float(i), i + 1.0) for i in range(50)], 60.0)) <= 3 + 5 + 100
