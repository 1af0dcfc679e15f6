# Everything a newcomer needs: `make demo` to see it, `make up` to use it, `make test` to trust it.
PYTHON := .venv/bin/python
export PORT ?= 8000
# Where it is set, each process that a test starts would compile all of our modules anew.
unexport PYTHONDONTWRITEBYTECODE
# Tests that compute, start no VM or process and have no time to keep: they run beside the others,
# in what these leave of the machine.
PATIENT := tests/disks/test_qcow2.py $(filter-out \
	%_claims.py %_events.py %_metrics.py %_mounted.py %_operations.py %_put_back.py %_servers.py \
	%_waiting.py, \
	$(wildcard tests/test_*.py tests/api/test_*.py tests/schedules/test_*.py))

# The tests of whole stacks mostly wait for their guests, and so does half of the rest: side by side.
STACKS := tests/system tests/bench tests/embedded

.PHONY: help setup demo test test-deployment test-guests faults year lint up down bench lock clean
.DEFAULT_GOAL := help

help:            ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 26

setup:           ## Install what is missing: system packages and the virtual environment
	@scripts/setup

demo: setup      ## Do the main job on a real VM built for it; KEEP=1 leaves it running
	@$(PYTHON) -m lab.demo $(if $(KEEP),--keep)

test:            ## Run the tests, a fault at each point included; ARGS="-k name" for some
	@scripts/setup tests
	@$(if $(ARGS),$(PYTHON) -m pytest $(ARGS),scripts/side-by-side \
		"$(PYTHON) -m pytest $(STACKS)" \
		"$(PYTHON) -m pytest $(patsubst %,--ignore=%, \
			tests/compose tests/faults tests/guests $(STACKS) $(PATIENT))" \
		"nice -n 19 $(PYTHON) -m pytest --timeout=900 $(PATIENT)")
	@$(if $(ARGS),,$(MAKE) --no-print-directory faults PART=1)

test-deployment: ## Run the tests of the deployment by docker compose, faults of minutes included
	@scripts/setup tests
	@$(if $(ARGS),$(PYTHON) -m pytest tests/compose $(ARGS),scripts/side-by-side \
		"$(PYTHON) -m pytest tests/compose/test_deployment_faults.py" \
		"$(PYTHON) -m pytest tests/compose --ignore=tests/compose/test_deployment_faults.py")

test-guests:     ## Run the tests on real Debian guests; many minutes without KVM
	@scripts/setup tests
	@$(PYTHON) -m pytest tests/guests $(ARGS)

faults:          ## Walk all points of all operations with faults (40 min); PART=1 each point once
	@scripts/setup tests
	@rm -rf .cache/faults
	@$(if $(PART),,TRIPTYCH_FAULTS_ALL=1) $(if $(ARGS),$(PYTHON) -m pytest tests/faults $(ARGS), \
		TRIPTYCH_FAULTS_OUTCOMES=.cache/faults scripts/side-by-side \
		$(foreach share,1 2,"env TRIPTYCH_FAULTS_SHARE=$(share) $(PYTHON) -m pytest tests/faults"); \
		walked=$$?; $(PYTHON) tests/faults/outcomes.py .cache/faults && exit $$walked)

year:            ## Simulate a year of 1,000 servers' schedules, with outages
	@scripts/setup tests
	@TRIPTYCH_YEAR_WHOLE=1 $(PYTHON) -m pytest tests/schedules/test_year.py -s $(ARGS)

lint: setup      ## ruff, mypy and the import contracts
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports

up: setup        ## Start Triptych for this machine's libvirt on 127.0.0.1:$(PORT)
	@$(PYTHON) -m embedded up

down:            ## Stop it again; VMs, copies and database stay
	@$(PYTHON) -m embedded down

bench:           ## Measure ours and its peers; ONLY=image,revert runs parts
	@scripts/setup tests
	@$(PYTHON) -m bench $(if $(ONLY),--only $(ONLY))

lock:            ## Pin dependencies anew (needs uv)
	@scripts/lock

clean:           ## Remove the virtual environment and caches
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
