"""Real text that is on every machine that can run us: first sentences of installed libraries' documentation strings.

The question put to a classifier is "which library does this sentence document?". Nothing is downloaded or
redistributed, and nothing is imported: sources are read with :mod:`ast`. The task is naturally ambiguous ("Return a
copy of the object with new labels" may come from several libraries), so over-confidence has something to show.

Sentences from libraries that are *not* among the classes form the out-of-distribution set.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

STANDARD_LIBRARY = "standard library"


class Library(NamedTuple):
    """A source of sentences: its name as a label, its import name and the words that would give it away."""

    label: str
    package: str
    names: tuple[str, ...]


CLASSES: tuple[Library, ...] = (
    Library("torch", "torch", ("torch", "pytorch", "libtorch", "aten")),
    Library("transformers", "transformers", ("transformers", "huggingface", "hugging face", "hf")),
    Library("numpy", "numpy", ("numpy", "np")),
    Library("pandas", "pandas", ("pandas", "pd")),
    Library("scikit-learn", "sklearn", ("scikit-learn", "scikit learn", "scikit", "sklearn")),
    Library("scipy", "scipy", ("scipy", "sp")),
    Library(STANDARD_LIBRARY, "", ("standard library", "stdlib", "python", "cpython")),
)
OUTSIDE: tuple[Library, ...] = (
    Library("sympy", "sympy", ("sympy",)),
    Library("networkx", "networkx", ("networkx", "nx")),
    Library("matplotlib", "matplotlib", ("matplotlib", "mpl", "pyplot", "plt")),
)

# Tests, bundled copies of other libraries, and code that only ships with an interpreter build.
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "_vendor", "externals", "ensurepip", "idlelib"}
SKIPPED_FOLDERS |= {"lib2to3", "turtledemo", "test", "tests", "testing", "array_api_compat", "array_api_extra"}
MIN_WORDS, MAX_WORDS = 6, 30
MAX_PER_FILE = 10  # neighbours in a file resemble each other: a spread makes the task harder and more honest

# Long names give a library away inside a word too ("torchscript"), short ones only as a word of their own ("np.").
_NAMES = sorted({name for library in (*CLASSES, *OUTSIDE) for name in library.names})
_NAMED = re.compile(
    "|".join(re.escape(name) if len(name) > 4 else rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])" for name in _NAMES),
    re.IGNORECASE,
)
_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^>]*>)?`")
_LINK = re.compile(r"\[`?([^\]`]+)`?\](?:\([^)]*\))?")
_URL = re.compile(r"\w+://\S+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(A-Z])")
_CODE = re.compile(r"[<>{}|\\=]|\.\.\.|, optional")
_SIGNATURE = re.compile(r"^[\w.]+\(")


class Sentence(NamedTuple):
    """One row: the sentence, the label of its library, and the file it was read from (relative to the library)."""

    text: str
    label: str
    origin: str


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a documentation string as plain text, or `None` where there is no usable one.

    Usable is a sentence of 6 to 30 words that names none of the libraries: names are the answer, and cutting them out
    would leave broken sentences behind.
    """
    paragraph = " ".join(docstring.strip().split("\n\n", 1)[0].split())
    if _SIGNATURE.match(paragraph):
        return None
    text = _URL.sub("", _LINK.sub(r"\1", _ROLE.sub(r"\1", paragraph))).replace("`", "").replace("*", "")
    sentence = _SENTENCE_END.split(" ".join(text.split()), maxsplit=1)[0]
    is_prose = sentence.isascii() and sentence[:1].isupper() and not _CODE.search(sentence)
    words = [word for word in sentence.split() if re.search(r"[A-Za-z]{2}", word)]
    has_length = len(words) >= MIN_WORDS and len(sentence.split()) <= MAX_WORDS
    return sentence if is_prose and has_length and not _NAMED.search(sentence) else None


def documentation_sentences(
    per_library: int = 500, outside: int = 200, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[list[Sentence], list[Sentence]]:
    """Sentences of the seven class libraries, and of libraries outside the classes; each once, and cached.

    Files are visited in the order of a hash of their path, so the result depends only on the installed versions.
    """
    if per_library < 1 or outside < 1:
        raise ValueError(f"per_library and outside must be at least 1, got {per_library} and {outside}")
    path = _cache_path(per_library, outside, cache_dir)
    if path.exists():
        rows = [Sentence(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        seen: set[str] = set()
        rows = [row for library in CLASSES for row in _collect(library, per_library, seen)]
        rows += [row for library in OUTSIDE for row in _collect(library, outside, seen)]
        _write_atomically(path, "".join(json.dumps(row._asdict()) + "\n" for row in rows))
    inside_labels = {library.label for library in CLASSES}
    return [r for r in rows if r.label in inside_labels], [r for r in rows if r.label not in inside_labels]


def _collect(library: Library, count: int, seen: set[str]) -> list[Sentence]:
    """The first `count` new sentences of one library; `seen` holds the normalised form of those already taken."""
    rows: list[Sentence] = []
    for file, origin in _files(library):
        taken = 0
        for text in filter(None, map(first_sentence, _docstrings(file))):
            key = re.sub(r"[^a-z]", "", text.lower())
            if key in seen or taken == MAX_PER_FILE:
                continue
            seen.add(key)
            taken += 1
            rows.append(Sentence(text, library.label, origin))
            if len(rows) == count:
                return rows
    raise ValueError(f"{library.label} has {len(rows)} usable sentences, {count} were asked for: ask for fewer")


def _files(library: Library) -> list[tuple[Path, str]]:
    root = _root(library)
    files = ((file, file.relative_to(root)) for file in root.rglob("*.py"))
    kept = [(file, name.as_posix()) for file, name in files if not SKIPPED_FOLDERS.intersection(name.parts)]
    return sorted(kept, key=lambda item: hashlib.sha256(item[1].encode()).digest())


def _root(library: Library) -> Path:
    if library.label == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = find_spec(library.package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the embedded data set reads the sources of {library.package!r}, which is not installed: "
            "pip install 'peft-calib[demo]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other interpreters
        return
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        nodes += [child for child in getattr(node, "body", ()) if isinstance(child, ast.stmt)]


def _cache_path(per_library: int, outside: int, cache_dir: str | os.PathLike[str] | None) -> Path:
    rules = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # a change of this file makes older caches void
    versions = [rules, per_library, outside, platform.python_version()]
    for library in (*CLASSES, *OUTSIDE):
        if library.package:
            _root(library)  # a missing library is reported even where an older cache could hide it
            distribution = {"sklearn": "scikit-learn"}.get(library.package, library.package)
            versions.append(importlib.metadata.version(distribution))
    key = hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:16]
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_calib"
    return Path(cache_dir or default) / f"documentation-sentences-{key}.jsonl"


def _write_atomically(path: Path, text: str) -> None:
    # not that of `files`: this module can be loaded by itself, without the package and torch behind it
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / path.name
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
