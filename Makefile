# The front door. `make` alone says what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUTF8 := 1

# Pictures in notebooks are drawn by the system's chromium. Nothing here may wait for a network.
test test-slow: export BROWSER_PATH = $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test test-slow: export HF_HUB_OFFLINE = 1
test test-slow: export HF_DATASETS_OFFLINE = 1
# What was compiled once (tests too, in which pytest rewrites each assert) is kept for the next process.
unexport PYTHONDONTWRITEBYTECODE
# Tests run in as many processes as there are cores, and each in one thread.
test: export OMP_NUM_THREADS = 1

comma := ,
ADAPTERS := verifiers openenv mcp games tau2

# $(call step,TITLE,COMMAND,WHAT TO DO WHEN IT FAILS)
define step
	@printf '\n-- %s\n' "$(1)"; start=$$SECONDS; $(2) || { printf '\nmake $@ stopped at "%s": %s\n' "$(1)" "$(3)" >&2; exit 1; }; \
	printf -- '-- done in %s s\n' $$((SECONDS - start))
endef

.PHONY: help demo test test-slow test-vllm test-adapters docs bench lint export readme clean

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.has-app  ## train the tiny policy on this machine and watch it; ARGS="--steps 40" goes to `tirlab demo`
	@$(BIN)/tirlab demo $(ARGS)

test: .venv/.has-dev  ## all checks, as in CI: style, notebooks in step with modules, notebooks run, tests
	@[ -n "$$BROWSER_PATH" ] || scripts/debian chromium || true
	$(call step,style,ruff check,repair what ruff names (for a file in tirlab, in its notebook))
	$(call step,notebooks and modules agree,scripts/in_step,commit what has just been brought into step)
	$(call step,README.md is made from nbs/index.ipynb,scripts/readme --check,run 'make readme' and commit)
	$(call step,notebooks run,nbdev-test --n-workers 2,run the notebook named above and repair the cell)
	$(call step,tests,pytest -q -n auto --maxprocesses 8 --dist loadfile --durations 10,repair what pytest names; 'pytest -x FILE' runs one file)
	@printf '\nAll good.\n'

test-slow: .venv/.has-dev  ## what takes minutes: tests marked slow, and the notebooks' cells marked `#| slow`
	@[ -n "$$BROWSER_PATH" ] || scripts/debian chromium || true
	$(call step,slow tests,pytest -q -m slow || [ $$? = 5 ],repair what pytest names)
	$(call step,slow notebooks,scripts/slow_notebooks,run the notebook named above and repair the cell)
	@printf '\nAll good.\n'

test-vllm: .venv-vllm/.has-vllm  ## the real vLLM on a CPU: both engines, servers, training; the first time it is installed
	$(call step,the real vLLM,OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -m vllm tests/vllm_cpu,repair what pytest names)
	@printf '\nAll good.\n'

test-adapters: $(ADAPTERS:%=test-adapter-%)  ## environments from elsewhere with their real packages, each in an environment of its own; -j2 runs two at a time
	@printf '\nAll good.\n'

test-adapter-%: .venv-adapters/%/.done
	$(call step,the real packages: $*,OMP_NUM_THREADS=1 .venv-adapters/$*/bin/python -m pytest -q -m adapter tests/adapters/test_$*.py,repair what pytest names)

docs: .venv/.has-dev  ## the documentation as a site, in site/index.html; links are checked, nothing is fetched
	$(call step,site,NO_MKDOCS_2_WARNING=1 mkdocs build -q,repair the page or link that mkdocs names)
	$(call step,links,scripts/docs/links.py site,repair the link where it stands: in a notebook$(comma) in docs/ or in a docstring)

bench: .venv/.has-dev  ## measure tirlab against its peers, and keep the figures in benchmarks/; takes minutes, wants an idle machine
	@scripts/bench

lint: .venv/.has-dev  ## style alone
	ruff check

export: .venv/.has-dev  ## write the modules from the notebooks
	nbdev-clean && nbdev-export

readme: .venv/.has-dev  ## write README.md from nbs/index.ipynb
	@scripts/readme

clean:  ## remove what was built, but not .venv
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	find app nbs scripts tests tirlab -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

.SECONDARY: $(ADAPTERS:%=.venv-adapters/%/.done)
.venv-adapters/%/.done: .venv/.has-dev scripts/setup_adapter
	@scripts/setup_adapter $*

# The real vLLM has an environment of its own.
.venv-vllm/.has-vllm: pyproject.toml constraints.txt scripts/setup_vllm
	@scripts/setup_vllm

# A stamp is older than what it depends on after a change there; pip then adds what is missing.
.venv/.has-%: pyproject.toml constraints.txt scripts/setup
	@scripts/setup $*
