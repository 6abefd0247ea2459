"""The floors of DESIGN section 2, proved from the source: who may import whom, and what every file must have.

`problems(root)` reads a tree with `ast` and lists what breaks a rule; the tests run it on the real package and, so
that the rules themselves are tested, on small trees that break one rule each.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "penstock"

# Room (directory or file right under the package) -> floor. cli.py and commands/ are one room.
FLOORS = {
    "config": 1, "registry": 1,
    "nn": 2, "core": 2,
    "spec": 3, "engine": 3, "transfer": 3, "tiers": 3,
    "runner": 4, "cluster": 4, "vision": 4, "training": 4,
    "server": 5, "sim": 5,
    "build": 6,
    "llm": 7,
    "bench": 8,
    "cli": 9,
}  # fmt: skip
SAME_ROOM = {"commands": "cli"}
TORCH_FREE = {"config", "registry", "core", "engine", "transfer", "server", "cli"}
CORE_MAY_IMPORT = {"numpy", "penstock"} | set(sys.stdlib_module_names)
# Files that import by name: the package's lazy attributes and the command tables, checked by tests/test_cli.py; how an
# engine's start begins: torch is imported there while other things go on; and the client of an optional package.
LAZY = re.compile(r"^(__init__|cli|commands/\w+|build/start|tiers/open)\.py$")
EXTENSION = "penstock._native"
MAX_LINES = 500
BAD_WORDS = {"utils", "util", "helper", "helpers", "manager", "impl", "mixin"}
BAD_FILES = BAD_WORDS | {"base", "common", "misc"}


@dataclass
class Source:
    """One file: its imports as (module or module.attribute, line, where), where: "top", "function" or "typing"."""

    path: Path
    module: str
    tree: ast.Module
    imports: list[tuple[str, int, str]] = field(default_factory=list)


def read_tree(root: Path) -> dict[str, Source]:
    """Module name ("penstock.core.plan"; a package is its __init__) -> Source."""
    sources = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = Source(path, module, ast.parse(path.read_text(encoding="utf-8")))
        _collect(source, source.tree, "top")
        sources[module] = source
    return sources


def _collect(source: Source, node: ast.AST, where: str) -> None:
    for child in ast.iter_child_nodes(node):
        inner = where
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner = "function"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            inner = "typing"
        elif isinstance(child, ast.Import):
            source.imports += [(alias.name, child.lineno, where) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = source.module.split(".")
                if source.path.name != "__init__.py":
                    package = package[:-1]
                package = package[: len(package) - child.level + 1]
                base = ".".join([*package, *([child.module] if child.module else [])])
            source.imports += [(f"{base}.{alias.name}", child.lineno, where) for alias in child.names]
        _collect(source, child, inner)


def room_of(module: str) -> str:
    """Room of a module; "" for the package itself."""
    parts = module.split(".")
    return SAME_ROOM.get(parts[1], parts[1]) if len(parts) > 1 else ""


def target(name: str, sources: dict[str, Source]) -> str | None:
    """The file that `import name` or `from a import b` (name a.b) reads; None if it is not ours."""
    if name.split(".")[0] != "penstock":
        return None
    while name not in sources and "." in name:
        name = name.rpartition(".")[0]
    return name if name in sources else None


def problems(root: Path) -> list[str]:
    """Every broken rule as "file:line: what"."""
    sources = read_tree(root)
    found = []
    for source in sources.values():
        relative = source.path.relative_to(root).as_posix()
        found += [f"{relative}:{line}: {text}" for line, text in _file_problems(source, relative)]
        found += [f"{relative}:{line}: {text}" for line, text in _import_problems(source, sources, relative)]
    found += _circles(sources) + _torch_reached(sources)
    return found


def _file_problems(source: Source, relative: str) -> list[tuple[int, str]]:
    found = []
    if not ast.get_docstring(source.tree):
        found.append((1, "no docstring"))
    num_lines = len(source.path.read_text(encoding="utf-8").splitlines())
    if num_lines > MAX_LINES:
        found.append((num_lines, f"{num_lines} lines; at most {MAX_LINES}"))
    if source.path.stem in BAD_FILES:
        found.append((1, f"a file may not be called {source.path.stem}"))
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            words = re.findall(r"[A-Z]?[a-z0-9]+", node.name)
            bad = BAD_WORDS.intersection(word.lower() for word in words)
            found.extend((node.lineno, f"{node.name}: no name may hold {word!r}") for word in bad)
        if isinstance(node, ast.Call) and not LAZY.match(relative):
            called = ast.unparse(node.func)
            if called.split(".")[-1] in ("import_module", "__import__"):
                found.append((node.lineno, f"{called}: only the command tables and build/start.py import by name"))
    return found


def _import_problems(source: Source, sources: dict[str, Source], relative: str) -> list[tuple[int, str]]:
    found = []
    room = room_of(source.module)
    if room and room not in FLOORS:
        return [(1, f"room {room!r} has no floor")]
    floor = FLOORS.get(room, 0)
    for name, line, where in source.imports:
        top = name.split(".")[0]
        if top == "torch" and room in TORCH_FREE:
            found.append((line, f"{room} may not import torch"))
        if room == "core" and top not in CORE_MAY_IMPORT and top != "__future__":
            found.append((line, f"core may import the standard library and numpy only, not {top}"))
        if top != "penstock":
            continue
        if where == "function":
            found.append((line, f"imports {name} inside a function"))
        if where == "typing":
            found.append((line, f"imports {name} under TYPE_CHECKING"))
        other = target(name, sources)
        if other is None or (other == "penstock" and name.count(".") > 1):
            found.append((line, f"{name} does not exist"))
        elif other == "penstock":
            if name == EXTENSION and room == "nn":  # compiled: there is no source file to find
                continue
            if name not in ("penstock", "penstock.__version__"):
                found.append((line, f"{name}: import it from its own module"))
        elif room_of(other) not in FLOORS:
            found.append((line, f"room {room_of(other)!r} has no floor"))
        elif room_of(other) != room and FLOORS[room_of(other)] >= floor:
            direction = "upward" if FLOORS[room_of(other)] > floor else "sideways"
            found.append((line, f"{direction} import of {other} from {room or 'the package'}"))
    return found


def _edges(sources: dict[str, Source]) -> dict[str, list[str]]:
    """File -> files that it names in its imports."""
    return {
        module: sorted({t for name, _, _ in source.imports if (t := target(name, sources)) and t != module})
        for module, source in sources.items()
    }


def _circles(sources: dict[str, Source]) -> list[str]:
    edges, state, found = _edges(sources), {}, []

    def visit(module: str, trail: list[str]) -> None:
        state[module] = "open"
        for other in edges[module]:
            if state.get(other) == "open":
                circle = [*trail[trail.index(other) :], other] if other in trail else [module, other, module]
                found.append(f"circle: {' -> '.join(circle)}")
            elif other not in state:
                visit(other, [*trail, other])
        state[module] = "done"

    for module in edges:
        if module not in state:
            visit(module, [module])
    return found


def _torch_reached(sources: dict[str, Source]) -> list[str]:
    """Files of torch-free rooms from which a chain of imports ends at torch; parents' __init__ files are run too."""
    edges = _edges(sources)
    for module in edges:
        parents = [module.rpartition(".")[0]] if "." in module else []
        edges[module] = edges[module] + [parent for parent in parents if parent in sources]
    heavy = {m for m, s in sources.items() if any(name.split(".")[0] == "torch" for name, _, _ in s.imports)}
    found = []
    for start in sources:
        if room_of(start) not in TORCH_FREE:
            continue
        trails, seen = [[start]], {start}
        while trails:
            trail = trails.pop(0)
            if trail[-1] in heavy:
                found.append(f"torch reached: {' -> '.join(trail)}")
                break
            for other in edges[trail[-1]]:
                if other not in seen:
                    seen.add(other)
                    trails.append([*trail, other])
    return found


def test_the_package_keeps_the_rules() -> None:
    found = problems(PACKAGE)
    assert not found, "\n" + "\n".join(found)


def test_torch_free_rooms_load_no_torch() -> None:
    """The static proof cannot see what other people's packages import; this loads every file and looks."""
    modules = [m for m in read_tree(PACKAGE) if room_of(m) in TORCH_FREE]
    assert len(modules) > 20
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False"], done.stderr[-2000:]


BREACHES = {
    "upward import": ("core/a.py", '"""."""\nfrom penstock.engine.b import x\n'),
    "sideways import": ("core/a.py", '"""."""\nimport penstock.nn.c\n'),
    "upward import of penstock.cli": ("build/a.py", '"""."""\nfrom penstock import cli\n'),
    "inside a function": ("engine/a.py", '"""."""\ndef f():\n    from penstock.core import plan\n'),
    "under TYPE_CHECKING": (
        "engine/a.py",
        '"""."""\nimport typing\nif typing.TYPE_CHECKING:\n    from penstock.core.plan import y\n',
    ),
    "circle: ": ("core/plan.py", '"""."""\nfrom . import other\n'),
    "engine may not import torch": ("engine/a.py", '"""."""\nfrom torch import nn\n'),
    "torch reached: penstock.server.a -> penstock.engine.via -> penstock.engine.heavy": (
        "server/a.py",
        '"""."""\nimport penstock.engine.via\n',
    ),
    "no docstring": ("core/a.py", "x = 1\n"),
    "501 lines": ("core/a.py", '"""."""\n' + "x = 1\n" * 500),
    "has no floor": ("attic/a.py", '"""."""\n'),
    "does not exist": ("engine/a.py", '"""."""\nfrom penstock.nothing import x\n'),
    "only the command tables": ("engine/a.py", '"""."""\nimport importlib\nimportlib.import_module("x")\n'),
    "standard library and numpy only, not msgspec": ("core/a.py", '"""."""\nimport msgspec\n'),
    "import it from its own module": ("build/a.py", '"""."""\nfrom penstock import LLM\n'),
    "may not be called utils": ("core/utils.py", '"""."""\n'),
    "no name may hold 'manager'": ("core/a.py", '"""."""\nclass BlockManager: ...\n'),
}
SOUND = {
    "__init__.py": '"""."""\n__version__ = "1"\n',
    "cli.py": '"""."""\nimport importlib\nfrom penstock import __version__\nimportlib.import_module("x")\n',
    "commands/go.py": '"""."""\nfrom penstock.config.schema import Config\n',
    "config/schema.py": '"""."""\nimport sys\n',
    "core/__init__.py": '"""."""\n',
    "core/plan.py": '"""."""\nimport numpy\n',
    "core/other.py": '"""."""\nfrom penstock.core.plan import x\n',
    "nn/c.py": '"""."""\nimport torch\nfrom penstock.config import schema\n',
    "engine/b.py": '"""."""\nfrom penstock.core import plan\n',
    "engine/via.py": '"""."""\n',
    "runner/d.py": '"""."""\nfrom penstock.engine.b import x\nfrom penstock.nn.c import y\n',
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "penstock" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return root / "penstock"


def test_a_sound_tree_has_no_problems(tmp_path: Path) -> None:
    assert problems(write_tree(tmp_path, SOUND)) == []


@pytest.mark.parametrize("expected", BREACHES)
def test_each_rule_catches_its_breach(expected: str, tmp_path: Path) -> None:
    name, text = BREACHES[expected]
    more = {name: text}
    if expected.startswith("torch reached"):  # an indirect import: server -> engine -> a room on torch
        more |= {
            "engine/via.py": '"""."""\nimport penstock.engine.heavy\n',
            "engine/heavy.py": '"""."""\nimport torch\n',
        }
    found = problems(write_tree(tmp_path, SOUND | more))
    assert any(expected in line for line in found), found
