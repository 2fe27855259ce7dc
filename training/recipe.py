"""Recipes: what is trained, on what and in which order, as strict YAML files.

A recipe may extend another one (`extends: NAME`): mappings are merged key by key, a stage that is
set to null is left out, and `files` are replaced as a whole. A key that no recipe has is refused
with the nearest known name, and so is one that is said twice.

A value that must be there may be null: it is open, and training says which ones are. So presets say
what was published and leave open what was not.

`PRESET/VARIANT` names a variant of Table 5: what the recipe's own `variants` say of it, else what
`variants.yaml` does, over a preset.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

RECIPES = Path(__file__).parent / "recipes"
VARIANTS = Path(__file__).parent / "variants.yaml"
STRICT = ConfigDict(extra="forbid", strict=True)
Profile = Literal["main", "ego", "spatial"]
Modality = Literal["text", "image", "video"]
Row = dict[str, Any]
DEFAULT_TEACHER = "teacher"
"""Name at its server of a teacher that nobody named."""
FULL = "full"
"""The variant that is everything."""
WHOLE = "files"
"""A mapping that is one value: whoever names files means these and no others."""


class RecipeError(ValueError):
    """A recipe that cannot be used; says what was wrong and what to do."""


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """AdamW with linear warm-up and a cosine towards a final rate."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    learning_rate: Annotated[float, Field(gt=0)]
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the steps over which the rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Of matrices; vectors (norms, biases) decay not at all."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: Annotated[float, Field(gt=0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class WorldData:
    """Videos of the scale world's training split, drawn from seeds."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    lengths: Annotated[dict[int, float], Field(min_length=1)]
    """Video length in seconds → share of the videos."""
    videos: Annotated[int, Field(ge=1)]
    """How many different videos there are; after them a new epoch begins in another order."""
    questions: Annotated[int, Field(ge=1)] = 1
    """Questions asked of one video."""
    profiles: dict[Profile, float] | None = None
    """Share of each kind of video; None: the scale model's own."""
    families: tuple[str, ...] | None = None
    """Question families; None: those that the suites ask of the kind of video."""
    descriptions: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the documents that ask for a description, the longest answers of the world, where
    the kind of video has any; None: no document does."""
    fps: Literal[1, 2, 4, 8] | None = None
    """Frames from a second of video; None: 2, as the scale model is evaluated."""
    first_seed: Annotated[int, Field(ge=0)] = 0
    """Where in the training split the videos begin; stages that should not share videos differ."""


@dataclass(frozen=True, kw_only=True)
class ChatData:
    """Files in the chat form of the released training data, with their own videos and images."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    files: Annotated[dict[str, float], Field(min_length=1)]
    """`.jsonl` or `.parquet` file → share of the samples."""
    fps: Annotated[float, Field(gt=0)] = 2.0
    """Frames from a second of video."""
    max_frames: Annotated[int, Field(ge=1)] = 512
    """Most frames of a video."""
    min_pixels: Annotated[int, Field(ge=1)] = 4096
    """Fewest pixels of a frame."""
    max_pixels: Annotated[int, Field(ge=1)] = 602112
    """Most pixels of a frame."""
    total_pixels: Annotated[int, Field(ge=1)] | None = None
    """Most pixels of all frames of a video together; 2048 of them are a token. None: no limit."""
    most_bad: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the samples that may be unusable before training stops."""


def _data_kind(value: Any) -> str:
    given = value if isinstance(value, dict) else vars(value)
    return "chat" if "files" in given else "world"


Data = Annotated[
    Annotated[WorldData, Tag("world")] | Annotated[ChatData, Tag("chat")],
    Discriminator(_data_kind),
]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of a mixture by samples; the paper's of continued pretraining (section 4.1)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    text: Annotated[float, Field(ge=0)] = 0.299
    image: Annotated[float, Field(ge=0)] = 0.549
    video: Annotated[float, Field(ge=0)] = 0.152

    def by_kind(self) -> dict[Modality, float]:
        """The same as a mapping."""
        return {"text": self.text, "image": self.image, "video": self.video}


@dataclass(frozen=True, kw_only=True)
class Convert:
    """GQA to M²LA, before anything is trained (section 3.2)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    kind: Literal["convert"]
    preset: str = "half"
    """Preset of the conversion's options."""
    videos: Annotated[int, Field(ge=1)] = 48
    """Videos that calibrate it."""
    probe: Annotated[int, Field(ge=1)] = 32
    """Documents of each kind on which the loss is measured before and after."""
    held_out: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Files of rows on which that is, where the data are files; None: it is not measured."""
    data: Data | None = None


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What every stage has to say. None: nobody published it, so whoever trains must set it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps; a GSPO step may make several updates."""
    documents: Annotated[int, Field(ge=1)]
    """Documents of one step, over all processes and accumulated passes."""
    pack_tokens: Annotated[int, Field(ge=1)]
    """Most tokens of one pass; documents share a pass behind a mask."""
    micro_documents: Annotated[int, Field(ge=1)] | None = None
    """Most documents of one pass; None: as many as `pack_tokens` takes."""
    optimiser: Optimiser
    data: Data | None = None
    train_vision: bool = False
    """Whether the vision tower learns."""
    bfloat16: bool = False
    """Matrix products in bf16, sampling too; weights, optimiser and, where responses are sampled,
    logits stay float32."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass."""
    sequence_parallel: Annotated[int, Field(ge=1)] = 1
    """Processes that share each row (256K tokens on several GPUs)."""
    attention: Literal["segments", "mask", "flex"] = "segments"
    """Back-end of the attention; all have the same numbers."""
    save_every: Annotated[int, Field(ge=1)] = 50
    """Steps between two checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Sft(StageOptions):
    """Supervised fine-tuning (section 3.3.2): one stretch of the short-to-long curriculum."""

    kind: Literal["sft"]


@dataclass(frozen=True, kw_only=True)
class Cpt(StageOptions):
    """Continued pretraining after conversion (sections 3.3.1 and 4.1)."""

    kind: Literal["cpt"]
    shares: Shares = Shares()
    probe: Annotated[int, Field(ge=1)] = 32
    """Documents of each kind on which the loss is measured before and after."""
    held_out: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Files of rows on which that is, where the data are files; None: it is not measured."""


@dataclass(frozen=True, kw_only=True)
class Gspo(StageOptions):
    """Rule-based reinforcement learning (section 3.3.3)."""

    kind: Literal["gspo"]
    group: Annotated[int, Field(ge=2)]
    """Responses sampled for each prompt."""
    max_new_tokens: Annotated[int, Field(ge=1)]
    rollouts: str | None = None
    """Address of a server that samples the responses (`internvideo3 serve-policy`), or several with
    commas between, dealt out to the processes; None: they are sampled in the processes themselves.
    It does not decide what is sampled."""
    updates: Annotated[int, Field(ge=1)] = 1
    """Optimiser updates on one batch of responses; the clipped ratio acts from the second on."""
    clip_low: Annotated[float, Field(gt=0)] = 3e-4
    clip_high: Annotated[float, Field(gt=0)] = 4e-4
    kl_weight: Annotated[float, Field(ge=0)] = 0.04
    gap_cap: Annotated[float, Field(ge=1)] = 2.0
    """Most that a response counts for by being likelier to training than to what sampled it."""


@dataclass(frozen=True, kw_only=True)
class Opd(StageOptions):
    """On-policy distillation (section 3.3.4)."""

    kind: Literal["opd"]
    teacher: str
    """Checkpoint folder or name, or the address of a server of OpenAI's form; it must have the
    student's token ids."""
    teacher_model: str = DEFAULT_TEACHER
    """Name of the teacher at the server; by default its address tells it from others."""
    group: Annotated[int, Field(ge=1)] = 1
    """Responses sampled for each prompt."""
    max_new_tokens: Annotated[int, Field(ge=1)]
    rollouts: str | None = None
    """Address of a server that samples the responses (`internvideo3 serve-policy`), or several with
    commas between, dealt out to the processes; None: they are sampled in the processes themselves.
    It does not decide what is sampled."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Divergence over the student's likeliest tokens and one bucket for the rest; None: exact."""
    chunk: Annotated[int, Field(ge=1)] = 1024
    """Most response tokens whose full-vocabulary logits exist at a time; fewer where the vocabulary
    is large (`objectives/linear_cross_entropy.py`)."""

    @property
    def remote(self) -> bool:
        """Whether the teacher is behind a server."""
        return self.teacher.startswith(("http://", "https://"))


KINDS: dict[str, Any] = {"convert": Convert, "cpt": Cpt, "sft": Sft, "gspo": Gspo, "opd": Opd}
Stage = Convert | Cpt | Sft | Gspo | Opd
_STAGE: TypeAdapter[Stage] = TypeAdapter(Annotated[Stage, Field(discriminator="kind")])


@dataclass(frozen=True, kw_only=True)
class Open:
    """A stage with values that nobody published: null, where training needs them."""

    kind: str
    options: Mapping[str, Any]
    """As the files have them."""
    missing: tuple[str, ...]
    """Paths of the open values in the stage."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A start and the stages that follow one another."""

    about: str
    """One sentence for people; where the numbers come from."""
    start: str | None = None
    """Checkpoint folder or name that the first stage begins from."""
    seed: int = 0
    stages: Mapping[str, Stage | Open]


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What a recipe's file may say at its top level."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    about: str
    start: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    variants: dict[str, Any] | None = None
    stages: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe by name or path, with all that it extends.

    Raises:
        RecipeError: Unknown recipe or key, a missing or senseless value, or a circle of `extends`.
    """
    text = str(name)
    if Path(text).suffix in (".yaml", ".yml") or Path(text).is_file() or "/" not in text:
        return _checked(text, _merged(_find(text, Path.cwd()), ()))
    return load_variant(*text.rsplit("/", 1))


def load_variant(preset: str, variant: str) -> Recipe:
    """A variant of Table 5 of a preset (a recipe's name or file).

    Raises:
        RecipeError: As `load_recipe`; or the variant is unknown, or not said of this preset.
    """
    told = yaml.safe_load(VARIANTS.read_text(encoding="utf-8"))
    if variant not in told:
        raise RecipeError(f"no variant {variant!r} of a recipe. {_nearest(variant, told)}")
    path = _find(preset, Path.cwd())
    whole = _merged(path, ())
    own = _own_variants(preset, whole, told)
    overlays = told[variant]["changes"]
    known = [name for name in _ancestry(path) if name in overlays]
    said = [overlays[key] for key in ("every", *known[:1]) if key in overlays]
    changes = [own[variant]] if variant in own else said
    if not changes:
        raise RecipeError(
            f"nothing says what the variant {variant} of {preset} is: {told[variant]['about']} Say "
            f"it in the recipe, as `variants: {{{variant}: {{stages: …}}}}`."
        )
    merged = whole
    for one in changes:
        merged = _overlaid(merged, _of_what_is_there(one, whole))
    if variant != FULL and _effective(merged) == _effective(whole):
        raise RecipeError(
            f"the variant {variant} changes nothing of {preset}, whose stages are "
            f"{', '.join(_effective(whole)['stages'])}; its row would repeat that of {FULL}."
        )
    return _checked(f"{preset}/{variant}", merged)


def _own_variants(preset: str, whole: Mapping[str, Any], told: Mapping[str, Any]) -> Row:
    """What a recipe itself says of variants."""
    own = whole.get("variants") or {}
    for name, change in own.items() if isinstance(own, dict) else [("variants", own)]:
        if name not in told:
            raise RecipeError(f"recipe {preset}: no variant {name!r}. {_nearest(name, told)}")
        if not isinstance(change, dict):
            raise RecipeError(f"recipe {preset}: variants.{name} must be a mapping, got {change!r}")
        if not isinstance(change.get("stages", {}), dict):
            got = change["stages"]
            raise RecipeError(
                f"recipe {preset}: variants.{name}.stages must be a mapping, got {got!r}"
            )
        _check_stages(Path(f"{preset}, variants.{name}"), whole, change)
    return dict(own)


def _of_what_is_there(change: Mapping[str, Any], whole: Mapping[str, Any]) -> Row:
    """A change without the stages that the recipe has left out: there is nothing to change."""
    held = whole.get("stages") or {}
    stages = {
        name: options
        for name, options in (change.get("stages") or {}).items()
        if held.get(name) is not None or (isinstance(options, dict) and "kind" in options)
    }
    return dict(change) | {"stages": stages}


def _effective(merged: Row) -> Row:
    """A recipe without the stages that are left out."""
    stages = {key: one for key, one in (merged.get("stages") or {}).items() if one is not None}
    return merged | {"stages": stages}


def variants() -> dict[str, str]:
    """The variants of Table 5, and what each says of itself."""
    told = yaml.safe_load(VARIANTS.read_text(encoding="utf-8"))
    return {name: one["about"] for name, one in told.items()}


def _checked(name: str, merged: Row) -> Recipe:
    _own_variants(name, merged, variants())
    if isinstance(merged.get("stages"), dict):
        merged = _effective(merged)
    told: list[str] = []
    stages: dict[str, Stage | Open] = {}
    # JSON mode: YAML has lists where the dataclasses have tuples, and nothing else is lax.
    try:
        frame = TypeAdapter(_Frame).validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        told = [_in_words(one, (), _Frame) for one in error.errors()]
        raise RecipeError(f"recipe {name}:\n" + "\n".join(told)) from None
    for key, options in frame.stages.items():
        try:
            stages[key] = _STAGE.validate_json(json.dumps(options), strict=True)
        except ValidationError as error:
            wrong, missing = _sorted_out(error)
            told += [_in_words(one, ("stages", key), Recipe) for one in wrong]
            stages[key] = Open(kind=str(options.get("kind")), options=options, missing=missing)
    if told:
        raise RecipeError(f"recipe {name}:\n" + "\n".join(told))
    return Recipe(about=frame.about, start=frame.start, seed=frame.seed, stages=stages)


NO_VALUE = ("unexpected_keyword_argument", "union_tag_invalid", "union_tag_not_found")
"""Errors about names, not about values that are null."""


def _sorted_out(error: ValidationError) -> tuple[list[Any], tuple[str, ...]]:
    """What is wrong in a stage, and which values are open."""
    wrong, missing = [], []
    for one in error.errors():
        if one["input"] is None and one["type"] not in NO_VALUE:
            missing.append(".".join(_file_path(one["loc"])))
        else:
            wrong.append(one)
    return wrong, tuple(missing)


def complete(recipe: Recipe) -> dict[str, Stage]:
    """The stages of a recipe that leaves nothing open.

    Raises:
        RecipeError: Something that training needs is null; says all of it.
    """
    missing = [] if recipe.start is not None else ["start"]
    found: dict[str, Stage] = {}
    for name, stage in recipe.stages.items():
        if isinstance(stage, Open):
            missing += [f"stages.{name}.{path}" for path in stage.missing]
        else:
            found[name] = stage
        given = stage.options.get if isinstance(stage, Open) else vars(stage).get
        needed = ("data",) if stage.kind == "convert" else ("steps", "data")
        missing += [f"stages.{name}.{key}" for key in needed if given(key) is None]
    if missing:
        raise RecipeError(
            f"{', '.join(sorted(set(missing)))}: not set. Presets leave open what nobody "
            "published; write a recipe that extends this one and sets it (training/README.md shows "
            "how)."
        )
    return found


ELSEWHERE = frozenset({"rollouts", "held_out", "save_every"})
"""Options that do not decide the weights: where something is computed, what is measured or kept."""
SAME_NUMBERS = {"recompute": False, "attention": "segments"}
"""Options that weigh memory against time: a stage goes on under others."""


def stage_digest(
    stage: StageOptions | Convert, seed: int, start: str, teacher: str | None = None
) -> str:
    """Digest of everything that decides a stage's weights, the rows of its files among it.

    Options that are None are left out, so that one that is added later voids no finished stage.

    Args:
        stage: Its options.
        seed: Of the recipe.
        start: Digest of what it begins from (`train.start_digest`).
        teacher: Digest of the weights that it is taught by.

    Raises:
        RecipeError: A file is not there.
    """
    files = stage.data.files if isinstance(stage.data, ChatData) else {}
    rows = {name: file_digest(Path(name)) for name in files}
    options = {key: one for key, one in asdict(stage).items() if key not in ELSEWHERE}
    options |= {key: one for key, one in SAME_NUMBERS.items() if key in options}
    if isinstance(stage, Opd) and stage.remote:
        known_by = served_teacher(stage.teacher, stage.teacher_model)
        options["teacher"] = "a server" if known_by == stage.teacher_model else known_by
    decides = [_without_none(options), seed, start, rows, teacher]
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def served_teacher(address: str, name: str) -> str:
    """What tells a teacher behind a server from others: its name, wherever it is served.

    One that nobody named is known by its address: another one there is not seen.
    """
    return address.rstrip("/") if name == DEFAULT_TEACHER else name


def _without_none(value: Any) -> Any:
    """The same without mappings' entries that are None, at any depth."""
    if not isinstance(value, dict):
        return value
    return {key: _without_none(one) for key, one in value.items() if one is not None}


def file_digest(path: Path) -> str:
    """Digest of a file of rows.

    Raises:
        RecipeError: It is not there.
    """
    if not path.is_file():
        raise RecipeError(f"the recipe's file {path} does not exist (from {Path.cwd()})")
    held = path.stat()
    return _content_digest(path.resolve(), held.st_size, held.st_mtime_ns)


@lru_cache(maxsize=64)
def _content_digest(path: Path, size: int, changed_ns: int) -> str:
    """Stages, variants and seeds ask of the same, large files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require(value: Any, where: str) -> Any:
    """A value that the recipe must have for training.

    Raises:
        RecipeError: It is None.
    """
    if value is None:
        raise RecipeError(
            f"{where} is not set. Write a recipe that extends this one and "
            "sets it (training/README.md shows how)."
        )
    return value


def _find(name: str, beside: Path) -> Path:
    for path in (beside / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    hint = _nearest(name, recipe_names())
    raise RecipeError(f"no recipe {name!r}. {hint} A path to a YAML file works too.")


def _nearest(name: str, known: Iterable[str]) -> str:
    names = tuple(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]}?" if near else f"Known: {', '.join(names)}."


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        circle = " → ".join(one.name for one in (*seen, path))
        raise RecipeError(f"these recipes extend one another in a circle: {circle}")
    try:
        text = path.read_text(encoding="utf-8")
        _check_said_once(path, yaml.compose(text, yaml.SafeLoader))
        read = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {error}") from error
    if not isinstance(read, dict):
        raise RecipeError(f"{path} must be a mapping with `about` and `stages`, got {read!r}")
    base = read.pop("extends", None)
    if base is None:
        return read
    below = _merged(_find(str(base), path.parent), (*seen, path))
    _check_stages(path, below, read)
    return _overlaid(below, read)


def _check_said_once(path: Path, node: Any) -> None:
    """YAML takes the last of two equal keys without a word."""
    waiting = [node]
    while waiting:
        at = waiting.pop()
        if isinstance(at, yaml.MappingNode):
            keys = [key.value for key, _ in at.value if key.tag != "tag:yaml.org,2002:merge"]
            twice = [key for key, count in Counter(map(str, keys)).items() if count > 1]
            if twice:
                line = at.start_mark.line + 1
                raise RecipeError(f"{path} says {', '.join(twice)} twice (mapping at line {line})")
            waiting += [value for _, value in at.value]
        elif isinstance(at, yaml.SequenceNode):
            waiting += at.value


def _check_stages(path: Path, below: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """A stage that the base has not: it is new and has a kind, or its name is mistaken."""
    held, told = below.get("stages"), read.get("stages")
    if not isinstance(held, dict) or not isinstance(told, dict):
        return
    for name, options in told.items():
        if name in held or (isinstance(options, dict) and "kind" in options):
            continue
        what = "there is no such stage to leave out" if options is None else (
            "a new stage says its `kind`, and no such stage is there to change"
        )  # fmt: skip
        raise RecipeError(f"recipe {path}:\n  stages.{name}: {what}. {_nearest(name, held)}")


def _ancestry(path: Path) -> list[str]:
    """Names of a recipe and of those that it extends, nearest first."""
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = read.get("extends")
    return [path.stem, *(_ancestry(_find(str(base), path.parent)) if base else [])]


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _replaces(key, value, old):
            merged[key] = _overlaid(old, value)
        else:
            merged[key] = value
    return merged


def _replaces(key: str, value: Row, old: Row) -> bool:
    """Whether a mapping takes the place of another: files, and data of another kind."""
    if key != "data":
        return key == WHOLE
    return (WHOLE in value and WHOLE not in old) or ("lengths" in value and WHOLE in old)


def _file_path(loc: Sequence[Any]) -> list[str]:
    """The path of a stage's error without the tags of unions ("sft", "world")."""
    path = [str(part) for part in loc]
    tags = {0} | {i + 1 for i, part in enumerate(path) if part == "data"}
    return [part for i, part in enumerate(path) if i not in tags]


def _in_words(error: Any, above: tuple[str, ...], level: Any) -> str:
    """One message of pydantic, with the path into the file and the nearest known key.

    Args:
        error: Its message.
        above: Where in the file the path begins.
        level: What is there.
    """
    path = [str(part) for part in error["loc"]]
    where = ".".join([*above, *(_file_path(path) if above else path)])
    if error["type"] == "unexpected_keyword_argument":
        known = _known_keys(path[:-1], level)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"  {where}: no such key; {hint}"
    if error["type"] == "missing":
        return f"  {where}: is required"
    note = ""
    if isinstance(error["input"], str) and "e" in error["input"]:
        note = " (YAML reads 2e-5 as text; write 2.0e-5)"
    return f"  {where}: {error['msg']}, got {error['input']!r}{note}"


def _known_keys(path: Sequence[str], level: Any) -> list[str]:
    """Keys that the mapping at a path may have."""
    tagged = KINDS | {"world": WorldData, "chat": ChatData}
    for part in path:
        if part in tagged:
            level = tagged[part]
        elif is_dataclass(level) and part in {f.name for f in fields(level)}:
            hint = get_type_hints(level)[part]
            inner = [t for t in (hint, *get_args(hint)) if is_dataclass(t)]
            level = inner[0] if inner else level
    return [f.name for f in fields(level)]
