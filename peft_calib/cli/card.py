"""`peft-calib card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ..runs.flags import given, with_flags
from .command import OUTPUT, PUBLISHING, command, main_console, option, say
from .options import ABOUT, ABOUT_PANEL, AsJson, Source


@command(
    "card",
    panel=PUBLISHING,
    examples=("run --output-dir card --base-model FacebookAI/roberta-base",),
    after_interrupt="Interrupted. Nothing was written; run the same command again.",
)
@with_flags(ABOUT)
def card(
    source: Source,
    output_dir: Annotated[Path, option(OUTPUT, "Folder to write; must be new or empty.")],
    repo_id: Annotated[str, option(ABOUT_PANEL, "Name that the card gives.")] = "user/name",
    as_json: AsJson = False,
    **about: Any,
) -> dict[str, str]:
    """Write what `push` would upload into a folder, to look at first: adapter, plain LoRA, report, pictures, card."""
    from ..hub import write_card

    where = write_card(source, output_dir, repo_id=repo_id, **given(about))
    if not as_json:
        say(main_console(), [f"Written to {where}"])
    return {"card": str(where)}
