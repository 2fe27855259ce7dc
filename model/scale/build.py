"""The scale model: Qwen3-VL's architecture at 1.5 million parameters (design page, section 8).

Everything is transformers' own Qwen3-VL (QK-norm, interleaved MRoPE, DeepStack, GQA); only the
sizes are ours. One second of video at 2 fps is one temporal patch of 64 x 64 pixels: four tokens
and a timestamp.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

SCALE_FOLDER = Path(__file__).parent
PROCESSOR_FOLDER = SCALE_FOLDER / "processor"
PATCH_SIZE = 16
FRAME_PIXELS = 64 * 64
"""Pixels of one frame as the vision tower sees it."""
VOCABULARY = 832
SYSTEM_PROMPT = "You are a helpful assistant."
"""The system prompt of training; lmms-eval's own Qwen3-VL class uses the same."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'video' or 'video' in part -%}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'image' or 'image' in part or 'image_url' in part -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
"""Qwen3-VL's chat form without its tool section."""


def token_id(token: str) -> int:
    """Id of a special token."""
    return SPECIAL_TOKENS.index(token)


def scale_config() -> Qwen3VLConfig:
    """Sizes of the scale model."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1],
        "hidden_act": "gelu_pytorch_tanh",
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def load_processor(folder: Path = PROCESSOR_FOLDER) -> Qwen3VLProcessor:
    """The scale model's tokenizer, image and video processors.

    Raises:
        FileNotFoundError: If the files are missing; says which command makes them.
    """
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"no processor in {folder}; make it with "
            "`python -m internvideo3.training.scale.tokenizer`"
        )
    processor: Qwen3VLProcessor = AutoProcessor.from_pretrained(folder)
    return processor


def random_model(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """The architecture with random float32 weights."""
    torch.manual_seed(seed)
    return Qwen3VLForConditionalGeneration(scale_config())
