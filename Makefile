# Needs Python 3.11 or later, make and git. Everything else is installed into .venv, .venv-sam and .venv-endpoint.
.DEFAULT_GOAL := help
SHELL := /bin/sh

PYTHON ?= python3
# The stack that deploy, secret, admin and logs work on. Empty REGION: the region of the AWS profile.
STACK ?= img2img
REGION ?=
# Passed on: make test ARGS="tests/unit -k fetch", make run ARGS="--port 3100", make demo ARGS="photo.heic 'in winter'",
# make admin ARGS="credits add acme 100".
ARGS ?=
# What `model` uploads, below which prefix, and whether with its safety checker (on).
MODEL ?=
BUCKET ?=
URI ?= $(if $(BUCKET),s3://$(BUCKET)/models/)
SAFETY_CHECKER ?= off
# Where `endpoint-image` pushes to. A tag is never pushed twice: the stack would not see that its image has changed.
REPOSITORY ?= img2img-endpoint
TAG ?= $(shell date -u +%Y%m%d-%H%M%S)
# One more than two cores: many tests wait for processes and threads of their own.
WORKERS ?= 3
SAM_VERSION := 1.170.0

PY := .venv/bin/python
ENDPOINT_PY := .venv-endpoint/bin/python
export SAM := $(CURDIR)/.venv-sam/bin/sam
export SAM_CLI_TELEMETRY := 0
export PYTHONPATH := layers/core/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# One file for each set of packages, newer than the lists it was installed from.
RUN := .venv/.run
DEV := .venv/.dev
ENDPOINT_RUN := .venv-endpoint/.run
ENDPOINT_DEV := .venv-endpoint/.dev
MUTANTS := .venv-mutants/.run
SAM_CLI := .venv-sam/.sam-$(SAM_VERSION)

# Without MAKEFLAGS: a PYTHON given to this make would reach the layer's and win over ours, which has pip.
SAM_BUILD = MAKEFLAGS= PYTHON=$(CURDIR)/$(PY) $(SAM) build

in_region = $(if $(REGION),--region $(REGION))
# The operator's command line.
OPERATE = $(PY) -m img2img --stack $(STACK) $(in_region)

.PHONY: help install install-endpoint run demo test test-endpoint test-long coverage mutants lint build deploy secret check-segmind model endpoint-image admin logs bench bench-endpoint clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(DEV) $(SAM_CLI) ## Install all tools into .venv and .venv-sam; the other targets do it as needed

install-endpoint: $(ENDPOINT_DEV) ## The same for the endpoint's container, into .venv-endpoint

run: $(RUN) $(if $(filter sagemaker auto,$(BACKEND)),$(ENDPOINT_RUN)) ## Run the whole system on this machine: http://127.0.0.1:3000/v1 (SEGMIND_API_KEY=... for the real Segmind; BACKEND=sagemaker|auto with MODEL=FOLDER_OR_HUB_NAME and SAGEMAKER_INVOCATION=realtime; ARGS="--port 3100")
	@$(PY) -m local run $(ARGS)

demo: $(RUN) ## Turn events/sample.jpg, or ARGS="image prompt", into a new picture
	@$(PY) -m local demo $(ARGS)

test: $(DEV) $(SAM_CLI) ## Run the tests; ARGS="tests/unit -k name" picks some
	$(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-endpoint: $(ENDPOINT_DEV) ## Run the tests of the SageMaker endpoint's container; ARGS="-k name" picks some
	$(ENDPOINT_PY) -m pytest -n $(WORKERS) --dist loadfile tests/endpoint $(ARGS)

test-long: ## Run all tests at length: every place of the fault walks, ten times the random examples
	LONG=1 $(MAKE) test test-endpoint

coverage: $(DEV) $(SAM_CLI) ## Run the tests and say which lines and branches they miss
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term:skip-covered --cov-report=json:out/coverage.json $(ARGS)

mutants: $(DEV) $(MUTANTS) ## Show what the fault walks of `make test` miss and those of `make test-long` see: ARGS="--count 120 --seed 11"
	.venv-mutants/bin/python -m tests.mutants $(ARGS)

lint: $(DEV) ## Check style, types and the template
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/cfn-lint template.yaml

build: $(DEV) $(SAM_CLI) ## Build what is deployed, and check it
	$(SAM_BUILD)
	$(PY) -m pytest tests/build

deploy: $(DEV) $(SAM_CLI) ## Deploy to AWS; asks for the parameters the first time
	$(SAM_BUILD)
	$(SAM) deploy --stack-name $(STACK) $(in_region) --no-fail-on-empty-changeset $(if $(wildcard samconfig.toml),,--guided)

secret: $(RUN) ## Store the Segmind key of a deployed stack; asks for it, or reads it from a pipe
	@$(OPERATE) secret

check-segmind: $(RUN) ## Send the sample photo to Segmind's APIs with your own key, and look at what comes back: ARGS="v1 v2"
	@$(OPERATE) check-segmind $(ARGS)

model: $(RUN) $(ENDPOINT_RUN) ## Convert a model for the endpoint and put it into S3: MODEL=FOLDER_OR_HUB_NAME BUCKET=NAME (or URI=s3://BUCKET/PREFIX/), SAFETY_CHECKER=on
	@test -n "$(MODEL)" && test -n "$(URI)" || { echo "make model MODEL=FOLDER_OR_HUB_NAME BUCKET=NAME" >&2; exit 2; }
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && trap 'exit 130' INT TERM && \
	$(ENDPOINT_PY) -m endpoint.weights $(if $(filter on,$(SAFETY_CHECKER)),--safety-checker) "$(MODEL)" "$$folder" && \
	$(OPERATE) model "$$folder" "$(URI)"

endpoint-image: $(RUN) ## Build the endpoint's image with Docker and push it to ECR (REPOSITORY=img2img-endpoint)
	@$(OPERATE) image "$(REPOSITORY)" "$(TAG)"

admin: $(RUN) ## Manage teams, keys and credits of a deployed stack: ARGS="team create acme"; ARGS=--help lists the commands
	@$(OPERATE) $(ARGS)

logs: $(SAM_CLI) ## Follow the logs of a deployed stack
	$(SAM) logs --stack-name $(STACK) $(in_region) --tail

bench: $(DEV) ## Measure against floors taken in the same run
	@$(PY) -m tests.bench

bench-endpoint: $(ENDPOINT_DEV) ## Measure the endpoint against diffusers: ARGS="--seconds 540 --json FILE"
	@TRANSFORMERS_VERBOSITY=error $(ENDPOINT_PY) -m tests.endpoint.bench $(ARGS)

clean: ## Remove everything that was installed, built or cached
	rm -rf .venv .venv-sam .venv-endpoint .venv-mutants .aws-sam .local .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find endpoint events functions layers local tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python .venv-sam/bin/python .venv-endpoint/bin/python .venv-mutants/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, for example: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(firstword $(subst /, ,$@))

$(RUN): layers/dependencies/requirements.txt local/requirements.txt | .venv/bin/python
	$(PY) -m pip install --quiet $(addprefix -r ,$^)
	@touch $@

$(DEV): tests/requirements.txt $(RUN)
	$(PY) -m pip install --quiet -r layers/dependencies/requirements.txt -r local/requirements.txt -r tests/requirements.txt
	@touch $@

# PyPI's torch brings gigabytes of CUDA along. Where pip is also offered a CPU build (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS
# in the environment), it takes that one: 2.13.0+cpu is the later version.
$(ENDPOINT_RUN): endpoint/requirements.txt | .venv-endpoint/bin/python
	$(ENDPOINT_PY) -m pip install --quiet -r $<
	@touch $@

$(ENDPOINT_DEV): tests/endpoint/requirements.txt $(ENDPOINT_RUN)
	$(ENDPOINT_PY) -m pip install --quiet -r endpoint/requirements.txt -r $<
	@touch $@

$(MUTANTS): tests/mutants/requirements.txt | .venv-mutants/bin/python
	.venv-mutants/bin/python -m pip install --quiet -r $<
	@touch $@

# On its own: SAM CLI pins packages that the tests have in other versions.
$(SAM_CLI): | .venv-sam/bin/python
	.venv-sam/bin/python -m pip install --quiet aws-sam-cli==$(SAM_VERSION)
	@touch $@
