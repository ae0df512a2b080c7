"""The house rules that a parser can check: who imports what, who prints, how long things are, and that tests test."""

import ast
import functools
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bernprune

ROOT = Path(__file__).parents[1]
MODULES = {
    path.relative_to(ROOT).as_posix(): path for top in ("bernprune", "kernels") for path in (ROOT / top).rglob("*.py")
}
BENCHMARKS = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "benchmarks").rglob("*.py")}
TESTS = {path.name: path for path in (ROOT / "tests").glob("test_*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in (MODULES | BENCHMARKS | TESTS).items()}
MOST_LINES, MOST_FUNCTION_LINES = 400, 60

all_modules = pytest.mark.parametrize("name", MODULES)
all_code = pytest.mark.parametrize("name", MODULES | BENCHMARKS)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def imported(name: str) -> frozenset[str]:
    """Dotted names of all that a module imports, also within functions; of our own packages, down to the module."""
    found = set[str]()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: write imports out from the top"
            found |= {_module_of(node.module or "", alias.name) for alias in node.names}
    return frozenset(found)


def _module_of(package: str, member: str) -> str:
    """``package.member`` if that is a module of ours, otherwise ``package``."""
    path = f"{package}.{member}".replace(".", "/")
    return f"{package}.{member}" if {f"{path}.py", f"{path}/__init__.py"} & set(MODULES) else package


def within(dotted: str, *packages: str) -> bool:
    return any(dotted == package or dotted.startswith(f"{package}.") for package in packages)


def room(name: str) -> str:
    """The dotted name of a module, as ``bernprune.policy.search``; of a package, its own."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# Directions

# Who alone may import a library; a type that is only named in annotations may come from anywhere.
LIBRARIES = {
    "transformers": ("bernprune.models", "bernprune.cli"),
    "huggingface_hub": ("bernprune.models",),
    "datasets": ("bernprune.text",),
    "triton": ("kernels",),
    "torchao": ("bernprune.models",),
    "peft": ("bernprune.models",),
    "gguf": ("bernprune.export",),
    "typer": ("bernprune.cli",),
    "argparse": ("bernprune.cli",),
}


@functools.cache
def types_only(name: str) -> frozenset[str]:
    """What is imported under ``if TYPE_CHECKING:``."""
    blocks = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.If)]
    guarded = [block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING"]
    return frozenset(node.module or "" for block in guarded for node in block.body if isinstance(node, ast.ImportFrom))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_known_to_its_rooms_alone(library: str) -> None:
    """transformers in ``models``, datasets in ``text``, Triton under ``kernels``, the command line in ``cli``."""
    users = {name for name in MODULES if any(within(used, library) for used in imported(name) - types_only(name))}
    strangers = {name for name in users if not within(room(name), *LIBRARIES[library])}
    assert not strangers


VOCABULARY = ("bernprune.names", "bernprune.errors", "bernprune.units", "bernprune.seeding")
LIMITS = {  # of our own modules, what those of a room may import
    "kernels": ("bernprune.kernels",),
    "bernprune.names": ("bernprune.errors",),
    "bernprune.errors": (),
    "bernprune.seeding": (),
    "bernprune.custom": ("bernprune.names", "bernprune.errors"),
    "bernprune.units": ("bernprune.names", "bernprune.errors"),
    "bernprune.presets": (),
    "bernprune.progress": (),
    "bernprune.settings": ("bernprune.errors", "bernprune.embedded", "bernprune.names"),
    "bernprune.complaints": ("bernprune.names",),
    "bernprune.config": (
        "bernprune.complaints",
        "bernprune.names",
        "bernprune.errors",
        "bernprune.units",
        "bernprune.presets",
        "bernprune.sections",
        "bernprune.settings",
    ),
    "bernprune.sections": ("bernprune.names", "bernprune.embedded"),
    "bernprune.backends": ("bernprune.names", "bernprune.errors", "bernprune.kernels"),
    "bernprune.policy": (*VOCABULARY, "bernprune.policy", "bernprune.kernels.masks", "bernprune.kernels.reference"),
    "bernprune.models": (
        *VOCABULARY,
        "bernprune.backends",
        "bernprune.kernels.masks",
        "bernprune.embedded",
        "bernprune.models",
        "bernprune.storage",
    ),
    "bernprune.export": (*VOCABULARY, "bernprune.export", "bernprune.models"),
    "bernprune.models.modeling_bernprune": (),  # copied into every saved folder
    "bernprune.scores": (
        *VOCABULARY,
        "bernprune.progress",
        "bernprune.backends",
        "bernprune.models",
        "bernprune.losses",
        "bernprune.objective",  # of metrics that try masks or gates
        "bernprune.custom",
        "bernprune.scores",
        "bernprune.storage",
    ),
    "bernprune.repair": (
        *VOCABULARY,
        "bernprune.progress",
        "bernprune.backends",
        "bernprune.models",
        "bernprune.repair",
    ),
    "bernprune.recovery": (
        *VOCABULARY,
        "bernprune.data",
        "bernprune.losses",
        "bernprune.models",
        "bernprune.recovery",
        "bernprune.sections",
    ),
    "bernprune.losses": ("bernprune.names", "bernprune.errors", "bernprune.backends"),
    "bernprune.costs": (*VOCABULARY, "bernprune.backends", "bernprune.models", "bernprune.losses"),
    "bernprune.objective": (
        *VOCABULARY,
        "bernprune.backends",
        "bernprune.kernels.masks",
        "bernprune.models",
        "bernprune.losses",
        "bernprune.costs",
    ),
}


@all_modules
def test_imports_follow_the_flow(name: str) -> None:
    """A room knows those that the flow passes before it, and no other."""
    limits = [allowed for limited, allowed in LIMITS.items() if within(room(name), limited)]
    ours = {used for used in imported(name) if within(used, "bernprune", "kernels")}
    for allowed in limits:
        assert not {used for used in ours if not within(used, *allowed)}


def test_every_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout finds modules that setup.py does not name; who installs does not."""
    setuptools = pytest.importorskip("setuptools")  # which an environment need not have once all is installed
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("bernprune/**/*.py")}
    places = {name: Path(told["package_dir"].get(name, name.replace(".", "/"))) for name in told["packages"]}
    assert set(places.values()) == (folders - {Path("bernprune/kernels")}) | {Path("kernels")}


def test_the_policy_is_mathematics_alone() -> None:
    """Of other people's packages it imports torch and numpy; of the standard library nothing that reads or writes."""
    others = {
        used.partition(".")[0]
        for name in MODULES
        if within(room(name), "bernprune.policy")
        for used in imported(name)
        if not within(used, "bernprune")
    }
    plain = {"abc", "bisect", "math", "itertools", "functools", "collections", "dataclasses", "typing", "enum"}
    assert others <= {*plain, "torch", "numpy"}


def test_nobody_imports_the_command_line() -> None:
    """Whatever it can do, the library can do."""
    users = {name for name in MODULES if any(within(used, "bernprune.cli") for used in imported(name))}
    assert {name for name in users if not within(room(name), "bernprune.cli")} == {"bernprune/__main__.py"}


def test_kernels_is_no_package_of_its_own() -> None:
    """With an ``__init__.py`` it would shadow Hugging Face's package of that name."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels/__init__.py").exists()


def test_importing_bernprune_does_no_work() -> None:
    """What takes long is imported where it is used, and no GPU is touched."""
    code = """if True:
        import sys, torch, bernprune
        assert not {"datasets", "typer", "matplotlib"} & set(sys.modules)
        assert not torch.cuda.is_initialized()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_public_names() -> None:
    """The list that users may rely on; each is documented."""
    assert bernprune.__all__ == [
        "SCORES",
        "BernpruneError",
        "Budget",
        "Design",
        "KeepPlan",
        "Limits",
        "MaskSearch",
        "ModelConfig",
        "PosteriorSearch",
        "ReinforceSearch",
        "Repairer",
        "RunConfig",
        "UnitSpace",
        "apply_plan",
        "compare_runs",
        "describe",
        "evaluate",
        "evaluate_step",
        "export_gguf",
        "initial_probs",
        "initial_scores",
        "load_model",
        "load_tokenizer",
        "make_baseline",
        "make_config",
        "masked_objective",
        "prune",
        "read_plan",
        "recover",
        "resume",
        "save_pruned",
        "score_model",
        "select",
        "select_plan",
        "slice_model",
    ]
    assert all(getattr(bernprune, name).__doc__ for name in bernprune.__all__)


# Style


@all_modules
def test_only_the_command_line_prints(name: str) -> None:
    """Libraries log."""
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if ast.unparse(call.func) in ("print", "pprint", "sys.stdout.write")]
    assert name.startswith("bernprune/cli/") or not prints


@all_code
def test_a_module_says_what_it_is_for(name: str) -> None:
    """In its docstring; an empty ``__init__`` and the three lines of ``__main__`` need none."""
    assert ast.get_docstring(TREES[name]) or not TREES[name].body or name == "bernprune/__main__.py"


@all_code
def test_files_are_short(name: str) -> None:
    """Four hundred lines are the limit."""
    assert len((MODULES | BENCHMARKS)[name].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@all_code
def test_functions_are_short(name: str) -> None:
    """Sixty lines are the limit."""
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, Function)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= MOST_FUNCTION_LINES]


# Tests


def checks(function: Function, helpers: dict[str, Function], seen: frozenset[str] = frozenset()) -> bool:
    """Whether something in it can fail on purpose: an assertion, ``raises``, ``fail``, or a helper that has one."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("raises", "fail", "warns") or called.startswith("assert_"):
                return True
            if called in helpers and called not in seen and checks(helpers[called], helpers, seen | {called}):
                return True
    return False


@pytest.mark.parametrize("name", TESTS)
def test_every_test_can_fail(name: str) -> None:
    """There is a check in each test function, or in what it calls in its own file."""
    functions = {node.name: node for node in ast.walk(TREES[name]) if isinstance(node, Function)}
    tests = [node for node in functions.values() if node.name.startswith("test_")]
    assert tests
    assert not [test.name for test in tests if not checks(test, functions, frozenset({test.name}))]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("assert found == 3", True),
        ("with pytest.raises(ValueError): run()", True),
        ("assert_close(found, 3)", True),
        ("for case in cases: helper(case)", True),
        ("found = run()", False),
        ("found == 3", False),
        ("other()", False),
        ("test_itself()", False),
    ],
)
def test_the_search_for_checks(body: str, expected: bool) -> None:
    """Itself finds what it must and nothing else."""
    source = f"def test_itself(): {body}" if not body.startswith(("with", "for")) else f"def test_itself():\n  {body}"
    helpers = "def helper(case): assert case\ndef other(): helper2()\ndef helper2(): other()"
    functions = {node.name: node for node in ast.parse(f"{source}\n{helpers}").body if isinstance(node, Function)}
    assert checks(functions["test_itself"], functions, frozenset({"test_itself"})) == expected
