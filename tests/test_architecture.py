"""The folder list is the method: imports run one way, and the heart loads torch alone."""

import ast
import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lossmith

ROOT = Path(lossmith.__file__).parent

# Each may import only what stands before it (and itself).
ORDER = [
    "lazy",
    "user_code",
    "errors",
    "files",
    "serving",
    "terminal",
    "templates",
    "intervals",
    "ranks",
    "losses",
    "proofs",
    "prompts",
    "rollouts",
    "detectors",
    "policy",
    "scorers",
    "samplers",
    "durable",
    "settings",
    "optimization",
    "feedback",
    "reward_model",
    "training",
    "replay",
    "explanation",
    "project",
    "report",
    "adapters",
    "outputs",
    "chat",
    "explorer",
    "running",
    "cluster",
    "api",
    "cli",
    "__main__",
]


def modules():
    return sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.name != "__init__.py")


@functools.cache
def nodes(path):
    """Of the syntax tree of a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported(path):
    """Names of the lossmith parts a file imports, those inside functions included."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lossmith"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lossmith"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(dotted):
    pieces = dotted.split(".")
    return pieces[1] if len(pieces) > 1 else ""


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    mine = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if mine == "data":
        return
    assert mine in ORDER, f"{mine} has no place in the order of imports"
    allowed = set(ORDER[: ORDER.index(mine) + 1]) | {"__version__", ""}
    wrong = [name for name in imported(path) if part(name) not in allowed]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which stand below it"


def dotted(path):
    return ".".join(["lossmith", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def test_no_file_imports_itself_by_way_of_others():
    """Not even for types alone (under TYPE_CHECKING), and not inside a function."""
    files = {dotted(path): path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"}
    ways = {
        name: {a if a in files else a.rpartition(".")[0] for a in imported(path)} & set(files) - {name}
        for name, path in files.items()
    }
    while below := {name for name, to in ways.items() if not to & set(ways)}:  # they import nothing that is left
        ways = {name: to for name, to in ways.items() if name not in below}
    assert not ways, f"each of these imports another of them: {sorted(ways)}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_fit(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            docstring = len((ast.get_docstring(node) or "").splitlines())
            assert length - docstring <= 60, f"{node.name} has {length - docstring} lines"


def fresh(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_heart_loads_torch_and_nothing_more():
    code = (
        "import sys, lossmith.losses; "
        "print([m for m in ('transformers', 'pydantic', 'datasets', 'pyarrow', 'rich') if m in sys.modules])"
    )
    assert fresh(code) == "[]"


def test_public_names_all_exist():
    missing = [name for name in lossmith.__all__ if not hasattr(lossmith, name)]
    assert missing == []


PACKAGES = sorted(".".join(("lossmith", *path.parent.relative_to(ROOT).parts)) for path in ROOT.rglob("__init__.py"))


@pytest.mark.parametrize("name", PACKAGES)
def test_no_module_hides_behind_a_name_of_its_package(name):
    package = importlib.import_module(name)
    inside = {module.name for module in pkgutil.iter_modules(package.__path__)}
    hidden = {x for x in getattr(package, "__all__", ()) if x in inside and not inspect.ismodule(getattr(package, x))}
    assert not hidden


@pytest.mark.parametrize("name", ["lossmith", "lossmith.feedback", "lossmith.reward_model", "lossmith.scorers"])
def test_a_lazy_package_lists_what_a_type_checker_reads(name):
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    read = {alias.name for node in block.body for alias in node.names}
    assert read <= set(package.__all__)
    for exported in package.__all__:
        getattr(package, exported)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = package.nonsense


def test_every_error_is_exported():
    module = importlib.import_module("lossmith.errors")
    kinds = {name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds <= set(lossmith.__all__)


def test_every_command_is_a_function_of_python():
    from lossmith.cli import app

    functions = {
        "train": "lossmith.train", "prefer": "lossmith.prefer", "sample": "lossmith.sample_outputs",
        "bench": "lossmith.measure_recipe", "annotate": "lossmith.feedback.serve", "plot": "lossmith.plot_frontier",
        "replay": "lossmith.replay.replay", "chat": "lossmith.chat.open_sides",
        "explain": "lossmith.explain", "explore": "lossmith.explorer.serve", "tour": "lossmith.explorer.serve",
        "merge": "lossmith.merge_adapter", "plan": "lossmith.plan_hardware",
        "audit": "lossmith.audit", "doctor": "lossmith.doctor", "report": "lossmith.write_report",
        "init": "lossmith.Project", "status": "lossmith.Project", "losses": "lossmith.compare",
        "reward": "lossmith.train_reward_model", "export": "lossmith.adapters.verl_export.export",
    }  # fmt: skip
    commands = {name for name in app if not name.startswith("-")}
    assert commands == functions.keys(), "a new command: give it a function, and name it here"
    for dotted in functions.values():
        home, _, name = dotted.rpartition(".")
        assert callable(getattr(importlib.import_module(home), name))


def test_train_is_the_function_even_after_the_package_is_loaded():
    importlib.import_module("lossmith.training")
    assert callable(lossmith.train)


# A scorer's own process is sent the user's columns by its parent: nothing foreign is ever unpickled.
PICKLES_TO_ITS_OWN_CHILD = {"process.py", "worker.py"}


def test_no_pickle_and_no_remote_code_anywhere():
    for path in modules():
        for node in nodes(path):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                unsafe = {"pickle", "cloudpickle", "dill", "joblib"} & set(names)
                assert not unsafe or path.name in PICKLES_TO_ITS_OWN_CHILD, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save"), f"{path} uses {called}"
                told = [k for k in node.keywords if k.arg == "trust_remote_code"]
                assert all(ast.unparse(k.value) == "False" for k in told), path
