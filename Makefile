# What can be done here. `make` alone lists it. Everything runs in .venv, which `make setup` (and every target) makes.

PYTHON ?= python3
ENV    ?= point
DATA   ?= mixed
SCALE  ?= laptop
SEEDS  ?= 1
RESULT ?= point
ROW    ?= base
STORES ?= stores
RUNS   ?= runs

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CLI    := $(BIN)/focal-cli
# one thread a process: the networks are small, and processes side by side use the cores better
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart data train compare sanity test-run report lint type imports test test-slow bench \
  reproduce ablation docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  ENV=$(ENV) DATA=$(DATA) SCALE=$(SCALE) SEEDS=$(SEEDS) RESULT=$(RESULT)   (change any: make data ENV=walker SCALE=smoke)"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

setup: $(READY) ## Make the virtual environment with pinned versions

quickstart: $(READY) ## The whole pipeline on sparse-point-robot: data, training, meta-test, pictures (about 4 minutes)
	$(CLI) data generate --env point --tasks 20/5 --set fleet.size=13 --stores quickstart/stores
	$(CLI) train --env point --data mixed --set steps=5000 --name first --resume --stores quickstart/stores --runs quickstart/runs
	$(CLI) test --stores quickstart/stores --runs quickstart/runs
	$(CLI) report --stores quickstart/stores --runs quickstart/runs -o quickstart/report.html

data: $(READY) ## Stage one: a SAC agent per task of ENV, rolled out into stores
	$(CLI) data generate --env $(ENV) --scale $(SCALE) --stores $(STORES)

train: $(READY) ## Stage two: FOCAL on the DATA of ENV
	$(CLI) train --env $(ENV) --data $(DATA) --seeds $(SEEDS) --stores $(STORES) --runs $(RUNS)

compare: $(READY) ## All four methods on the DATA of ENV (point, wind, cheetah-vel, walker, cheetah-dir, ant-dir), SEEDS seeds
	$(CLI) compare --env $(ENV) --data $(DATA) --seeds $(SEEDS) --stores $(STORES) --runs $(RUNS)

sanity: $(READY) ## Every method on one task of sparse-point-robot, where nothing is to be inferred, beside its expert
	$(CLI) data generate --env point --tasks 1/1 -o sanity/sparse-point-robot
	$(BIN)/python benchmarks/single_task.py sanity/sparse-point-robot --runs sanity/runs

test-run: $(READY) ## Meta-test the newest run on its test tasks
	$(CLI) test --stores $(STORES) --runs $(RUNS)

report: $(READY) ## All about the newest run in one HTML page, report.html
	$(CLI) report --stores $(STORES) --runs $(RUNS)

lint: $(READY) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot map the root folder to a package name, so it sees the root through a link called focal
type: $(READY) ## mypy
	@folder=$$(mktemp -d) && ln -s "$(CURDIR)" $$folder/focal && cd $$folder && \
	  "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p focal; \
	  code=$$?; rm -r $$folder; exit $$code

imports: $(READY) ## import-linter: which package may import which
	$(BIN)/lint-imports

test: $(READY) ## The fast tests
	$(BIN)/pytest -n 2

test-slow: $(READY) ## The slow tests: killed processes, learning
	$(BIN)/pytest -m slow

bench: $(READY) ## How fast this machine is in both stages, with the rivals, and in meta-testing
	$(BIN)/python benchmarks/stage_one.py
	$(BIN)/python benchmarks/stage_two.py
	$(BIN)/python benchmarks/rivals.py
	$(BIN)/python benchmarks/evaluation.py

# FIGURE=3 ENV="point wind" makes these families' part; ENV's default is for the other targets
ONLY = $(if $(findstring command,$(origin ENV)),$(foreach family,$(ENV),--env $(family)))

reproduce: $(READY) ## A FIGURE or TABLE of the paper (FIGURE=8), or a RESULT of docs/results.md: point, point-joint, cheetah-dir
ifdef FIGURE
	$(CLI) reproduce figure $(FIGURE) $(ONLY) --scale $(SCALE) --stores $(STORES) --runs $(RUNS)
else ifdef TABLE
	$(CLI) reproduce table $(TABLE) $(ONLY) --scale $(SCALE) --stores $(STORES) --runs $(RUNS)
else
	benchmarks/reproduce.sh $(RESULT) $(CLI) $(STORES) $(RUNS)
endif

ablation: $(READY) ## One ROW of docs/ablations.md (ROW=coupled, ROW=all) on the DATA of ENV, with the rows it is compared with
	$(CLI) ablate --env $(ENV) --data $(DATA) --rows $(ROW) --seeds $(SEEDS) --stores $(STORES) --runs $(RUNS)

# pdoc lets an import start no program unless told so; GLFW, which gymnasium imports, looks for its library that way
docs: $(READY) ## The API reference from the docstrings, in site/
	PDOC_ALLOW_EXEC=1 $(BIN)/pdoc focal $(foreach p,envs datasets datagen trainer evaluation,focal.$(p)) '!focal.tests' -o site

clean: ## Remove caches (never stores or runs)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
