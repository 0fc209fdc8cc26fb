# Every target sets up what it needs in .venv first. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check format bench bench-checkpoints bench-gpu bench-training-gpu toy clean

help:  ## Show the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

# An editable install in strict mode links single files, so a folder that gained or lost one is installed anew.
SOURCE_FOLDERS := $(shell find src/dit_hub conversion export model_cards -type d -not -name __pycache__)

.venv/.installed: pyproject.toml constraints.txt $(SOURCE_FOLDERS)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev]' --config-settings editable_mode=strict
	@touch $@

demo: .venv/.installed  ## Sample the embedded toy in PyTorch and on ONNX Runtime, side by side.
	$(BIN)/python examples/demo.py

test: .venv/.installed  ## Run the tests (under 10 minutes on 2 cores).
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/.installed  ## Run the tests that take minutes each.
	$(BIN)/python -m pytest -m slow

check: .venv/.installed  ## Formatting, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/.installed  ## Format and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.installed  ## Print the speed tables of benchmarks/README.md for this machine.
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/latents.py

bench-checkpoints: .venv/.installed  ## Convert and load an XL/2 checkpoint beside a plain copy (11 GB of disk, 3 minutes).
	$(BIN)/python benchmarks/checkpoints.py

bench-gpu: .venv/.installed  ## Latency of XL/2 on an NVIDIA GPU: eager, compiled and TensorRT.
	$(BIN)/python benchmarks/gpu.py

bench-training-gpu: .venv/.installed  ## Training of B/2 and XL/2 on an NVIDIA GPU against the official train step.
	$(BIN)/python benchmarks/training_gpu.py

toy: .venv/.installed  ## Train the embedded model anew, with its pictures and card.
	$(BIN)/dit-hub train toy-shapes --out src/dit_hub/assets/dit-toy-shapes --overwrite

clean:  ## Remove what the other targets made.
	rm -rf .venv build dist outputs src/*.egg-info
