# Everything below works on a fresh clone: each target sets up what it needs. `make` alone lists the targets.
PYTHON_VENV := .venv/bin/python
DEMO := runs/demo
SYNTHREASON := data/synthreason

.DEFAULT_GOAL := help
.PHONY: help setup test test-all lint format docs demo app bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: ## make .venv (shared between clones; only the first time is slow)
	@scripts/setup.sh

test: setup ## the default tests: a few minutes, no GPU, no download
	OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest -n 2 --dist worksteal  # one thread each: twice as fast on 2 cores

test-all: setup ## every test, the slow ones too (GPU tests skip themselves without a GPU)
	$(PYTHON_VENV) -m pytest -m ""

lint: setup ## check style and types
	$(PYTHON_VENV) -m ruff check .
	$(PYTHON_VENV) -m ruff format --check .
	$(PYTHON_VENV) -m mypy

docs: setup ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(PYTHON_VENV) -m mkdocs build --quiet

format: setup ## repair style
	$(PYTHON_VENV) -m ruff check --fix .
	$(PYTHON_VENV) -m ruff format .

$(SYNTHREASON)/synthreason.json: | setup
	$(PYTHON_VENV) -m dataset.synthetic --out $(SYNTHREASON)

demo: setup $(SYNTHREASON)/synthreason.json ## train CoReS on SynthReason, measure it, keep the model in runs/demo
	$(PYTHON_VENV) train_ds.py --config configs/tiny.yaml --exp_name demo
	rm -rf $(DEMO)/model
	$(PYTHON_VENV) merge_lora_weights_and_save_hf_model.py --run $(DEMO) --save_path $(DEMO)/model

app: ## the web page with the demo's model, for this machine alone (makes both where they are missing)
	@scripts/setup.sh app
	@[ -e $(DEMO)/model/config.json ] || $(MAKE) demo
	.venv-app/bin/python app.py --version $(DEMO)/model

bench: setup $(SYNTHREASON)/synthreason.json ## CoReS against LISA, five seeds each: half an hour on 2 free cores
	$(PYTHON_VENV) -m benchmarks.synthreason

clean: ## remove caches and the link to the environment; data and runs stay
	rm -rf .pytest_cache .ruff_cache .hypothesis .venv .venv-app
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
