# make demo   install, then run the whole chain on the embedded default
# make test   install (Slurm from Debian when root and absent), then run all tests
# make quick  the tests that start no process: no Slurm, no torch.distributed; under a minute
# make peers  our losses and adapters beside TRL's and peft's own functions; installs these first (15 seconds)
# make docs   the pages that are made from the code, then the site into build/docs; a dead link fails
# make gpu-test [PYTHON=python3]   everything that a GPU can test, in under five minutes; with PYTHON nothing is installed
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test quick gpu-test peers lint docs setup slurm browser lock
demo: setup
	$(BIN)/python -m launcher submit full-pipeline --recipe bloom-tiny --wait

test: setup slurm browser
	$(BIN)/python -m pytest -n 2

quick: setup
	$(BIN)/python -m pytest -n 2 -m quick tests

# With PYTHON given, that Python's own torch and packages; else the virtual environment's.
GIVEN := $(filter command environment override,$(firstword $(origin PYTHON)))
gpu-test: $(if $(GIVEN),,setup)
	CONVOY_GPU=1 $(if $(GIVEN),$(PYTHON),$(BIN)/python) -m pytest -n 0 -p no:cacheprovider --durations 15 tests/gpu tests/kernels

# Their requirements contradict our pins, so they go into a folder of their own. TRL 0.11.4 is the last whose PPO has the loss as methods.
PEERS := build/peers
peers: setup $(PEERS)/.installed
	PYTHONPATH=$(PEERS) $(BIN)/python -m pytest -n 2 tests/training/test_losses_trl.py tests/training/models/test_lora.py

$(PEERS)/.installed: Makefile
	@echo "setup: TRL and peft into $(PEERS)"
	rm -rf $(PEERS)
	$(BIN)/python -m pip install --quiet --no-deps --target $(PEERS) trl==0.11.4 datasets==3.6.0 tyro==0.9.35 accelerate==1.15.0 \
		peft==0.21.2 pyarrow pandas requests dill multiprocess xxhash docstring_parser shtab typeguard python-dateutil six urllib3 \
		idna certifi charset-normalizer
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/python docs/reference.py --check

docs: setup
	$(BIN)/python docs/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "docs: open build/docs/index.html"

# Installed again only when what to install has changed.
setup: $(VENV)/.installed
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "setup: Python packages of constraints.txt into $(VENV)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v < (3, 13) else f"Python {v.major}.{v.minor} is not supported: set PYTHON to one of 3.10, 3.11, 3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,docs]'
	@touch $@

# The tests of the launcher run on a real Slurm; Debian's and Ubuntu's packages are enough, nothing of the system's is configured.
slurm:
	@if command -v sbatch >/dev/null && command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then \
		echo "setup: Slurm is installed"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "setup: Slurm from the distribution's packages"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; \
	else \
		echo "setup: no Slurm here and no right to install it: its tests will be skipped (apt-get install slurmctld slurmd slurm-client munge)"; \
	fi

# The report is tested in a real browser; without one that test is skipped.
browser:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then \
		echo "setup: a browser is installed"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "setup: Chromium from the distribution's packages"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
			|| echo "setup: no Chromium to be had: the report's test in a browser will be skipped"; \
	else \
		echo "setup: no browser here: the report's test in one will be skipped (apt-get install chromium)"; \
	fi

# Resolve constraints.txt anew for Python 3.10 to 3.12.
lock:
	$(BIN)/python -m pip install --quiet uv
	echo 'torch==2.13.0' > $(VENV)/torch.txt
	$(BIN)/uv pip compile setup.cfg --extra test --extra docs --universal --python-version 3.10 --constraint $(VENV)/torch.txt \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet --output-file $(VENV)/resolved.txt
	{ echo "# Versions that this release is tested with (make lock). torch's own CUDA packages are left to torch; triton is the one it wants."; \
	  grep -vE '^(nvidia-|cuda-)' $(VENV)/resolved.txt; } > constraints.txt
