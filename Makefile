# make demo   is it worth it? pre-train, select, fine-tune with and without, report (real images; no download)
# make test   the tests, with one whole job, in a few minutes; with another Python: make test PYTHON=python3.13
# make test-all  also the slow tests: runs that are killed, disks that are full, several hosts, notebooks, the record of results
# make stress real runs killed at least 100 times at random moments; nothing may be lost or differ (long: KILLS=10 for a glance)
# make bench  speed, beside its peers (needs torch for some; see benchmarks/)
# make lint   ruff, then the types (mypy)
# Each makes .venv and installs what is missing first.

PYTHON ?= python3
# One environment for each Python that is named.
VENV := .venv$(if $(filter-out python3,$(notdir $(PYTHON))),-$(notdir $(PYTHON)))
RUN := $(VENV)/bin/python

.PHONY: demo test test-all stress bench lint clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "== making $(VENV) and installing requirements.txt (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@echo "== installing what the tests need"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: $(VENV)/.installed
	@echo "== python main.py --config=configs/digits.py (a finished run is shown again; rm -r runs/digits starts afresh)"
	@$(RUN) main.py --config=configs/digits.py

# Four workers at most: each needs about a GB.
PYTEST := -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal

test: $(VENV)/.installed-dev
	@echo "== tests but for the slow ones, on $$($(RUN) --version)"
	@$(RUN) $(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-dev
	@echo "== all tests, on $$($(RUN) --version)"
	@$(RUN) $(PYTEST)

stress: $(VENV)/.installed-dev
	@echo "== runs killed at random moments (KILLS=100 SEED=0)"
	@$(RUN) tests/stress.py --kills=$(or $(KILLS),100) --seed=$(or $(SEED),0)
	@echo "== four processes, then two of them"
	@FT_JAX_STRESS=1 $(RUN) -m pytest tests/runs/test_hosts.py
	@echo "== the demo, and the benchmark of selection"
	@FT_JAX_STRESS=1 $(RUN) -m pytest tests/runs/test_jobs.py tests/runs/test_benchmarks.py -k "demo or benchmark_of_selection"
	@echo "== files and names that are out to do harm, 3,000 of each kind"
	@FT_JAX_FUZZ=3000 $(RUN) -m pytest --numprocesses=logical tests/trust -k "not shows_names"

lint: $(VENV)/.installed-dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

bench: $(VENV)/.installed-dev
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(RUN) $$file; done

clean:
	rm -rf .venv .venv-*
