"""The page of one conversion, from its `conversion.json`: what was kept, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

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
        css=Markup(css),
    )


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
