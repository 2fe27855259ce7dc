"""Stage 3a: convert the trained scale model to M²LA at half the cache, before any recovery.

python -m internvideo3.training.scale.convert_stage --source DIR/checkpoint --out DIR
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from internvideo3.model.conversion.convert import convert_with_report
from internvideo3.model.scale.build import SYSTEM_PROMPT, load_processor
from internvideo3.tasks.world.difficulty import FILE_FPS
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.questions import draw_question
from internvideo3.tasks.world.scenes import draw_video
from internvideo3.training.scale.batches import (
    PROFILE_FAMILIES,
    PROFILE_SHARES,
    TRAINING_ONLY,
    answer_text,
    seed_stream,
)
from internvideo3.training.scale.pixels import SIDE_PX, sampled_times

log = logging.getLogger("internvideo3.train")
LENGTHS_S = (4, 8, 16, 32)
FIRST_SEED = 9 * 10**8
"""Calibration videos: training seeds that no training batch uses."""


def calibration(processor: Qwen3VLProcessor, videos: int) -> Iterator[dict[str, Tensor]]:
    """Model inputs of one question and its answer about each of many training videos."""
    for index, seed in enumerate(seed_stream("train", FIRST_SEED, videos)):
        rng = random.Random(f"calibration/{seed}")
        length = LENGTHS_S[index % len(LENGTHS_S)]
        kind = rng.choices(list(PROFILE_SHARES), list(PROFILE_SHARES.values()))[0]
        spec = draw_video(seed, length, kind)
        drawn = None
        while drawn is None:
            families = [family for family in PROFILE_FAMILIES[kind] if family not in TRAINING_ONLY]
            drawn = draw_question(spec, rng, rng.choice(families), option_count=2)
        times = sampled_times(length)
        messages: list[Any] = [
            {"role": "system", "content": SYSTEM_PROMPT},
            {
                "role": "user",
                "content": [{"type": "video"}, {"type": "text", "text": drawn.prompt}],
            },
        ]
        frames = torch.from_numpy(paint(spec, times, SIDE_PX)).permute(0, 3, 1, 2)
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(
            text=[prompt],
            videos=[frames],
            video_metadata=[
                VideoMetadata(
                    total_num_frames=length * FILE_FPS,
                    fps=FILE_FPS,
                    frames_indices=(times * FILE_FPS).astype(int).tolist(),
                )
            ],
            do_sample_frames=False,
            do_resize=False,
            return_tensors="pt",
        )
        yield _answered(inputs, processor, f"{answer_text(drawn)}<|im_end|>")


def _answered(inputs: Any, processor: Qwen3VLProcessor, answer: str) -> dict[str, Tensor]:
    """The inputs with the answer's own ids after the generation prompt.

    Rendered as one text, the line break before the answer would swallow the answer's first space,
    and the tokens would not be those that the model writes.
    """
    said = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], said], 1)
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(said)], 1)
    kinds = inputs["mm_token_type_ids"]
    longer["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(said).to(kinds.dtype)], 1)
    return longer


def main(arguments: list[str] | None = None) -> None:
    """Convert, write the checkpoint and what each layer kept."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="GQA checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--videos", type=int, default=64, help="calibration videos")
    named = parser.parse_args(arguments)
    source: Any = AutoModelForImageTextToText.from_pretrained(named.source, dtype=torch.float32)
    processor = load_processor()
    conversion = convert_with_report(source, list(calibration(processor, named.videos)), "half")
    model: Any = conversion.model
    model.to(torch.bfloat16).save_pretrained(named.out)
    processor.save_pretrained(named.out)
    report = {
        "cache_share": conversion.cache_share,
        "layers": [asdict(layer) for layer in conversion.layers],
    }
    (named.out / "conversion.json").write_text(json.dumps(report, indent=1) + "\n")
    log.info("%s", json.dumps(report))


if __name__ == "__main__":
    main()
