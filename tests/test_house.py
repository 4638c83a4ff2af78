"""The rooms import one way: commands -> training, evaluation, builders -> modeling, which imports none of them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "modeling_fvlm": set(),
    "training_fvlm": {"modeling_fvlm"},
    "evaluation_fvlm": {"modeling_fvlm"},
    "data_builders": {"modeling_fvlm"},
    "benchmarks": {
        "modeling_fvlm",
        "training_fvlm",
        "evaluation_fvlm",
        "data_builders",
    },  # commands, as the scripts are
}
OURS = {*ROOMS, "benchmarks", "tests", "train_fvlm", "eval_fvlm"}


def imported_rooms(path: Path) -> set[str]:
    """Names of ours that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names & OURS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_stands_on(room):
    files = sorted((ROOT / room).glob("**/*.py"))
    assert files
    for path in files:
        assert imported_rooms(path) <= ROOMS[room] | {room}, path.name


def test_what_ships_to_the_hub_is_flat_and_imports_siblings_by_one_dot():
    files = sorted((ROOT / "modeling_fvlm").glob("**/*.py"))
    assert all(path.parent.name == "modeling_fvlm" for path in files)
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{path.name}:{node.lineno}"


def test_builders_import_no_network():
    for path in sorted((ROOT / "data_builders").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not any(module.endswith("modeling_fvlm.modeling_fvlm") for module in modules), path.name
