"""GQA to M²LA: the order of the steps, and what they report.

1. `recording`: one forward and backward pass over the calibration batches, written layer by layer;
2. per layer `statistics`, with `norms` in place of QK-norm if it is to be linear;
3. per layer `rotary` (slots and gain) and `lowrank` (latent); the number of slots and the use of
   `adapters` are chosen by `divergence` from the source, ranks by `budget`;
4. per layer `refit` of the output projection.

Every step works on one layer at a time and leaves its result in a work folder: an interrupted
conversion continues, several conversions of one source share what they can, and memory holds the
source and one layer's statistics, solution and weights (`finished`). The folder has

    inputs.json                     what the source and the calibration batches are
    calls-SEED/                     the calibration pass
    norms-DIGEST/                   per layer, the linear norm of one fit
    statistics-DIGEST/              per layer, for one linear norm and token floor
    result-DIGEST/                  per layer, for one set of options
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvideo3.model.attention import LatentAttention, RowAttention
from internvideo3.model.conversion.budget import tempered_ranks, text_rank, vision_ranks
from internvideo3.model.conversion.converted import Shape, converted_model, layer_config
from internvideo3.model.conversion.divergence import CHOICE_BATCHES, Reference
from internvideo3.model.conversion.finished import FinishedLayers, load_layer, save_layer
from internvideo3.model.conversion.memory import give_back
from internvideo3.model.conversion.norm_alone import uncompressed
from internvideo3.model.conversion.norms import Concentration, LinearNorm, linear_norm
from internvideo3.model.conversion.options import ConversionOptions, key_width, preset
from internvideo3.model.conversion.plan import LayerPlan, build_layer, plan_layer
from internvideo3.model.conversion.recording import Progress, Recording, record, silent
from internvideo3.model.conversion.refit import refit_output
from internvideo3.model.conversion.rotary import PairGeometry, pair_geometry
from internvideo3.model.conversion.source import Batch, Projections, Source, valid_tokens
from internvideo3.model.conversion.statistics import LayerStatistics, collect
from internvideo3.model.released import ReleasedAttention, release

WEIGHT_SAMPLE = 1024
"""Numbers of every weight by which a source is known again."""

PLACE_FIELDS = ("_name_or_path", "transformers_version")
"""Of a configuration: where it was read, and by what."""


@dataclass(frozen=True)
class LayerReport:
    """What the conversion of one layer kept."""

    layer: int
    rank: int
    vision_rank: int
    rope_slots: int
    slot_frequencies: list[int]
    rotary_energy: float
    """Share of the rotary importance that the slots carry."""
    latent_energy: float
    """Share of the weighted energy of [k_rest; v] within the rank."""
    adapter_gain: float
    """Share of the latent's calibrated error that modality adapters save; 0 without adapters."""
    output_error: float | None
    """Share of the attention output's error left after the refit; None without a refit."""
    geometry: PairGeometry
    concentration: Concentration | None
    """None for sources without QK-norm."""


@dataclass(frozen=True)
class Conversion:
    """A converted model and how it came about."""

    model: Any
    layers: list[LayerReport]
    cache_share: float
    """Cached numbers per token over the source's."""
    divergence: float
    """Mean KL(source || converted) per supervised calibration token, in nats."""


def convert(
    model: Any, calibration: Sequence[Batch], options: ConversionOptions | str = "half"
) -> Any:
    """Converts a GQA model to M²LA; see `convert_with_report`."""
    return convert_with_report(model, calibration, options).model


def convert_with_report(
    model: Any,
    calibration: Sequence[Batch],
    options: ConversionOptions | str = "half",
    *,
    progress: Progress = silent,
    folder: Path | None = None,
) -> Conversion:
    """Converts a GQA model to M²LA on calibration batches.

    Args:
        model: the source, see `source`; it is not changed.
        calibration: dicts of model inputs (as the processor returns them). Sequences must begin at
            their true start, since the first token is an attention sink.
        options: options, or the name of a preset.
        progress: called as steps advance.
        folder: work folder, kept; None: a temporary one.

    Raises:
        ValueError: the model cannot be converted, a preset is unknown, there is no batch, or the
            folder belongs to another source or calibration set.
    """
    source = Source.of(model)
    if isinstance(options, str):
        options = preset(options, source.text)
    with tempfile.TemporaryDirectory(prefix="internvideo3-convert-") as temporary:
        job = Job.start(source, calibration, options, folder or Path(temporary), progress)
        built = job.run()
        converted = converted_model(source, built.layers, built.shape).train(model.training)
        return Conversion(converted, built.reports, built.cache_share, job.divergence(built))


@dataclass(frozen=True)
class Built:
    """All converted layers."""

    layers: Sequence[RowAttention]
    """Each is loaded from the work folder when it is asked for."""
    reports: list[LayerReport]
    shape: Shape
    cache_share: float
    """Cached numbers per token over the source's, in the mean over the calibration set."""
    vision_tokens: float
    """Share of vision tokens in the calibration set."""


@dataclass(frozen=True)
class _Choice:
    """What is decided for all layers together."""

    slots: int
    adapters: bool
    ranks: list[int]
    vision_ranks: list[int]


@dataclass(frozen=True)
class Job:
    """One conversion in a work folder."""

    source: Source
    calibration: Sequence[Batch]
    options: ConversionOptions
    folder: Path
    progress: Progress
    recording: Recording

    @classmethod
    def start(
        cls,
        source: Source,
        calibration: Sequence[Batch],
        options: ConversionOptions,
        folder: Path,
        progress: Progress = silent,
    ) -> Job:
        """Runs or continues the calibration pass.

        Raises:
            ValueError: there is no calibration batch, the options do not fit the source or the
                batches, or the folder belongs to another source or calibration set.
        """
        check_fit(options, source.text, source.has_norm)
        _check_vision(options, source, calibration)
        _claim(folder, source, calibration)
        calls = folder / f"calls-{options.seed}"
        recording = record(source, calibration, calls, seed=options.seed, progress=progress)
        give_back()
        return cls(source, calibration, options, folder, progress, recording)

    @property
    def layer_count(self) -> int:
        """L."""
        return len(self.source.layers)

    def run(self) -> Built:
        """Everything after the calibration pass."""
        with _evaluating(self.source.model):
            return self._run()

    def _run(self) -> Built:
        self._collect()
        choice = self._choose()
        reports: list[LayerReport] = []
        for index in range(self.layer_count):
            reports.append(self._finish(index, choice))
            give_back()
            self.progress("layers", index + 1, self.layer_count)
        shape = self._shape(choice, [r.slot_frequencies for r in reports])
        share = self.options.row_width / (2 * key_width(self.source.text))
        configs = [layer_config(self.source, shape.of_layer(r.layer)) for r in reports]
        layers = self._finished([self._layer_file(r.layer) for r in reports], configs)
        return Built(layers, reports, shape, share, self.vision_tokens)

    def _finished(self, files: Sequence[Path], configs: Sequence[Any]) -> FinishedLayers:
        # The source's own now: while converted layers run, they stand in their places.
        attentions = [layer.self_attn for layer in self.source.layers]
        return FinishedLayers(
            lambda index: load_layer(files[index], configs[index], attentions[index]), len(files)
        )

    def divergence(self, built: Built) -> float:
        """Mean KL(source || converted) per supervised calibration token, in nats."""
        with _evaluating(self.source.model):
            return self.reference(CHOICE_BATCHES).divergence(built.layers)

    def _collect(self) -> None:
        for index in range(self.layer_count):
            file = self._statistics_file(index)
            if not file.is_file():
                projections, scale = self._projections(index)
                calls = self.recording.calls(index)
                floor = self.options.token_floor
                collect(projections, calls, scale=scale, token_floor=floor).save(file)
                give_back()
            self.progress("statistics", index + 1, self.layer_count)

    def _projections(self, index: int) -> tuple[Any, float]:
        attention = self.source.layers[index].self_attn
        norm = self.norm(index)
        own = Projections.of(attention) if norm is None else norm.projections(attention)
        return own, float(attention.scaling)

    def without_norm(self) -> FinishedLayers | None:
        """The source's layers with the linear norm and nothing compressed; None without one."""
        if self.norm(0) is None:
            return None
        # Made now: while other layers stand in the source's places, nothing can be fitted on it.
        files = [self._norm_file(index) for index in range(self.layer_count)]
        attentions = [layer.self_attn for layer in self.source.layers]

        def load(index: int) -> RowAttention:
            norm = LinearNorm.load(files[index], self.source.device)
            return uncompressed(attentions[index], norm)

        return FinishedLayers(load, self.layer_count)

    def norm(self, index: int) -> LinearNorm | None:
        """The linear substitute of a layer's norms, if it is wanted."""
        if self.options.norm == "exact" or not self.source.has_norm:
            return None
        return self._fitted_norm(index)

    def _fitted_norm(self, index: int) -> LinearNorm:
        return LinearNorm.load(self._norm_file(index), self.source.device)

    def _norm_file(self, index: int) -> Path:
        """A layer's fit, made once: of a large model it takes all calibration tokens' queries."""
        fit = [self.options.seed, self.options.norm_fit]
        file = self._subfolder("norms", fit) / f"{index:03d}.safetensors"
        if not file.is_file():
            self._fit_norm(index).save(file)
            give_back()
        return file

    def _fit_norm(self, index: int) -> LinearNorm:
        attention = self.source.layers[index].self_attn
        inputs = ((call.x_BTX, call.valid_BT) for call in self.recording.calls(index))
        return linear_norm(attention, inputs, self.options.norm_fit)

    def statistics(self, index: int) -> LayerStatistics:
        """What the calibration pass says about a layer, once `run` has collected it."""
        return LayerStatistics.load(self._statistics_file(index), self.source.device)

    def _statistics_file(self, index: int) -> Path:
        used = self.options
        parts = [used.seed, used.token_floor, used.norm, used.norm_fit]
        return self._subfolder("statistics", parts) / f"{index:03d}.safetensors"

    def _result_file(self, name: str) -> Path:
        return self._subfolder("result", asdict(self.options)) / name

    def _subfolder(self, name: str, depends_on: Any) -> Path:
        folder = self.folder / f"{name}-{_digest(json.dumps(depends_on).encode())[:12]}"
        folder.mkdir(exist_ok=True)
        return folder

    def reference(self, batches: int | None = None) -> Reference:
        """The source on the first (or all) calibration batches, as the calibration pass left it."""
        chosen = self.calibration[:batches]
        hidden = [self.recording.hidden(index) for index in range(len(chosen))]
        return Reference(self.source, chosen, hidden)

    def _choose(self) -> _Choice:
        """Slots, adapters and ranks; kept in a file, since candidates take long to compare."""
        file = self._result_file("choice.json")
        if file.is_file():
            return _Choice(**json.loads(file.read_text(encoding="utf-8")))
        slots = self._best_slots()
        ranks, nested = self._best_ranks(slots)
        adapters = self.options.adapters
        if float(self.statistics(0).weight_M[1]) == 0.0:
            adapters = bool(adapters)  # with one modality there is nothing to adapt
        if adapters is None:
            found = {
                tried: self._candidate(_Choice(slots, tried, ranks, nested))
                for tried in (False, True)
            }
            adapters = found[True] < found[False]
        choice = _Choice(slots, adapters, ranks, nested)
        _write_whole(file, asdict(choice))
        return choice

    def _uniform(self, slots: int, vision_share: float) -> int:
        """Rank of text tokens in a layer, in the mean over layers."""
        text = self.source.text
        mean = self.options.latent_rank(slots, self.layer_count, text.head_dim)
        return text_rank(mean, vision_share, self.vision_tokens, 2 * key_width(text))

    @cached_property
    def vision_tokens(self) -> float:
        """Share of vision tokens among the calibration set's."""
        seen = sum(int(self.source.vision_tokens(batch).sum()) for batch in self.calibration)
        return seen / sum(int(valid_tokens(batch).sum()) for batch in self.calibration)

    def _best_slots(self) -> int:
        """Number of rotary slots with the least divergence, before any refit."""
        choices = self.options.slot_choices()
        if len(choices) == 1:
            return choices[0]
        share = self.options.vision_shares()[0]
        found: dict[int, float] = {}
        for slots in choices:
            ranks = [self._uniform(slots, share)] * self.layer_count
            nested = self._vision_ranks(slots, ranks, share)
            found[slots] = self._candidate(_Choice(slots, False, ranks, nested))
            self.progress("slot numbers tried", len(found), len(choices))
        return min(found, key=lambda slots: found[slots])

    def _best_ranks(self, slots: int) -> tuple[list[int], list[int]]:
        """Ranks of text and of vision tokens; their ratio is that of the least divergence."""
        shares = self.options.vision_shares()
        if self.vision_tokens == 0.0:
            shares = [1.0]  # nothing can be learned for what is not seen
        tried = {share: self._ranks(slots, share) for share in shares}
        if len(tried) == 1:
            return tried[shares[0]]
        found: dict[float, float] = {}
        for share, (ranks, nested) in tried.items():
            found[share] = self._candidate(_Choice(slots, False, ranks, nested))
            self.progress("vision ranks tried", len(found), len(tried))
        return tried[min(found, key=lambda share: found[share])]

    def _ranks(self, slots: int, vision_share: float) -> tuple[list[int], list[int]]:
        uniform = self._uniform(slots, vision_share)
        ranks = [uniform] * self.layer_count
        if self.options.tempered:
            plans = (self._plan(index, slots) for index in range(self.layer_count))
            ranks = tempered_ranks([plan.low.energies_Q.cpu() for plan in plans], uniform)
        return ranks, self._vision_ranks(slots, ranks, vision_share)

    def _vision_ranks(self, slots: int, ranks: list[int], share: float) -> list[int]:
        if share == 1.0:
            return ranks
        energies = []
        for index in range(self.layer_count):
            stats = self.statistics(index)
            plan = self._plan(index, slots).cut(ranks[index], stats, self.options)
            seen = stats.covariance(plan.mean_E, modality=1)
            energies.append((plan.low.encoder_RE @ seen * plan.low.encoder_RE).sum(1).cpu())
        return vision_ranks(energies, ranks, share * sum(ranks) / len(ranks))

    def _candidate(self, choice: _Choice) -> float:
        """Divergence of a choice, before any refit."""
        with tempfile.TemporaryDirectory(prefix="try-", dir=self.folder) as place:
            files = [Path(place) / f"{index:03d}.safetensors" for index in range(self.layer_count)]
            configs: list[Any] = []
            for index, file in enumerate(files):
                layer, plan = self._build(index, choice)
                configs.append(self._layer_config(index, choice, plan.slots.frequencies))
                save_layer(layer, self.source.layers[index].self_attn, file)
                give_back()
            return self.reference(CHOICE_BATCHES).divergence(self._finished(files, configs))

    def _plan(self, index: int, slots: int) -> LayerPlan:
        return plan_layer(self.statistics(index), self.options, slots, self.norm(index))

    def _build(self, index: int, choice: _Choice) -> tuple[RowAttention, LayerPlan]:
        """A layer before its refit."""
        options = self.options.with_(adapters=choice.adapters)
        stats = self.statistics(index)
        plan = self._plan(index, choice.slots).cut(choice.ranks[index], stats, options)
        config = self._layer_config(index, choice, plan.slots.frequencies)
        attention = self.source.layers[index].self_attn
        return build_layer(plan, config, 0, attention), plan

    def _layer_config(self, index: int, choice: _Choice, frequencies: list[int]) -> Any:
        shape = Shape(
            row_form="prerope" if self.options.row_form == "prerope" else "latent",
            linear=self.options.norm == "linear" or not self.source.has_norm,
            biased=self.options.norm == "linear" and self.source.has_norm,
            adapters=choice.adapters,
            ranks=[choice.ranks[index]],
            vision_ranks=[choice.vision_ranks[index]],
            frequencies=[frequencies],
        )
        return layer_config(self.source, shape)

    def _shape(self, choice: _Choice, frequencies: list[list[int]]) -> Shape:
        released = self.options.row_form == "released"
        return Shape(
            row_form=self.options.row_form,
            linear=self.options.norm == "linear" or not self.source.has_norm,
            biased=self.options.norm == "linear" and self.source.has_norm,
            adapters=choice.adapters,
            ranks=[rank + released for rank in choice.ranks],
            vision_ranks=[rank + released for rank in choice.vision_ranks],
            frequencies=frequencies,
        )

    def _finish(self, index: int, choice: _Choice) -> LayerReport:
        """Writes a layer and its report, unless an earlier run did."""
        report_file = self._result_file(f"{index:03d}.json")
        if report_file.is_file():
            return read_report(json.loads(report_file.read_text(encoding="utf-8")))
        layer, plan = self._build(index, choice)
        attention = self.source.layers[index].self_attn
        left = None
        if self.options.refit_output:
            calls = self.recording.calls(index)
            left = refit_output(attention, layer, calls, self.options.refit_ridge)
        if self.options.row_form == "released":
            layer = self._released(layer, choice.ranks[index])
        report = self._report(index, plan, choice, left)
        save_layer(layer, attention, self._layer_file(index))
        _write_whole(report_file, asdict(report))
        return report

    def _released(self, layer: RowAttention, rank: int) -> RowAttention:
        """The layer in the released layout."""
        assert isinstance(layer, LatentAttention)
        shape = Shape(
            row_form="released",
            linear=True,
            biased=False,
            adapters=False,
            ranks=[rank + 1],
            vision_ranks=[rank + 1],
            frequencies=[layer.slot_frequencies],
        )
        weight = layer.o_proj.weight
        with torch.device(weight.device):
            made = ReleasedAttention(layer_config(self.source, shape), 0).to(weight.dtype)
        made.load_state_dict(release(layer))
        return made.requires_grad_(False).eval()

    def _layer_file(self, index: int) -> Path:
        return self._result_file(f"{index:03d}.safetensors")

    def _report(
        self, index: int, plan: LayerPlan, choice: _Choice, left: float | None
    ) -> LayerReport:
        before = sum(a.error_before for a in plan.adapters)
        after = sum(a.error_after for a in plan.adapters)
        concentration = None
        if self.source.has_norm:
            concentration = (plan.norm or self._fitted_norm(index)).concentration
        released = self.options.row_form == "released"
        return LayerReport(
            layer=index,
            rank=choice.ranks[index] + released,
            vision_rank=choice.vision_ranks[index] + released,
            rope_slots=len(plan.slots.frequencies),
            slot_frequencies=plan.slots.frequencies,
            rotary_energy=plan.slots.energy_kept,
            latent_energy=plan.low.energy_kept,
            adapter_gain=1 - after / before if before > 0 else 0.0,
            output_error=left,
            geometry=pair_geometry(self.statistics(index)),
            concentration=concentration,
        )


def read_report(found: dict[str, Any]) -> LayerReport:
    """A layer's report from JSON."""
    own = found["concentration"]
    return LayerReport(
        **{
            **found,
            "geometry": PairGeometry(**found["geometry"]),
            "concentration": None if own is None else Concentration(**own),
        }
    )


LOCK = ".lock"
"""Name of the lock of a command that works in a folder."""


def _claim(folder: Path, source: Source, calibration: Sequence[Batch]) -> None:
    """Makes the folder this source's and calibration set's.

    Raises:
        ValueError: it is another's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "inputs.json"
    others = sorted({one.name for one in folder.iterdir()} - {"inputs.partial", LOCK})
    if others and not file.is_file():
        raise ValueError(
            f"{folder} is where unfinished work is kept, and it holds files of others "
            f"({', '.join(others[:3])}), which would be deleted at the end. Move them, or give "
            "another output folder."
        )
    found_config = source.model.config.to_dict()
    for name in PLACE_FIELDS:  # the same source elsewhere is the same source
        found_config.pop(name, None)
    config = json.dumps(found_config, sort_keys=True, default=str).encode()
    inputs = [batch[name] for batch in calibration for name in sorted(batch)]
    mine = {
        "config": _digest(config),
        "weights": _digest(*(_as_bytes(_sample(p)) for p in source.model.parameters())),
        "calibration": _digest(*(_as_bytes(x) for x in inputs if isinstance(x, Tensor))),
    }
    if not file.is_file():
        _write_whole(file, mine)
    found = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, digest in mine.items() if found.get(name) != digest]
    if other:
        raise ValueError(
            f"the work folder {folder} was made with another {' and '.join(other)}; delete it, "
            "or give the source and the calibration set it belongs to."
        )


def _write_whole(file: Path, found: dict[str, Any]) -> None:
    """Writes JSON that a killed process leaves whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(file)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _sample(parameter: Tensor) -> Tensor:
    """Some of a weight's numbers, spread over it: all of an 8B model would take a minute."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, len(flat) // WEIGHT_SAMPLE)]


def _as_bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def check_fit(options: ConversionOptions, text: Any, has_norm: bool) -> None:
    """Refuses options that a source has no room for, before any work.

    Raises:
        ValueError: the row is wider than the source's own cache, or leaves no rank.
    """
    width = 2 * key_width(text)
    if options.row_width > width:
        raise ValueError(
            f"a row of {options.row_width} numbers is wider than the {width} that the source "
            "itself caches per token and layer; give a narrower row or a smaller share."
        )
    pairs = width // 4
    for slots in options.slot_choices():
        rank = options.latent_rank(slots, text.num_hidden_layers, text.head_dim)
        if rank < 1 or slots > pairs:
            raise ValueError(
                f"a row of {options.row_width} numbers leaves rank {rank} beside {slots} rotary "
                f"slots (the source has {pairs}); the budget is below the feasible minimum."
            )
    if options.row_form == "released":
        _check_released(options, text, has_norm)


def _check_vision(options: ConversionOptions, source: Source, calibration: Sequence[Batch]) -> None:
    """Refuses a rank of vision tokens that nothing can be learned for."""
    if options.vision_rank_share in (1.0, None):
        return
    if not any(bool(source.vision_tokens(batch).any()) for batch in calibration):
        raise ValueError(
            f"vision_rank_share is {options.vision_rank_share}, but the calibration set shows no "
            "vision tokens; add videos (to a model that sees), or leave the share at 1."
        )


def _check_released(options: ConversionOptions, text: Any, has_norm: bool) -> None:
    wrong = {
        "norm must be `linear`": has_norm and options.norm != "linear",
        f"rope_slots must be {text.head_dim // 2}": options.rope_slots != text.head_dim // 2,
        "adapters must be off": options.adapters is not False,
        "ranks must not differ": options.tempered or options.vision_rank_share != 1.0,
    }
    found = [rule for rule, broken in wrong.items() if broken]
    if found:
        raise ValueError(f"the released layout: {'; '.join(found)}. Use the preset `official`.")


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
