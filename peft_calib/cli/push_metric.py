"""`peft-calib push-metric`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import OUTPUT, PUBLISHING, command, main_console, option, say
from .options import COMMIT, AsJson

METRICS = ("calibration", "decision", "selective_prediction", "uncertainty")


@command(
    "push-metric",
    panel=PUBLISHING,
    examples=("calibration user/calibration", "decision user/decision --output-dir space"),
    after_interrupt="Interrupted. It is one commit or none; look on the Hub, or run the same command again.",
)
def push_metric(
    name: Annotated[
        str,
        typer.Argument(
            help=f"One of {', '.join(METRICS)}.",
            autocompletion=lambda incomplete: [one for one in METRICS if one.startswith(incomplete)],
        ),
    ],
    repo_id: Annotated[str, typer.Argument(help="user/name of the Space; made if it does not exist.")],
    private: Annotated[bool, option(COMMIT, "Make the Space a private one.", "--private")] = False,
    revision: Annotated[str | None, option(COMMIT, "Branch; made if it does not exist.")] = None,
    create_pr: Annotated[bool, option(COMMIT, "Open a pull request instead.", "--create-pr")] = False,
    message: Annotated[str | None, option(COMMIT, "Of the commit.")] = None,
    output_dir: Annotated[
        Path | None, option(OUTPUT, "Write what would be pushed into this new folder, and push nothing.")
    ] = None,
    as_json: AsJson = False,
) -> dict[str, str | None]:
    """Push a metric of this package to the Hub as a Space: a page to try it on, and a module for evaluate.load.

    The page starts with an example, measured, and its picture.
    """
    from ..hub import push_metric as push_space
    from ..hub import write_space

    if output_dir is not None:
        where = write_space(name, output_dir, repo_id=repo_id)
        if not as_json:
            say(main_console(), [f"Written to {where}"])
        return {"folder": str(where)}
    told = push_space(
        name, repo_id, private=private or None, revision=revision, create_pr=create_pr, commit_message=message
    )
    if not as_json:
        main_console().print(f"Pushed: {told.pr_url or told.commit_url}", soft_wrap=True)
    return {"commit_url": told.commit_url, "oid": told.oid, "pull_request_url": told.pr_url}
