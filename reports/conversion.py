"""The page of one conversion, from its `conversion.json`: what was kept, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from internvideo3.reports.plots import Plot, profiles

TEMPLATES = Path(__file__).parent / "templates"

COLUMNS = (
    "layer",
    "rank",
    "rank, vision",
    "rotary slots",
    "rotary energy",
    "latent energy",
    "adapter gain",
    "output error left",
    "flatness of pairs",
    "shared rotary direction",
    "CV of key rms",
    "R² linear, keys",
    "R² eq. 7, keys",
    "CV of query rms",
    "R² linear, queries",
)


def conversion_page(report: Mapping[str, Any]) -> str:
    """One self-contained HTML page.

    Args:
        report: what `conversion.json` holds.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template("conversion.html.jinja").render(
        report=report,
        columns=COLUMNS,
        rows=[layer_row(layer) for layer in report["layers"]],
        figures=[Markup(plot.svg[plot.svg.index("<svg") :]) for plot in figures(report)],
        css=Markup(css),
    )


def figures(report: Mapping[str, Any]) -> Iterator[Plot]:
    """What can be drawn of a conversion, layer by layer and frequency by frequency."""
    layers = report["layers"]
    if all(layer["concentration"] for layer in layers):
        yield from _norm_figures([layer["concentration"] for layer in layers])
    yield profiles(
        "flatness",
        "Keys in rotary planes (Figure 3, right)",
        {
            "flatness": _over_layers(layers, "flatness_F"),
            "in one direction shared by all heads": _over_layers(layers, "alignment_F"),
        },
        x_label="rotary frequency, fastest first",
        whole=True,
    )
    yield profiles(
        "ranks",
        "Numbers cached per token",
        {
            "latent, text": [layer["rank"] for layer in layers],
            "latent, vision": [layer["vision_rank"] for layer in layers],
            "rotary": [2 * layer["rope_slots"] for layer in layers],
        },
        x_label="layer",
    )
    names = {"held_out": "text", "held_out_videos": "answers about videos"}
    alone = {names[name]: values for name, values in report["layers_alone"].items() if values}
    yield profiles("alone", "KL in nats if one layer alone is converted", alone, x_label="layer")


def _norm_figures(layers: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    yield profiles(
        "concentration",
        "CV of heads' rms (Figure 3, left)",
        {
            "keys": [fmean(layer["key_cv"]) for layer in layers],
            "queries": [fmean(layer["query_cv"]) for layer in layers],
        },
        x_label="layer",
    )
    yield profiles(
        "linear",
        "1 − R² of a linear map in place of the norm",
        {
            title: [1 - fmean(layer[name]) for layer in layers]
            for title, name in {
                "keys, learned": "key_r2",
                "keys, equation 7": "key_r2_constant",
                "queries, learned": "query_r2",
                "queries, equation 7": "query_r2_constant",
            }.items()
        },
        x_label="layer",
    )


def _over_layers(layers: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [fmean(values) for values in zip(*(x["geometry"][name] for x in layers), strict=True)]


def layer_row(layer: Mapping[str, Any]) -> list[str]:
    """Cells of one layer; a figure that a layer does not have is a dash."""
    norm = layer["concentration"] or {}
    left = layer["output_error"]
    return [
        str(layer["layer"]),
        str(layer["rank"]),
        str(layer["vision_rank"]),
        str(layer["rope_slots"]),
        f"{layer['rotary_energy']:.1%}",
        f"{layer['latent_energy']:.2%}",
        f"{layer['adapter_gain']:.1%}",
        "–" if left is None else f"{left:.1%}",
        _mean(layer["geometry"]["flatness_F"]),
        _mean(layer["geometry"]["alignment_F"]),
        _mean(norm.get("key_cv")),
        _mean(norm.get("key_r2")),
        _mean(norm.get("key_r2_constant")),
        _mean(norm.get("query_cv")),
        _mean(norm.get("query_r2")),
    ]


def _mean(values: Sequence[float] | None) -> str:
    return f"{fmean(values):.3f}" if values else "–"
