"""The one reader of the JSON files of this package: what a file says is checked before it is believed.

A file is opened as `Fields`, and every field is taken out by a method that names its type and range. Whatever is
wrong, the error names the file, the field, the value, what was expected, and how to mend it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_MISSING: Any = object()
#: Field of a file for what it says itself, see `sealed`.
DIGEST = "digest"
#: What is said where a file cannot be trusted and nothing better is known.
RESTORE = "Restore the file from a copy, or make it again"


def read_json(path: str | Path, mend: str = RESTORE) -> Fields:
    """Open a JSON file that holds one mapping; `mend` says how a user gets a good file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is no UTF-8 text ({error}). {mend}.") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {path}. {mend}, or name the right one.") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{path} is a folder, and a JSON file is expected: name the file in it.") from error
    return parse_json(text, str(path), mend)


def parse_json(text: str, source: str, mend: str = RESTORE) -> Fields:
    """The same for a text that is at hand already."""
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"{source} is damaged: {reason}. {mend}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source} is damaged: it holds {describe(content)}, not a mapping. {mend}.")
    return Fields(content, source, mend)


@dataclass(frozen=True)
class Fields:
    """A mapping that came from outside: from `source`, where it stands under `prefix`; `mend` gets a good one."""

    content: Mapping[str, Any]
    source: str
    mend: str = RESTORE
    prefix: str = ""

    def __contains__(self, name: str) -> bool:
        return name in self.content

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """A field of any type; without a default a missing field is an error."""
        if name in self.content:
            return self.content[name]
        if default is _MISSING:
            raise ValueError(f"{self.source}: {self.prefix}{name} is missing. {self.mend}.")
        return default

    def wrong(self, name: str, expected: str) -> ValueError:
        """The error that says what a field should have been."""
        found = describe(self.content.get(name))
        return ValueError(f"{self.source}: {self.prefix}{name} is {found}, but must be {expected}. {self.mend}.")

    def _typed(self, name: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        """A field that fits; `default` stands for a missing one, and for null if it is None."""
        value = self.get(name, default)
        if value is default or (value is None and default is None) or fits(value):
            return value
        raise self.wrong(name, expected)

    @contextmanager
    def named(self) -> Iterator[None]:
        """What is raised inside for a value that no user may give knows no file: name it, and how to mend it."""
        try:
            yield
        except (TypeError, ValueError) as error:
            if self.source in str(error):
                raise
            raise ValueError(f"{self.source}: {error} {self.mend}.") from error

    def check_seal(self, what: str | None = None) -> None:
        """Raise `ValueError` where a file that `sealed` wrote says something else now; one without a digest passes.

        `what` is the thing in it that was fitted; of a file in which not all is fitted, the error tells how one says
        that a change was meant. The last thing to be asked of a file: of a value that cannot be, a reader has more to
        say.
        """
        if self.prefix or DIGEST not in self.content or self.text(DIGEST) == seal_of(self.content):
            return
        then = "it was written" if what is None else f"{what} in it was fitted"
        meant = "" if what is not None else f", or leave the field {DIGEST} out of it if the change was meant"
        raise ValueError(
            f"{self.source} was changed after {then}: its digest is not that of what it says now. {self.mend}{meant}."
        )

    def number(
        self, name: str, *, above: float | None = None, least: float | None = None, most: float | None = None,
        default: Any = _MISSING,
    ) -> Any:  # fmt: skip
        """A finite number; true and false are none."""
        expected = f"a finite number{_range(above, least, most)}"
        return self._typed(name, default, lambda v: _is(v, float) and _within(v, above, least, most), expected)

    def integer(self, name: str, *, least: int | None = None, default: Any = _MISSING) -> Any:
        """A whole number; true, false and 3.0 are none."""
        expected = f"a whole number{_range(None, least, None)}"
        return self._typed(name, default, lambda v: _is(v, int) and _within(v, None, least, None), expected)

    def has_version(self, expected: int) -> bool:
        """Whether `format_version` is a whole number, which true and 1.0 are not, and the one that is read."""
        found = self.content.get("format_version")
        return type(found) is int and found == expected

    def check_version(self, expected: int) -> None:
        """Raise `ValueError` for what was saved with another format version than the one that is read."""
        if not self.has_version(expected):
            raise ValueError(
                f"{self.source} was saved with format version {describe(self.content.get('format_version'))}; this "
                f"release reads {expected}."
            )

    def text(self, name: str, *, among: Collection[str] | None = None, default: Any = _MISSING) -> Any:
        """A text, perhaps one of a few."""
        expected = "a text" if among is None else f"one of {', '.join(map(repr, among))}"
        return self._typed(name, default, lambda v: isinstance(v, str) and (among is None or v in among), expected)

    def flag(self, name: str, default: Any = _MISSING) -> Any:
        """True or false, and nothing that counts as one of them."""
        return self._typed(name, default, lambda v: _is(v, bool), "true or false")

    def mapping(self, name: str, default: Any = _MISSING) -> Any:
        """A mapping, to be read in the same way."""
        value = self._typed(name, default, lambda v: isinstance(v, Mapping), "a mapping")
        return Fields(value, self.source, self.mend, f"{self.prefix}{name}.") if isinstance(value, Mapping) else value

    def listing(self, name: str, kind: type | None = None, default: Any = _MISSING) -> Any:
        """A list, perhaps of one kind of entries."""
        entries = f" of {_WORDS.get(kind, kind.__name__)}" if kind is not None else ""
        kind_or_any: Any = Any if kind is None else kind

        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(_is(entry, kind_or_any) for entry in value)

        return self._typed(name, default, fits, f"a list{entries}")

    def array(self, name: str, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
        """Finite numbers in (nested) lists, as float64; `shape` has None where any size will do."""
        value = self.get(name)
        sizes = "" if shape is None else " of shape (" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
        expected = f"finite numbers{sizes}"
        if not _only_numbers(value):
            raise self.wrong(name, expected)
        try:
            array = np.asarray(value, dtype=np.float64)
        except (ValueError, OverflowError):
            raise self.wrong(name, expected) from None
        fits = shape is None or (
            array.ndim == len(shape)
            and all(wanted in (None, size) for wanted, size in zip(shape, array.shape, strict=True))
        )
        if not fits or not np.isfinite(array).all():
            raise self.wrong(name, expected)
        return array


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file with its digest at the end, by which `Fields.check_seal` sees an edit.

    It keeps an honest hand from being believed, not a forger: who changes the digest with the rest is not found.
    """
    return {**content, DIGEST: seal_of(content)}


def seal_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content as JSON in one spelling (keys in order, no spaces, 1 for 1.0), without the digest."""
    said = {name: _spelled(value) for name, value in content.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _spelled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _spelled(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_fields(instance: Any, owner: type, source: str) -> None:
    """Hold the fields that `owner` itself declares against their annotations, strictly: true is no number."""
    hints = typing.get_type_hints(owner)
    for name in inspect.get_annotations(owner):
        hint, value = hints[name], getattr(instance, name, None)
        if typing.get_origin(hint) is not typing.ClassVar and not _fits(value, hint):
            raise ValueError(f"{source}: {name} is {describe(value)}, but must be {_words(hint)}.")


def inside(folder: str | Path, name: str, source: str) -> Path:
    """The path of what an index names, which must lie in its own folder: no `..`, no link out of it."""
    plain = isinstance(name, str) and not {"\0", "\\"} & set(name) and not Path(name).is_absolute()
    top = Path(folder).resolve()
    place = (top / name).resolve() if plain else top
    if place == top or not place.is_relative_to(top):
        raise ValueError(
            f"{source} names {describe(name)}, which does not lie in its own folder {folder}. An index names what "
            "lies beside it; restore it, or write the folder again."
        )
    return Path(folder) / name


def describe(value: Any) -> str:
    """A value as it is shown in a message: short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__} of {len(text)} characters)"


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} stands there twice")
    return content


def _within(value: float, above: float | None, least: float | None, most: float | None) -> bool:
    below = (above is not None and value <= above) or (least is not None and value < least)
    return not below and (most is None or value <= most)


def _range(above: float | None, least: float | None, most: float | None) -> str:
    ends = {"above": above, "of at least": least, "of at most": most}
    parts = [f"{word} {end:g}" for word, end in ends.items() if end is not None]
    return f" {' and '.join(parts)}" if parts else ""


def _only_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_only_numbers, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # also of a whole number that no float reaches
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is list:
        (kind,) = typing.get_args(hint)
        return isinstance(value, (list, set, tuple)) and all(_fits(entry, kind) for entry in value)
    if origin is dict:
        keys, values = typing.get_args(hint)
        return isinstance(value, dict) and all(_fits(k, keys) and _fits(v, values) for k, v in value.items())
    if hint is list:
        return isinstance(value, (list, tuple))
    return _is(value, hint)


def _words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_words(part) for part in typing.get_args(hint)]
        if "a finite number" in parts and "a whole number" in parts:
            parts.remove("a whole number")
        return " or ".join(parts)
    if origin is list:
        return f"a list (of entries that are each {_words(typing.get_args(hint)[0])})"
    if origin is dict:
        return f"a mapping (with values that are each {_words(typing.get_args(hint)[1])})"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def without_nan(value: Any) -> Any:
    """NaN, where a score is not defined, as null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
