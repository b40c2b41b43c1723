# The README's commands. Each does its own set-up: a fresh machine needs Python 3.11 or newer.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports, and keeps it; pip would compile all of torch and transformers first.
INSTALL := $(BIN)/pip install --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE
# MODEL=... works as QWENVL_MODEL=... does.
ifdef MODEL
export QWENVL_MODEL := $(MODEL)
endif

.PHONY: run test test-all test-gpu check format bench bench-gpu demo clean

run: $(VENV)/runtime
	$(BIN)/gunicorn -c config/gunicorn.conf.py --bind $(HOST):$(PORT) wsgi:app

# Everything but what repeats a proof for longer or in more variants; four, as they often wait.
test: $(VENV)/dev
	$(BIN)/python -m pytest -n 4 --dist worksteal -m "not slow"

# The slow ones compute, and hold more memory.
test-all: $(VENV)/dev
	$(BIN)/python -m pytest -n 3 --dist worksteal

# What needs a GPU. Where torch sees none nothing is collected, which counts as a failure.
test-gpu: $(VENV)/dev
	$(BIN)/python -m pytest tests/gpu -m gpu

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Ours beside the replaced service, generate and PEERS (benchmarks/peers.md), in under 25 minutes, into
# benchmarks/RESULTS.md: make bench PEERS="llama-server=http://127.0.0.1:8081,http://127.0.0.1:8082"
# BENCH=--quick takes a few minutes; python -m benchmarks.serving --help has the rest.
bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.serving --peers $(PEERS) $(BENCH)

# All that a GPU can tell, in nine minutes, into gpu.json; it needs no more than the service does.
bench-gpu: $(VENV)/runtime
	$(BIN)/python -m benchmarks.gpu

# Train the embedded model again, into demo/out: about two hours on two cores.
demo: $(VENV)/dev
	$(BIN)/python -m demo.train

clean:
	rm -rf $(VENV) demo/out

$(VENV)/created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
# Python 3.11 brings a pip that takes twice as long to find out what to install.
	$(INSTALL) pip==26.3
	touch $@

$(VENV)/runtime: $(VENV)/created requirements.txt
	$(INSTALL) -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/created requirements.txt requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@ $(VENV)/runtime
