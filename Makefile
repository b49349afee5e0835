# make demo: set everything up, train a ternary model, export it, verify the export, use it.
# make test: the same set-up, then the tests. make check-kernels: the GPU kernels, on a machine without a GPU.

PYTHON ?= python3
# Test processes; each computes with one thread.
JOBS   ?= auto
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test check-kernels llama-cpp setup lint format clean

demo: setup
	$(BIN)/python -m bitnet_train +recipe=tiny
	$(BIN)/python -m bitnet_train command=export run=runs/tiny
	$(BIN)/python -m bitnet_train command=generate run=runs/tiny/export/hf-packed 'generate.prompt="class "' generate.temperature=0.6 generate.max_new_tokens=96
	@echo
	@echo "run:       runs/tiny (config.yaml, metrics.csv, samples.md, checkpoints/)"
	@echo "report:    runs/tiny/report.html"
	@echo "export:    runs/tiny/export/ (hf-packed for transformers, gguf-i2_s for bitnet.cpp, ...)"
	@echo "next:      $(BIN)/python -m bitnet_train --help"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("bitnet_train needs Python 3.11 or newer: make PYTHON=python3.11 demo")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(READY)

# Triton's kernels without a GPU: against the oracle in Triton's interpreter, then compiled for six GPU generations.
check-kernels: setup
	$(BIN)/python -m pytest tests/kernels
	$(BIN)/python -m bitnet_train.kernels.triton.ahead_of_time

# llama.cpp, which runs the GGUF exports: built from source, about seven minutes on two cores.
llama-cpp: $(VENV)/.llama-cpp

$(VENV)/.llama-cpp: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[llama-cpp]"
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
