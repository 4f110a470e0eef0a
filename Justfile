# The commands of the README and of CI; `just` lists them.

default:
    @just --list

# install with everything development needs
setup:
    pip install -e ".[dev]"

# convert a small real chat model and compare
demo:
    splitquant-mlx demo

# offline tests, minutes
test:
    pytest

# fuzzing, kills, hostile input: minutes
test-robustness:
    pytest -m "robustness and not slow"

# real models and a separate mlx-lm environment; needs a network the first time
test-slow:
    pytest -m slow

# what only a GPU can show, Apple's or another
test-gpu:
    pytest -m gpu -n 0

# mutated checkpoints, GGUF files and recipes, a quarter of an hour: no crash, no hang, no escape
fuzz:
    python tests/support/fuzz.py --inputs 10000 --seed 0

# convert, load, chat and evaluate for twenty minutes in one process: memory and files stay flat
soak:
    python tests/support/soak.py --minutes 20

# the tests with the oldest versions that pyproject.toml allows, then with the newest; needs uv
versions:
    .ci/versions lowest-direct
    .ci/versions highest

# wheel and sdist, checked, and the wheel used as pipx installs it
package:
    .ci/package

# every published figure, on a quiet machine
results:
    splitquant-mlx run recipes/smollm2.toml --output-dir docs/results/smollm2
    python docs/figures.py

# how every architecture compares with transformers, half an hour; needs torch
architectures:
    python tests/support/architectures.py --json splitquant_mlx/inspection/architectures.json --page docs/architectures.md

# the documentation, served on this machine while it is edited
docs:
    mkdocs serve

lint:
    ruff check .
    ruff format --check .
    pyright
