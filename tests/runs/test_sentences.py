import ast
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from peft_calib.runs.embedded import sentences as module
from peft_calib.runs.embedded.sentences import CLASSES, OUTSIDE, documentation_sentences, first_sentence


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return documentation_sentences(500, 200, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_counts_and_order(built):
    inside, outside = built
    assert Counter(row.label for row in inside) == {library.label: 500 for library in CLASSES}
    assert Counter(row.label for row in outside) == {library.label: 200 for library in OUTSIDE}
    assert [row.label for row in inside] == [library.label for library in CLASSES for _ in range(500)]


def test_sentences_are_prose_of_six_to_thirty_words(built):
    for row in [*built[0], *built[1]]:
        assert 6 <= len(row.text.split()) <= 30
        assert row.text == " ".join(row.text.split())
        assert row.text.isascii() and row.text[0].isupper()
        assert "`" not in row.text and ":class:" not in row.text and "://" not in row.text


def test_no_sentence_names_a_library(built):
    long_names = "torch transformers hugging numpy pandas scikit sklearn scipy python stdlib sympy networkx matplotlib"
    for row in [*built[0], *built[1]]:
        text = row.text.lower()
        assert "standard library" not in text
        assert not [name for name in long_names.split() if name in text]
        words = "".join(character if character.isalnum() else " " for character in text).split()
        assert not {"np", "pd", "sp", "hf", "plt", "nx"}.intersection(words)


def test_no_sentence_occurs_twice(built):
    texts = ["".join(c for c in row.text.lower() if c.isalpha()) for row in [*built[0], *built[1]]]
    assert len(set(texts)) == len(texts)


def test_sentences_are_read_from_the_named_file(built):
    """Each row can be traced to a documentation string of the file it names."""
    for row in built[0][::250]:
        library = next(library for library in CLASSES if library.label == row.label)
        tree = ast.parse((module._root(library) / row.origin).read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        assert row.text in [first_sentence(docstring) for docstring in found if docstring]


def test_same_rows_in_another_process_and_from_the_cache(tmp_path):
    """Neither the order of the file system, nor string hashing, nor the cache changes a row; nothing is imported."""
    script = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('sentences', {module.__file__!r})\n"
        "sys.modules['sentences'] = sentences = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sentences)\n"
        "print(json.dumps(sentences.documentation_sentences(20, 5, cache_dir=sys.argv[1])))\n"
        "assert not {'torch', 'numpy', 'pandas', 'sympy', 'matplotlib'} & set(sys.modules)\n"
    )
    answers = [
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / name], capture_output=True, text=True, check=True
        ).stdout
        for name in ("first", "first", "second")
    ]
    assert answers[0] == answers[1] == answers[2]
    assert len(json.loads(answers[0])[0]) == 140
    assert len(list((tmp_path / "first").iterdir())) == 1  # no temporary file is left behind


def test_an_interrupted_build_leaves_no_cache(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        documentation_sentences(2, 1, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_more_than_there_are():
    with pytest.raises(ValueError, match="ask for fewer"):
        module._collect(CLASSES[2], 10**6, set())
    with pytest.raises(ValueError, match="at least 1"):
        documentation_sentences(0, 5)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"peft-calib\[demo\]"):
        documentation_sentences(3, 1)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the :meth:`~DataFrame.sum` of the values over\nthe axis. Then more.\n\nDetails.",
         "Return the DataFrame.sum of the values over the axis."),
        ("Compute **all** the ``values`` of `x` in one single pass", "Compute all the values of x in one single pass"),
        ("dot(a, b, out=None)\n\nDot product of two arrays and more words.", None),
        ("Return a numpy array of the same shape and type.", None),
        ("Return an object which torchscript can compile to a graph.", None),
        ("Short one.", None),
        ("", None),
    ],
)  # fmt: skip
def test_first_sentence(docstring, expected):
    assert first_sentence(docstring) == expected


def test_the_task_is_learnable_but_ambiguous(built):
    """Words alone carry the label well above chance (1/7) and well below certainty."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    from sklearn.feature_extraction.text import TfidfVectorizer

    from peft_calib.demo.data import load_text_data

    data = load_text_data("documentation", seed=0)
    words = TfidfVectorizer().fit(data.train["text"][:])
    classifier = linear_model.LogisticRegression(max_iter=1000)
    classifier.fit(words.transform(data.train["text"][:]), data.train["label"][:])
    accuracy = np.mean(classifier.predict(words.transform(data.test["text"][:])) == np.array(data.test["label"][:]))
    assert 0.40 < accuracy < 0.70
