# Every target sets up what it needs in .venv first. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-processors test-slow mutation check format bench bench-checkpoints bench-serving bench-gpu bench-training-gpu toy clean

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

PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# They lie apart: where torchao and bitsandbytes are installed, diffusers imports both in every process, which takes
# seconds and prints what they lack. torch-fidelity asks for torchvision, of which there is no build for CPUs alone.
ECOSYSTEM := torchao==0.18.0 bitsandbytes==0.50.2 cache-dit==1.5.3 torch-fidelity==0.4.0
APART := tests/test_other_packages.py tests/test_torch_fidelity.py

build/ecosystem/.installed: .venv/.installed Makefile
	@rm -rf build/ecosystem
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/ecosystem $(ECOSYSTEM)
	@touch $@

test: .venv/.installed build/ecosystem/.installed  ## Run the tests (8 minutes on 2 cores).
	$(PYTEST) $(APART:%=--ignore %)
	PYTHONPATH=build/ecosystem $(BIN)/python -m pytest $(APART)

# The official code's numbers, sampling, an export, a conversion, training steps.
QUICK := tests/test_modeling.py tests/test_pipeline.py tests/test_solvers.py $(wildcard tests/test_*_numbers.py) \
	tests/test_export.py::test_the_learned_variance_reaches_ddpm_on_onnx_runtime \
	tests/test_convert.py::test_the_golden_checkpoint_converts_with_its_numbers \
	tests/test_training.py::test_training_learns_and_repeats_itself_bit_for_bit

test-quick: .venv/.installed  ## Run the tests of what computes, between two edits (under 60 seconds).
	$(PYTEST) $(QUICK)

NUMBERS := $(filter-out tests/test_convert.py::%,$(QUICK)) tests/test_conversion.py tests/test_convert.py \
	tests/test_export.py::test_every_kind_of_model_exports \
	tests/test_export.py::test_a_denoiser_with_precomputed_modulation_samples_as_the_plain_one \
	tests/test_resume.py::test_another_number_of_workers_ends_in_the_same_bits

# What makes this processor compute as others do; a plus joins settings. MKL_ENABLE_INSTRUCTIONS=SSE4_2 has products with
# one row sum as the alignment of their weights has it, which Intel's own kernels for newer instructions never do.
PROCESSORS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=1 OMP_NUM_THREADS=3

test-processors: .venv/.installed  ## Run the tests of numbers as other processors compute (10 minutes).
	@status=0; for setting in $(PROCESSORS); do \
		echo "== $$setting"; env $$(echo $$setting | tr + ' ') $(PYTEST) -q $(NUMBERS) || status=1; \
	done; exit $$status

# cosmic-ray lies apart: nothing else needs what it depends on.
mutation: .venv/.installed  ## Change what computes in 1,500 places, and see whether a test notices (an hour).
	@test -d build/cosmic-ray || $(BIN)/python -m pip install --quiet --target build/cosmic-ray cosmic-ray==8.7.0
	PYTHONPATH=build/cosmic-ray $(BIN)/python tests/mutation.py

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
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/evaluation_sampling.py

bench-checkpoints: .venv/.installed  ## Convert and load an XL/2 checkpoint beside a plain copy (11 GB of disk, 3 minutes).
	$(BIN)/python benchmarks/checkpoints.py

bench-serving: .venv/.installed  ## Latency against load of `dit-hub serve` and other servers (20 minutes).
	@test -d build/litserve || $(BIN)/python -m pip install --quiet --no-deps --target build/litserve litserve==0.2.19 pyzmq
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/serving.py --any-steps --shares 0.2 0.35 0.5 0.7 --seconds 10 --out docs/serving-toy
	PYTHONPATH=build/litserve $(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/serving.py --any-steps --runtime pytorch
	$(BIN)/python benchmarks/serving.py --any-steps --model S/2 --batch 4 --shares 0.7 --most 40 --deadline 20

bench-gpu: .venv/.installed  ## Latency of XL/2 on an NVIDIA GPU: eager, compiled and TensorRT.
	$(BIN)/python benchmarks/gpu.py

bench-training-gpu: .venv/.installed  ## Training of B/2 and XL/2 on an NVIDIA GPU against the official train step.
	$(BIN)/python benchmarks/training_gpu.py

toy: .venv/.installed  ## Train the embedded model anew, with its images and card.
	$(BIN)/dit-hub train toy-shapes --out src/dit_hub/assets/dit-toy-shapes --overwrite

clean:  ## Remove what the other targets made.
	rm -rf .venv build dist outputs src/*.egg-info
