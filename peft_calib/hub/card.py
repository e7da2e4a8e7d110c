"""The text of a card: what the adapter predicts, how calibrated it is, how to use it, and how that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..provenance.stored_decision import ENTITY, HEAD
from ..tuners.config import REMEDY
from .facts import CardFacts, Measurement

REPORT_FILE, RELIABILITY, RISK = "report.json", "reliability.png", "risk_coverage.png"
DECISION = "decision.png"
#: What a user writes for what a rule of each kind says.
ANSWERS = {"threshold": "answer.answered", "sets": "answer.label_sets"}
ANSWERS |= {"labels": "answer.labels_given", "interval": "answer.lower, answer.upper"}
#: The same of an entity, one of `answer.entities[row]`.
ENTITY_ANSWERED = 'entity["answered"]'
#: What an adapter says, by its kind of answer.
TELLS = {
    "classes": "It tells {count} classes apart: {names}.",
    "labels": "It gives any of {count} label(s), each with a probability: {names}.",
    "numbers": "It predicts a number, {names}, with its noise.",
    "entities": "It finds entities in words, each with a probability, by {count} tags: {names}.",
    "tags": "It gives each word one of {count} tags: {names}.",
}
#: What is given to a predictor, and what its answer is read by.
USES = {
    "classes": ('["a text"]', "answer.labels_predicted, answer.probabilities"),
    "labels": ('["a text"]', "answer.labels_predicted, answer.probabilities"),
    "numbers": ('["a text"]', "answer.means, answer.sd, answer.lower, answer.upper"),
    "entities": ('[["the", "words", "of", "a", "row"]]', "answer.entities  # type, words and probability of each"),
}


def card_body(facts: CardFacts, repo_id: str, pictures: Mapping[str, str]) -> str:
    """Everything below the head; `pictures` maps a caption to its file."""
    parts = [
        f"# {_text(facts.name)}",
        _what(facts),
        _numbers(facts, pictures),
        _usage(facts, repo_id),
        _rule(facts),
        "" if facts.head_report is None else f"## P(error) of each answer\n\n{_told(facts.head_report)}",
        _decisions(facts),
        _origins(facts),
        _limits(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(value: Any) -> str:
    """A name as text: neither a table's cell nor a tag or a heading of the page ends or begins in it."""
    plain = " ".join(str(value).split())
    for mark in "\\`|*_<>#[]":
        plain = plain.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return plain


def _what(facts: CardFacts) -> str:
    classes, subject = facts.artefact.classes, facts.subject
    lines = [_text(subject.intended_use)] if subject.intended_use else []
    # the Hub has one name for texts that are given a class or a number
    kind = "regression" if facts.answers == "numbers" else (facts.pipeline or "a task of its own").replace("-", " ")
    lines.append(
        f"An adapter of `{facts.base_model}` for {kind} ({facts.method}), with probabilities that were measured for "
        "calibration."
    )
    if classes:
        shown = ", ".join(map(_text, classes[:30])) + (f", and {len(classes) - 30} more" if len(classes) > 30 else "")
        lines.append(TELLS[facts.answers].format(count=len(classes), names=shown))
    return "\n\n".join(lines)


def _numbers(facts: CardFacts, pictures: Mapping[str, str]) -> str:
    if not facts.measured:
        return (
            "## How calibrated it is\n\n**Not measured.** Nothing is known of its probabilities: measure them on rows "
            "of your own before you act on them."
        )
    parts = ["## How calibrated it is"]
    for measured in facts.measured:
        parts.append(_table(measured))
    parts += [f"![{caption}]({file})" for caption, file in pictures.items()]
    return "\n\n".join(parts)


def _table(measured: Measurement) -> str:
    """The scores of every table, before and after, with interval and noise floor where the report has them."""
    recalibrated, panel = measured.is_recalibrated, measured.panel
    told = f"**{_text(measured.way)}**", f"{_counted(measured)}{_of(measured)}", _text(measured.recalibrated)
    lines = [", ".join(filter(None, told))]
    intervals, floor = measured.after.get("intervals") or {}, measured.after.get("noise_floor") or {}
    heads = ["score", *(["before", "after"] if recalibrated else ["value"])]
    level = f"{measured.after['settings'].get('confidence_level') or 0.95:.0%}"
    heads += ([f"{level} interval"] if intervals else []) + (["if calibrated"] if floor else []) + ["meaning"]
    lines += ["", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 2) + "---|"]
    for key in panel.shown:
        value = measured.number(key)
        if value is None:
            continue
        cells = [f"{value:.4f}"]
        if recalibrated:
            earlier = measured.number(key, measured.before)
            cells.insert(0, "–" if earlier is None else f"{earlier:.4f}")
        if intervals:
            cells.append(_pair(intervals.get(key)))
        if floor:
            band = floor.get(key)
            cells.append("–" if band is None else f"{band['mean']:.4f} [{band['low']:.4f}, {band['high']:.4f}]")
        lines.append(f"| {key} | {' | '.join(cells)} | {_text(panel.meanings[key])} |")
    if measured.verdict:
        lines += ["", measured.verdict]
    return "\n".join(lines)


def _counted(measured: Measurement) -> str:
    """How many rows, and how many words where these are what was scored."""
    words = measured.kind == "classes" and measured.rows is not None
    return f"{measured.num_rows:,} rows" + (f" ({measured.after['settings']['num_rows']:,} words)" if words else "")


def _of(measured: Measurement) -> str:
    return "" if measured.split is None else f" of {_code(measured.split)}"


def _code(value: Any) -> str:
    """A name as code, where nothing but the mark that ends it has a meaning."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


def _pair(interval: Any) -> str:
    return "–" if interval is None or None in interval else f"[{interval[0]:.4f}, {interval[1]:.4f}]"


def _usage(facts: CardFacts, repo_id: str) -> str:
    parts = ["## How to use it", _asked(facts, repo_id)]
    if facts.needs_us:
        parts.append(REMEDY)
    if facts.has_lora and facts.needs_us:
        parts.append(
            "Without it, `lora/` is the adapter's deterministic function as a plain LoRA, for PEFT and for whatever "
            f'serves one: `PeftModel.from_pretrained(base, "{repo_id}", subfolder="lora")`. Its probabilities are '
            f"{_unscaled(facts)}."
        )
    return "\n\n".join(parts)


def _asked(facts: CardFacts, repo_id: str) -> str:
    if facts.answers not in USES:
        return "Its words are predicted with `peft_calib.predict_dataset(model, rows, task='token')`."
    given, read = USES[facts.answers]
    return (
        "```python\nimport peft_calib\n\n"
        f'predictor = peft_calib.load("{repo_id}")  # tokenizer, names, recalibration\n'
        f"answer = predictor.predict({given})\n{read}\n```"
    )


def _unscaled(facts: CardFacts) -> str:
    way = facts.artefact.ways.get("mean")
    if facts.artefact.kind != "classes":
        return "as its head gives it, without what was fitted on held-out rows"
    value = None if way is None else way.content.get("parameters", {}).get("temperature")
    if isinstance(value, (int, float)) and value != 1:
        return f"calibrated once its logits are divided by {value:.6g}"
    if way is not None and value is None:  # fitted by another method, which a softmax of its logits lacks
        return f"its logits' softmax, without the {way.content.get('method')} that was fitted on held-out rows"
    return "its logits' softmax, as nothing was found to mend them" if way is not None else "not recalibrated"


def _rule(facts: CardFacts) -> str:
    ways = {how: way.content for how, way in facts.artefact.ways.items()}
    names = {how: "the mean" if how == "mean" else f"{way.get('num_samples')} draws" for how, way in ways.items()}
    rows = [f"- {names[how]}: {_method_of(way)}" for how, way in ways.items()]
    return "\n".join(["## Recalibration", "", *rows]) if rows else ""


def _method_of(way: Mapping[str, Any]) -> str:
    fitted = way.get("fitted_on") or {}
    scale = (way.get("parameters") or {}).get("temperature")
    told = str(way.get("method")) + (f", T = {scale:.6g}" if isinstance(scale, (int, float)) else "")
    digest = str(fitted.get("digest", ""))[:16]
    return told + (f", fitted on {fitted.get('num_rows'):,} rows (`{digest}`)" if fitted.get("num_rows") else "")


def _told(report: str) -> str:
    return (
        "`answer.error_probability` says how likely each prediction is to be wrong, from a head that changes none of "
        "them (see `uncertainty_head.json`).\n\n" + "\n\n".join(_text(line) for line in report.splitlines())
    )


def _decisions(facts: CardFacts) -> str:
    """What each rule promises, what it rests on, and what it reached on the rows that were measured on."""
    if not facts.decisions:
        return ""
    parts = ["## Deciding"]
    for kind, one in facts.decisions.items():
        known = ", ".join(f"`{rows.digest[:16]}`" for rows in one.rows.values())
        goes = " It goes by 1 - P(error) of the uncertainty head." if one.to.by == HEAD else ""
        answered = ENTITY_ANSWERED if one.to.by == ENTITY else ANSWERS[kind]
        parts.append(f"`{answered}`, for {one.to.way}, fitted on {one.num_rows:,} rows ({known}).{goes}")
        parts.append(one.told())
        if kind == "threshold":
            parts.append(f"![Risk and coverage on the rows of the fit, with the bound]({DECISION})")
        for measured in facts.measured:
            if kind in measured.decisions:
                parts.append(f"Reached ({_text(measured.way)}{_of(measured)}):\n\n{measured.decisions[kind]}")
    return "\n\n".join(parts)


def _origins(facts: CardFacts) -> str:
    """Which rows, which seeds, which versions: what somebody needs who wants to check."""
    rows = ["## How it was measured", "", "| rows | number | fingerprint |", "|---|---:|---|"]
    sets = (("trained on", facts.splits.trained_on), ("calibrated on", facts.splits.calibrated_on))
    for what, kinds in sets:
        rows += [_row(f"{what} ({_text(kind)})", len(found), found.digest) for kind, found in kinds.items()]
    for measured in facts.measured:
        what = f"measured on ({', '.join(map(_text, filter(None, (measured.split, measured.way))))})"
        rows.append(_row(what, measured.num_rows, measured.rows_digest))
    versions = ", ".join(f"{package} {version}" for package, version in facts.versions.items())
    seeds = sorted({measured.seed for measured in facts.measured if measured.seed is not None})
    told = [f"Adapter `{facts.digest}`, written with {versions}."]
    if seeds:
        told.append(f"Draws and intervals follow seed {', '.join(map(str, seeds))}.")
    if facts.measured:
        drawn = all(measured.kind != "numbers" for measured in facts.measured)
        how = "; intervals are a bootstrap over the rows" if drawn else ""
        told.append(f"`{REPORT_FILE}` has every score{how}.")
    return "\n".join([*rows, "", " ".join(told)])


def _row(what: str, count: int, digest: str | None) -> str:
    return f"| {what} | {count:,} | {'–' if digest is None else f'`{digest[:16]}`'} |"


def _limits() -> str:
    return (
        "## What these numbers do not say\n\nThey hold for rows like those they were measured on. Where texts come "
        "from elsewhere, a temperature does not help: measure again, on rows from there."
    )
