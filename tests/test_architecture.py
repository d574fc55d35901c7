"""The rules of the house that a parser can check: who imports what, how long things are, what is documented."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from nanojax.cli import load_preset

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "nanojax").rglob("*.py"))
SOURCES = [*LIBRARY, *sorted((ROOT / "scripts").rglob("*.py"))]
PRESETS = sorted((ROOT / "configs").glob("*.py"))
FILE_LINES, FUNCTION_LINES, PRESET_LINES = 400, 60, 40  # house-style.md, 19 and architecture.md
# Longer than FUNCTION_LINES, and why. A function that has become short enough must leave this table.
LONG_FUNCTIONS: dict[str, str] = {}
# The files outside errors.py that read the environment: the address of the hub, by the name that huggingface_hub gave it; where this
# process is, as Slurm and its like say it; and the launcher, which says it.
ENVIRONMENT = {"nanojax/data/download.py", "nanojax/ranks.py", "nanojax/launch.py"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("tyro", {"nanojax/cli.py", "nanojax/config.py"}),
        ("orbax", {"nanojax/checkpoint.py"}),
        ("grain", {"nanojax/data/"}),
        ("transformer_engine", {"nanojax/ops/attention_te.py"}),
        ("tensorboardX", {"nanojax/telemetry.py"}),
        ("matplotlib", {"nanojax/telemetry.py", "nanojax/analysis/picture.py", "scripts/bench/"}),
        ("tiktoken", {"nanojax/tokenizer.py"}),
        ("rustbpe", {"nanojax/tokenizer.py"}),
        ("safetensors", {"nanojax/export/"}),
    ],
)
def test_a_library_is_imported_in_its_room_only(package, rooms):
    users = {name(path) for path in SOURCES if package in imported(path)}
    strangers = {user for user in users if not any(user == room or (room.endswith("/") and user.startswith(room)) for room in rooms)}
    assert not strangers, f"{package} is imported in {sorted(strangers)}; it belongs to {sorted(rooms)}"


def test_the_rooms_of_the_libraries_are_inhabited():
    """Otherwise the test above would pass on an empty house."""
    assert "tyro" in imported(ROOT / "nanojax/cli.py")
    assert "orbax" in imported(ROOT / "nanojax/checkpoint.py")
    assert any("grain" in imported(path) for path in LIBRARY if name(path).startswith("nanojax/data/"))


def test_no_file_is_longer_than_the_house_allows():
    long = {name(path): n for path in SOURCES if (n := len(path.read_text().splitlines())) >= FILE_LINES}
    assert not long, f"files of {FILE_LINES} lines or more: {long}"


def test_no_function_is_longer_than_the_house_allows_but_for_those_with_a_reason():
    long = {}
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines >= FUNCTION_LINES:
                    long[f"{name(path)}:{node.name}"] = lines
    assert set(long) == set(LONG_FUNCTIONS), f"functions of {FUNCTION_LINES} lines or more: {long}; with a reason: {set(LONG_FUNCTIONS)}"


@pytest.mark.parametrize("path", [*SOURCES, *PRESETS], ids=name)
def test_a_module_says_what_it_holds(path):
    assert ast.get_docstring(tree(path)), f"{name(path)} has no docstring"


def test_every_public_function_and_class_says_what_it_is():
    missing = [
        f"{name(path)}:{node.lineno} {node.name}"
        for path in LIBRARY
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not missing, missing


def test_the_environment_is_read_in_one_place():
    readers = {name(path) for path in SOURCES if re.search(r"\bos\.(environ|getenv)\b", path.read_text())} - {"nanojax/errors.py"}
    assert readers <= ENVIRONMENT, f"{sorted(readers - ENVIRONMENT)} read the environment; make it a field of the config"


@pytest.mark.parametrize("path", PRESETS, ids=name)
def test_a_preset_is_short_loads_and_names_its_own_command(path):
    text = path.read_text()
    assert len(text.splitlines()) <= PRESET_LINES
    config = load_preset(path)
    assert config.model.width % config.model.head_dim == 0
    commands = re.findall(r"configs/\w+\.py", ast.get_docstring(tree(path)) or "")
    assert set(commands) <= {name(path)}, f"{name(path)} tells how to run {commands}"


def test_every_source_file_has_the_tests_that_mirror_it():
    """A test file without its module is a leftover of a rename. test_fp4.py and test_fp4_properties.py both mirror fp4.py."""
    modules = {path.relative_to(ROOT / "nanojax").with_suffix("").as_posix() for path in LIBRARY}
    free = {"architecture", "wrong_calls", "two_processes", "ablate", "chaos", "scripts"}  # the last three: scripts
    tests = {
        (path.parent.relative_to(ROOT / "tests") / path.stem.removeprefix("test_")).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    mirrored = tuple(f"{module}_" for module in modules)
    strays = {test for test in tests if test not in modules and not test.startswith(mirrored) and test.split("/")[-1] not in free}
    assert not strays, f"tests/ mirrors nanojax/, and these mirror nothing: {sorted(strays)}"


def test_the_readme_names_only_files_that_exist():
    """Paths anywhere in it, and bare names as the tree has them: `model.py` must be the name of some file."""
    text = (ROOT / "README.md").read_text()
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {file for file in listed.splitlines() if (ROOT / file).exists()}
    folders = {parent.as_posix() for file in files for parent in Path(file).parents}
    names = {Path(entry).name for entry in files | folders}
    paths = set(re.findall(r"(?<![\w/.-])((?:nanojax|configs|scripts|tests)/[\w./-]*\w)", text))
    bare = set(re.findall(r"(?<![\w/.*'-])(\w[\w-]*\.(?:py|sh|toml|sbatch|yaml))\b", text)) | {
        found for block in re.findall(r"```.*?```", text, re.S) for found in re.findall(r"(?m)^\s+(\w+)/(?=\s)", block)
    }
    gone = sorted({path for path in paths if path not in files | folders} | {word for word in bare if word not in names})
    assert paths, "the README names no file at all"
    assert not gone, f"README.md names {gone}, which do not exist"
