"""The rules of the house, read off the syntax tree of every file.

A rule is a function from one `Source` to complaints. `RULES` says where each applies. Every rule
also meets sources that break it (`OFFENCES`) and sources that look like it but do not
(`INNOCENT`): a rule that reports nothing because it looks at nothing fails here.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = "chunkft"

# Bottom up. Floor 0 of the design has an order of its own: errors, core, then the public names
# in chunkft/__init__.py (PACKAGE). Units on one line do not know each other.
FLOORS = (
    ("errors",),
    ("core",),
    (PACKAGE,),
    ("memory", "models", "data"),
    ("train",),
    ("recipes", "ttt"),
    ("arena", "registry"),
    ("cli",),
)
HEIGHT = {unit: height for height, units in enumerate(FLOORS) for unit in units}
CORE_MAY_IMPORT = {*sys.stdlib_module_names, "torch", PACKAGE}

MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = {PACKAGE: 500, "tests": 500, "benchmarks": 500, "examples": 60}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
HEAVY = ("transformers", "trl", "peft", "datasets", "accelerate", "diffusers", "bitsandbytes")


class Source(NamedTuple):
    """One Python file: its path from the repository's root, and its text."""

    path: str
    text: str

    @property
    def nodes(self) -> Iterator[ast.AST]:
        """Every node, inside functions and conditions too."""
        return ast.walk(ast.parse(self.text, self.path))

    @property
    def folder(self) -> str:
        return self.path.split("/")[0]

    @property
    def package(self) -> list[str]:
        """What `from . import x` in this file starts from."""
        return self.path.split("/")[:-1]

    @property
    def unit(self) -> str:
        """The name that has a place in FLOORS: `core`, `errors`, `cli`, ..."""
        inside = self.path.removesuffix(".py").split("/")[1]
        return {"__init__": PACKAGE, "__main__": "cli"}.get(inside, inside)


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of each import, also `import_module("written.out")`."""
    for node in source.nodes:
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                origin = absolute_origin(source, node)
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
            case ast.Call(
                func=ast.Name(id=function) | ast.Attribute(attr=function),
                args=[ast.Constant(value=str(name)), *_],
            ) if function in {"import_module", "__import__"}:
                yield node.lineno, name


def absolute_origin(source: Source, node: ast.ImportFrom) -> str:
    """The `a.b` of `from a.b import c`, dots in front resolved."""
    if not node.level:
        return node.module or ""
    above = source.package[: len(source.package) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def floors(source: Source) -> Iterator[str]:
    """Imports go down only; siblings do not know each other."""
    if source.unit not in HEIGHT:
        yield f"{source.path}: {source.unit!r} stands on no floor; give it one in FLOORS"
        return
    for line, name in imports(source):
        package, *inside = name.split(".")
        if package != PACKAGE:
            continue
        # `from chunkft import ChunkedOptimizer` asks the package itself for a public name.
        target = inside[0] if inside and inside[0] in HEIGHT else PACKAGE
        if target != source.unit and HEIGHT[target] >= HEIGHT[source.unit]:
            yield f"{source.path}:{line}: {source.unit} may not import {name}"


def light_core(source: Source) -> Iterator[str]:
    """The ground floor knows torch and the standard library."""
    if source.unit not in {"core", "errors"}:
        return
    for line, name in imports(source):
        if name.split(".")[0] not in CORE_MAY_IMPORT:
            yield f"{source.path}:{line}: {source.unit} may not import {name}"


def short_files(source: Source) -> Iterator[str]:
    lines, bound = len(source.text.splitlines()), MAX_FILE_LINES[source.folder]
    if lines > bound:
        yield f"{source.path}: {lines} lines, {bound} allowed: split it by what changes together"


def short_functions(source: Source) -> Iterator[str]:
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield (
                    f"{source.path}:{node.lineno}: {node.name} has {lines} lines, "
                    f"{MAX_FUNCTION_LINES} allowed"
                )


def no_code_from_text(source: Source) -> Iterator[str]:
    """No `exec`, no `eval`; `model.eval()` is something else."""
    for node in source.nodes:
        match node:
            case ast.Call(
                func=ast.Name(id="exec" | "eval" as function)
                | ast.Attribute(value=ast.Name(id="builtins"), attr="exec" | "eval" as function)
            ):
                yield f"{source.path}:{node.lineno}: {function}() runs text as code"


def one_reader_of_the_environment(source: Source) -> Iterator[str]:
    """Settings come as arguments; only cli.py looks around."""
    if source.path == f"{PACKAGE}/cli.py":
        return
    os_names = {name for name, origin in bound_names(source) if origin == "os"}
    for node in source.nodes:
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (
                module in os_names and name in ENVIRONMENT
            ):
                yield f"{source.path}:{node.lineno}: os.{name} outside cli.py"
            case ast.ImportFrom(module="os", names=aliases):
                for alias in aliases:
                    if alias.name in ENVIRONMENT:
                        yield f"{source.path}:{node.lineno}: os.{alias.name} outside cli.py"


def bound_names(source: Source) -> Iterator[tuple[str, str]]:
    """(name in this file, dotted origin) for each name that an import binds."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute_origin(source, node)
            for alias in node.names:
                yield alias.asname or alias.name, f"{origin}.{alias.name}"


def no_foreign_patch(source: Source) -> Iterator[str]:
    """Nothing is hung onto a module, class or function that another package defined."""
    foreign = {name for name, origin in bound_names(source) if origin.split(".")[0] != PACKAGE}
    for node in source.nodes:
        for target in written_to(node):
            name = root_name(target)
            if name in foreign:
                line = getattr(node, "lineno", 0)
                yield f"{source.path}:{line}: writes to {ast.unparse(target)}, which is not ours"


def written_to(node: ast.AST) -> list[ast.expr]:
    """Attributes and items that a statement changes: `a.b = c`, `del a[b]`, `setattr(a, ...)`."""
    match node:
        case ast.Call(
            func=ast.Name(id="setattr" | "delattr") | ast.Attribute(attr="__setattr__"),
            args=[thing, *_],
        ):
            return [thing]
        case ast.Attribute(ctx=ast.Store() | ast.Del()):
            return [node]
        case ast.Subscript(ctx=ast.Store() | ast.Del()):
            return [node]
    return []


def root_name(node: ast.expr) -> str | None:
    """`a` of `a.b[c].d`; None where the root is a call or a literal."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


Check = Callable[[Source], Iterable[str]]
Case = tuple[Check, str, str]  # rule, path, text


class Rule(NamedTuple):
    check: Check
    folders: tuple[str, ...]


EVERYWHERE = tuple(MAX_FILE_LINES)
RULES = (
    Rule(floors, (PACKAGE,)),
    Rule(light_core, (PACKAGE,)),
    Rule(short_files, EVERYWHERE),
    Rule(short_functions, EVERYWHERE),
    Rule(no_code_from_text, EVERYWHERE),
    Rule(one_reader_of_the_environment, (PACKAGE,)),
    Rule(no_foreign_patch, (PACKAGE, "examples")),
)

LONG_FUNCTION = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
OFFENCES: list[Case] = [
    (floors, "chunkft/core/store.py", "from chunkft.memory import plan"),
    (floors, "chunkft/core/store.py", "from chunkft import ChunkedOptimizer"),
    (floors, "chunkft/errors.py", "import chunkft.core.store"),
    (floors, "chunkft/__init__.py", "from chunkft.train import config"),
    (floors, "chunkft/data/mix.py", "from chunkft import models"),
    (floors, "chunkft/data/mix.py", "from ..memory.plan import Plan"),
    (floors, "chunkft/data/mix.py", "from .. import memory"),
    (floors, "chunkft/train/glue.py", "def f():\n    import chunkft.recipes.sft"),
    (floors, "chunkft/train/glue.py", "m = import_module('chunkft.ttt')"),
    (floors, "chunkft/train/glue.py", "m = importlib.import_module('chunkft.ttt.run')"),
    (floors, "chunkft/arena/judge.py", "if TYPE_CHECKING:\n    from chunkft.cli import main"),
    (floors, "chunkft/helpers/text.py", ""),
    (light_core, "chunkft/core/store.py", "def f():\n    import numpy as np"),
    (light_core, "chunkft/errors.py", "from transformers import Trainer"),
    (short_files, "chunkft/train/glue.py", "pass\n" * 501),
    (short_files, "tests/test_glue.py", "pass\n" * 501),
    (short_files, "examples/sft.py", "pass\n" * 61),
    (short_functions, "benchmarks/speed.py", LONG_FUNCTION),
    (short_functions, "chunkft/train/glue.py", "async " + LONG_FUNCTION),
    (no_code_from_text, "chunkft/data/mix.py", "x = eval('1')"),
    (no_code_from_text, "tests/test_mix.py", "import builtins\nbuiltins.exec('x = 1')"),
    (one_reader_of_the_environment, "chunkft/train/glue.py", "import os\nx = os.environ['A']"),
    (one_reader_of_the_environment, "chunkft/train/glue.py", "import os as o\no.getenv('A')"),
    (one_reader_of_the_environment, "chunkft/data/mix.py", "import os.path\nos.environ"),
    (one_reader_of_the_environment, "chunkft/train/cli.py", "from os import environ as e"),
    (no_foreign_patch, "chunkft/core/ops.py", "from torch import nn\nnn.Linear.forward = f"),
    (no_foreign_patch, "chunkft/core/ops.py", "import torch.nn.functional as F\nF.linear += 1"),
    (no_foreign_patch, "chunkft/core/ops.py", "import torch\nsetattr(torch.nn, 'Linear', f)"),
    (no_foreign_patch, "chunkft/core/ops.py", "import torch\ndel torch.nn.Linear.forward"),
    (no_foreign_patch, "chunkft/core/ops.py", "import sys\nsys.modules['torch'], a = b, c"),
    (no_foreign_patch, "chunkft/core/ops.py", "def f():\n import trl\n trl.x: int = 1"),
]
INNOCENT: list[Case] = [
    (floors, "chunkft/__main__.py", "from chunkft.cli import main"),
    (floors, "chunkft/__init__.py", "from chunkft.core.store import Store\nimport chunkft.errors"),
    (floors, "chunkft/core/store.py", "from . import schedule\nfrom ..errors import StateError"),
    (floors, "chunkft/models/load.py", "from chunkft import ChunkedOptimizer\nimport torch"),
    (floors, "chunkft/cli.py", "def f():\n    from chunkft import arena, registry, train"),
    (light_core, "chunkft/core/store.py", "from __future__ import annotations\nimport torch.nn"),
    (light_core, "chunkft/data/mix.py", "import datasets"),
    (short_files, "chunkft/train/glue.py", "pass\n" * 500),
    (short_functions, "chunkft/train/glue.py", LONG_FUNCTION.replace("    pass\n", "", 1)),
    (no_code_from_text, "chunkft/train/glue.py", "model.eval()\nmodel.exec = 1"),
    (one_reader_of_the_environment, "chunkft/cli.py", "import os\nx = os.environ"),
    (one_reader_of_the_environment, "chunkft/train/glue.py", "import os\nos.cpu_count()"),
    (no_foreign_patch, "chunkft/core/ops.py", "import torch\nmodel.x = torch.nn.Linear"),
    (no_foreign_patch, "chunkft/core/ops.py", "from chunkft.core import ops\nops.table[1] = 2"),
    (no_foreign_patch, "chunkft/core/ops.py", "import torch\ntorch.empty(2)[0] = 1"),
]


def names(cases: list[Case]) -> list[str]:
    return [f"{check.__name__}-{path}" for check, path, _ in cases]


def sources(folders: Iterable[str]) -> list[Source]:
    """Every Python file below these folders of the repository."""
    return [
        Source(path.relative_to(REPO).as_posix(), path.read_text(encoding="utf-8"))
        for folder in folders
        for path in sorted((REPO / folder).rglob("*.py"))
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.check.__name__)
def test_the_tree_keeps_the_rule(rule: Rule) -> None:
    complaints = [found for source in sources(rule.folders) for found in rule.check(source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_rules_see_the_tree() -> None:
    seen = {source.path for source in sources(EVERYWHERE)}
    assert {"chunkft/__init__.py", "chunkft/errors.py", "tests/test_architecture.py"} <= seen
    assert any(path.startswith("chunkft/core/") for path in seen)


@pytest.mark.parametrize(("check", "path", "text"), OFFENCES, ids=names(OFFENCES))
def test_an_offence_is_reported(check: Check, path: str, text: str) -> None:
    assert list(check(Source(path, text)))


@pytest.mark.parametrize(("check", "path", "text"), INNOCENT, ids=names(INNOCENT))
def test_the_innocent_are_left_alone(check: Check, path: str, text: str) -> None:
    assert not list(check(Source(path, text)))


def test_every_rule_is_proven_both_ways() -> None:
    rules = {rule.check for rule in RULES}
    assert {check for check, _, _ in OFFENCES} == rules
    assert {check for check, _, _ in INNOCENT} == rules


def weight_of(statement: str) -> list[str]:
    """What a fresh interpreter has after this statement and should not have."""
    probe = (
        f"import json, sys\n{statement}\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "torch = sys.modules.get('torch')\n"
        "found += ['CUDA'] if torch and torch.cuda.is_initialized() else []\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_chunkft_is_light() -> None:
    assert weight_of("import chunkft; assert 'torch' in sys.modules") == []


def test_a_heavy_import_is_reported() -> None:
    """Stand-ins, so that the check of the check costs no import of the real ones."""
    cuda = "types.SimpleNamespace(is_initialized=lambda: True)"
    stand_ins = f"transformers=types, torch=types.SimpleNamespace(cuda={cuda})"
    assert weight_of(f"import types; sys.modules.update({stand_ins})") == ["transformers", "CUDA"]
