"""Checkpoints: finding, checking, describing and loading them.

A checkpoint is a folder with `config.json`, safetensors weights and processor files. Known are
Qwen3-VL (GQA), ours (M²LA, with vision or text alone), and the authors' release: a Qwen3-VL
configuration beside weights whose names show the latent attention. Pickled weights are refused,
since unpickling runs code. torch is imported only to load weights.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SCALE_FOLDER = Path(__file__).parent / "scale"
SCALE_NAMES = {
    f"scale:{kind}": SCALE_FOLDER / kind for kind in ("base", "m2la", "control", "agent", "teacher")
}
"""Short names of the checkpoints shipped with the package."""

ARCHITECTURES = {"qwen3_vl": "gqa", "internvideo3": "m2la", "internvideo3_text": "m2la"}
"""Attention of each model type that can be loaded."""

TEXT_DEFAULTS = {"head_dim": 128, "num_key_value_heads": 32}
"""Of transformers' `Qwen3VLTextConfig`, for what a configuration leaves out."""

LONG_BYTES = 2**30
"""Weights that are read with a bar."""

WIDEST_ROW = 1024
"""Columns of a row that the Triton kernels take; wider rows run in plain torch."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PROCESSOR_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json",
    "vocab.json",
)  # fmt: skip
"""What transformers reads a processor from."""
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint is, read from its headers."""

    path: Path
    model_type: str
    attention: str
    """"gqa" or "m2la"."""
    parameters: int
    """Values stored; tied weights count once."""
    layers: int
    row_form: str
    """"grouped" for GQA, else "latent", "prerope" or "released"."""
    query_heads: int
    kv_heads: int
    head_dim: int
    latent_ranks: tuple[int, ...]
    """Latent rank of each layer; empty for GQA."""
    vision_ranks: tuple[int, ...]
    """Latent rank of vision tokens in each layer; empty for GQA."""
    rope_widths: tuple[int, ...]
    """Numbers of rotary key per token of each layer (2 S); empty for GQA."""
    numbers_per_token: int
    """Cached numbers per text token, all layers together."""
    gqa_numbers_per_token: int
    """What a GQA model of the same shape caches."""
    has_kernels: bool
    """Whether every layer's rows, vision tokens' too, have a width that the Triton kernels take."""


def resolve_checkpoint(name: str | Path) -> Path:
    """Folder of a checkpoint given by path, short name, or the name of a downloaded Hub model.

    Raises:
        CheckpointError: there is none; offers the nearest known name.
    """
    text = str(name)
    path = SCALE_NAMES.get(text, Path(text).expanduser())
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json.")
    if text in SCALE_NAMES:
        raise CheckpointError(
            f"{text} is not in this installation ({path} is missing). Reinstall the package with "
            "its weights, or train it in a checkout with `make scale-model`."
        )
    downloaded = _downloaded(text)
    if downloaded is not None:
        return downloaded
    raise CheckpointError(f"no checkpoint {text!r}.{_suggestion(path, text)}")


def _downloaded(name: str) -> Path | None:
    """Folder of a Hub model in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or name.startswith((".", "/")):
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _suggestion(path: Path, text: str) -> str:
    known = list(SCALE_NAMES)
    if path.parent.is_dir():
        folders = [p for p in path.parent.iterdir() if (p / "config.json").is_file()]
        known += [str(p) for p in folders]
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.6)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    return (
        f" Give a folder with config.json, or one of {', '.join(SCALE_NAMES)}; "
        "a Hub model must be downloaded first (hf download OWNER/NAME)."
    )


def read_config(path: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        CheckpointError: it is missing, not JSON, or of an architecture that is not known.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json, so it is no checkpoint.")
    config = read_json(file)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} holds a {kind!r} model. Known are {' and '.join(ARCHITECTURES)}: Qwen3-VL, "
            "and models converted to M²LA by this package (`internvideo3 convert`)."
        )
    if kind != "qwen3_vl":
        return config
    _check_text(file, text_config(config))
    return _as_released(path, config)


def _check_text(file: Path, text: object) -> None:
    """Whether the text part has what everything reads and transformers has no default for.

    Raises:
        CheckpointError: it does not; names what is missing.
    """
    wanted = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    lacking = [name for name in wanted if not isinstance(text, dict) or name not in text]
    if lacking:
        raise CheckpointError(
            f"{file} says nothing of the text model's {', '.join(lacking)}; copy the file again."
        )


def read_json(file: Path) -> dict[str, Any]:
    """A checkpoint's JSON file.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); copy the file again.") from error
    return found


def _as_released(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the authors' release, whose own is that of the GQA model.

    The weights tell: rank and rotary width are read from the shapes of each layer's tensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        shapes |= _stored_shapes(file)
    layers = config["text_config"]["num_hidden_layers"]
    prefix = "model.language_model.layers"
    down = [shapes.get(f"{prefix}.{i}.self_attn.kv_a_proj_with_mqa.weight") for i in range(layers)]
    up = [shapes.get(f"{prefix}.{i}.self_attn.kv_b_proj.weight") for i in range(layers)]
    if not any(down):
        return config
    absent = [i for i in range(layers) if down[i] is None or up[i] is None]
    if absent:
        raise CheckpointError(
            f"{path} has the released layout, but layers {absent[:5]} lack kv_a_proj_with_mqa or "
            "kv_b_proj; copy the weights again."
        )
    ranks = [int(shape[1]) for shape in up if shape]
    slots = [(int(shape[0]) - rank) // 2 for shape, rank in zip(down, ranks, strict=True) if shape]
    latent = {
        "latent_rank": ranks,
        "rope_slots": slots,
        "row_form": "released",
        "qk_norm": "linear",
    }
    text = {k: v for k, v in config["text_config"].items() if k != "model_type"} | latent
    return config | {"model_type": "internvideo3", "text_config": text}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        CheckpointError: there is none, or only pickled weights.
    """
    files = sorted(path.glob("*.safetensors"))
    absent = sorted(_shards_of_index(path) - {file.name for file in files})
    if absent:
        raise CheckpointError(
            f"{path} lacks {len(absent)} of its weight files ({', '.join(absent[:3])}); "
            "copy them again."
        )
    if files:
        return files
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} has pickled weights only ({', '.join(pickles[:3])}). Unpickling runs code, so "
            "they are refused: convert them to safetensors first."
        )
    raise CheckpointError(f"{path} has no *.safetensors file; copy the weights again.")


def _shards_of_index(path: Path) -> set[str]:
    """Names of the weight files that a sharded checkpoint's index lists."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    return set(read_json(index).get("weight_map", {}).values())


def weights_digest(path: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's configuration and weights, in hex.

    Raises:
        CheckpointError: there are no safetensors weights.
    """
    return _files_digest([path / "config.json", *weight_files(path)])


def processor_digest(path: Path) -> str:
    """SHA-256 over the names and contents of what makes ids and pixels of a prompt, in hex."""
    return _files_digest([path / name for name in PROCESSOR_FILES if (path / name).is_file()])


def _files_digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def cache_bytes_per_token(
    config: Path | Mapping[str, Any] | Any, dtype: str | Any, *, vision: bool = False
) -> int:
    """Bytes that one token takes in the cache, all layers together.

    Args:
        config: a checkpoint folder, its configuration as a mapping, or as a transformers object.
        dtype: name of a floating type, or a torch dtype.
        vision: of a vision token, whose rank may be smaller; else of a text token.

    Raises:
        CheckpointError: the type or the architecture is not known.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise CheckpointError(f"no cache type {name!r}; choose one of {', '.join(ITEM_BYTES)}.")
    if isinstance(config, Path):
        config = read_config(config)
    elif not isinstance(config, Mapping):
        config = config.to_dict()
    ranks, ropes = _latent_rows(config)
    if vision:
        ranks = _vision_ranks(config, ranks)
    numbers = sum(ranks) + sum(ropes) if ranks else _gqa_numbers(text_config(config))
    return numbers * ITEM_BYTES[name]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text part of a configuration, with what Qwen3-VL's has by default."""
    found = config.get("text_config", {} if config["model_type"] == "qwen3_vl" else config)
    return TEXT_DEFAULTS | found if isinstance(found, dict) else {}


def inspect(name: str | Path) -> CheckpointInfo:
    """What a checkpoint is, without loading its weights.

    Raises:
        CheckpointError: the checkpoint cannot be used.
    """
    path = resolve_checkpoint(name)
    config = read_config(path)
    text = text_config(config)
    _check_text(path / "config.json", text)
    ranks, ropes = _latent_rows(config)
    of_vision = _vision_ranks(config, ranks)
    widths = [rank + rope for rank, rope in zip(ranks, ropes, strict=True)]
    read = {*widths, *(rank + rope for rank, rope in zip(of_vision, ropes, strict=True))}
    return CheckpointInfo(
        path=path,
        model_type=config["model_type"],
        attention=ARCHITECTURES[config["model_type"]],
        parameters=sum(_stored_values(file) for file in weight_files(path)),
        layers=text["num_hidden_layers"],
        row_form=text.get("row_form", "latent") if ranks else "grouped",
        query_heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        latent_ranks=ranks,
        vision_ranks=of_vision,
        rope_widths=ropes,
        numbers_per_token=sum(widths) or _gqa_numbers(text),
        gqa_numbers_per_token=_gqa_numbers(text),
        has_kernels=bool(widths) and max(read) <= WIDEST_ROW,
    )


def _latent_rows(config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rank and rotary width of each layer; empty for GQA.

    Before rotation there are no slots, but the first layer's rows carry every token's angles.
    """
    if ARCHITECTURES[config["model_type"]] != "m2la":
        return (), ()
    text = text_config(config)
    layers = text["num_hidden_layers"]

    def each(value: int | list[int]) -> list[int]:
        if isinstance(value, list) and len(value) != layers:
            raise CheckpointError(
                f"a list in config.json is of {len(value)} layers, and the model has {layers}; "
                "copy the file again."
            )
        return value if isinstance(value, list) else [value] * layers

    ropes = [2 * slots for slots in each(text["rope_slots"])]
    if text.get("row_form") == "prerope":
        ropes[0] += text["head_dim"]
    return tuple(each(text["latent_rank"])), tuple(ropes)


def _vision_ranks(config: Mapping[str, Any], ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Latent rank of vision tokens in each layer; empty for GQA."""
    own = text_config(config).get("vision_rank")
    if own is None or not ranks:
        return ranks
    return tuple(own) if isinstance(own, list) else (own,) * len(ranks)


def _gqa_numbers(text: Mapping[str, Any]) -> int:
    return int(2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"])


def _stored_values(file: Path) -> int:
    """Number of values in a safetensors file, from its header."""
    return sum(math.prod(shape) for shape in _stored_shapes(file).values())


def _stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a safetensors file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stored:
            names = list(stored.keys())
            return {name: tuple(stored.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy the weights again.") from error


def load_model(
    name: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[Any, Any]:
    """Loads a checkpoint for inference.

    Args:
        name: path or name, see `resolve_checkpoint`.
        device: where to; by default CUDA if there is a GPU.
        dtype: a floating type; "auto" is float32 on CPU and bfloat16 on CUDA.

    A GPU becomes the current one.

    Returns:
        The model (a `Qwen3VLForConditionalGeneration`, for M²LA its subclass) and its
        `Qwen3VLProcessor`. For a converted text model its class, and its tokenizer.

    Raises:
        CheckpointError: the checkpoint cannot be used.
    """
    path = resolve_checkpoint(name)
    config = read_config(path)
    kind = config["model_type"]
    weight_files(path)  # before the imports, which take seconds

    import torch
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    from internvideo3.model.config import InternVideo3Config
    from internvideo3.model.device import device_of, use
    from internvideo3.model.modeling import (
        InternVideo3ForCausalLM,
        InternVideo3ForConditionalGeneration,
    )

    where = device_of(device)
    if dtype == "auto":
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    classes: dict[str, Any] = {
        "qwen3_vl": Qwen3VLForConditionalGeneration,
        "internvideo3": InternVideo3ForConditionalGeneration,
        "internvideo3_text": InternVideo3ForCausalLM,
    }
    given = {"config": InternVideo3Config.from_dict(config)} if kind == "internvideo3" else {}
    reader: Any = AutoTokenizer if kind == "internvideo3_text" else Qwen3VLProcessor
    model = read_weights(classes[kind], path, dtype=torch_type(dtype), **given)
    try:
        processor = reader.from_pretrained(path, local_files_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    use(where)
    return model.to(where).eval(), processor


def read_weights(kind: Any, path: Path, **given: Any) -> Any:
    """A model of a checkpoint's weights, all of them and no others.

    transformers' bar is shown where reading takes long, in a terminal; of a small checkpoint it
    would bury what the command says, and in a log it would be hundreds of carriage returns.

    Args:
        kind: a class with `from_pretrained`.
        path: the checkpoint.
        given: further arguments of `from_pretrained`.

    Raises:
        CheckpointError: they are not there, damaged, or do not fit the configuration.
    """
    from safetensors import SafetensorError

    size = sum(file.stat().st_size for file in weight_files(path))
    try:
        with bars_for(size):
            model, report = kind.from_pretrained(
                path, use_safetensors=True, local_files_only=True, output_loading_info=True, **given
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    check_complete(path, report)
    return model


@contextmanager
def bars_for(size: int) -> Iterator[None]:
    """Bars of transformers while so many bytes are read or written: only where it takes a while."""
    from transformers.utils import logging

    # Where the environment decides, it cannot be overruled but with a warning.
    decided = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
    in_log = not sys.stderr.isatty() and "ipykernel" not in sys.modules
    hidden = (size < LONG_BYTES or in_log) and logging.is_progress_bar_enabled() and not decided
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


def torch_type(dtype: str | torch.dtype) -> torch.dtype:
    """A floating type by name.

    Raises:
        CheckpointError: the type is not known.
    """
    import torch

    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise CheckpointError(f"no weight type {name!r}; choose one of {', '.join(ITEM_BYTES)}.")
    kind: torch.dtype = getattr(torch, name)
    return kind


def check_complete(path: Path, report: Mapping[str, Any]) -> None:
    """Refuses weights that do not fit the configuration; transformers would fill the gaps.

    Args:
        path: the checkpoint.
        report: what `from_pretrained` returns with `output_loading_info`.

    Raises:
        CheckpointError: tensors are missing, not known, or of another shape; names them.
    """
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(map(str, report.get(problem) or ()))
        if names:
            raise CheckpointError(
                f"{path} does not fit its config.json: {len(names)} "
                f"{problem.replace('_', ' ')} ({', '.join(names[:3])}, ...). "
                "Copy the checkpoint again, or give the one that this config.json belongs to."
            )
