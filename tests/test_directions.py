"""Who may import whom: maths know nothing of models, models nothing of the trainer, and nobody the entry point."""

import ast
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "datamodules", "lightning_modules", "reporting", "callbacks", "app", "benchmarks")
OURS = (*PACKAGES, "run", "tests")
COMPUTED = "a computed name"


class Rule(NamedTuple):
    """ours: the modules of this repository that a package may import; only / never: its third parties."""

    ours: tuple[str, ...]
    only: tuple[str, ...] | None = None
    never: tuple[str, ...] = ("hydra",)


METHODS = ("objectives", "diffusion", "flow", "plans", "online", "speculative")
SHARED = ("models.functional", "models.interfaces", "models.backbones")
LIBRARIES = ("torch", "numpy", "transformers", "peft", "safetensors")

# the first rule whose name fits counts
RULES = {
    "models.functional": Rule(ours=SHARED[:1], only=("torch", "numpy")),
    "models.interfaces": Rule(ours=SHARED[:2], only=("torch",)),
    "models.backbones": Rule(ours=SHARED, only=(*LIBRARIES, "huggingface_hub", "psutil")),
    # a method knows what is shared and itself; methods never know each other
    **{f"models.{m}": Rule(ours=(*SHARED, f"models.{m}"), only=(*LIBRARIES, "scipy", "torchmetrics")) for m in METHODS},
    "models": Rule(ours=()),
    "datamodules": Rule(ours=("datamodules", "models.functional")),
    "lightning_modules": Rule(ours=("lightning_modules", "models"), never=("hydra", "omegaconf")),
    "reporting": Rule(ours=("reporting", "models.functional"), never=("hydra",)),
    "callbacks": Rule(ours=("callbacks", "reporting", "models.functional", "models.interfaces")),
    "benchmarks": Rule(ours=PACKAGES, never=()),
    "app": Rule(ours=PACKAGES[:-1], never=()),
    "run": Rule(ours=("app", "reporting"), never=("torch", "lightning", "transformers")),
}


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


parsed = cache(ast.parse)  # every file is looked at by several tests


@cache
def imports(source: str, module: str) -> list[tuple[int, str]]:
    """(line, module) of everything that a source imports, at its head, inside functions or by name."""
    found = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:  # `from models import backbones` imports models.backbones
                found.append((node.lineno, f"{base}.{alias.name}" if within(base, OURS) else base))
        elif isinstance(node, ast.Call) and _called(node.func) in ("importlib.import_module", "__import__"):
            name = node.args[0]
            found.append((node.lineno, name.value if isinstance(name, ast.Constant) else COMPUTED))
    return found


def _called(function: ast.expr) -> str:
    """The name of a function, or of one in a module; "" for others."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def violations(source: str, module: str) -> list[str]:
    """What the source of `module` imports against its rule, one sentence each."""
    rule = next(rule for package, rule in RULES.items() if within(module, (package,)))
    complaints = []
    for line, imported in imports(source, module):
        top = imported.split(".")[0]
        if imported == COMPUTED:
            allowed = False
        elif top in OURS:
            allowed = within(imported, rule.ours)
        elif rule.only is not None:
            allowed = within(top, rule.only) or top in sys.stdlib_module_names
        else:
            allowed = top not in rule.never
        if not allowed:
            complaints.append(f"{module}:{line} imports {imported}")
    return complaints


def python_files() -> list[Path]:
    return [ROOT / "run.py", *sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead from one back to itself, or an empty list."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next((c for other in sorted(graph.get(name, ())) if (c := visit(other, [*path, name]))), [])
        done.add(name)
        return found

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def import_graph(paths: list[Path]) -> dict[str, set[str]]:
    """Which of the files imports which other of them."""
    names = {module_name(path) for path in paths}
    graph = {}
    for path in paths:
        found = [imported for _, imported in imports(path.read_text(encoding="utf-8"), module_name(path))]
        graph[module_name(path)] = {n for i in found for n in (i, i.rpartition(".")[0]) if n in names}
    return graph


def test_imports_go_one_way():
    assert [c for path in python_files() for c in violations(path.read_text(encoding="utf-8"), module_name(path))] == []


def test_every_file_begins_with_a_docstring():
    sources = {path: path.read_text(encoding="utf-8") for path in python_files()}
    assert [str(path) for path, text in sources.items() if text.strip() and not ast.get_docstring(parsed(text))] == []


def test_no_files_import_each_other_in_a_circle():
    assert cycle(import_graph([path for path in python_files() if path.name != "__init__.py"])) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_lm_eval_is_imported_by_its_adapter_alone():
    """It is an extra, and slow to import: `python run.py` must neither need nor read it."""
    adapter, wanted = "app.evaluation_harness", ("lm_eval", "app.evaluation_harness")
    sources = {module_name(path): path.read_text(encoding="utf-8") for path in python_files()}
    assert {
        module for module, source in sources.items() if any(within(i, wanted) for _, i in imports(source, module))
    } == {adapter}


def test_every_package_is_looked_at():
    names = {module_name(path) for path in python_files()}
    for known in ("run", "models.functional.meanflow", "models.backbones.llada", "datamodules.oracle.score"):
        assert known in names
    assert {"callbacks.ema", "lightning_modules.base"} <= names
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"} <= set(PACKAGES)
    assert {path.name for path in (ROOT / "models").iterdir() if path.is_dir()} - {"__pycache__"} == {
        name.removeprefix("models.") for name in RULES if name.startswith("models.")
    }


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("models.functional.meanflow", "import scipy.stats", "scipy.stats"),
        (
            "models.functional.meanflow",
            "from models.backbones.llada import LladaModel",
            "models.backbones.llada.LladaModel",
        ),
        ("models.functional.meanflow", "from models import backbones", "models.backbones"),
        ("models.functional.meanflow", "from .. import backbones", "models.backbones"),
        ("models.backbones.llada", "def f():\n    from lightning import Trainer", "lightning"),
        ("models.backbones.llada", "import hydra.utils", "hydra.utils"),
        ("models.interfaces.decoder", "from omegaconf import DictConfig", "omegaconf"),
        ("models.interfaces.decoder", "from datamodules.batch import TensorRows", "datamodules.batch.TensorRows"),
        (
            "datamodules.oracle.score",
            "from models.interfaces.decoder import Decoder",
            "models.interfaces.decoder.Decoder",
        ),
        ("datamodules.oracle.score", "import lightning_modules.base as base", "lightning_modules.base"),
        ("datamodules.oracle.score", "from reporting import record", "reporting.record"),
        ("datamodules.pairs", "from hydra.utils import instantiate", "hydra.utils"),
        ("lightning_modules.base", "try:\n    import callbacks.ema\nexcept ImportError:\n    pass", "callbacks.ema"),
        ("lightning_modules.base", "import omegaconf", "omegaconf"),
        ("lightning_modules.base", "import importlib\nimportlib.import_module('callbacks.ema')", "callbacks.ema"),
        ("lightning_modules.base", "__import__(name)", COMPUTED),
        ("callbacks.export", "from lightning_modules.base import LeapModule", "lightning_modules.base.LeapModule"),
        ("callbacks.export", "from models.backbones.llada import LladaModel", "models.backbones.llada.LladaModel"),
        ("callbacks.export", "import hydra", "hydra"),
        ("benchmarks.timing", "from run import main", "run.main"),
        ("callbacks.export", "import run", "run"),
        ("lightning_modules.base", "from app import build", "app.build"),
        ("run", "import torch", "torch"),
        ("models.plans.search", "from models.flow.solver import follow_flow", "models.flow.solver.follow_flow"),
        ("models.interfaces.decoder", "from models.backbones import llada", "models.backbones.llada"),
        ("reporting.table", "from callbacks.ema import TrainableEMA", "callbacks.ema.TrainableEMA"),
    ],
)
def test_a_wrong_import_is_seen(module, source, complaint):
    assert [text.split(" imports ")[1] for text in violations(source, module)] == [complaint]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.functional.meanflow", "import math\nimport numpy as np\nimport torch\nfrom torch import Tensor"),
        ("models.functional.meanflow", "from models.functional.errors import UsageError\nfrom . import errors"),
        ("models.backbones.llada", "import transformers\nfrom safetensors.torch import load_file\nimport peft"),
        ("datamodules.pairs", "import lightning\nimport scipy\nfrom models.functional.errors import UsageError"),
        ("lightning_modules.base", "import lightning\nfrom models.interfaces.decoder import Decoder"),
        ("callbacks.export", "from models.interfaces.probes import TextProbe\nimport lightning"),
        ("models.plans.search", "from models.plans import planner\nfrom models.backbones.llada import LladaModel"),
        ("run", "import hydra\nfrom reporting.console import print_error"),
    ],
)
def test_a_right_import_is_not(module, source):
    assert violations(source, module) == []
