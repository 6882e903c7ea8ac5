"""Imports go one way: each room of the house names the rooms it stands on."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ENGRAM = Path(__file__).parents[1] / "engram"

GROUND = frozenset(
    {
        "child_process",
        "columns",
        "deadlines",
        "descriptors",
        "errors",
        "files",
        "format_level",
        "large_string",
        "mappings",
        "operations",
        "progress",
        "scan_order",
        "sizes",
        "supervision",
        "tally",
    }
)
STATE = GROUND | {"effects", "index", "keyspace", "key_effects", "kinds"}

# A room is a module or a package directly under `engram`, and may import itself, the names defined in
# engram/__init__.py, and these rooms.
MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "child_process": frozenset(),
    "descriptors": frozenset(),
    "errors": frozenset(),
    "sizes": frozenset(),
    "tally": frozenset(),
    "deadlines": frozenset({"sizes"}),
    "mappings": frozenset({"columns"}),
    "scan_order": frozenset({"sizes"}),
    "files": frozenset(),
    "large_string": frozenset(),
    "operations": frozenset(),
    "columns": frozenset({"errors", "files", "format_level"}),
    "format_level": frozenset({"errors"}),
    "progress": frozenset({"errors"}),
    "supervision": frozenset({"errors"}),
    "config": frozenset({"errors", "protocol"}),
    "key_patterns": frozenset({"protocol"}),
    "permissions": frozenset({"config", "key_patterns", "protocol"}),
    "access": frozenset({"config", "errors", "files", "permissions", "protocol"}),
    "config_file": frozenset({"config", "files", "protocol"}),
    "log_lines": frozenset({"config", "errors"}),
    "protocol": frozenset({"errors"}),
    "keyspace": GROUND,
    "index": GROUND,
    "persistence": GROUND,
    "effects": GROUND | {"index", "keyspace"},
    "key_effects": frozenset({"effects", "operations"}),
    "kinds": GROUND | {"effects", "index", "key_effects"},
    "snapshot_columns": STATE | {"persistence"},
    "engine": STATE | {"snapshot_columns"},
    "database": STATE | {"engine", "watches"},
    "rounds": frozenset(),
    "heap": frozenset(),
    "collector": frozenset(),
    "statistics": frozenset(),
    "slowlog": frozenset(),
    "monitors": frozenset({"protocol", "sizes", "slowlog"}),
    "exclusion": frozenset(),
    "pause": frozenset(),
    "watches": frozenset({"effects", "index", "keyspace"}),
    "memory": frozenset({"config", "database", "errors", "keyspace", "kinds", "operations"}),
    "commands": STATE
    | {
        "access",
        "config",
        "config_file",
        "database",
        "rounds",
        "engine",
        "exclusion",
        "memory",
        "monitors",
        "pause",
        "permissions",
        "protocol",
        "slowlog",
        "statistics",
        "watches",
    },
    "transport": frozenset({"errors", "rounds"}),
    "outbox": frozenset({"commands", "database", "transport"}),
    "connection": frozenset({"commands", "database", "errors", "outbox", "protocol", "transport"}),
    "certificates": frozenset({"config", "errors", "files"}),
    "listeners": frozenset(
        {
            "access",
            "certificates",
            "commands",
            "config",
            "connection",
            "errors",
            "protocol",
            "supervision",
            "transport",
        }
    ),
    "snapshotter": STATE | {"engine", "persistence"},
    "server": STATE
    | {
        "access",
        "collector",
        "commands",
        "config",
        "database",
        "engine",
        "exclusion",
        "heap",
        "listeners",
        "log_lines",
        "persistence",
        "standard_streams",
        "statistics",
        "temporary_folder",
    },
    "metrics": frozenset({"commands", "errors", "statistics", "supervision"}),
    "temporary_folder": GROUND | {"persistence"},
    "dump": STATE | {"engine", "persistence"},
    "load": frozenset({"dump", "errors", "kinds"}),
    "standard_streams": frozenset({"errors"}),
    "hearing": frozenset({"standard_streams"}),
    "subcommands": frozenset({"dump", "errors", "files", "load", "persistence", "standard_streams"}),
    "cli": frozenset({"config", "errors", "hearing", "log_lines", "server", "standard_streams"}),
    "__main__": frozenset({"cli"}),
    "__init__": frozenset({"config", "server"}),
}

# Packages from elsewhere that only these rooms import, and rooms that do not import them.
ONLY_IN: Mapping[str, frozenset[str]] = {
    "h11": frozenset({"metrics"}),
    "prometheus_client": frozenset({"metrics"}),
    "usearch": frozenset({"index"}),
}
NEVER_IN: Mapping[str, frozenset[str]] = {
    "trio": frozenset({"access", "permissions", "protocol", "keyspace", "engine", "operations"}),
    "numpy": frozenset({"protocol"}),
}


def read_tree(folder: Path) -> dict[str, str]:
    """The source of each module of the package, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imported_names(source: str) -> Iterator[str]:
    """Dotted names of what a module imports, wherever in it; a relative import keeps its dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(tree: Mapping[str, str]) -> list[str]:
    """What breaks the rules, a sentence each."""
    found = []
    for path, source in sorted(tree.items()):
        room = room_of(path)
        if room not in MAY_IMPORT:
            found.append(f"{path}: '{room}' is not in the table of rooms")
            continue
        for name in imported_names(source):
            package, _, rest = name.partition(".")
            if not package:
                found.append(f"{path} imports {name}: imports are absolute here")
            elif package != "engram":
                if room not in ONLY_IN.get(package, {room}) or room in NEVER_IN.get(package, ()):
                    found.append(f"{path} imports {name}: '{room}' must not know {package}")
            else:
                target = rest.partition(".")[0]
                if target in MAY_IMPORT and target not in MAY_IMPORT[room] | {room}:
                    found.append(f"{path} imports {name}: '{room}' must not know '{target}'")
    return found


def test_imports_go_one_way() -> None:
    assert violations(read_tree(ENGRAM)) == []


def test_rules_have_no_circle() -> None:
    order = list(TopologicalSorter(MAY_IMPORT).static_order())
    assert order.index("operations") < order.index("engine") < order.index("server") < order.index("cli")


def test_a_good_tree_passes() -> None:
    tree = {
        "__init__.py": "__version__ = '1'",
        "protocol/requests.py": "import re\nfrom engram.errors import CommandError",
        "index/search.py": "import trio\nimport usearch.index\nfrom engram.index.head import Head",
        "commands/clients.py": "from engram import __version__\nfrom engram.protocol import replies",
    }
    assert violations(tree) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("protocol/requests.py", "import engram.index.search"),
        ("protocol/requests.py", "from engram import keyspace"),
        ("protocol/replies.py", "import numpy as np"),
        ("protocol/replies.py", "from trio.lowlevel import checkpoint"),
        ("index/head.py", "from engram.keyspace import Keyspace"),
        ("keyspace.py", "from engram.protocol.replies import OK"),
        ("persistence/snapshot.py", "def later():\n    from engram.engine import Engine"),
        ("engine.py", "from engram.database import Database"),
        ("engine.py", "import trio"),
        ("commands/vectors.py", "from usearch.index import Index"),
        ("commands/vectors.py", "if TYPE_CHECKING:\n    from engram.server import Server"),
        ("connection.py", "from engram.persistence import Persistence"),
        ("index/head.py", "from .. import keyspace"),
        ("cellar.py", ""),
    ],
)
def test_a_bad_tree_is_found_out(path: str, source: str) -> None:
    assert len(violations({path: source})) == 1
