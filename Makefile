PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(VENV)/tools/bin/uv
INSTALLED := $(VENV)/.installed

# Where it is set, each of the tests' processes compiles every module again: 10 s of processor time.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: lab lab-down

lab: $(INSTALLED)
	@$(BIN)/python -m lab up

lab-down:
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m lab down --all; fi

.PHONY: install docs catalogue messages screenshots

install: $(INSTALLED)

# The site, without a warning: build/site/index.html. Nothing in it is loaded from elsewhere.
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# docs/catalogue.md and docs/coverage.md, from the flows.
catalogue: $(INSTALLED)
	@$(BIN)/python -m deployments.catalogue

# The catalogues of translations, runbook/language/*/*.po, from the sources; translators edit them.
messages: $(INSTALLED)
	@$(BIN)/python -m deployments.messages

# The pictures of the README and the docs, by the tests of the UI (as root: Chromium from Debian).
screenshots: $(INSTALLED)
	@tests/system/install
	@mkdir -p docs/screenshots
	@OPS_SCREENSHOTS=docs/screenshots $(BIN)/python -m pytest -q -m system tests/ui --ignore tests/ui/test_pages.py
	@mkdir -p docs/screenshots/ja
	@OPS_LAB_LANGUAGE=ja OPS_SCREENSHOTS=docs/screenshots/ja $(BIN)/python -m pytest -q -m system tests/ui --ignore tests/ui/test_pages.py

.PHONY: demo drill bench

demo:
	@began=$$(date +%s) && $(MAKE) --no-print-directory lab && $(BIN)/python -m lab.demo --since "$$began"

# A drill of §8.4 in the lab: make drill SCENARIO=data_corruption [PARTICIPANTS="name name"]
SCENARIO ?= database_failure
drill:
	@began=$$(date +%s) && $(MAKE) --no-print-directory lab && $(BIN)/python -m lab.drill --scenario "$(SCENARIO)" \
	  --since "$$began" --participants $(PARTICIPANTS)

# What is wrong with an installation: make doctor [ENVIRONMENT=production]
ENVIRONMENT ?= $(OPS_ENVIRONMENT)
.PHONY: doctor
doctor: $(INSTALLED)
	@$(BIN)/python -m deployments.doctor --environment "$(ENVIRONMENT)"

# Both sides of every ratio in one run, on a lab of its own: make bench [MEGABYTES=1000] [JSON=bench.json]
MEGABYTES ?= 1000
bench: $(INSTALLED)
	@tests/matrix/install-redis
	@command -v jq >/dev/null || apt-get install -y -qq --no-install-recommends jq >/dev/null
	@$(BIN)/python -m benchmarks --megabytes $(MEGABYTES) $(if $(JSON),--json "$(JSON)")

# Everything that runs something depends on this: exactly the packages of requirements.lock, and this project, editable.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "This project needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) has no venv module: install it (Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "Installing packages into $(VENV)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@[ -x $(UV) ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(VENV)/tools \
	    --require-hashes --requirement deployments/tools.lock
	@$(UV) pip sync --quiet --python $(BIN)/python requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: lint compiled lint-and-compiled test test-all test-thorough test-matrix test-matrix-brief test-matrix-installed test-matrix-15 test-matrix-16 test-matrix-17 test-matrix-redis
.PHONY: test-system test-system-installed test-hosts test-ui soak lock

# A file is one worker's; tests/plugins/ordered.py has the longest begun first, where xdist would begin with the most tests.
WORKERS ?= 4
PARALLEL = --dist loadfile --no-loadscope-reorder -n $(WORKERS)

# The newest failures first: style, types, wording, layers; then everything else on two workers.
lint: $(INSTALLED)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . && $(BIN)/mypy
	@$(BIN)/python -m tests.docs.wording
	@$(BIN)/lint-imports --no-logo 2>&1 | tail -3

# Every package compiled, every test's assertions rewritten, node's packages: once, beside mypy, which uses one processor.
# In a fresh clone each of the workers would do it.
compiled: $(INSTALLED)
	@tests/node/install
	@log=$$(mktemp) && trap 'rm -f "$$log"' EXIT && $(BIN)/python -m pytest --collect-only -q >"$$log" 2>&1 \
	  || { tail -50 "$$log"; exit 1; }

lint-and-compiled: $(INSTALLED)
	@$(MAKE) --no-print-directory -j2 lint compiled

# The newcomer's proof and the developer's loop: each runbook, and a seeded failure of each promise. One lab is enough
# for it (tests/plugins/lab_workers.py).
test: lint-and-compiled
	@OPS_TEST_LABS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not system and not soak and not thorough"
	@echo "make test-all also runs the $$(wc -l <tests/thorough.txt) more expensive tests of tests/thorough.txt"

# What CI proves with the servers of the lab, in one run, whose files share two labs; test-matrix and test-system are the
# rest. The long files, which are begun first, mostly wait: hence more workers.
test-all: WORKERS = 6
test-all: lint-and-compiled
	@OPS_TEST_LABS=2 $(BIN)/python -m pytest $(PARALLEL) -m "not system and not soak"

test-thorough: $(INSTALLED)
	@tests/node/install
	@OPS_TEST_LABS=2 $(BIN)/python -m pytest $(PARALLEL) -m "thorough and not system and not soak" \
	  $$(cut -d: -f1 tests/thorough.txt | sort -u)

# The database chapter on the other majors that are still supported (and 15), from wheels; the Redis chapter on Redis 8.
# What no major changes (stores, deaths, Alembic's states and drivers) runs once, in make test; migrations here on 15 only.
# 15 and 18 are tested whole; of 16 and 17, which lie between them, the core: backup, restore, recovery to a moment.
CORE := tests/matrix tests/tasks/postgres/test_definitions.py tests/tasks/postgres/test_rowhash.py
RESTORES := $(patsubst %,tests/database/%.py,backup/test_backup backup/test_base_backup restore/test_restore)
POINT := tests/recovery/point/test_point_in_time.py
MATRIX_15 := $(CORE) tests/database $(POINT)
MATRIX_16 := $(CORE) $(RESTORES) $(POINT) $(patsubst %,tests/database/%.py,\
  restore/test_tables server/test_vacuum backup/test_verify_and_prune)
MATRIX_17 := $(MATRIX_16)
ONCE := $(patsubst %,--ignore=tests/database/%.py,test_killed_server backup/test_write_load backup/test_stores \
  backup/test_memory backup/test_copies backup/test_waiting migrations/test_migrations_states \
  migrations/test_migrations_elsewhere migrations/test_migrations_create)
ONCE_REDIS := $(patsubst %,--ignore=tests/redis/%.py,cache/test_cache_meanwhile memory/test_memory_scale \
  settings/test_overrides test_refusals)
# PostgreSQL has incremental base backups from 17 on.
INCREMENTAL := $(patsubst %,--deselect=$(POINT)::%,test_incremental_backups_stand_on_each_other \
  test_base_backups_go_by_chain_and_none_on_which_another_stands)
ONCE_15 := $(ONCE) $(INCREMENTAL)
ONCE_16 := $(INCREMENTAL)
# Of these, what backups and restores stand on: CI, which has 45 minutes, runs it after `make test`.
BRIEF := $(CORE) $(RESTORES) $(POINT)
BRIEF_REDIS := $(patsubst %,tests/redis/%.py,restore/test_restore backup/test_aof_backup backup/test_persistence \
  backup/test_verification)
MATRIX_REDIS := tests/redis tests/recovery/redis/test_redis_failover.py
CASES := not system and not soak
CASES_15 = $(CASES)
CASES_16 = $(CASES)
CASES_17 = $(CASES)
FEW := $(CASES) and not thorough

test-matrix: test-matrix-15 test-matrix-16 test-matrix-17 test-matrix-redis

test-matrix-brief:
	@$(MAKE) --no-print-directory test-matrix MATRIX_15="$(BRIEF)" MATRIX_16="$(BRIEF)" MATRIX_17="$(BRIEF)" \
	  MATRIX_REDIS="$(BRIEF_REDIS)" CASES_16="$(FEW)" CASES_17="$(FEW)" WORKERS=2

test-matrix-installed: $(INSTALLED)
	@$(BIN)/python -m tests.matrix.versions

test-matrix-15 test-matrix-16 test-matrix-17: test-matrix-%: test-matrix-installed
	@OPS_TEST_POSTGRES=$* $(BIN)/python -m pytest $(MATRIX_$*) $(PARALLEL) -m "$(CASES_$*)" -k "not killed" $(ONCE_$*)

test-matrix-redis: $(INSTALLED)
	@tests/matrix/install-redis
	@OPS_TEST_REDIS=8 $(BIN)/python -m pytest $(MATRIX_REDIS) $(PARALLEL) -m "$(CASES)" -k "not killed" $(ONCE_REDIS)

# The browser has a run of its own, so a Prefect server of its own: it shows the deployments of one lab. Both mostly
# wait: `make -j2 test-system` runs them beside each other.
test-system: test-hosts test-ui

test-system-installed: $(INSTALLED)
	@tests/system/install
	@tests/node/install

test-hosts: test-system-installed
	@$(BIN)/python -m pytest $(PARALLEL) -n 2 -m "system and not soak" \
	  $$(grep -rl "mark.system" tests --include="test_*.py" | grep -v ^tests/ui/)

test-ui: test-system-installed
	@$(BIN)/python -m pytest -m system tests/ui

# What is marked soak, at the test or in tests/soak.txt; the system's as root, after the others.
soak: $(INSTALLED)
	@tests/node/install
	@$(BIN)/python -m pytest $(PARALLEL) -n 2 --timeout 1500 -m "soak and not system"
	@tests/system/install
	@$(BIN)/python -m pytest --timeout 1500 -m "soak and system" tests/system

# Hashes, no addresses: the lock names packages, not where they come from. Production's is a part of it.
lock:
	@$(UV) pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --output-file requirements.lock
	@$(UV) pip compile pyproject.toml --quiet --extra production --universal --python-version 3.11 \
	  --constraint requirements.lock --generate-hashes --no-emit-index-url --no-header --no-annotate \
	  --output-file deployments/requirements.lock
