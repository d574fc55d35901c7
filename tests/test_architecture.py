"""The rules of the house that a parser can check: who imports what, how long things are, what is documented."""

from __future__ import annotations

import ast
import functools
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
# What touches the environment besides errors.py: the address of the hub, by the name that huggingface_hub gave it; NANOJAX_FAULT; what is
# set for Transformer Engine, which has no other switch; where this process is, as Slurm and its like say it; the launcher, who says so; and
# the bench whose processes share a GPU's memory, which XLA and torch take no other word about.
ENVIRONMENT = {
    "nanojax/data/download.py",
    "nanojax/faults.py",
    "nanojax/launch.py",
    "nanojax/ops/attention_te.py",
    "nanojax/ranks.py",
    "scripts/bench/throughput.py",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@functools.cache
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
    free = {"architecture", "wrong_calls", "two_processes", "ablate", "chaos", "floor", "throughput", "scripts"}  # the last five: scripts
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


# What runs or unpickles what it reads. Where one is used, and why; an entry that nobody needs any more must leave this table.
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
UNSAFE_CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "torch.load", "pandas.read_pickle",
    "subprocess.getoutput", "subprocess.getstatusoutput", "*.deserialize_and_load", "*.deserialize", "*.read_pickle", "*.unsafe_load",
}  # fmt: skip
ALLOWED_UNSAFE = {
    "nanojax/cli.py: runpy": "a preset is a Python file that the user names on the command line, as any other program",
    "scripts/bench/chaos.py: runpy": "the prelude of a process that the user asks for, in a string that Python is given",
}


def unsafe(source: ast.Module) -> set[str]:
    """Names from the tables above that a source uses, in its code and in strings of code, and arguments that amount to the same."""
    found: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {f"*.{alias.name}" for alias in node.names}
            found |= ({(node.module or "").split(".")[0]} & UNSAFE_MODULES) | (names & UNSAFE_CALLS)
        elif isinstance(node, ast.Attribute | ast.Name):
            whole = ast.unparse(node).removeprefix("builtins.").replace("np.", "numpy.")
            found |= {whole, f"*.{whole.rpartition('.')[2]}"} & UNSAFE_CALLS
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell") and getattr(node.value, "value", True) is not False:
            found.add(f"{node.arg}=True")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\bimport (\w+)", node.value)) & UNSAFE_MODULES
    return found


def test_nothing_that_is_read_is_run_or_unpickled():
    used = {f"{name(path)}: {what}" for path in SOURCES for what in unsafe(tree(path))}
    assert used == set(ALLOWED_UNSAFE), f"used {sorted(used - set(ALLOWED_UNSAFE))}, not used {sorted(set(ALLOWED_UNSAFE) - used)}"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle as p", "pickle"),
        ("from marshal import loads", "marshal"),
        ("def f():\n    import shelve", "shelve"),
        ("eval(x)", "eval"),
        ("import builtins; builtins.exec(x)", "exec"),
        ("list(map(eval, x))", "eval"),
        ("yaml.load(f)", "yaml.load"),
        ("from torch import load", "torch.load"),
        ("torch.load(f, weights_only=True)", "torch.load"),
        ("np.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("np.load(f, allow_pickle=flag)", "allow_pickle=True"),
        ("os.system(x)", "os.system"),
        ("subprocess.run(x, shell=True)", "shell=True"),
        ("serialize_executable.deserialize_and_load(x, y, z)", "*.deserialize_and_load"),
        ("from jax.experimental.serialize_executable import deserialize_and_load", "*.deserialize_and_load"),
        ("run([python, '-c', 'import pickle; pickle.load(f)'])", "pickle"),
    ],
)
def test_the_search_for_what_runs_what_it_reads_finds_it(source, what):
    assert what in unsafe(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["np.load(f, allow_pickle=False)", "re.compile(x)", "lowered.compile()", "model.eval()", "run(x, shell=False)"]
)
def test_the_search_leaves_what_only_sounds_like_it_alone(source):
    assert unsafe(ast.parse(source)) == set()
