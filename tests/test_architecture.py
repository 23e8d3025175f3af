"""The house stays as docs/architecture.md describes it: imports run downwards, files stay short."""

import ast
from pathlib import Path

import pytest

import orpo_kernels

PACKAGE = Path(orpo_kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400

# From the top of the house to the bottom; a room may import itself and what is below it.
ROOMS = [
    {"__main__", "cli"},
    {"training", "estimate", "environment"},
    {"selftest"},
    {"integrations"},
    {"__init__"},  # the public names
    {"loss"},
    {"guard"},
    {
        "backend",
        "layout",
        "linear_logps",
        "logps_output",
        "loss_output",
        "odds_ratio",
        "pair_batch",
        "pair_loss",
        "pairing",
        "sequence_mean",
    },
    {"ops"},
    {"options", "presets", "reference"},
    {"engine"},
    {"kernels"},
    {"constants", "version"},
]
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}
# What a third-party library is for; everything else imports torch and the standard library.
LIBRARIES = {
    "accelerate", "bitsandbytes", "datasets", "matplotlib", "peft", "transformers", "triton", "trl",
    "yaml",
}  # fmt: skip
MAY_IMPORT_LIBRARIES = {"integrations", "kernels", "selftest", "training", "estimate", "cli"}


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(name):
    return name.split(".")[0]


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path):
    """Modules a file imports when it is imported: not inside functions, nor for type checkers."""
    pending, found = [ast.parse(path.read_text())], []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(node):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        pending += ast.iter_child_nodes(node)
    return found


def own(imported):
    """The modules of this package among them, as `name_of` says them."""
    known = {name_of(path) for path in FILES}
    for each in imported:
        if not each.startswith("orpo_kernels."):
            continue
        name = each.removeprefix("orpo_kernels.")
        while name not in known and "." in name:
            name = name.rpartition(".")[0]
        yield name if name in known else "__init__"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downwards(path):
    name = name_of(path)
    level = LEVEL[room_of(name)]  # a new room has a floor first
    for other in own(imports(path)):
        same = room_of(other) == room_of(name)
        assert same or LEVEL[room_of(other)] >= level, f"{name} imports {other}, a floor above"


def test_no_file_imports_itself_by_way_of_others():
    graph = {name_of(path): set(own(imports(path))) - {name_of(path)} for path in FILES}
    # A package's __init__ is imported before its files: only what it imports itself counts.
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(path.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_outer_rooms_import_libraries(path):
    if room_of(name_of(path)) in MAY_IMPORT_LIBRARIES:
        return
    assert not {each.split(".")[0] for each in imports(path)} & LIBRARIES


def test_files_are_short():
    root = Path(__file__).parents[1]
    folders = ("orpo_kernels", "csrc", "tests", "benchmarks", "examples", "tools")
    sources = [path for name in folders for path in sorted((root / name).rglob("*.*"))]
    sources = [path for path in sources if path.suffix in (".py", ".cpp", ".h")]
    lines = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in sources}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
