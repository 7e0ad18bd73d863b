# Needs Python 3.11 or later, make and git. Everything else is installed into .venv and .venv-sam.
.DEFAULT_GOAL := help
SHELL := /bin/sh

PYTHON ?= python3
# The stack that deploy, secret, admin and logs work on. Empty REGION: the region of the AWS profile.
STACK ?= img2img
REGION ?=
# Passed on: make test ARGS="tests/unit -k fetch", make run ARGS="--port 3100", make demo ARGS="photo.heic 'in winter'",
# make admin ARGS="credits add acme 100".
ARGS ?=
WORKERS ?= 2
SAM_VERSION := 1.170.0

PY := .venv/bin/python
export SAM := $(CURDIR)/.venv-sam/bin/sam
export SAM_CLI_TELEMETRY := 0
export PYTHONPATH := layers/core/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# One file for each set of packages, newer than the lists it was installed from.
RUN := .venv/.run
DEV := .venv/.dev
SAM_CLI := .venv-sam/.sam-$(SAM_VERSION)

# Without MAKEFLAGS: a PYTHON given to this make would reach the layer's and win over ours, which has pip.
SAM_BUILD = MAKEFLAGS= PYTHON=$(CURDIR)/$(PY) $(SAM) build

in_region = $(if $(REGION),--region $(REGION))

.PHONY: help install run demo test lint build deploy secret admin logs bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(DEV) $(SAM_CLI) ## Install all tools into .venv and .venv-sam; the other targets do it as needed

run: $(RUN) ## Run the whole system on this machine: http://127.0.0.1:3000/v1 (SEGMIND_API_KEY=... for the real backend, ARGS="--port 3100")
	@$(PY) -m local run $(ARGS)

demo: $(RUN) ## Turn events/sample.jpg, or ARGS="image prompt", into a new picture
	@$(PY) -m local demo $(ARGS)

test: $(DEV) $(SAM_CLI) ## Run the tests; ARGS="tests/unit -k name" picks some
	$(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

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
	@$(PY) -c "$$STORE_SECRET" "$(STACK)" "$(REGION)"

admin: $(RUN) ## Manage teams, keys and credits of a deployed stack: ARGS="team create acme"; ARGS=--help lists the commands
	@$(PY) -m img2img --stack $(STACK) $(in_region) $(ARGS)

logs: $(SAM_CLI) ## Follow the logs of a deployed stack
	$(SAM) logs --stack-name $(STACK) $(in_region) --tail

bench: $(DEV) ## Measure against floors taken in the same run
	@$(PY) -m tests.bench

clean: ## Remove everything that was installed, built or cached
	rm -rf .venv .venv-sam .aws-sam .local .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find events functions layers local tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python .venv-sam/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, for example: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(firstword $(subst /, ,$@))

$(RUN): layers/dependencies/requirements.txt local/requirements.txt | .venv/bin/python
	$(PY) -m pip install --quiet $(addprefix -r ,$^)
	@touch $@

$(DEV): tests/requirements.txt $(RUN)
	$(PY) -m pip install --quiet -r layers/dependencies/requirements.txt -r local/requirements.txt -r tests/requirements.txt
	@touch $@

# On its own: SAM CLI pins packages that the tests have in other versions.
$(SAM_CLI): | .venv-sam/bin/python
	.venv-sam/bin/python -m pip install --quiet aws-sam-cli==$(SAM_VERSION)
	@touch $@

# The key never stands on a command line, where `ps` would show it.
define STORE_SECRET
import getpass, sys, boto3
stack, region = sys.argv[1], sys.argv[2] or None
session = boto3.Session(region_name=region)
found = session.client("cloudformation").describe_stack_resource(StackName=stack, LogicalResourceId="SegmindSecret")
secret = found["StackResourceDetail"]["PhysicalResourceId"]
key = (getpass.getpass("Segmind API key: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
if not key:
    sys.exit("No key, nothing stored")
session.client("secretsmanager").put_secret_value(SecretId=secret, SecretString=key)
print("Stored; running workers pick it up with their next job, within five minutes at most")
endef
export STORE_SECRET
