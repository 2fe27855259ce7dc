"""Stages on the scale world with the scale model: `pytest tests/training/test_stages.py`."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from internvideo3.model.checkpoint import load_model
from internvideo3.training.documents import WorldDocuments
from internvideo3.training.packing import Pack, pack
from internvideo3.training.policy import Policy, token_logps, vision_ids
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import (
    Cpt,
    Gspo,
    Opd,
    Optimiser,
    Recipe,
    RecipeError,
    Sft,
    StageOptions,
    WorldData,
    load_recipe,
)
from internvideo3.training.rollouts import Response, Sampler, answered
from internvideo3.training.stages.gspo import reward
from internvideo3.training.stages.opd import check_teacher
from internvideo3.training.train import build_stage, train

DATA = WorldData(
    lengths={2: 0.5, 4: 0.5}, videos=8, profiles={"main": 1.0},
    families=("shape", "motion", "ground_object"),
)  # fmt: skip
COMMON: dict[str, Any] = {
    "steps": 2, "documents": 3, "pack_tokens": 2048, "data": DATA,
    "optimiser": Optimiser(learning_rate=1e-4, warmup=0.0),
}  # fmt: skip
SFT = Sft(kind="sft", **COMMON)
GSPO = Gspo(kind="gspo", group=3, max_new_tokens=8, updates=2, **COMMON)
OPD = Opd(kind="opd", group=2, max_new_tokens=8, teacher="scale:base", **COMMON)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model("scale:m2la", "cpu", torch.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages, one after another."""
    out = tmp_path_factory.mktemp("stages")
    stages: dict[str, StageOptions] = {"sft": SFT, "gspo": GSPO, "opd": OPD}
    train(Recipe(about="test", start="scale:m2la", stages=stages), out)  # type: ignore[arg-type]
    return out


class Eye:
    """Keeps what a vision tower was shown."""

    def __init__(self, visual: Any) -> None:
        self.seen: list[Tensor] = []
        self.hook = visual.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: Any) -> None:
        pixels = args[0] if args else kwargs["hidden_states"]
        self.seen.append(pixels.detach().clone())

    def rows(self) -> Tensor:
        return torch.cat([one.reshape(-1, one.shape[-1]) for one in self.seen])


@pytest.mark.parametrize("options", [GSPO, OPD], ids=["gspo", "opd"])
def test_every_pass_sees_the_pixels_of_the_rollout(loaded: Any, options: Any) -> None:
    model, processor = deepcopy(loaded[0]), loaded[1]
    policy = Policy(model)
    stage: Any = build_stage(options, processor, policy, 0, Processes())
    other = stage.reference if isinstance(options, Gspo) else stage.teacher
    rollout, judge = Eye(model.model.visual), Eye(other.model.model.visual)
    works, _ = stage.works(0, policy)
    rollout.hook.remove()
    trains = Eye(model.model.visual)
    for work in works:
        policy(work.pack, work.loss).backward()
    assert len(rollout.rows()) >= 16 * 2 * options.documents
    assert float(rollout.rows().std()) > 0.1
    assert torch.equal(rollout.rows(), trains.rows())
    assert torch.equal(rollout.rows(), judge.rows())


def test_supervised_passes_see_the_videos(loaded: Any) -> None:
    model, processor = deepcopy(loaded[0]), loaded[1]
    policy, eye = Policy(model), Eye(model.model.visual)
    works, _ = build_stage(SFT, processor, policy, 0, Processes()).works(0, policy)
    losses = [float(policy(work.pack, work.loss)) for work in works]
    source = WorldDocuments(DATA, processor, 0)
    shown = torch.cat([source.taught(i).media[0].pixels for i in range(SFT.documents)])
    assert torch.equal(eye.rows(), shown)
    blind = replace(works[0].pack, pixels=torch.zeros_like(works[0].pack.pixels))
    assert abs(float(policy(blind, works[0].loss)) - losses[0]) > 1e-3


def test_continued_pretraining_sees_pictures_and_videos(loaded: Any) -> None:
    """And a row of text alone shows the tower nothing that is used."""
    model, processor = deepcopy(loaded[0]), loaded[1]
    options = Cpt(kind="cpt", **(COMMON | {"documents": 20}))
    policy, eye = Policy(model), Eye(model.model.visual)
    stage: Any = build_stage(options, processor, policy, 0, Processes())
    works, noted = stage.works(0, policy)
    losses = [float(policy(work.pack, work.loss).detach()) for work in works]
    taught = [stage.captions.taught(n) for n in range(20)]
    shown = [m.pixels for one in taught for m in one.media]
    assert torch.equal(eye.rows(), torch.cat(shown))
    samples = {k: noted[f"{k}_samples"][0] for k in ("text", "image", "video")}
    assert samples == {"text": 6, "image": 11, "video": 3} and sum(losses) > 0
    kinds = [stage.captions.kind(n) for n in range(20)]
    words = next(taught[n] for n in range(20) if kinds[n] == "text")
    assert not words.media and not len(pack([words], model).grid_thw)


def test_distillation_over_few_tokens_is_a_bound_and_over_nearly_all_the_same(loaded: Any) -> None:
    model, processor = loaded
    values = {}
    for top_k in (1, 16, 400, None):
        policy = Policy(deepcopy(model))
        options = replace(OPD, top_k=top_k)
        works, _ = build_stage(options, processor, policy, 0, Processes()).works(0, policy)
        values[top_k] = sum(float(policy(work.pack, work.loss).detach()) for work in works)
    assert 0 <= values[1] < values[16] <= values[400] + 1e-7
    assert values[400] == pytest.approx(values[None], rel=1e-3)


def test_training_recomputes_the_log_probabilities_of_the_rollout(loaded: Any) -> None:
    model, processor = loaded
    barred = vision_ids(model, processor)
    source = WorldDocuments(DATA, processor, 0)
    prompt = source.prompt(3)
    responses = Sampler(model, processor, barred, 8).sample(prompt, 4, seed=1)
    document = answered(prompt, responses, source.prompter)
    laid = pack([document], model)
    labels_N = laid.labels_T[laid.labels_T != -100]
    with torch.no_grad():
        logps_N = Policy(deepcopy(model))(
            laid, lambda hidden, head: token_logps(hidden, head, labels_N, barred)
        )
    assert labels_N.tolist() == [i for one in responses for i in one.ids]
    said = torch.tensor([logp for one in responses for logp in one.logps])
    assert (logps_N - said).abs().max() < 1e-4


def test_chunked_log_probabilities_equal_plain_ones() -> None:
    torch.manual_seed(0)
    hidden_NW, head_VW = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5).double()
    hidden_NW.requires_grad_()
    ids_N = torch.tensor([1, 0, 2, 10, 6, 1, 2])
    logits_NV = hidden_NW @ head_VW.T
    keep = [i for i in range(11) if i not in (3, 4)]
    kept = torch.tensor([keep.index(int(i)) for i in ids_N])
    plain_N = log_softmax(logits_NV[:, keep].float(), -1).gather(-1, kept[:, None])[:, 0]
    ours_N = token_logps(hidden_NW, head_VW, ids_N, (3, 4), chunk=3)
    assert (ours_N - plain_N).abs().max() < 1e-6
    (ours,), (plain,) = (torch.autograd.grad(x.sum(), hidden_NW) for x in (ours_N, plain_N))
    assert (ours - plain).abs().max() < 1e-6


def test_sampling_never_says_a_vision_id(loaded: Any) -> None:
    """Not even a model that wants nothing else."""
    model, processor = deepcopy(loaded[0]), loaded[1]
    barred = vision_ids(model, processor)
    names = processor.tokenizer.convert_ids_to_tokens(list(barred))
    assert {"<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_pad|>"} <= set(names)
    prompt = WorldDocuments(DATA, processor, 0).prompt(0)
    sampler = Sampler(model, processor, barred, 6)
    free = Sampler(model, processor, (), 1)
    head = model.lm_head.weight
    with torch.no_grad():
        head[list(barred)] = 50 * head[free.sample(prompt, 1, 0)[0].ids[0]]
    said = [i for one in sampler.sample(prompt, 6, seed=0) for i in one.ids]
    assert said and not set(said) & set(barred)


def test_rewards_are_the_plain_rule_of_the_scorers(loaded: Any) -> None:
    source = WorldDocuments(replace(DATA, families=("ground_object",)), loaded[1], 0)
    prompt = source.prompt(0)
    start, end = (float(part) for part in prompt.doc["answer"].split(" - "))

    def earned(text: str) -> float:
        return reward(prompt, Response((1,), (0.0,), text))

    assert earned(prompt.doc["answer"]) == 1.0
    assert earned(f"from {end:g} to {start:g}") == earned(f"{end:g} - {start:g}") == 1.0
    assert earned(f"{start:g} - {start + 2 * (end - start):g}") == pytest.approx(0.5)
    assert earned("no idea") == 0.0


def test_the_stages_follow_one_another(trained: Path) -> None:
    begun = json.loads((trained / "2-gspo" / "stage.json").read_text())["start"]
    assert begun == str(trained / "1-sft" / "checkpoint")
    rows = {
        name: [json.loads(line) for line in (trained / name / "metrics.jsonl").open()]
        for name in ("1-sft", "2-gspo", "3-opd")
    }
    assert all(0 <= row["reward"] <= 1 and row["mixed_groups"] <= 1 for row in rows["2-gspo"])
    assert all(row["loss"] > 0 for row in rows["3-opd"])
    final, _ = load_model(trained / "3-opd" / "checkpoint", "cpu", torch.float32)
    middle, _ = load_model(trained / "2-gspo" / "checkpoint", "cpu", torch.float32)
    pairs = zip(final.parameters(), middle.parameters(), strict=True)
    assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)


def test_the_prompts_of_distillation_hold_descriptions_that_fit(loaded: Any) -> None:
    """As the paper's set holds long-form captioning beside questions."""
    options = load_recipe("scale").stages["opd"]
    assert isinstance(options, Opd) and isinstance(options.data, WorldData)
    source = WorldDocuments(options.data, loaded[1], 0)
    docs = [source.prompt(n).doc for n in range(80)]
    described = [doc for doc in docs if doc["family"] == "describe"]
    assert 10 <= len(described) <= 30 and len({doc["family"] for doc in docs}) > 6
    ids = [source.prompter.tokenize(f" {doc['answer']}") for doc in described]
    assert max(map(len, ids)) + 1 <= options.max_new_tokens
    without = WorldDocuments(replace(options.data, descriptions=None), loaded[1], 0)
    assert all(without.prompt(n).doc["family"] != "describe" for n in range(80))


def test_a_teacher_with_other_token_ids_is_refused(loaded: Any) -> None:
    _, processor = loaded
    other = deepcopy(processor)
    check_teacher(processor, other)
    other.tokenizer.add_tokens(["<|another|>"])
    with pytest.raises(RecipeError, match=r"other token ids \(1 differ: '<\|another\|>' is None"):
        check_teacher(processor, other)


def noisy(model: Any) -> Any:
    """A copy with noise in its weights, so that what is learnt can be told from chance."""
    copy = deepcopy(model)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in copy.named_parameters():
            if "visual" not in name and weight.ndim > 1:
                weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=noise))
    return copy


def test_reinforcement_learning_finds_what_is_rewarded(loaded: Any) -> None:
    """Rewards of sampled answers to prompts that it is not trained on come to more than double.

    The policy is a good one with noise in its weights and flatter predictions: what it has to find
    again it is told by its rewards alone.
    """
    good, processor = loaded
    policy = Policy(noisy(good))
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.mul_(0.4)
    data = WorldData(
        lengths={2: 1.0}, videos=200, profiles={"main": 1.0},
        families=("shape", "motion", "count", "order"),
    )  # fmt: skip
    options = replace(GSPO, data=data, documents=8, group=8, steps=16, max_new_tokens=6)
    stage: Any = build_stage(options, processor, policy, 0, Processes())
    held = WorldDocuments(replace(data, first_seed=9 * 10**8), processor, 1)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=6e-4)
    found = [earned(policy, stage, held)]
    for step in range(options.steps):
        works, _ = stage.works(step, policy)
        one_update(policy, works, optimizer)
    found.append(earned(policy, stage, held))
    assert found[-1] > 2 * found[0], found


def earned(policy: Policy, stage: Any, held: WorldDocuments) -> float:
    """Mean reward of four sampled answers to each of 32 prompts."""
    sampler = stage.sampler_of(policy)
    rewards = [
        reward(prompt, one)
        for index in range(32)
        for prompt in [held.prompt(index)]
        for one in sampler.sample(prompt, 4, index)
    ]
    return sum(rewards) / len(rewards)


def one_update(policy: Policy, works: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """What the loop does with a step's rows."""
    optimizer.zero_grad()
    for work in works:
        policy(work.pack, work.loss).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def test_distillation_brings_a_distant_student_to_its_teacher(loaded: Any) -> None:
    """The exact reverse KL on prompts that it is not trained on falls to less than half.

    The student is its teacher with noise in its weights; it is measured at every position of right
    answers, where nothing is sampled.
    """
    teacher, processor = loaded
    student = noisy(teacher)
    data = WorldData(lengths={2: 1.0}, videos=200)
    options = replace(
        OPD, teacher="scale:m2la", data=data, documents=8, steps=12,
    )  # fmt: skip
    policy = Policy(student)
    stage: Any = build_stage(options, processor, policy, 0, Processes())
    held = WorldDocuments(replace(data, first_seed=9 * 10**8, questions=8), processor, 1)
    rows = [pack([held.taught(index)], student) for index in range(8)]
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-4)
    found = [reverse_kl(policy, stage.teacher, rows)]
    for step in range(12):
        works, _ = stage.works(step, policy)
        one_update(policy, works, optimizer)
        if step % 4 == 3:
            found.append(reverse_kl(policy, stage.teacher, rows))
    assert found == sorted(found, reverse=True), found
    assert found[-1] < 0.5 * found[0], found


def logits(hidden_NW: Tensor, head_VW: Tensor) -> Tensor:
    return hidden_NW @ head_VW.T


@torch.no_grad()
def reverse_kl(student: Policy, teacher: Policy, rows: list[Pack]) -> float:
    """KL(student ‖ teacher), nats a token, summed over the whole vocabulary."""
    total = tokens = 0.0
    for row in rows:
        p, q = (log_softmax(one(row, logits), -1) for one in (student.eval(), teacher))
        total += float((p.exp() * (p - q)).sum())
        tokens += len(p)
    return total / tokens
