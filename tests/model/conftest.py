"""Random scale-sized models and their inputs, shared by the tests of model/."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm
from transformers.video_utils import VideoMetadata

from internvideo3.model.conversion.convert import convert
from internvideo3.model.conversion.options import PRESETS
from internvideo3.model.modeling import InternVideo3ForConditionalGeneration
from internvideo3.model.scale.build import SYSTEM_PROMPT, load_processor, random_model

Inputs = dict[str, Any]


@dataclass(frozen=True)
class FakeFrames:
    """What tasks.video.read_frames returns, without a file."""

    pixels_THWC: np.ndarray
    indices: tuple[int, ...]
    source_fps: float = 8.0
    total_frames: int = 0


def draw_frames(count: int, seed: int, size: int = 64) -> FakeFrames:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return FakeFrames(pixels, tuple(range(0, 4 * count, 4)), total_frames=4 * count)


def chat(question: str, videos: int = 0, images: int = 0) -> list[dict[str, Any]]:
    media = [{"type": "video"}] * videos + [{"type": "image"}] * images
    user = {"role": "user", "content": [*media, {"type": "text", "text": question}]}
    return [{"role": "system", "content": SYSTEM_PROMPT}, user]


class Inputter:
    """Model inputs as the processor makes them."""

    def __init__(self, processor: Qwen3VLProcessor) -> None:
        self.processor = processor

    def __call__(
        self, question: str, videos: tuple[FakeFrames, ...] = (), images: tuple[Any, ...] = ()
    ) -> Inputs:
        text = self.processor.apply_chat_template(
            chat(question, len(videos), len(images)), tokenize=False, add_generation_prompt=True
        )
        media: dict[str, Any] = {}
        if videos:
            media["videos"] = [torch.from_numpy(v.pixels_THWC).permute(0, 3, 1, 2) for v in videos]
            media["video_metadata"] = [
                VideoMetadata(v.total_frames, fps=v.source_fps, frames_indices=list(v.indices))
                for v in videos
            ]
        if images:
            media["images"] = list(images)
        batch = self.processor(
            text=[text], return_tensors="pt", do_sample_frames=False, padding=True, **media
        )
        return dict(batch)


def pad_together(rows: list[Inputs]) -> Inputs:
    """Left-pads single inputs into one batch."""
    longest = max(row["input_ids"].shape[1] for row in rows)

    def left(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (longest - x.shape[1], 0))

    batch: Inputs = {
        name: torch.cat([left(torch.as_tensor(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    for name in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"):
        present = [row[name] for row in rows if name in row]
        if present:
            batch[name] = torch.cat(present)
    return batch


@pytest.fixture(autouse=True)
def _exact_norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps float64 through RMSNorm, which transformers computes in float32.

    Rounded to float32, two float64 paths would mostly agree bit for bit and sometimes differ by
    1e-8: the comparison would see neither path.
    """

    def forward(self: Qwen3VLTextRMSNorm, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        variance = wide.pow(2).mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)

    monkeypatch.setattr(Qwen3VLTextRMSNorm, "forward", forward)
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    """Fills memory that nobody has written to with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def processor() -> Qwen3VLProcessor:
    return load_processor()


@pytest.fixture(scope="session")
def inputs(processor: Qwen3VLProcessor) -> Inputter:
    return Inputter(processor)


def lively_model(seed: int = 1) -> Qwen3VLForConditionalGeneration:
    """A random model whose attention is far from uniform."""
    model = random_model(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            elif "q_norm" in name or "k_norm" in name:
                # Gains that differ within a rotated pair: they must act before the rotation.
                parameter.add_(0.4 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.fixture(scope="session")
def source() -> Qwen3VLForConditionalGeneration:
    """A GQA model in float64."""
    return lively_model()


@pytest.fixture(scope="session")
def calibration(inputs: Inputter) -> list[Inputs]:
    return [
        inputs("Which red circle moves left?", (draw_frames(16, 1),)),
        inputs("What moves right and who is it?", (draw_frames(12, 2),)),
        inputs("How many circles are there?"),
    ]


@pytest.fixture(scope="session")
def identity(
    source: Qwen3VLForConditionalGeneration, calibration: list[Inputs]
) -> InternVideo3ForConditionalGeneration:
    """The source converted at full rank, float64: the same function in the other form."""
    return convert(source, calibration, "full")


@pytest.fixture(scope="session")
def half(
    source: Qwen3VLForConditionalGeneration, calibration: list[Inputs]
) -> InternVideo3ForConditionalGeneration:
    """The source at half the cache, with modality adapters, float64."""
    options = PRESETS["half"](source.config.text_config).with_(rope_slots=8, adapters=True)
    return convert(source, calibration, options)


@pytest.fixture(scope="session")
def nested(
    source: Qwen3VLForConditionalGeneration, calibration: list[Inputs]
) -> InternVideo3ForConditionalGeneration:
    """As `half`, with half the latent rank for vision tokens, and other ranks in every layer."""
    options = PRESETS["half"](source.config.text_config).with_(
        rope_slots=8, adapters=True, tempered=True, vision_rank_share=0.5
    )
    return convert(source, calibration, options)


@pytest.fixture(
    params=["gqa", "m2la reconstruct", "m2la absorbed", "nested reconstruct", "nested absorbed"]
)
def model(request: pytest.FixtureRequest, source: Any, with_form: Any, nested_form: Any) -> Any:
    """Each model that a session must run on; a session computes what the whole model does."""
    kind, _, form = request.param.partition(" ")
    return {"gqa": lambda _: source, "m2la": with_form, "nested": nested_form}[kind](form)


@pytest.fixture
def with_form(
    identity: InternVideo3ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], InternVideo3ForConditionalGeneration]:
    """The identity conversion, restricted to one form of attention."""

    return lambda form: _restricted(identity, form, monkeypatch)


@pytest.fixture
def nested_form(
    nested: InternVideo3ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], InternVideo3ForConditionalGeneration]:
    """The conversion with a smaller rank for vision tokens, in one form of attention."""
    return lambda form: _restricted(nested, form, monkeypatch)


def _restricted(
    model: InternVideo3ForConditionalGeneration, form: str, monkeypatch: pytest.MonkeyPatch
) -> InternVideo3ForConditionalGeneration:
    monkeypatch.setattr(model.config.text_config, "attention_form", form)
    return model


@pytest.fixture
def pad() -> Callable[[list[Inputs]], Inputs]:
    return pad_together


@pytest.fixture(name="chat")
def chat_fixture() -> Callable[..., list[dict[str, Any]]]:
    return chat


@pytest.fixture
def frames() -> Callable[..., FakeFrames]:
    return draw_frames
