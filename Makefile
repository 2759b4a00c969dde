# Two commands set up everything they need inside .venv:
#   make demo    tune pocketvar on this CPU, then draw a picture dense and tuned, side by side
#   make test    lint, types, tests (make fast: without the slow ones)
# And: make docs writes the API reference to build/api; make bench holds counts, binaries and speed-ups against
# tests/benchmarks/baseline.json, make baseline writes that file anew.
PYTHON ?= python3
PIP_TORCH ?= $(if $(TORCH_CPU_INDEX),--extra-index-url $(TORCH_CPU_INDEX),)
BIN := .venv/bin
IN_PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test fast bench baseline docs clean
demo: .venv/.demo
	$(BIN)/sparvar-tune --gpu cpu --model pocketvar
	$(BIN)/sparvar-tune generate --model pocketvar --class cat --out cat.png

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(IN_PARALLEL)

fast: .venv/.test
	$(BIN)/pytest $(IN_PARALLEL) -m 'not slow and not gpu'

bench: build/bench.json
	$(BIN)/python -m lab.bench_baseline build/bench.json

baseline: build/bench.json
	$(BIN)/python -m lab.bench_baseline build/bench.json --write

.PHONY: build/bench.json
build/bench.json: .venv/.test
	mkdir -p build
	$(BIN)/pytest tests/benchmarks --benchmark-enable --benchmark-json $@ --benchmark-columns min,median,rounds

docs: .venv/.test
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/pdoc -o build/api sparvar_tune sparvar_kernels

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet -c constraints.txt $(PIP_TORCH) torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/.test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet -c constraints.txt $(PIP_TORCH) torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist
