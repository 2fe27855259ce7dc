"""Train the scale model's tokenizer and write its processor: `python -m …training.scale.tokenizer`.

A byte-level BPE, so any text survives the round trip. Two choices make look-ups learnable at this
size: numbers up to three digits are one token wherever they stand (a timestamp, a question and an
answer share it), and a timestamp's tail (`.2 seconds>`) is one token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from internvideo3.model.scale.build import (
    CHAT_TEMPLATE,
    FRAME_PIXELS,
    PATCH_SIZE,
    PROCESSOR_FOLDER,
    SPECIAL_TOKENS,
    SYSTEM_PROMPT,
    VOCABULARY,
)
from internvideo3.tasks.world.questions import narration
from internvideo3.tasks.world.suites import SUITES, draw_suite

PIECES = (
    r"\.\d seconds>|\nAnswer with [^.\n]*\.|\n[A-E]\.|\d{1,3}| ?[A-Za-z_]+| ?[^\sA-Za-z\d]+|\s+"
)
"""Split before BPE: timestamp tails, fixed prompt lines, option letters with their line break,
numbers, words with their space, punctuation, blanks. The first three keep prompts short."""

AGENT_WORDS = (
    ' {"name": "zoom", "arguments": {"start_s": 4, "end_s": 9}} tool observation evidence verify '
    "answer belief hypothesis uncertain memory search scene caption clip system user assistant "
    "The video shows an object. nearer farther same yes no because then after before while first "
    "last between seconds minute question option letter unknown not sure supported unsupported "
)
"""Words that the agent and later recipes need, so that they cost a token and not a letter each."""


def build_processor() -> Qwen3VLProcessor:
    """Train the tokenizer on the world's own text (training seeds) and wrap it in a processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
        model_max_length=65536,
    )
    pixels = {"shortest_edge": FRAME_PIXELS, "longest_edge": FRAME_PIXELS * 4096}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=PATCH_SIZE,
            size={"shortest_edge": FRAME_PIXELS, "longest_edge": FRAME_PIXELS},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=fast,
        video_processor=Qwen3VLVideoProcessor(patch_size=PATCH_SIZE, size=pixels),
        chat_template=CHAT_TEMPLATE,
    )


def _corpus() -> Iterator[str]:
    rng = random.Random(0)
    for number in range(128):
        yield "\n".join([f"<{number}.{tail} seconds>" for tail in range(10)] * 3)
        yield f"{number} - {number}\n" * 20
    for suite in SUITES.values():
        for spec, asked in draw_suite(suite, "train"):
            for question in asked:
                yield question.prompt
                yield f" {question.answer}"
                yield f"Which of: {', '.join(question.options or ())}?"
            yield f"\n{narration(spec)}"
    for _ in range(50):
        yield "system\nuser\nassistant\ntool\n"
        yield f"{SYSTEM_PROMPT} Describe the video.\n{AGENT_WORDS}"
        words = AGENT_WORDS.split()
        rng.shuffle(words)
        yield " " + " ".join(words)


def main() -> None:
    """Write the processor's files to where the scale model ships them."""
    folder = Path(PROCESSOR_FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    build_processor().save_pretrained(folder)


if __name__ == "__main__":
    main()
