"""The scale model's training: `python -m pytest tests/training/test_scale.py`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

import internvideo3.model.modeling  # noqa: F401
from internvideo3.model.conversion.convert import convert
from internvideo3.model.scale.build import SYSTEM_PROMPT, load_processor, random_model
from internvideo3.tasks.sampling import frame_indices
from internvideo3.tasks.world.difficulty import FILE_FPS
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.questions import questions
from internvideo3.tasks.world.scenes import draw_video
from internvideo3.tasks.world.suites import SUITES, video_seed
from internvideo3.training.scale import convert_stage, language_stage
from internvideo3.training.scale.batches import (
    FAMILY_NAMES,
    PROFILE_FAMILIES,
    QUESTION_TOKENS,
    Difficulty,
    RowWriter,
    answer_text,
    make_batch,
    seed_stream,
)
from internvideo3.training.scale.curriculum import (
    BASE,
    CURRICULA,
    difficulty_at,
    learning_rate_factor,
)
from internvideo3.training.scale.objective import (
    MaskedModel,
    PackedModel,
    answer_loss,
    distillation_loss,
    right_answers,
)
from internvideo3.training.scale.pixels import SIDE_PX, sampled_times, training_patches
from internvideo3.training.scale.scene_heads import SceneHeads, scene_truth
from internvideo3.training.scale.start import scale_weights
from internvideo3.training.scale.vision import FrameEncoder
from internvideo3.training.scale.vision_stage import draw_seconds

MIXED = Difficulty(lengths={4: 1.0}, easy_share=0.5)


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor()


@pytest.fixture(scope="module")
def model() -> Any:
    model = random_model(1)
    scale_weights(model, draw_seconds(0)[0])
    return model.eval()


def processor_inputs(processor: Any, spec: Any, prompt: str) -> Any:
    times = sampled_times(int(spec.length_s))
    content = [{"type": "video"}, {"type": "text", "text": prompt}]
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": content},
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    metadata = VideoMetadata(
        total_num_frames=int(spec.length_s) * FILE_FPS,
        fps=FILE_FPS,
        frames_indices=(times * FILE_FPS).astype(int).tolist(),
    )
    frames = torch.from_numpy(paint(spec, times, SIDE_PX)).permute(0, 3, 1, 2)
    return processor(
        text=[text],
        videos=[frames],
        video_metadata=[metadata],
        do_sample_frames=False,
        do_resize=False,
        return_tensors="pt",
    )


@pytest.mark.parametrize("length", [2, 8, 120])
def test_training_sees_what_the_processor_makes(processor: Any, model: Any, length: int) -> None:
    spec = draw_video(5, length)
    question = questions(spec, random.Random(0), ["needle"])[0]
    inputs = processor_inputs(processor, spec, question.prompt)
    writer = RowWriter(processor.tokenizer)
    prefix, positions_3P = writer.video_prefix(length)
    ids, said = writer.question(question)
    assert inputs["input_ids"][0].tolist() == prefix + ids[:-said]
    patches_PKV = training_patches(spec, None)
    ours = patches_PKV.reshape(-1, patches_PKV.shape[-1])
    # transformers rescales in another order: one float32 rounding of 1/255 apart.
    assert (ours - inputs["pixel_values_videos"]).abs().max() < 1e-6
    theirs, _ = model.model.get_rope_index(
        inputs["input_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        attention_mask=inputs["attention_mask"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
    )
    tail = positions_3P.max() + 1 + np.arange(len(ids) - said)
    expected = np.concatenate([positions_3P, np.tile(tail, (3, 1))], 1)
    assert (theirs[:, 0].numpy() == expected).all()


def test_packed_answers_equal_transformers_generation_path(processor: Any, model: Any) -> None:
    """Every question of a packed row has the logits of the plain model on that question alone."""
    seed = next(iter(seed_stream("train", 3, 1)))
    batch = make_batch(RowWriter(processor.tokenizer), [seed], 4, MIXED, noisy=False)
    with torch.no_grad():
        answers = PackedModel(model)(batch)
    for q in (0, 5, 9):
        ids = torch.cat([batch.prefix_ids_P, batch.ids_BQL[0, q]])[None]
        told = (batch.labels_BQL[0, q] != -100).nonzero()[:, 0] + len(batch.prefix_ids_P)
        with torch.no_grad():
            plain = model(
                input_ids=ids,
                mm_token_type_ids=(ids == model.config.video_token_id).long() * 2,
                pixel_values_videos=batch.patches_FKV.flatten(0, 1),
                video_grid_thw=torch.tensor([[4, 4, 4]]),
            ).logits[0, told]
        assert (plain - answers.logits_AV[answers.question_A == q]).abs().max() < 1e-4


@pytest.mark.parametrize("length", [2, 16])
def test_packed_equals_masked_for_gqa_and_latent(processor: Any, model: Any, length: int) -> None:
    batch = make_batch(RowWriter(processor.tokenizer), seed_stream("train", 0, 2), length, MIXED)
    calibration = list(convert_stage.calibration(processor, 2))
    for either in (model, convert(model, calibration, "half").eval()):
        with torch.no_grad():
            packed, masked = PackedModel(either)(batch), MaskedModel(either)(batch)
        assert (packed.logits_AV - masked.logits_AV).abs().max() < 1e-4
        assert torch.equal(packed.labels_A, masked.labels_A)


def test_packed_gradients_equal_masked(processor: Any, model: Any) -> None:
    batch = make_batch(RowWriter(processor.tokenizer), seed_stream("train", 0, 2), 4, MIXED)
    found = []
    for route in (PackedModel(model), MaskedModel(model)):
        model.zero_grad()
        answer_loss(route(batch)).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 50
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


def test_frame_encoder_equals_the_tower(model: Any) -> None:
    patches_PKV = training_patches(draw_video(2, 4), np.random.default_rng(0))
    with torch.no_grad():
        tokens, deep = FrameEncoder(model.model.visual)(patches_PKV)
        theirs = model.model.visual(patches_PKV.flatten(0, 1), torch.tensor([[4, 4, 4]]))
    assert (tokens.flatten(0, 1) - theirs.pooler_output).abs().max() < 1e-4
    assert (deep[0].flatten(0, 1) - theirs.deepstack_features[0]).abs().max() < 1e-4


def test_pixels_matter(processor: Any, model: Any) -> None:
    """Other pixels, other answers: a loop that trains blind would not notice otherwise."""
    batch = make_batch(RowWriter(processor.tokenizer), seed_stream("train", 0, 1), 4, MIXED)
    blind = batch._replace(patches_FKV=batch.patches_FKV.flip(0))
    with torch.no_grad():
        seen, other = PackedModel(model)(batch), PackedModel(model)(blind)
    assert (seen.logits_AV - other.logits_AV).abs().max() > 1e-3


@pytest.mark.parametrize("length", [2, 7, 32, 120])
def test_sampling_times_are_the_readers(length: int) -> None:
    read = np.array(frame_indices(length * FILE_FPS, float(FILE_FPS))) / FILE_FPS
    if length % 2 == 0:
        assert (sampled_times(length) == read).all()
    assert len(sampled_times(length)) == 2 * length and len(sampled_times(length, 4)) == 4 * length


def test_batches_repeat_and_their_videos_are_in_no_suite(processor: Any) -> None:
    writer = RowWriter(processor.tokenizer)
    first, again = (make_batch(writer, seed_stream("train", 7, 2), 4, MIXED) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert torch.equal(first.ids_BQL, again.ids_BQL)
    suites = {
        video_seed(suite, split, index)
        for suite in SUITES.values()
        for split in ("train", "validation", "test")
        for index in range(suite.videos)
    }
    drawn = [*seed_stream("train", 0, 100), *seed_stream("validation", 0, 100)]
    assert not suites.intersection(drawn)


def test_every_family_of_the_suites_is_trained() -> None:
    trained = {family for shares in PROFILE_FAMILIES.values() for family in shares}
    asked = {family for suite in SUITES.values() for family in suite.families}
    assert asked <= trained <= set(FAMILY_NAMES)


def test_answers_end_and_carry_the_weight_of_one_over_root(processor: Any) -> None:
    batch = make_batch(RowWriter(processor.tokenizer), seed_stream("train", 1, 1), 8, MIXED)
    for q in range(batch.ids_BQL.shape[1]):
        labels = batch.labels_BQL[0, q]
        told = labels[labels != -100]
        assert told[-1] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        weights = batch.weight_BQL[0, q][labels != -100]
        assert torch.allclose(weights, torch.full_like(weights, len(told) ** -0.5))
        text = processor.tokenizer.decode(told[:-1])
        assert text.strip() and processor.tokenizer.decode(batch.ids_BQL[0, q]).count(text) >= 1


def test_option_words_share_their_tokens_with_answers(processor: Any) -> None:
    spec = draw_video(11, 32)
    for question in questions(spec, random.Random(0), ["order", "attime", "shape", "count"]):
        assert question.options is not None
        answer = processor.tokenizer(answer_text(question), add_special_tokens=False)["input_ids"]
        prompt = processor.tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
        assert set(answer) <= set(prompt)


def test_scene_truth_is_what_the_heads_can_reach(model: Any) -> None:
    spec = draw_video(3, 4)
    truth = scene_truth(spec)
    first = spec.scenes[0].things[0]
    visible = [p for p in range(4) if first.enter_s <= p < first.leave_s]
    from internvideo3.tasks.world.difficulty import COLOURS, SHAPES

    column = list(COLOURS).index(first.colour)
    assert truth.here_PC[visible, column].all()
    assert (truth.shape_PC[visible, column] == SHAPES.index(first.shape)).all()
    heads = SceneHeads(model.config.text_config.hidden_size)
    tokens = torch.randn(4, 4, model.config.text_config.hidden_size)
    assert torch.isfinite(heads.loss(tokens, truth))


def test_curriculum_grows() -> None:
    longest = [max(stretch.lengths) for stretch in BASE]
    easy = [stretch.easy_share for stretch in BASE]
    ends = [stretch.until for stretch in BASE]
    assert longest == sorted(longest) and longest[-1] == 120
    assert easy == sorted(easy, reverse=True) and easy[0] == 1.0
    assert ends == sorted(ends) and ends[-1] == 1.0
    assert difficulty_at("base", 0.0).easy_share == 1.0
    for name in CURRICULA:
        assert difficulty_at(name, 1.0) == difficulty_at(name, 0.999)
    assert difficulty_at("late", 0.0).easy_share > difficulty_at("late", 1.0).easy_share
    assert difficulty_at("final", 0.0) == difficulty_at("late", 1.0)
    rates = [learning_rate_factor(step, 1000, 100) for step in range(1000)]
    assert max(rates) == 1.0 and rates[0] < 0.02 and rates[-1] < 0.03


def test_distillation_is_zero_for_the_teacher_itself(processor: Any, model: Any) -> None:
    batch = make_batch(RowWriter(processor.tokenizer), seed_stream("train", 2, 1), 2, MIXED)
    with torch.no_grad():
        answers = PackedModel(model)(batch)
        other = answers._replace(logits_AV=answers.logits_AV.flip(-1))
    assert abs(float(distillation_loss(answers, answers))) < 1e-6
    assert float(distillation_loss(other, answers)) > 0.01


def test_right_answers_counts_whole_answers(processor: Any, model: Any) -> None:
    batch = make_batch(RowWriter(processor.tokenizer), seed_stream("train", 2, 1), 2, MIXED)
    with torch.no_grad():
        answers = PackedModel(model)(batch)
    perfect = torch.nn.functional.one_hot(answers.labels_A, answers.logits_AV.shape[1]).float()
    assert all(
        right == 1.0 for _, right in right_answers(answers._replace(logits_AV=perfect), batch)
    )
    first = answers.question_A == answers.question_A[0]
    spoiled = perfect.clone()
    spoiled[first.nonzero()[-1]] = 0.0
    rights = [right for _, right in right_answers(answers._replace(logits_AV=spoiled), batch)]
    assert rights.count(0.0) == 1


def test_calibration_ends_in_the_ids_that_the_model_writes(processor: Any) -> None:
    for inputs in convert_stage.calibration(processor, 3):
        ids = inputs["input_ids"][0].tolist()
        start = max(i for i, t in enumerate(ids) if processor.tokenizer.decode([t]) == "assistant")
        said = ids[start + 2 :]
        assert processor.tokenizer.decode([ids[start + 1]]) == "\n"
        again = processor.tokenizer(processor.tokenizer.decode(said), add_special_tokens=False)
        assert said == again["input_ids"] and len(said) >= 2
        assert {
            len(inputs[k][0]) for k in ("input_ids", "attention_mask", "mm_token_type_ids")
        } == {len(ids)}


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def options(name: str, steps: int) -> language_stage.Options:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        return language_stage.Options(
            out=out,
            steps=steps,
            vision=None,
            init=tmp_path / "start",
            teacher=None,
            learning_rate=1e-3,
            batch_tokens=600,
            warmup=2,
            weight_decay=0.05,
            curriculum="base",
            seed=3,
        )

    random_model(2).save_pretrained(tmp_path / "start")
    whole = language_stage.Trainer(options("whole", 4), fuse=False)
    for batch in language_stage.StepStream(whole.options, 0):
        whole.train_step(batch)
    first = language_stage.Trainer(options("parts", 4), fuse=False)
    for batch in list(language_stage.StepStream(first.options, 0))[:2]:
        first.train_step(batch)
    first.save()
    second = language_stage.Trainer(options("parts", 4), fuse=False)
    assert second.resume() and second.step == 2
    for batch in language_stage.StepStream(second.options, second.step):
        second.train_step(batch)
    for ours, theirs in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_row_has_room_for_every_family(processor: Any) -> None:
    """No family is silently left out because its questions are too long."""
    writer = RowWriter(processor.tokenizer)
    found = set()
    for index, suite in enumerate(SUITES.values()):
        spec = draw_video(index, max(suite.lengths), suite.profile)
        for question in questions(spec, random.Random(1), suite.families, 12):
            ids, _ = writer.question(question)
            assert len(ids) <= QUESTION_TOKENS
            found.add(question.family)
    assert len(found) >= 12
