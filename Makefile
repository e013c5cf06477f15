# Begin with `make demo` and `make test`; all targets make .venv if needed.

PYTHON ?= python3
BIN := .venv/bin
SAMPLES := sample_checkpoints
# Networks for the tests alone, apart from the environment: see tests/models/test_real_models.py.
VISION := torchvision==0.28.0 timm==1.0.31
# A contender of `make bench`, and what it imports; its own requirements would change torch.
CURVLINOPS := curvlinops-for-pytorch==3.0.1 backpack-for-pytorch einops einconv linear_operator \
	opt-einsum jaxtyping wadler-lindig tqdm

.PHONY: help demo test stress check samples gallery bench bench-gpu readme golden clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.* ## /\1\t/p' Makefile | expand -t 10

demo: .venv/installed ## Draw a first picture
	$(BIN)/losscli interpolate $(SAMPLES)/relu/init.pt $(SAMPLES)/relu/final.pt -o demo --force
	@echo "The picture is $(CURDIR)/demo.png"

# One process per core with one thread each; in tests of threads, those that wait sleep instead of
# spinning on a core that another process needs. Each process runs neighbouring tests, which share
# what they compute, and takes tests from another when it is done. The compiled tests are kept.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n auto --dist worksteal

test: .venv/installed ## Run the tests
	$(PYTEST)

stress: .venv/installed ## Run the other cases and the full counts, of which `make test` takes a sample
	$(PYTEST) -m stress

check: .venv/installed ## Run the linters and the type checker, and check the READMEs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.readme --check

samples: .venv/installed ## Train the runs in sample_checkpoints again
	$(BIN)/python $(SAMPLES)/train.py

gallery: .venv/installed ## Redraw the pictures of the READMEs
	$(BIN)/python -m tests.readme --gallery

readme: .venv/installed ## Write help texts and measurements into the README
	$(BIN)/python -m tests.readme

bench: .venv/installed ## Compare the speed with other tools, for the table and figure of the README
	$(BIN)/python -m pip install -q -e '.[bench]'
	$(BIN)/python -m pip install -q --no-deps $(CURVLINOPS)
	$(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.readme

# A machine with a GPU may have no network: this takes the Python that has torch.
bench-gpu: ## Check and measure the GPU in 8 minutes; PYTHON names a Python with torch
	$(PYTHON) -m tests.benchmarks.gpu

golden: .venv/installed ## Redraw the pictures that the tests compare with, from stored tables
	LOSSCLI_REGENERATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/plotting -k golden -m 'stress or not stress'

clean: ## Remove .venv and what is built or cached
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps --target .venv/vision $(VISION)
	touch $@
