# The everyday commands of mmtransformer; `make help` lists them.
# They need Python 3.11 or newer (with its venv module), make, and a C compiler. Everything else is
# installed into .venv, at the versions and with the hashes that are pinned: in requirements.txt what users
# need, in requirements-dev.txt what tests and checks need besides.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# Left behind by a set-up that was interrupted: the next one then starts from an empty .venv.
UNFINISHED := $(VENV)/.unfinished

# The interpreter that .venv is made with: the first of these that runs, is new enough and can make a
# virtual environment. Say `make PYTHON=/path/to/python setup` to choose another.
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	"$$python" -c '$(SUITABLE)' >/dev/null 2>&1 && echo "$$python" && break; done)

# uv installs only what is pinned, whatever other places this machine would look in: a CPU-only
# torch from a folder of wheels, for example, cannot be combined with the published torchvision.
unexport UV_FIND_LINKS UV_EXTRA_INDEX_URL UV_INDEX UV_TORCH_BACKEND UV_CONFIG_FILE UV_CONSTRAINT UV_OVERRIDE
# Nor may packages from outside .venv be seen.
unexport PYTHONPATH PYTHONHOME
export UV_HTTP_TIMEOUT ?= 180
export UV_NO_PROGRESS ?= 1
UV := $(BIN)/uv --no-config pip
# uv reads no pip configuration; a package mirror that pip is told of replaces the default index for both.
MIRROR = $${UV_DEFAULT_INDEX:-$${UV_INDEX_URL:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}}}

# One test process a core, one thread each: faster than one process with many threads.
JOBS ?= $(shell $(BIN)/python -c 'import os; print(min(8, os.cpu_count()))' 2>/dev/null)
ARGS ?=

.PHONY: help caption test bench bench-gpu lint format setup setup-dev lock clean
.DEFAULT_GOAL := help

help:  ## List these commands.
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1	\2/p' Makefile | expand -t 18

caption: setup  ## Train the captioner of recipes/caption_scenes.yaml, score it and draw its gallery.
	@$(BIN)/mmt fit --config recipes/caption_scenes.yaml $(ARGS)

test: $(DEV_STAMP)  ## Run all tests. ARGS="-k vit" passes arguments on to pytest.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

bench: $(DEV_STAMP)  ## Measure this CPU beside the peers, in parts that go on. ARGS="--quick" takes 12 minutes.
	@OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/run.py $(ARGS)

bench-gpu: $(DEV_STAMP)  ## Measure this GPU, in parts of at most 8 minutes that go on; results are appended.
	@$(BIN)/python tests/benchmarks/bench_gpu.py $(ARGS)

lint: $(DEV_STAMP)  ## Check style and types.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright

format: $(DEV_STAMP)  ## Rewrite the code in the house style.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# A stamp holds the folder that .venv was made in: programs in .venv do not survive being moved.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

# Makes .venv hold what these files pin, and the package itself.
define INSTALL
export UV_DEFAULT_INDEX="$(MIRROR)"; test -n "$$UV_DEFAULT_INDEX" || unset UV_DEFAULT_INDEX; \
	$(UV) sync --quiet --python $(BIN)/python --no-build --require-hashes --compile-bytecode $(1) \
	&& $(UV) install --quiet --python $(BIN)/python --no-deps --no-build-isolation --offline --editable .
endef

setup: $(STAMP)  ## Make .venv and install what users need. The other commands do this themselves.

setup-dev: $(DEV_STAMP)  ## Install what tests and checks need besides.

$(STAMP): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(SUITABLE)' || { \
		echo "No suitable Python was found$(if $(PYTHON), ($(PYTHON) is not)). mmtransformer needs Python 3.11 or newer with its venv module" >&2; \
		echo "(on Debian and Ubuntu: apt install python3-venv). To name one: make PYTHON=/path/to/python3.11 setup" >&2; exit 1; }
	@rm -f $(STAMP)
	@# A .venv that does not run, was moved here from elsewhere or was left half made is made anew.
	@test ! -e $(UNFINISHED) && $(BIN)/python -m pip --version >/dev/null 2>&1 \
		&& grep -qsF "$(CURDIR)/$(VENV)" $(VENV)/pyvenv.cfg \
		|| { echo "Making $(VENV) with $(PYTHON)" && "$(PYTHON)" -m venv --clear $(VENV); }
	@touch $(UNFINISHED)
	@awk '/^[^ ]/ { keep = /^uv==/ } keep' requirements.txt > $(VENV)/uv.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r $(VENV)/uv.txt
	@echo "Installing the pinned packages (the first time, about 3 GB are downloaded)"
	@$(call INSTALL,requirements.txt $(if $(wildcard $(DEV_STAMP)),requirements-dev.txt))
	@rm -f $(UNFINISHED)
	@echo "$(CURDIR)" > $(STAMP)

$(DEV_STAMP): $(STAMP) requirements-dev.txt
	@echo "Installing what tests and checks need besides"
	@$(call INSTALL,requirements.txt requirements-dev.txt)
	@touch $(DEV_STAMP)

COMPILE = $(UV) compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-header --no-annotate --group setup --extra hf --extra lora --extra parquet

lock: setup  ## Pin anew what pyproject.toml asks for. ARGS=--upgrade takes newer versions.
	@$(COMPILE) $(ARGS) pyproject.toml -o requirements.txt
	@cat requirements.txt requirements-dev.txt > $(VENV)/all.txt
	@$(COMPILE) $(ARGS) --extra draw --extra excel --extra heic --extra meteor --extra tensorboard \
		--group dev \
		--constraint requirements.txt pyproject.toml -o $(VENV)/all.txt
	@awk 'NR == FNR { known[$$1] = 1; next } /^[^ ]/ { keep = !($$1 in known) } keep' \
		requirements.txt $(VENV)/all.txt > requirements-dev.txt

clean:  ## Remove what these commands made, except for runs/.
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find mmtransformer tests -name __pycache__ -type d -prune -exec rm -rf {} +
