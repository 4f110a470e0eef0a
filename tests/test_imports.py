"""The house's order: every module imports only modules that come before it."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "splitquant_mlx"
ORDER = [
    ["_version", "errors", "blas", "progress", "cache", "environment", "histogram", "disk", "host"],
    ["compatibility", "workspace", "journal"],
    ["recipe", "kmeans", "headers", "shards", "gguf", "gguf_tokenizer", "source", "model_file"],
    ["source_card"],
    ["gguf_import", "demo_model", "affine", "parts", "checkpoint", "plan", "manifest", "study"],
    ["distributed", "sharding"],
    ["directory", "layers", "resume", "save", "staging", "result_parts", "results"],
    ["fit", "coding", "allocate", "patch"],
    ["gptq", "loader", "evaluate"],
    ["weight", "calibrate"],
    ["auto", "worker", "refine"],
    ["pipeline", "random_checkpoint", "evaluation", "report"],
    ["original"],
    ["inspection", "verify", "bench", "doctor", "chat", "openai_fields"],
    ["publish"],
    ["openai_request", "answers", "openai_handler", "serve"],
    ["plots", "demo", "study_data", "study_values", "runner"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def first_party_imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("splitquant_mlx"):
            tail = node.module.split(".")[1:]
            yield from [tail[0]] if tail else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("splitquant_mlx."):
                    yield alias.name.split(".")[1]


def test_imports_go_one_way():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        home = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if home in ("__init__", "__main__"):
            continue
        assert home in RANK, f"give {home} its place in ORDER"
        for name in first_party_imports(file):
            if name != home and RANK[name] > RANK[home]:
                wrong.append(f"{file.name} imports {name}")
    assert not wrong


def test_files_stay_small():
    too_long = {
        str(file.relative_to(PACKAGE)): lines
        for file in PACKAGE.rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 400
    }
    assert not too_long


def test_the_model_file_needs_only_mlx_and_mlx_lm():
    tree = ast.parse((PACKAGE / "model_file.py").read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots == {"mlx", "mlx_lm"}


def test_the_package_lists_what_it_offers_without_importing_mlx():
    code = (
        "import sys, splitquant_mlx\n"
        "assert 'mlx.core' not in sys.modules and 'numpy' not in sys.modules\n"
        "for name in splitquant_mlx.__all__: assert getattr(splitquant_mlx, name) is not None\n"
        "assert callable(splitquant_mlx.convert) and callable(splitquant_mlx.load)\n"
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
