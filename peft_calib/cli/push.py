"""`peft-calib push`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..runs.flags import given, with_flags
from .command import PUBLISHING, command, main_console, option
from .options import ABOUT, COMMIT, AsJson, Source


@command(
    "push",
    panel=PUBLISHING,
    examples=("run user/name --license mit", "run user/name --private --create-pr"),
    after_interrupt="Interrupted. It is one commit or none; look on the Hub, or run the same command again.",
)
@with_flags(ABOUT)
def push(
    source: Source,
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hub; made if it does not exist.")],
    private: Annotated[bool, option(COMMIT, "Make the repository a private one.", "--private")] = False,
    revision: Annotated[str | None, option(COMMIT, "Branch; made if it does not exist.")] = None,
    create_pr: Annotated[bool, option(COMMIT, "Open a pull request instead.", "--create-pr")] = False,
    message: Annotated[str | None, option(COMMIT, "Of the commit.")] = None,
    as_json: AsJson = False,
    **about: Any,
) -> dict[str, str | None]:
    """Upload a run's adapter to the Hub, with a card that says how calibrated it is and how that was measured.

    One commit or none. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from ..hub import push_to_hub

    options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "commit_message": message}
    told = push_to_hub(source, repo_id, private=private or None, **options, **given(about))
    if not as_json:
        main_console().print(f"Pushed: {told.pr_url or told.commit_url}", soft_wrap=True)
    return {"commit_url": told.commit_url, "oid": told.oid, "pull_request_url": told.pr_url}
