# Everything starts here. Needs make, Python 3.11 to 3.13 and its venv; `make serve` and `make test` set up the rest on
# their first run: as root, or with a sudo that asks no password, the system's packages too.
SHELL := /bin/sh
# Each worker and each server of the tests would compile every module again: 10 s of CPU time a worker.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
BIN := .venv/bin
SOURCES := service triton_models build_engines benchmarks tests scripts examples deploy
# One worker runs the tests that start servers, the others the rest: tests/support/workers.py.
WORKERS ?= 2
# It runs what failed once more, alone.
PYTEST := $(BIN)/python -m tests.support.again -n $(WORKERS) --no-loadscope-reorder

.PHONY: help serve test test-stack up down check format eval bench bench-versus train repository proto settings dashboards mutants clean

help: ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

serve: ready-to-serve ## set up, then serve on port 8080 until Ctrl-C
	@exec $(BIN)/glimpse serve

test: style ## set up, then the style gate and every test
	@$(MAKE) --no-print-directory --jobs 2 every-test types GENTLY="nice -n 19"

# Types take a minute of one core if nothing is cached. Beside the tests they take what these leave.
.PHONY: every-test style types
every-test:
	$(PYTEST)

test-stack: ready-to-develop ## build the images and test the stack under a real Docker engine (as root; 5 to 8 minutes)
	$(BIN)/python scripts/test_stack.py $(STACK)

up: ready-to-compose readable-mounts .env ## build and start the whole stack with Docker Compose: http://127.0.0.1:8080, Grafana on 3000
	OTLP_ENDPOINT=http://collector:4317 docker compose --profile full up --build --detach --wait

down: ready-to-compose ## stop and remove it; what Prometheus and Grafana stored stays
	docker compose --profile full --profile gpu --profile simple down

.PHONY: ready-to-compose
ready-to-compose:
	@docker compose version >/dev/null 2>&1 || { echo "This needs Docker and its Compose plugin, 2.24 or newer: https://docs.docker.com/engine/install"; exit 1; }

# What docker-compose.yml mounts, for users of their own in the containers.
MOUNTED := $(addprefix deploy/,envoy prometheus alertmanager traces grafana/provisioning grafana/dashboards)
.PHONY: readable-mounts
readable-mounts:
	@closed=$$(find $(MOUNTED) \( -type d ! -perm -o=rx -o ! -type d ! -perm -o=r \) | head -n 1); test -z "$$closed" || \
	  { echo "Containers run under other users, which cannot read $$closed: run chmod -R a+rX $(MOUNTED)"; exit 1; }

SECRET = $$(od -An -N18 -tx1 /dev/urandom | tr -d ' \n')
.env:
	@umask 077 && sed -e "s/^REDIS_PASSWORD=$$/&$(SECRET)/" -e "s/^GRAFANA_PASSWORD=$$/&$(SECRET)/" .env.example > .env
	@echo "  wrote .env with random passwords"

quick: ready-to-develop ## the style gate and every test that starts no server and takes no seconds (a minute and a half)
	@$(MAKE) --no-print-directory --jobs 6 --output-sync=target $(QUICK_PARTS) check

# Plain processes: pytest-xdist would collect every test in each worker and pass on every report. Many tests wait, so more
# processes than cores pay, of one thread each. Only quick-builder imports PyTorch, which takes longer than its tests.
QUICK_PARTS := quick-http quick-gateway quick-media quick-builder quick-edges
QUICK := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not servers and not slow" --hypothesis-profile quick
.PHONY: quick $(QUICK_PARTS)
quick-http:
	$(QUICK) tests/service/edges/http
quick-edges:
	$(QUICK) tests/service/edges --ignore tests/service/edges/http
quick-media:
	$(QUICK) tests/service/media tests/service/cli
quick-builder:
	$(QUICK) tests/build_engines tests/benchmarks
quick-gateway:
	$(QUICK) $(foreach part,service/edges service/media service/cli build_engines benchmarks,--ignore tests/$(part))

check: style types ## the style gate: format, lint, types, import layers

style: ready-to-develop
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: ready-to-develop
	$(GENTLY) $(BIN)/mypy
	$(GENTLY) $(BIN)/lint-imports

format: ready-to-develop ## format and mend what ruff can
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

eval: ready-to-serve ## accuracy of the served chain on the committed scenes (needs a running server)
	$(BIN)/glimpse eval

bench: ready-to-serve ## latency and throughput of the served chain (a minute; starts a service of its own)
	$(BIN)/python -m benchmarks.latency

bench-versus: ready-to-bench ## the service under load beside other servers, on a model of real proportions (a quarter of an hour)
	$(BIN)/glimpse bench --scenario versus --model base

train: ready-to-build ## train the reference model from nothing into runs/reference; goes on where it was killed
	$(BIN)/glimpse train --out runs/reference --resume

repository: ready-to-build ## export reference/ into model_repository/
	$(BIN)/python -m build_engines.export reference --out model_repository

proto: ready-to-develop ## write the gRPC stubs in service/edges/grpc/stubs from the proto
	$(BIN)/python scripts/write_stubs.py

settings: ready-to-develop ## write docs/settings.md from service/settings.py
	$(BIN)/python scripts/write_settings.py

dashboards: ready-to-develop ## write Grafana's dashboards from deploy/grafana/content.py
	$(BIN)/python -m deploy.grafana

mutants: ready-to-develop ## plant small faults one at a time and list those that no test notices (hours; ONLY="triton_models.sampling*")
	$(BIN)/python scripts/mutants.py $(ONLY)

clean: ## remove the environment and what was built; training runs stay
	rm -rf .venv build logs mutants *.egg-info

.PHONY: ready-to-serve ready-to-build ready-to-bench ready-to-develop
ready-to-serve ready-to-build ready-to-bench ready-to-develop:
	@command -v $(PYTHON) >/dev/null || { echo "Glimpse needs Python 3.11 to 3.13: sudo apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) scripts/set_up.py $(@:ready-to-%=%)
