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

# real models and a separate mlx-lm environment; needs a network the first time
test-slow:
    pytest -m slow

# what only an Apple GPU can show
test-metal:
    pytest -m metal

lint:
    ruff check .
    ruff format --check .
    pyright
