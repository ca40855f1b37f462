# make demo | test | test-slow | lint | docs | results | bench: each sets up .venv itself when it has to.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint docs results bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

# The main job on the embedded default: SmolLM2-135M-Instruct, the starter corpus, three languages.
demo: $(VENV)/.installed
	$(BIN)/polylens enhance --languages sw,es,zh --out runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 2 -m "not slow" tests src --doctest-modules

# Real weights and reference numbers; minutes to an hour.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow --timeout 3600 tests

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python docs/generate_cli.py --check
	$(BIN)/python docs/generate_configuration.py --check

docs: $(VENV)/.installed
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

# The tables of docs/results.md, from the values that experiments/run.py kept.
results: $(VENV)/.installed
	$(BIN)/python experiments/page.py

# Half an hour on two cores; fetches Qwen2.5-Coder-1.5B (1.1 GB). `make bench ARGS="method --share 20"` is short.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf $(VENV) site runs build dist .mypy_cache .ruff_cache .pytest_cache
