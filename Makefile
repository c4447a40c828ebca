# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` install into .venv on first use. They need nothing but Python. EXTRA=onedl installs OneDL's forks
# of OpenMMLab into .venv-onedl instead.

PYTHON ?= python3
EXTRA ?= stock
VENV ?= .venv$(if $(filter-out stock,$(EXTRA)),-$(EXTRA))
BIN = $(VENV)/bin

.PHONY: demo test suite test-zoo test-reliability test-environments benchmark lint format site clean

demo: $(VENV)/.runtime
	$(BIN)/python tools/train.py configs/zsq/yolov5-p_shapes_w4a4.py --work-dir work_dirs/demo
	if $(BIN)/python -m pip install -r requirements/deploy.txt; then \
		$(BIN)/python -m mmzsq.export configs/zsq/yolov5-p_shapes_w4a4.py "$$(cat work_dirs/demo/last_checkpoint)" \
			--work-dir work_dirs/demo --out work_dirs/demo/student.onnx --verify 4 --benchmark; \
	else \
		echo 'The packages of requirements/deploy.txt cannot be installed here: the demo ends without the export.'; \
	fi

test: $(VENV)/.tests
	$(MAKE) suite

# The tests, in an environment as it is.
# One process per core with one thread each. Tests of data sets and of runs depend on MMEngine's state of a process, so
# each group has processes of its own. A process that crashes ends the run: xdist may wait for ever for its replacement.
GROUPS = tests/datasets tests/engine tests/reliability
suite: export OMP_NUM_THREADS = 1
suite:
	$(BIN)/python -m pytest tests/datasets
	$(BIN)/python -m pytest -n auto --max-worker-restart 0 --dist loadfile tests/engine tests/reliability
	$(BIN)/python -m pytest -n auto --max-worker-restart 0 --dist loadfile $(addprefix --ignore=,$(GROUPS))
	$(BIN)/python -m pytest --doctest-modules mmzsq

# Takes about twenty minutes on one core.
test-zoo: $(VENV)/.tests
	$(BIN)/python -m pytest tests/zoo -m ''

# Kills runs at forty points and moments, and summarizes all wrong and damaged inputs. Takes about ten minutes.
test-reliability: export OMP_NUM_THREADS = 1
test-reliability: $(VENV)/.tests
	$(BIN)/python benchmarks/reliability.py

# Installs and rehearses the package on each Python that is here, with stock OpenMMLab, OneDL's forks and MMYOLO. Takes a few
# GB and about ten minutes for each; others are skipped. For single ones: make test-environments ENVIRONMENTS='onedl mmyolo'.
# SUITE=1 runs all tests in each of them, too.
test-environments:
	$(PYTHON) benchmarks/environments.py $(if $(SUITE),--suite) $(ENVIRONMENTS)

# Compares a GPU with the goals of docs/performance.md. Without a GPU, only the checks that need none run.
benchmark: $(VENV)/.tests
	$(BIN)/python -m pytest tests/benchmarks -m benchmark

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.tests
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Builds the documentation into site/. A dead link is an error.
site: export NO_MKDOCS_2_WARNING = 1
site: $(VENV)/.site
	$(BIN)/python tools/misc/messages_page.py docs/troubleshooting.md --check
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# mmcv-lite is installed without dependencies, since it requires the stock MMEngine. Any MMEngine brings what it needs.
$(VENV)/.runtime: setup.py $(addprefix requirements/,runtime.txt $(EXTRA).txt deploy.txt mmcv-lite.txt) | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[$(EXTRA),deploy]'
	$(BIN)/python -c 'import mmcv' 2>/dev/null || $(BIN)/python -m pip install --no-deps -r requirements/mmcv-lite.txt
	touch $@

$(VENV)/.tests: $(VENV)/.runtime requirements/tests.txt
	$(BIN)/python -m pip install -r requirements/tests.txt
	touch $@

$(VENV)/.site: requirements/docs.txt | $(BIN)/python
	$(BIN)/python -m pip install -r requirements/docs.txt
	touch $@
