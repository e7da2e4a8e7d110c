"""What a JSON file says is checked before it is believed; every error names file, field, value and mend."""

import pytest

from peft_calib.json_files import Fields, inside, read_json

FIELDS = Fields({"n": 3, "x": 0.5, "s": "a", "b": True, "l": [1, 2], "m": {"t": -1}}, "box.json", "Make it again")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: f.number("b"), r"box\.json: b is True, but must be a finite number\. Make it again\."),
        (lambda f: f.integer("x"), r"x is 0\.5, but must be a whole number"),
        (lambda f: f.integer("n", least=4), r"n is 3, but must be a whole number of at least 4"),
        (lambda f: f.text("s", among=["b", "c"]), r"s is 'a', but must be one of 'b', 'c'"),
        (lambda f: f.flag("n"), r"n is 3, but must be true or false"),
        (lambda f: f.listing("l", str), r"l is \[1, 2\], but must be a list of a text"),
        (lambda f: f.array("l", (3,)), r"l is \[1, 2\], but must be finite numbers of shape \(3\)"),
        (lambda f: f.mapping("m").number("t", above=0), r"m\.t is -1, but must be a finite number above 0"),
        (lambda f: f.number("gone"), r"box\.json: gone is missing\. Make it again"),
        (lambda f: f.mapping("s"), r"s is 'a', but must be a mapping"),
    ],
)
def test_wrong_values_are_named(read, message):
    with pytest.raises(ValueError, match=message):
        read(FIELDS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, None, "1", [1.0], {}])
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"t is .*, but must be a finite number above 0"):
        Fields({"t": value}, "a file").number("t", above=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: Expecting"),
        ("[1]", "holds .1., not a mapping"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, message):
    place = tmp_path / "facts.json"
    place.write_text(text)
    with pytest.raises(ValueError, match=f"facts.json is damaged: .*{message.removeprefix('is damaged: ')}"):
        read_json(place)


@pytest.mark.parametrize("name", ["../x", "/tmp", "a/../../x", "", ".", "..", "link", 3, None, "a\\b", "a\0"])
def test_an_index_stays_inside_its_folder(tmp_path, name):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="does not lie in its own folder"):
        inside(tmp_path / "index", name, "draws.json")
    assert inside(tmp_path / "index", "draw-0", "draws.json") == tmp_path / "index" / "draw-0"


def test_a_file_that_is_not_there_and_a_folder_are_one_line(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^There is no file .*box\.json\. Make it again, or name the right one\.$"
    ):
        read_json(tmp_path / "box.json", "Make it again")
    with pytest.raises(IsADirectoryError, match=r"is a folder, and a JSON file is expected"):
        read_json(tmp_path)
