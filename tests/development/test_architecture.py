"""The map of docs/architecture.md is that of the imports, and a circle cannot be drawn."""

import pytest
from comfyui_deltaconv.development import DevelopmentError, architecture


def test_the_committed_map_is_that_of_the_imports(capsys):
    assert architecture.main(["--check"]) == 0
    rooms = architecture.arrows()
    assert set(rooms) == set(architecture.PURPOSE)
    # Every room but the lowest leans on another.
    assert {room for room, below in rooms.items() if not below} == {"kernels"}


def test_another_map_is_refused(tmp_path, monkeypatch, capsys):
    older = tmp_path / "architecture.md"
    text = architecture.MAP.read_text(encoding="utf-8")
    older.write_text(text.replace("development --> cli", "development --> kernels"))
    monkeypatch.setattr(architecture, "MAP", older)
    assert architecture.main(["--check"]) == 1
    assert "older map" in capsys.readouterr().out
    assert architecture.main([]) == 0
    assert older.read_text(encoding="utf-8") == text


def test_a_circle_is_named_and_an_arrow_said_twice_is_left_out():
    drawn = architecture.mermaid(
        {"cli": {"nodes", "kernels"}, "nodes": {"kernels"}, "kernels": set()}
    )
    assert "cli --> nodes" in drawn and "nodes --> kernels" in drawn
    assert "cli --> kernels" not in drawn
    with pytest.raises(DevelopmentError, match=r"no circle, got .*nodes.*kernels"):
        architecture.mermaid({"nodes": {"kernels"}, "kernels": {"nodes"}})


def test_a_module_in_no_room_is_named():
    with pytest.raises(DevelopmentError, match=r"comfyui_deltaconv\.attic\.old in a room"):
        architecture.room_of("comfyui_deltaconv.attic.old", False)
