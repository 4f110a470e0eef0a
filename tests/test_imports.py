"""The house's order: every module imports only modules that come before it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import pytest

from splitquant_mlx.conversion.save import model_code

PACKAGE = Path(__file__).resolve().parents[1] / "splitquant_mlx"
# what every package may import: those before it
ORDER = [
    *("_version", "errors", "progress", "sizes", "settings", "recipe"),
    *("runtime", "quantization", "nn", "formats", "models", "data", "inference"),
    *("calibration", "evaluation", "conversion", "inspection", "demo", "bench"),
    *("study", "report", "publish", "cli"),
]


def module_name(file):
    names = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imported_modules(file):
    """Yield the package's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("splitquant_mlx"):
            home = node.module.partition(".")[2]
            names = [f"{home}.{alias.name}".strip(".") for alias in node.names] + [home]
        elif isinstance(node, ast.Import):
            own = [alias.name for alias in node.names if alias.name.startswith("splitquant_mlx")]
            names = [name.partition(".")[2] for name in own]
        yield from (name for name in names if name and name in MODULES)


def test_packages_import_only_those_before_them():
    wrong = []
    for name, file in MODULES.items():
        home = name.partition(".")[0]
        if home in ("", "__main__"):
            continue
        assert home in ORDER, f"give {home} its place in ORDER"
        for other in imported_modules(file):
            if ORDER.index(other.partition(".")[0]) > ORDER.index(home):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_module_imports_one_that_imports_it():
    graph = {
        name: {m for m in imported_modules(file) if m != name} for name, file in MODULES.items()
    }
    # a package's __init__ may gather what its modules offer
    graph = {
        name: {m for m in others if not name.startswith(f"{m}.")} for name, others in graph.items()
    }
    TopologicalSorter(graph).prepare()  # which raises CycleError


def test_files_stay_small():
    too_long = {
        str(file.relative_to(PACKAGE)): lines
        for file in PACKAGE.rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 400
    }
    assert not too_long


def test_functions_stay_small():
    too_large = []
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{module}.{node.name}"
                lines = node.end_lineno - node.lineno + 1
                args = node.args
                parameters = len([*args.posonlyargs, *args.args, *args.kwonlyargs])
                if name == "cli.convert.convert":  # each of its options is one
                    parameters = 0
                if lines > 60 or parameters > 8:
                    too_large.append(f"{name}: {lines} lines, {parameters} parameters")
    assert not too_large


@pytest.mark.parametrize("mode", ["affine", "lut"])
def test_a_model_file_needs_only_mlx_and_the_program_that_runs_it(mode):
    tree = ast.parse(model_code([SimpleNamespace(mode=mode)]))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert {"mlx", "mlx_lm"} <= roots <= {"collections", "typing", "mlx", "mlx_lm", "mlx_vlm"}


def test_the_package_lists_what_it_offers_without_importing_mlx():
    code = (
        "import sys, splitquant_mlx\n"
        "assert 'mlx.core' not in sys.modules and 'numpy' not in sys.modules\n"
        "for name in splitquant_mlx.__all__: assert getattr(splitquant_mlx, name) is not None\n"
        "assert callable(splitquant_mlx.convert) and callable(splitquant_mlx.evaluate)\n"
        "assert 'mlx_lm' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_help_imports_neither_mlx_nor_numpy():
    code = (
        "import sys; from splitquant_mlx.cli import run\n"
        "assert run(['convert', '--help']) == 0\n"
        "assert not {'mlx', 'mlx.core', 'numpy', 'mlx_lm', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, stdout=subprocess.DEVNULL
    )
