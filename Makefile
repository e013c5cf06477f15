# The two commands of a newcomer are `make demo` and `make test`; both make .venv if need be.

PYTHON ?= python3
BIN := .venv/bin
SAMPLES := sample_checkpoints
# Networks for the tests alone, apart from the environment: see tests/models/test_real_models.py.
VISION := torchvision==0.28.0 timm==1.0.31
# A contender of `make bench`, and what it imports; its own requirements would change torch.
CURVLINOPS := curvlinops-for-pytorch==3.0.1 backpack-for-pytorch einops einconv linear_operator \
	opt-einsum jaxtyping wadler-lindig tqdm

.PHONY: demo test stress check samples gallery bench readme golden clean

demo: .venv/installed
	$(BIN)/losscli interpolate $(SAMPLES)/relu/init.pt $(SAMPLES)/relu/final.pt -o demo --force
	@echo "The picture is $(CURDIR)/demo.png"

# One process per core with one thread each; in tests of threads, those that wait sleep instead of
# spinning on a core that another process needs. Each process runs neighbouring tests, which share
# what they compute, and takes tests from another when it is done. The compiled tests are kept.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n auto --dist worksteal

test: .venv/installed
	$(PYTEST)

# The full counts of which `make test` takes a sample.
stress: .venv/installed
	$(PYTEST) -m stress

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.readme --check

# Trains the runs in sample_checkpoints again.
samples: .venv/installed
	$(BIN)/python $(SAMPLES)/train.py

# Draws the README's pictures again.
gallery: .venv/installed
	$(BIN)/python -m tests.readme --gallery

# Writes the help texts into the README again.
readme: .venv/installed
	$(BIN)/python -m tests.readme

# Measures losscli beside what else there is, and writes the README's table and figure again.
bench: .venv/installed
	$(BIN)/python -m pip install -q -e '.[bench]'
	$(BIN)/python -m pip install -q --no-deps $(CURVLINOPS)
	$(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.readme

# Draws the pictures that the tests compare with again, from their stored tables.
golden: .venv/installed
	LOSSCLI_REGENERATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/plotting

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps --target .venv/vision $(VISION)
	touch $@
