# make train   train MiT-B0 on the sample that this repository ships: runs/sample/
# make test    the tests (about 7 minutes on two cores)
# make install, make install-dev   what training needs into .venv; what the tests need, too
# make test-slurm   the long tests on a real Slurm, which they bring up on this machine (needs root)
# make test-slow   the tests marked slow: compilers, all ZeRO stages and launchers, many stops, the README as a new user runs it
# make test-lowest  quick tests of the lowest versions that pyproject.toml allows (3 GB of CUDA's libraries with torch 2.11)
# make faults  the tests that kill processes, fill disks or corrupt files on purpose (those of Slurm need root)
# make lint    ruff and mypy
# Each installs what it needs into .venv. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install install-dev slurm-packages browser train test test-slow test-slurm test-lowest faults lint clean

help:
	@sed -n 's/^# //p' Makefile | head -8

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 13) else \
		f"Python 3.11 or 3.12 is needed, {sys.executable} is {v.major}.{v.minor}; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first and alone: pip then keeps that build when the other packages ask for it.
$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.train
install-dev: $(VENV)/.dev

# All visible GPUs as far as the batch of 8 divides by their number. On a CPU two ranks of half the cores each: as fast
# as one process when the machine is idle, and faster when something else runs (threads of one process wait for each
# other at every operation). GPUs are named, because DeepSpeed ignores CUDA_VISIBLE_DEVICES when it is given a number;
# the port is a free one, because its default is one fixed number.
train: install
	$(BIN)/python data_prep/shard.py data=sample
	@set -e; \
	gpus=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())'); \
	if [ $$gpus = 0 ]; then \
		export DS_ACCELERATOR=cpu; unset CUDA_VISIBLE_DEVICES; \
		gpus=$$(nproc); [ $$gpus -le 2 ] || gpus=2; fi; \
	ranks=$$($(BIN)/python -c "print(max(r for r in (1, 2, 4, 8) if r <= $$gpus))"); \
	where="--num_accelerators $$ranks"; \
	if [ -n "$$CUDA_VISIBLE_DEVICES" ]; then \
		where="--include localhost:$$(echo "$$CUDA_VISIBLE_DEVICES" | cut -d, -f1-$$ranks)"; fi; \
	port=$$($(BIN)/python -c 'from segformer.distributed.world import free_port; print(free_port())'); \
	set -x; $(BIN)/deepspeed --log_level warning $$where --master_port $$port launch/train.py experiment=sample

# Slurm's daemons and its data base, and a browser, where they are absent and can be installed; the tests that need them
# are skipped without.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name > /dev/null && exit; done; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then \
		echo "no Chromium, and installing it needs root and apt-get: tests of pages in a browser will be skipped"; \
	else { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		chromium fonts-dejavu-core > /dev/null; } \
		|| echo "Chromium can't be installed: tests of pages in a browser will be skipped"; fi

slurm-packages:
	@for program in slurmctld slurmd slurmdbd mariadbd sbatch ip; do \
		PATH="$$PATH:/usr/sbin:/sbin" command -v $$program > /dev/null && continue; \
		if [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then \
			echo "$$program is absent, and installing it needs root and apt-get: tests/slurm/real will be skipped"; break; fi; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin mariadb-server-core iproute2 procps > /dev/null; } \
			|| echo "Slurm's packages can't be installed: tests/slurm/real will be skipped"; \
		break; \
	done

# A file stays on one worker, which starts its ranks once. Triton must not be imported before its tests are found; those
# on Slurm mostly wait, so the two share the cores.
test: install-dev slurm-packages browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" --ignore=tests/models/ops_triton --ignore=tests/slurm/real
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" tests/slurm/real tests/models/ops_triton

# Those on Slurm, whose jobs have time limits, want the cores for themselves.
test-slow: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not slurm" --ignore=tests/models/ops_triton
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/models/ops_triton

test-slurm: install-dev slurm-packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slurm and slow" tests/slurm/real

# Not in CI: torch 2.11 has no build for CPUs alone, and fetching it takes minutes. Warnings of old releases about new ones
# are none of ours. What needs a development tool of today (transformers, moto) is left out.
LOWEST := .venv-lowest
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra train --extra remote --extra tensorboard --extra datasets --extra tiff pyproject.toml -o $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python -r $(LOWEST)/lowest.txt pytest hypothesis
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -o filterwarnings=default -W ignore -m "not slow and not gpu" \
		tests/training/test_config.py tests/training/test_loop.py tests/checkpoint/test_checkpoint.py tests/data/sources \
		tests/evaluation/test_metrics.py tests/telemetry tests/models/test_mit.py tests/inference/test_one_reader.py \
		tests/inference/test_report.py tests/distributed/test_engine.py tests/test_compatibility.py

# Each of them is part of test or of test-slow, too.
faults: install-dev slurm-packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Caches only: runs/, data/ and .venv are yours to remove.
clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache build segformer.egg-info
	find segformer launch data_prep tests -name __pycache__ -prune -exec rm -rf {} +
