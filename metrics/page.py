"""The page of each metric's Space: paste or upload rows, see the report. Needs `gradio`."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.special import softmax

from peft_calib.calibration.report.page import picture

# predictions, references, settings -> a heading in Markdown, and HTML below it
Measure = Callable[[Any, Any, dict[str, Any]], tuple[str, str]]

NUM_BINS = 15
FORMATS = """\
**JSON**: `{"predictions": [...], "references": [...]}`.
**CSV**: one row an example, the last column its label, the others its predictions; a header line is optional."""


def parse_rows(text: str) -> tuple[Any, Any]:
    """Predictions and integer references from JSON or CSV text; a ValueError says what cannot be read, and where."""
    text = text.strip()
    if not text:
        raise ValueError("There is nothing to read: paste rows or upload a file.")
    return _parse_json(text) if text[0] in "{[" else _parse_csv(text)


def read_rows(path: str | Path) -> tuple[Any, Any]:
    """`parse_rows` of a file."""
    try:
        return parse_rows(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{Path(path).name} is not a text file; give CSV or JSON.") from error


def safely(measure: Measure, text: str, path: str | None, settings: dict[str, Any]) -> tuple[str, str]:
    """Measures an uploaded file, else pasted rows, as Markdown and HTML; what is wrong becomes a heading."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            predictions, references = read_rows(path) if path else parse_rows(text)
            heading, body = measure(predictions, references, settings)
        except (ValueError, TypeError, ArithmeticError, LookupError, MemoryError, csv.Error, RecursionError) as error:
            return f"### This cannot be measured\n\n{html.escape(_reason(error), quote=False)}", ""
    notes = [str(note.message) for note in caught if note.category is UserWarning]
    return heading + "".join(f"\n\n**Note.** {html.escape(note, quote=False)}" for note in notes), body


def framed(page: str, height: int = 1500) -> str:
    """A whole HTML page inside another, so that neither's style reaches the other."""
    return (
        f'<iframe title="report" srcdoc="{html.escape(page)}" style="width:100%;height:{height}px;border:0"></iframe>'
    )


def table(scores: dict[str, float]) -> str:
    """Scores as an HTML table."""
    lines = "".join(
        f"<tr><td><code>{html.escape(key)}</code></td><td>{value:.4f}</td></tr>" for key, value in scores.items()
    )
    return f"<table><thead><tr><th>score</th><th>value</th></tr></thead><tbody>{lines}</tbody></table>"


def example_rows(num_rows: int = 300, temperature: float = 2.0) -> str:
    """Rows of three classes as CSV, from a model that is sharper than it is right."""
    generator = np.random.default_rng(0)
    logits = 2.0 * generator.normal(size=(num_rows, 3))
    true, shown = (softmax(logits / t, axis=1) for t in (temperature, 1.0))
    labels = (generator.random((num_rows, 1)) > true.cumsum(axis=1)).sum(axis=1).clip(max=2)
    shown = shown.round(4)
    shown[:, 2] = (1.0 - shown[:, 0] - shown[:, 1]).clip(0.0, 1.0)
    return "\n".join(f"{a:.4f},{b:.4f},{c:.4f},{label}" for (a, b, c), label in zip(shown, labels, strict=True))


def pictured(figure: Figure, name: str) -> str:
    """A figure as part of an HTML page."""
    return f'<p style="background:white">{picture(name, figure)}</p>'


def build_page(
    title: str, description: str, measure: Measure, kinds: list[str], example: str, bins: bool = False
) -> Any:
    """The page as `gradio.Blocks`; `kinds` are the choices of `input`, `bins` asks for `num_bins` too.

    It opens on the measured example.
    """
    import gradio

    def run(text: str, path: str | None, kind: str, num_bins: int) -> tuple[str, str]:
        settings = {"input": kind, **({"num_bins": int(num_bins)} if bins else {})}
        return safely(measure, text or "", path, settings)

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}\n\n{description}\n\n{FORMATS}")
        with gradio.Row():
            text = gradio.Textbox(example, label="Rows", lines=8, elem_id="rows")
            with gradio.Column():
                upload = gradio.File(
                    label="or a file", file_types=[".csv", ".json", ".txt"], type="filepath", elem_id="file"
                )
                kind = gradio.Radio(kinds, value=kinds[0], label="Predictions are")
                num_bins = gradio.Slider(1, 50, value=NUM_BINS, step=1, label="Bins", visible=bins)
        button = gradio.Button("Measure", variant="primary", elem_id="measure")
        told, shown = run(example, None, kinds[0], NUM_BINS)
        heading, body = gradio.Markdown(told, elem_id="heading"), gradio.HTML(shown, elem_id="body")
        button.click(run, [text, upload, kind, num_bins], [heading, body], api_name="measure")
    return page


def _reason(error: Exception) -> str:
    """What was wrong, also where the exception says nothing to a reader."""
    if isinstance(error, RecursionError):
        return "The JSON is nested too deeply: predictions are rows of numbers, or rows of draws."
    if isinstance(error, MemoryError):
        return "There is not enough memory for so many rows, classes or bins."
    return str(error) or type(error).__name__


def _parse_json(text: str) -> tuple[Any, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:  # JSONDecodeError, and whole numbers of thousands of digits
        raise ValueError(f"This is not valid JSON: {error}.") from error
    if not isinstance(values, dict) or {"predictions", "references"} - set(values):
        raise ValueError('JSON must be an object with the keys "predictions" and "references".')
    return values["predictions"], values["references"]


def _parse_csv(text: str) -> tuple[Any, Any]:
    reader = csv.reader(io.StringIO(text))
    try:
        lines = [(reader.line_num, row) for row in reader if any(c.strip() for c in row)]
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} cannot be read as CSV: {error}.") from error
    if lines and not _is_number(lines[0][1][-1]):
        lines = lines[1:]
    if not lines:
        raise ValueError("There is only a header line.")
    width = len(lines[0][1])
    predictions, references = [], []
    for number, row in lines:
        if len(row) != width or width < 2:
            raise ValueError(
                f"Line {number} has {len(row)} columns; expected {max(width, 2)}, the last one the label."
            )
        try:
            *numbers, label = [float(cell) for cell in row]
        except ValueError as error:
            raise ValueError(f"Line {number} holds something that is not a number: {','.join(row)[:80]}") from error
        if not math.isfinite(label) or label != int(label):
            raise ValueError(f"Line {number}: the last column is the label and must be a whole number, got {row[-1]}.")
        predictions.append(numbers[0] if width == 2 else numbers)
        references.append(int(label))
    return predictions, references


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
