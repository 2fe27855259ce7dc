"""Recipes: what is trained, on what and in which order, as strict YAML files.

A recipe may extend another one (`extends: NAME`): mappings are merged key by key, and a stage that
is set to null is left out. A key that no recipe has is refused with the nearest known name.

`PRESET/VARIANT` names a variant of Table 5: what `variants.yaml` says of it, over a preset.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

RECIPES = Path(__file__).parent / "recipes"
VARIANTS = Path(__file__).parent / "variants.yaml"
STRICT = ConfigDict(extra="forbid", strict=True)
Profile = Literal["main", "ego", "spatial"]
Modality = Literal["text", "image", "video"]


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
    bfloat16: bool = False
    """Matrix products in bf16; weights and optimiser stay float32."""
    fps: float | None = None
    """Frames from a second of video, for the record of presets; the world is sampled at 2."""
    max_frames: int | None = None
    """Most frames of a video, for the record of presets."""


@dataclass(frozen=True, kw_only=True)
class Cpt(StageOptions):
    """Continued pretraining after conversion (sections 3.3.1 and 4.1)."""

    kind: Literal["cpt"]
    shares: Shares = Shares()
    probe: Annotated[int, Field(ge=1)] = 32
    """Documents of each kind on which the loss is measured before and after."""
    bfloat16: bool = False
    """Matrix products in bf16; weights and optimiser stay float32."""
    fps: float | None = None
    """Frames from a second of video, for the record of presets; the world is sampled at 2."""
    max_frames: int | None = None
    """Most frames of a video, for the record of presets."""


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


@dataclass(frozen=True, kw_only=True)
class Opd(StageOptions):
    """On-policy distillation (section 3.3.4)."""

    kind: Literal["opd"]
    teacher: str
    """Checkpoint folder or name, or the address of a server of OpenAI's form; it must have the
    student's token ids."""
    teacher_model: str = "teacher"
    """Name of the teacher at the server."""
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
    """Response tokens whose full-vocabulary logits exist at a time."""

    @property
    def remote(self) -> bool:
        """Whether the teacher is behind a server."""
        return self.teacher.startswith(("http://", "https://"))


KINDS: dict[str, Any] = {"convert": Convert, "cpt": Cpt, "sft": Sft, "gspo": Gspo, "opd": Opd}
Stage = Annotated[Convert | Cpt | Sft | Gspo | Opd, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A start and the stages that follow one another."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    about: str
    """One sentence for people; where the numbers come from."""
    start: str | None = None
    """Checkpoint folder or name that the first stage begins from."""
    seed: Annotated[int, Field(ge=0)] = 0
    stages: Annotated[dict[str, Stage], Field(min_length=1)]


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe by name or path, with all that it extends.

    Raises:
        RecipeError: Unknown recipe or key, a missing or senseless value, or a circle of `extends`.
    """
    text = str(name)
    if Path(text).is_file() or "/" not in text:
        return _checked(text, _merged(_find(text, Path.cwd()), ()))
    return load_variant(*text.rsplit("/", 1))


def load_variant(preset: str, variant: str) -> Recipe:
    """A variant of Table 5 of a preset (a recipe's name or file).

    Raises:
        RecipeError: As `load_recipe`; or the variant is unknown, or not said of this preset.
    """
    told = yaml.safe_load(VARIANTS.read_text(encoding="utf-8"))
    if variant not in told:
        near = difflib.get_close_matches(variant, told, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(told)}."
        raise RecipeError(f"no variant {variant!r} of a recipe. {hint}")
    path = _find(preset, Path.cwd())
    overlays = told[variant]["changes"]
    known = [name for name in _ancestry(path) if name in overlays]
    if "every" not in overlays and not known:
        raise RecipeError(
            f"the variant {variant} is not said of the preset {preset}; it is of "
            f"{', '.join(overlays)}. Extend one of these."
        )
    merged = _merged(path, ())
    for key in ("every", *known[:1]):
        merged = _overlaid(merged, overlays.get(key, {}))
    return _checked(f"{preset}/{variant}", merged)


def variants() -> dict[str, str]:
    """The variants of Table 5, and what each says of itself."""
    told = yaml.safe_load(VARIANTS.read_text(encoding="utf-8"))
    return {name: one["about"] for name, one in told.items()}


def _checked(name: str, merged: dict[str, Any]) -> Recipe:
    stages = merged.get("stages")
    if isinstance(stages, dict):
        merged["stages"] = {key: value for key, value in stages.items() if value is not None}
    try:
        # JSON mode: YAML has lists where the dataclasses have tuples, and nothing else is lax.
        return TypeAdapter(Recipe).validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        told = "\n".join(_in_words(one, merged) for one in error.errors())
        raise RecipeError(f"recipe {name}:\n{told}") from None


ELSEWHERE = frozenset({"rollouts"})
"""Options that say where something is computed, and do not decide the weights."""


def stage_digest(
    stage: StageOptions | Convert, seed: int, start: str, teacher: str | None = None
) -> str:
    """Digest of everything that decides a stage's weights, the rows of its files among it.

    Options that are None are left out, so that one that is added later voids no finished stage.

    Args:
        stage: Its options.
        seed: Of the recipe.
        start: Digest of the weights that it begins from.
        teacher: Digest of the weights that it is taught by.

    Raises:
        RecipeError: A file is not there.
    """
    files = stage.data.files if isinstance(stage.data, ChatData) else {}
    rows = {name: _file_digest(Path(name)) for name in files}
    options = {key: one for key, one in asdict(stage).items() if key not in ELSEWHERE}
    decides = [_without_none(options), seed, start, rows, teacher]
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_none(value: Any) -> Any:
    """The same without mappings' entries that are None, at any depth."""
    if not isinstance(value, dict):
        return value
    return {key: _without_none(one) for key, one in value.items() if one is not None}


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise RecipeError(f"the recipe's file {path} does not exist (from {Path.cwd()})")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require(value: Any, where: str) -> Any:
    """A value that the recipe must have for training.

    Raises:
        RecipeError: It is None.
    """
    if value is None:
        raise RecipeError(
            f"{where} is not set: nobody published it. Write a recipe that extends this one and "
            "sets it (training/README.md shows how)."
        )
    return value


def _find(name: str, beside: Path) -> Path:
    for path in (beside / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(recipe_names())}."
    raise RecipeError(f"no recipe {name!r}. {hint} A path to a YAML file works too.")


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        circle = " → ".join(one.name for one in (*seen, path))
        raise RecipeError(f"these recipes extend one another in a circle: {circle}")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {error}") from error
    if not isinstance(read, dict):
        raise RecipeError(f"{path} must be a mapping with `about` and `stages`, got {read!r}")
    base = read.pop("extends", None)
    if base is None:
        return read
    return _overlaid(_merged(_find(str(base), path.parent), (*seen, path)), read)


def _ancestry(path: Path) -> list[str]:
    """Names of a recipe and of those that it extends, nearest first."""
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = read.get("extends")
    return [path.stem, *(_ancestry(_find(str(base), path.parent)) if base else [])]


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _overlaid(old, value)
        else:
            merged[key] = value
    return merged


def _in_words(error: Any, given: Mapping[str, Any]) -> str:
    """One message of pydantic, with the path into the file and the nearest known key."""
    # The tags of unions ("sft", "world") are in the path, but not in the file.
    path = [str(part) for part in error["loc"]]
    tags = {2} | {i + 1 for i, part in enumerate(path) if part == "data"}
    shown = [part for i, part in enumerate(path) if not (i in tags and path[0] == "stages")]
    where = ".".join(shown)
    if error["type"] == "unexpected_keyword_argument":
        known = _known_keys(path[:-1], given)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"  {where}: no such key; {hint}"
    if error["type"] == "missing":
        return f"  {where}: is required"
    note = ""
    if isinstance(error["input"], str) and "e" in error["input"]:
        note = " (YAML reads 2e-5 as text; write 2.0e-5)"
    return f"  {where}: {error['msg']}, got {error['input']!r}{note}"


def _known_keys(path: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """Keys that the mapping at a path may have."""
    tagged = KINDS | {"world": WorldData, "chat": ChatData}
    level: Any = Recipe
    for part in path:
        if part in tagged:
            level = tagged[part]
        elif is_dataclass(level) and part in {f.name for f in fields(level)}:
            hint = get_type_hints(level)[part]
            inner = [t for t in (hint, *get_args(hint)) if is_dataclass(t)]
            level = inner[0] if inner else level
    return [f.name for f in fields(level)]
