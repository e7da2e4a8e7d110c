"""The import graph, imports inside functions and for type checkers included: no circle, no arrow up."""

from import_graph import FLOORS, ROOT, circles, graph, room, rooms, table

ARROWS = graph()
ORDER = [member for floor in FLOORS.values() for member in floor]


def test_no_module_imports_itself_by_way_of_others():
    assert circles(ARROWS) == []


def test_every_room_has_its_floor():
    assert sorted(ORDER) == sorted(set(rooms(ARROWS)) - {""})


def test_no_room_imports_one_above_it():
    up = {
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        for other in others
        if room(name) and (not room(other) or ORDER.index(room(other)) > ORDER.index(room(name)))
    }
    assert up == set()


def test_the_two_foundations_do_not_know_each_other():
    found = rooms(ARROWS)
    assert "calibration" not in found["tuners"]
    assert "tuners" not in found["calibration"]


def test_laws_do_not_know_each_other():
    for name, others in ARROWS.items():
        parts = name.split(".")
        if parts[1:2] == ["tuners"] and parts[2:3] and parts[2].endswith("_lora"):
            foreign = {other for other in others if "_lora" in other and not other.startswith(".".join(parts[:3]))}
            assert not foreign, name


def test_a_circle_and_an_import_inside_a_function_or_for_types_are_seen(tmp_path):
    from import_graph import imports

    file = tmp_path / "b.py"
    file.write_text("def late():\n    from .a import name\n")
    assert imports("p.b", file, {"p.a", "p.b"}) == {"p.a"}
    file.write_text("if TYPE_CHECKING:\n    from .a import name\n")
    assert imports("p.b", file, {"p.a", "p.b"}) == {"p.a"}
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [["a", "b"]]


def test_the_page_shows_the_graph():
    page = (ROOT / "docs" / "architecture.md").read_text()
    shown = page.partition("<!-- rooms -->")[2].partition("<!-- end of rooms -->")[0].strip()
    assert shown == table(), "docs/architecture.md: put there what python tests/support/import_graph.py prints"
