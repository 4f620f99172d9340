"""Who may import whom: maths know nothing of models, models nothing of the trainer, and nobody the entry point."""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "datamodules", "lightning_modules", "callbacks", "benchmarks")
OURS = (*PACKAGES, "wiring", "run", "tests")
COMPUTED = "a computed name"
MOST_LINES = 300


class Rule(NamedTuple):
    """ours: the modules of this repository that a package may import; only / never: its third parties."""

    ours: tuple[str, ...]
    only: tuple[str, ...] | None = None
    never: tuple[str, ...] = ("hydra",)


# the first rule whose name fits counts
RULES = {
    "models.functional": Rule(ours=("models.functional",), only=("torch", "numpy")),
    "models": Rule(
        ours=("models",),
        only=("torch", "numpy", "transformers", "peft", "safetensors", "huggingface_hub", "psutil"),
    ),
    "datamodules": Rule(ours=("datamodules", "models.functional")),
    "lightning_modules": Rule(ours=("lightning_modules", "models"), never=("hydra", "omegaconf")),
    "callbacks": Rule(ours=("callbacks", "models.functional", "models.backbones.student_files")),
    "benchmarks": Rule(ours=(*PACKAGES, "wiring"), never=()),
    "wiring": Rule(ours=(*PACKAGES[:-1], "wiring"), never=()),
    "run": Rule(ours=("wiring", "callbacks"), never=("torch", "lightning", "transformers")),
}


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def imports(source: str, module: str) -> list[tuple[int, str]]:
    """(line, module) of everything that a source imports, at its head, inside functions or by name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:  # `from models import backbones` imports models.backbones
                found.append((node.lineno, f"{base}.{alias.name}" if within(base, OURS) else base))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            name = node.args[0]
            found.append((node.lineno, name.value if isinstance(name, ast.Constant) else COMPUTED))
    return found


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
    return [
        ROOT / "run.py",
        *sorted(path for package in (*PACKAGES, "wiring") for path in (ROOT / package).rglob("*.py")),
    ]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def faults(source: str) -> list[str]:
    """What a file lacks: one sentence at its head, and an end within reach. An empty `__init__.py` needs neither."""
    found = []
    if source.strip() and not ast.get_docstring(ast.parse(source)):
        found.append("has no docstring")
    if (lines := len(source.splitlines())) > MOST_LINES:
        found.append(f"has {lines} lines, more than {MOST_LINES}")
    return found


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert violations(path.read_text(encoding="utf-8"), module_name(path)) == []


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is_and_is_short(path):
    assert faults(path.read_text(encoding="utf-8")) == []


def test_every_package_is_looked_at():
    names = {module_name(path) for path in python_files()}
    for known in ("run", "models.functional.meanflow", "models.backbones.llada", "datamodules.oracle.score"):
        assert known in names
    assert {"callbacks.ema", "lightning_modules.base"} <= names
    packaged = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packaged <= {*PACKAGES, "wiring"}


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
        ("models.decoding.decoder", "from omegaconf import DictConfig", "omegaconf"),
        ("models.decoding.decoder", "from datamodules.batch import TensorRows", "datamodules.batch.TensorRows"),
        ("datamodules.oracle.score", "from models.decoding.decoder import Decoder", "models.decoding.decoder.Decoder"),
        ("datamodules.oracle.score", "import lightning_modules.base as base", "lightning_modules.base"),
        ("datamodules.oracle.score", "from callbacks import record", "callbacks.record"),
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
        ("lightning_modules.base", "from wiring import build", "wiring.build"),
        ("run", "import torch", "torch"),
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
        ("lightning_modules.base", "import lightning\nfrom models.decoding.decoder import Decoder"),
        ("callbacks.export", "from models.backbones.student_files import save_student\nimport lightning"),
        ("run", "import hydra\nfrom callbacks.frontier import FrontierReport"),
    ],
)
def test_a_right_import_is_not(module, source):
    assert violations(source, module) == []


def test_a_file_without_a_docstring_or_too_long_is_seen():
    assert faults("import torch\n") == ["has no docstring"]
    assert faults('"""Maths."""\n' + "\n" * MOST_LINES) == ["has 301 lines, more than 300"]
    assert faults('"""Maths."""\n') == faults("") == []
