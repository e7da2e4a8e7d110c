"""What every command shares: examples, JSON for programs, a word after Ctrl-C, and libraries loaded late."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from ..versions import __version__

#: Exit code of a command that was stopped by hand, as shells have it.
INTERRUPTED = 130
#: Exit code of a command that did its work and raised an alarm.
ALARM = 3
EXIT_CODES = (
    "Exit codes: 0 done; 1 not done, one line says why; 2 not understood; 3 an alarm of watch; 130 stopped by hand."
)
#: Headings of the help, over commands and over options.
TRAINING, MEASURING, PUBLISHING = "Train", "Measure and use", "Pass on"
ROWS, PREDICTION, OUTPUT = "Rows", "Prediction", "Output"
#: Whose versions belong into a report of a fault.
PACKAGES = ("peft", "transformers", "torch", "huggingface-hub")

#: What stands after Ctrl-C: a line, or what makes it of the command's arguments.
AfterInterrupt = str | Callable[[Mapping[str, Any]], str]

app = typer.Typer(
    name="peft-calib",
    help="Calibrated LoRA fine-tuning: train, and learn how far to trust the probabilities.",
    epilog="Start with:\n\n  peft-calib demo\n\n"
    "  peft-calib train --data reviews.csv --model roberta-base --output-dir run\n\n"
    f"  peft-calib evaluate run --data held_out.csv\n\n{EXIT_CODES}",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


class Command(TyperCommand):
    """A command that has the libraries loaded once its arguments are known to be right.

    With `--json` what the command returns is printed, and nothing else on standard output; what it returns may be an
    alarm, which is an exit code of its own.
    """

    after_interrupt: AfterInterrupt = "Interrupted."
    alarms: Callable[[Any], bool] = staticmethod(lambda _: False)

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = OUTPUT  # a panel for one option stands in the way
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            several = getattr(error.param, "nargs", 1)
            if several > 1:  # what was taken for the second may be the next option
                error.message = (
                    f"takes {several} numbers, {getattr(error.param, 'metavar', None) or 'one after the other'}."
                )
            raise

    def invoke(self, ctx: Any) -> Any:
        with _without_foreign_notes(), _warnings_in_a_line():
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        try:
            if ctx.find_root().obj is not None:
                with Console(stderr=True).status("loading libraries"):
                    ctx.find_root().obj()
            return self._said(ctx)
        except KeyboardInterrupt:
            told = self.after_interrupt
            if os.environ.get("RANK", "0") == "0":  # of the processes of a launcher, one speaks
                print(told if isinstance(told, str) else told(ctx.params), file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    def _said(self, ctx: Any) -> Any:
        """Run it, with what it returns as JSON where that was asked for."""
        stdout = sys.stdout
        if not ctx.params.get("as_json"):
            value = super().invoke(ctx)
        else:
            with redirect_stdout(sys.stderr):  # bars and notes
                value = super().invoke(ctx)
            if value is not None:  # on other processes than the first
                from ..json_files import without_nan  # numpy is not needed for a help

                stdout.write(json.dumps(without_nan(value), indent=2, ensure_ascii=False, default=str) + "\n")
        if value is not None and self.alarms(value):
            raise typer.Exit(ALARM)
        return value


@contextmanager
def _without_foreign_notes() -> Iterator[None]:
    """What PEFT's import of bitsandbytes says of its own wheels, before the first line of ours."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """What is warned of, for who runs a command: without the line of code; which are shown is not changed."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def command(
    name: str,
    *,
    panel: str,
    examples: Iterable[str],
    after_interrupt: AfterInterrupt,
    alarms: Callable[[Any], bool] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a command, with examples below its help and the line that is told after Ctrl-C.

    `alarms` says of what the function returned whether the command ends with `ALARM`.
    """
    own = {"after_interrupt": _unbound(after_interrupt)} | ({} if alarms is None else {"alarms": staticmethod(alarms)})
    kind = type("Command", (Command,), own)
    shown = "\n\n".join(f"  peft-calib {name} {example}" for example in examples)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        # one line a paragraph: a help is wrapped to the terminal, not where the docstring is
        paragraphs = (" ".join(part.split()) for part in inspect.cleandoc(function.__doc__ or "").split("\n\n"))
        told = "\n\n".join(paragraphs)
        registered = app.command(name, cls=kind, help=told, rich_help_panel=panel, epilog=f"Examples:\n\n{shown}")
        return registered(function)

    return register


def option(panel: str, text: str, *names: str, **more: Any) -> Any:
    """An option below a heading of the help; its bounds are told when they are broken, as they fill lines there."""
    if "min" in more:
        more["metavar"] = "<int>"
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def _unbound(told: AfterInterrupt) -> Any:
    return told if isinstance(told, str) else staticmethod(told)


def _tell_versions(asked: bool) -> None:
    if not asked:
        return
    print(f"peft-calib {__version__}")
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    raise typer.Exit


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


@app.callback()
def _root(
    versions: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_versions, is_eager=True, help="Tell the version, and those below, and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error with its traceback; at any place.")] = False,
) -> None:
    """Options of the program itself; `main` takes `--debug` out of the words, wherever it stands."""


def main_console() -> Console:
    """Speaks on the main process only."""
    from ..runs.processes import processes

    return Console(quiet=not processes().is_main_process)


def say(console: Console, lines: Iterable[str | None]) -> None:
    """Print lines as they are; a bracket is no markup."""
    for line in lines:
        if line is not None:
            console.print(line, markup=False, highlight=False)
