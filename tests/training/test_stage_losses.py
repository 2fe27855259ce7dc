"""What stages minimise, by definition: `pytest tests/training/test_stage_losses.py`.

A step of a stage (rows of several documents, several rows, chunks of logits) is held to the same
sum in float64, made of ordinary forward passes of the model, one response at a time.

Letters: S words of a response, V vocabulary, K likeliest words.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

from internvideo3.model.checkpoint import load_model
from internvideo3.model.prompt import Prompter
from internvideo3.training.captions import WorldCaptions
from internvideo3.training.documents import Document, Prompt, WorldDocuments
from internvideo3.training.endpoint import Endpoint
from internvideo3.training.loop import Loop, Work
from internvideo3.training.policy import Policy
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import (
    Cpt,
    Gspo,
    Opd,
    Optimiser,
    Recipe,
    Sft,
    Shares,
    StageOptions,
    WorldData,
)
from internvideo3.training.remote import RemoteTeacher
from internvideo3.training.rollouts import Response, Samples, answered
from internvideo3.training.stages import gspo as gspo_stage
from internvideo3.training.stages.gspo import reward
from internvideo3.training.stages.opd import OpdStage
from internvideo3.training.stages.sft import SftStage
from internvideo3.training.train import build_stage, quiet, train, unwatched

DATA = WorldData(
    lengths={2: 0.5, 4: 0.5}, videos=12, profiles={"main": 1.0}, questions=3,
    families=("attime", "ground_object"),
)  # fmt: skip
COMMON: dict[str, Any] = {
    "steps": 2, "documents": 5, "micro_documents": 2, "pack_tokens": 2048, "data": DATA,
    "optimiser": Optimiser(learning_rate=1e-4, warmup=0.0),
}  # fmt: skip
SFT = Sft(kind="sft", **COMMON | {"data": replace(DATA, families=("shape", "ground_object"))})
GSPO = Gspo(
    kind="gspo", group=6, max_new_tokens=6, clip_low=0.005, clip_high=0.01, kl_weight=0.5, **COMMON
)
OPD = Opd(kind="opd", group=2, max_new_tokens=6, teacher="scale:base", **COMMON)
STEP = 1


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The scale model, made less sure of itself so that groups differ, and its processor."""
    model, processor = load_model("scale:m2la", "cpu", torch.float32)
    move(model, 0.1, seed=3)
    model.model.language_model.norm.weight.data.mul_(0.6)
    return model, processor


@pytest.fixture(scope="module")
def teacher() -> Any:
    """The teacher as transformers runs it."""
    return load_model("scale:base", "cpu", torch.float64)[0]


@torch.no_grad()
def move(model: Any, size: float, seed: int) -> None:
    """Add noise to what is learnt."""
    noise = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "visual" not in name and weight.ndim > 1:
            weight.add_(size * weight.std() * torch.randn(weight.shape, generator=noise))


def plain_copy(policy: Policy) -> Any:
    """The model as it is now, in float64."""
    return deepcopy(policy.model).double()


def plain_logps(model: Any, document: Document, ids: Sequence[int]) -> Tensor:
    """Log-probabilities `[T,V]` of what follows each of the ids, by an ordinary forward pass."""
    config, ids_1T = model.config, torch.tensor([ids])
    image = (ids_1T == config.image_token_id).int()
    told = {"mm_token_type_ids": image + 2 * (ids_1T == config.video_token_id).int()}
    for kind, pixels in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        media = [one for one in document.media if one.kind == kind]
        if media:
            told[pixels] = torch.cat([one.pixels for one in media]).double()
            told[f"{kind}_grid_thw"] = torch.stack([one.grid_thw for one in media])
    logits: Tensor = model(
        input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False, **told
    ).logits[0]
    assert logits.dtype == torch.float64
    return logits.log_softmax(-1)


def words_of(document: Document) -> Iterator[tuple[list[int], int, int]]:
    """Each answer: the ids up to its end, and from and to where it stands in them."""
    for start, stop in document.said:
        yield list(document.trunk_ids[:stop]), start, stop
    for branch in document.branches:
        ids = [*document.trunk_ids, *branch.ids]
        yield ids, len(ids) - branch.said, len(ids)


def answer_logps(model: Any, document: Document) -> Iterator[Tensor]:
    """Log-probabilities `[S]` of the words of each answer."""
    for ids, start, stop in words_of(document):
        said_S = torch.tensor(ids[start:stop])
        logps_SV = plain_logps(model, document, ids)[start - 1 : stop - 1]
        yield logps_SV.gather(-1, said_S[:, None])[:, 0]


class Rollout(NamedTuple):
    """A prompt and what the policy said."""

    prompt: Prompt
    document: Document
    responses: list[Response]


class Keeps:
    """A sampler that keeps what it sampled."""

    def __init__(self, inner: Samples, prompter: Any) -> None:
        self.inner, self.prompter = inner, prompter
        self.barred = inner.barred
        self.rollouts: list[Rollout] = []

    def sample(self, prompt: Prompt, count: int, seed: int) -> list[Response]:
        made = self.inner.sample(prompt, count, seed)
        document = answered(prompt, made, self.prompter)
        self.rollouts.append(Rollout(prompt, document, made))
        return made


def sampled_step(stage: Any, policy: Policy) -> tuple[list[Work], list[Rollout]]:
    """A step of a stage that samples, and its rollouts."""
    kept: list[Keeps] = []
    sampler_of = stage.sampler_of

    def keeps(policy: Policy) -> Keeps:
        kept.append(Keeps(sampler_of(policy), stage.documents.prompter))
        return kept[-1]

    stage.sampler_of = keeps
    works, _ = stage.works(STEP, policy)
    return works, kept[0].rollouts


class Vocabulary:
    """The ids that a policy may say, of so many."""

    def __init__(self, processor: Any, size: int) -> None:
        tokens = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
        tokenizer = processor.tokenizer
        barred = tokenizer.convert_tokens_to_ids([f"<|{one}|>" for one in tokens])
        self.ids = [one for one in range(size) if one not in barred]

    def logps(self, model: Any, document: Document) -> list[Tensor]:
        """For each response log-probabilities `[S,V]` among these ids."""
        return [
            plain_logps(model, document, ids)[start - 1 : stop - 1, self.ids].log_softmax(-1)
            for ids, start, stop in words_of(document)
        ]

    def said(self, model: Any, document: Document) -> list[Tensor]:
        """For each response the log-probabilities `[S]` of its words."""
        pairs = zip(self.logps(model, document), document.branches, strict=True)
        return [
            logps_SV[range(one.said), [self.ids.index(word) for word in one.ids[-one.said :]]]
            for logps_SV, one in pairs
        ]


def assert_same(policy: Policy, works: list[Work], plain: Any, expected: Tensor) -> None:
    """The step's loss is the expected one, and so are its gradients."""
    assert [int(work.pack.document_T.max()) + 1 for work in works] == [2, 2, 1]
    policy.zero_grad()
    plain.zero_grad()
    total = 0.0
    for work in works:
        part = policy(work.pack, work.loss)
        part.backward()
        total += float(part.detach())
    expected.backward()
    assert abs(total - float(expected.detach())) < 1e-5
    pairs = list(zip(policy.model.parameters(), plain.parameters(), strict=True))
    ours, theirs = (
        torch.cat([p[n].grad.double().flatten() for p in pairs if p[1].grad is not None])
        for n in (0, 1)
    )
    assert float(theirs.norm()) > 1e-3
    assert float((ours - theirs).norm()) < 1e-4 * float(theirs.norm())


def acted(document: Document) -> Document:
    """The same with two answers in its trunk, as an agent's turns are."""
    one, two = document.branches[0], document.branches[-1]
    ids = [*document.trunk_ids, *one.ids, *two.ids]
    middle = len(ids) - len(two.ids)
    said = ((middle - one.said, middle), (len(ids) - two.said, len(ids)))
    return replace(document, trunk_ids=tuple(ids), branches=(), said=said)


class Fixed:
    """Documents as they are given."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def taught(self, index: int) -> Document:
        return self.documents[index]


def supervised(kind: str, processor: Any, policy: Policy) -> tuple[Any, list[Document]]:
    """A supervised stage, and the documents of its step."""
    indices = range(STEP * SFT.documents, (STEP + 1) * SFT.documents)
    if kind == "captions":
        shares = Shares(text=0.4, image=0.3, video=0.3)
        captions = WorldCaptions(DATA, processor, 0, shares.by_kind())
        stage = build_stage(
            Cpt(kind="cpt", shares=shares, **COMMON), processor, policy, 0, Processes()
        )
        assert {captions.kind(one) for one in indices} == {"text", "image", "video"}
        return stage, [captions.taught(one) for one in indices]
    source = WorldDocuments(SFT.data or pytest.fail(), processor, 0)
    taught = [source.taught(one) for one in indices]
    if kind == "answers":
        return build_stage(SFT, processor, policy, 0, Processes()), taught
    taught = [acted(one) if n % 2 else one for n, one in enumerate(taught)]
    fixed: Any = Fixed([*taught, *taught])
    return SftStage(SFT, fixed, Processes()), taught


@pytest.mark.parametrize("kind", ["answers", "answers within a trunk", "captions"])
def test_supervised_stages_weigh_each_answer_by_the_root_of_its_length(
    loaded: Any, kind: str
) -> None:
    """Cross-entropy, 1/sqrt(words) of each answer's words, over the sum of all weights."""
    policy, processor = Policy(deepcopy(loaded[0])), loaded[1]
    stage, documents = supervised(kind, processor, policy)
    works, _ = stage.works(STEP, policy)
    plain = plain_copy(policy)
    losses, weights, lengths = [], 0.0, set()
    for document in documents:
        for logp_S in answer_logps(plain, document):
            losses.append(-logp_S.sum() / len(logp_S) ** 0.5)
            weights += len(logp_S) ** 0.5
            lengths.add(len(logp_S))
    assert len(lengths) > 1
    assert_same(policy, works, plain, torch.stack(losses).sum() / weights)


def test_gspo_is_its_definition(loaded: Any) -> None:
    """Ratios to the policy before the updates, divergence from the start, groups by themselves."""
    policy, processor = Policy(deepcopy(loaded[0])), loaded[1]
    stage: Any = build_stage(GSPO, processor, policy, 0, Processes())
    start = plain_copy(policy)
    move(policy.model, 0.05, seed=4)
    works, rollouts = sampled_step(stage, policy)
    with torch.no_grad():
        for work in works:  # the first update: where the policy was when it sampled
            policy(work.pack, work.loss)
    move(policy.model, 0.03, seed=5)
    plain = plain_copy(policy)
    vocabulary = Vocabulary(processor, len(plain.lm_head.weight))
    losses, kls, clipped, ratios, means = [], [], [], [], set()
    for prompt, document, responses in rollouts:
        rewards = torch.tensor([reward(prompt, one) for one in responses], dtype=torch.float64)
        spread = rewards.std(correction=0)
        means.add((float(rewards.mean()), float(spread)))
        now, begun = (vocabulary.said(one, document) for one in (plain, start))
        for n, response in enumerate(responses):
            assert len(now[n]) == len(response.ids)
            advantage = float((rewards[n] - rewards.mean()) / spread) if spread > 0 else 0.0
            ratio = (now[n] - torch.tensor(response.logps)).mean().exp()
            bounded = ratio.clamp(1 - GSPO.clip_low, 1 + GSPO.clip_high)
            gain = min(ratio * advantage, bounded * advantage)
            gap_S = begun[n].detach() - now[n]
            kl = (gap_S.exp() - gap_S - 1).mean()
            losses.append(GSPO.kl_weight * kl - gain)
            kls.append(float(kl.detach()))
            ratios.append(float(ratio.detach()))
            clipped.append(float(gain.detach()) < ratios[-1] * advantage)
    responses_of_step = GSPO.documents * GSPO.group
    assert len(losses) == responses_of_step
    assert len(means) > 2, "groups of different rewards are needed"
    assert 2 < sum(clipped) < responses_of_step - 2 and min(ratios) < 1 < max(ratios)
    assert sum(kls) > 1e-3 * responses_of_step
    assert_same(policy, works, plain, torch.stack(losses).mean())
    noted = stage.noted()
    for name, values in (("kl", kls), ("clipped_share", clipped), ("ratio", ratios)):
        total, count = noted[name]
        assert count == responses_of_step
        assert total / count == pytest.approx(sum(values) / count, abs=1e-5), name
    # A pass that only keeps this process in step with others is not counted.
    policy(works[-1].pack, works[-1].loss)
    assert stage.noted() == noted


@dataclass
class Off:
    """A sampler whose log-probabilities are off by so many nats, as another program's are."""

    inner: Samples
    nats: float

    def __post_init__(self) -> None:
        self.barred = self.inner.barred

    def sample(self, prompt: Prompt, count: int, seed: int) -> list[Response]:
        said = self.inner.sample(prompt, count, seed)
        return [replace(one, logps=tuple(x - self.nats for x in one.logps)) for one in said]


@pytest.mark.parametrize(("nats", "weight"), [(0.3, math.exp(0.3)), (-2.0, math.exp(-2.0)), (3, 2)])
def test_what_the_sampler_is_off_by_is_a_weight_and_no_clipping(
    loaded: Any, nats: float, weight: float
) -> None:
    """Gradients are those of the right numbers times the weight, which is 2 at most."""
    found = []
    for off in (0.0, nats):
        policy = Policy(deepcopy(loaded[0]))
        options = replace(GSPO, kl_weight=0.0)
        stage: Any = build_stage(options, loaded[1], policy, 0, Processes())
        sampler_of = stage.sampler_of
        stage.sampler_of = lambda policy, off=off, of=sampler_of: Off(of(policy), off)
        works, _ = stage.works(STEP, policy)
        found.append(gradient_of(policy, works))
        told = {name: total / count for name, (total, count) in stage.noted().items()}
        assert told["sampler_gap"] == pytest.approx(abs(off), abs=1e-5)
        assert told["clipped_share"] == 0 and told["ratio"] == pytest.approx(1, abs=1e-6)
    right, theirs = found
    assert float(right.norm()) > 1e-2
    assert float((theirs - weight * right).norm()) < 1e-4 * weight * float(right.norm())


@pytest.mark.parametrize("options", [GSPO, OPD], ids=["gspo", "opd"])
def test_products_in_bf16_have_the_direction_of_float32(
    loaded: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All models are passed in bf16; one that has not moved has a ratio of 1, and hardly a KL."""
    found, kinds = [], []
    # Sessions refuse hooks, since a step would leave them out.
    kind = type(loaded[0].model.language_model.layers[0].mlp)
    forward, seen = kind.forward, set[torch.dtype]()

    def noting(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = forward(self, x)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(kind, "forward", noting)
    for bfloat16 in (False, True):
        policy = Policy(deepcopy(loaded[0]))
        stage: Any = build_stage(
            replace(options, bfloat16=bfloat16), loaded[1], policy, 0, Processes()
        )
        works, _ = stage.works(STEP, policy)
        assert seen >= {torch.bfloat16 if bfloat16 else torch.float32}
        seen.clear()
        with stage.products(torch.device("cpu")):
            found.append(gradient_of(policy, works))
        kinds.append(set(seen))
        seen.clear()
        if options is GSPO:
            told = {name: total / count for name, (total, count) in stage.noted().items()}
            assert told["ratio"] == 1 and told["clipped_share"] == 0 and told["kl"] < 1e-3
            assert (1e-4 if bfloat16 else 0) < told["sampler_gap"] < (0.05 if bfloat16 else 1e-5)
    assert kinds == [{torch.float32}, {torch.bfloat16}]
    exact, rounded = found
    assert not torch.equal(exact, rounded)
    assert float(exact @ rounded / exact.norm() / rounded.norm()) > 0.99


def gradient_of(policy: Policy, works: list[Work]) -> Tensor:
    """All gradients of a step, as one vector."""
    policy.zero_grad()
    for work in works:
        policy(work.pack, work.loss).backward()
    return torch.cat(
        [p.grad.double().flatten() for p in policy.model.parameters() if p.grad is not None]
    )


@dataclass(frozen=True)
class PlainTeacher(RemoteTeacher):
    """A teacher as one behind a server is asked: for the ids alone, over its whole vocabulary."""

    model: Any
    prompter: Prompter

    @torch.no_grad()
    def logps(self, prompt: Prompt, prompt_ids: list[int], response: Response) -> Tensor:
        seen = answered(prompt, [response], self.prompter)
        assert prompt_ids == [*seen.trunk_ids, seen.branches[0].ids[0]]
        (logp_S,) = answer_logps(self.model, seen)
        return logp_S.float()


def merged(logps_SV: Tensor, top_SK: Tensor) -> Tensor:
    """The likeliest words and, last, all others together."""
    others_SV = logps_SV.exp().scatter(-1, top_SK, 0.0)
    return torch.cat([logps_SV.gather(-1, top_SK), others_SV.sum(-1, keepdim=True).log()], -1)


def divergence(student_SV: Tensor, teacher_SV: Tensor) -> Tensor:
    """KL(student ‖ teacher) at each place, `[S]`."""
    return (student_SV.exp() * (student_SV - teacher_SV)).sum(-1)


@pytest.mark.parametrize("form", ["all words", "3 words", "said words"])
def test_distillation_is_its_definition(loaded: Any, teacher: Any, form: str) -> None:
    """The mean over responses of the mean over their words, as in eq. 8."""
    policy, processor = Policy(deepcopy(loaded[0])), loaded[1]
    options = replace(OPD, chunk=7, top_k=3 if form == "3 words" else None)
    stage: Any = build_stage(options, processor, policy, 0, Processes())
    if form == "said words":
        endpoint = Endpoint(url="http://nowhere/v1", model="none")
        remote = PlainTeacher(endpoint, processor.tokenizer, teacher, stage.documents.prompter)
        source, sampler_of = stage.documents, stage.sampler_of
        stage = OpdStage(options, source, remote, sampler_of, 0, Processes())
    works, rollouts = sampled_step(stage, policy)
    plain = plain_copy(policy)
    vocabulary = Vocabulary(processor, len(plain.lm_head.weight))
    losses = []
    for _, document, _ in rollouts:
        ours, said = vocabulary.logps(plain, document), vocabulary.said(plain, document)
        with torch.no_grad():
            judged = list(vocabulary.logps(teacher, document))
            told = list(answer_logps(teacher, document))
        for n, student_SV in enumerate(ours):
            if form == "said words":
                losses.append(((said[n].detach() - told[n]) * said[n]).mean())
                continue
            teacher_SV = judged[n]
            if form == "3 words":
                top_SK = student_SV.topk(3, -1).indices
                student_SV, teacher_SV = (merged(one, top_SK) for one in (student_SV, teacher_SV))
            losses.append(divergence(student_SV, teacher_SV).mean())
    assert len(losses) == OPD.documents * OPD.group
    assert len({len(one.ids) for _, _, said in rollouts for one in said}) > 1
    assert_same(policy, works, plain, torch.stack(losses).mean())


class Run(NamedTuple):
    """What a stage's loop did."""

    rows: list[dict[str, float]]
    updates: set[int]
    """Of the optimiser on each of its weights."""


def run(options: StageOptions, loaded: Any, folder: Path) -> Run:
    """A stage in the loop, from the noisy model."""
    folder.mkdir()
    policy, group = Policy(deepcopy(loaded[0])), Processes()
    stage = build_stage(options, loaded[1], policy, 0, group)
    loop = Loop("own", options, stage, policy, folder, "digest", 0, group, quiet, unwatched)
    assert loop.run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    states = loop.optimizer.state.values()
    return Run([json.loads(line) for line in lines], {int(one["step"]) for one in states})


@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_makes_its_updates_and_notes_the_last(
    loaded: Any, tmp_path: Path, updates: int
) -> None:
    found = run(replace(GSPO, updates=updates), loaded, tmp_path / "run")
    assert found.updates == {2 * updates}
    first = found.rows[0]
    if updates == 1:
        assert abs(first["kl"]) < 1e-6 and first["ratio"] == pytest.approx(1, abs=1e-5)
        assert first["clipped_share"] == 0
    else:
        assert first["kl"] > 1e-5 and abs(first["ratio"] - 1) > 1e-5
        assert 0 < first["clipped_share"] < 1
    assert first["reward_spread"] > 0
    assert found.rows[1]["kl"] > 1e-5


def test_gspo_raises_the_reward(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that the model does not know: a digit comes first, and it is not 0."""
    digits = loaded[1].tokenizer.convert_tokens_to_ids(list("123456789"))
    monkeypatch.setattr(gspo_stage, "reward", lambda _, one: float(one.ids[0] in digits))
    options = replace(
        GSPO, steps=8, documents=4, group=8, max_new_tokens=1, micro_documents=None, kl_weight=0.0,
        optimiser=Optimiser(learning_rate=1e-3, warmup=0.0), data=replace(DATA, videos=4),
    )  # fmt: skip
    rewards = [row["reward"] for row in run(options, loaded, tmp_path / "run").rows]
    assert max(rewards[:2]) < 0.5 and min(rewards[-2:]) > 0.8, rewards


@pytest.mark.parametrize("kind", ["gspo", "opd"])
def test_accumulating_eight_passes_equals_one_pass(loaded: Any, tmp_path: Path, kind: str) -> None:
    """Rollouts, losses and gradients of the first steps."""
    options: Any = replace(GSPO, updates=2) if kind == "gspo" else OPD
    ones, eight = (
        run(replace(options, documents=8, group=2, micro_documents=n), loaded, tmp_path / str(n))
        for n in (1, None)
    )
    for ours, theirs in zip(ones.rows, eight.rows, strict=True):
        assert ours["response_tokens"] == theirs["response_tokens"]
        assert abs(ours["loss"]) > 1e-4 and abs(ours["loss"] - theirs["loss"]) < 1e-5
        assert abs(ours["norm"] - theirs["norm"]) < 1e-4 * theirs["norm"]


@pytest.mark.slow
def test_two_processes_note_and_learn_what_one_does(loaded: Any, tmp_path: Path) -> None:
    """One of them has a pass fewer, and repeats its last for the other's sake."""
    start = tmp_path / "start"
    for one in loaded:
        one.save_pretrained(start)
    options = replace(GSPO, documents=3, micro_documents=1, updates=2, save_every=1)
    recipe = Recipe(about="test", start=str(start), stages={"gspo": options})
    train(recipe, tmp_path / "one")
    stage = {key: value for key, value in asdict(options).items() if value is not None}
    written = {"about": "test", "start": str(start), "stages": {"gspo": stage}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(written))))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         "-m", "internvideo3.harness.cli", "train", str(tmp_path / "own.yaml"),
         "--out", str(tmp_path / "two")],
        capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / n / "1-gspo/metrics.jsonl").open()]
        for n in ("one", "two")
    )
    for one, two in zip(ours, theirs, strict=True):
        assert one["kl"] > 0 and one["ratio"] != 1
        for name in ("kl", "ratio", "clipped_share", "reward", "reward_spread", "loss"):
            assert two[name] == pytest.approx(one[name], abs=1e-5), name
        assert two["norm"] == pytest.approx(one["norm"], rel=1e-3)
