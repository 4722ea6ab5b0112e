# make run    build everything and start the daemon (its own PostgreSQL in ./data)
# make test   build everything and run all tests
# make levels get the databases that make test does not bring along (TimescaleDB), if this machine can
# make image  build the container's image as tests run it, if this machine can
# make clients get the clients of the venue that tests use, in an environment of their own
# make install [DESTDIR=] [PYTHON=] [WHEEL=]   install it on this host as a systemd service
# make demo   the daemon against the simulated exchange, with a proof at the end
# make bench  every figure of README.md
# make instructions   count the machine instructions of parse and encode, and keep them (valgrind)
# make peers  get what bench-peers compares tradecore with, in environments of their own
# make bench-peers  the same load through tradecore and through what one would use in its place
# make bench-report [FULL=1]   what grows with symbols, streams, rows and time: docs/scaling.md anew
# make torture [ROUNDS=100] [SEED=1] [FAULTS=kill9,reset,mixed]   break everything, again and again
# make pythons build, install and test the wheel on each other Python from 3.11 on: of pyenv, of PATH,
#              and 3.14 of Debian in a folder, if this machine can
# make sanitize  the extensions' tests under the sanitizers of addresses and undefined behaviour
# make fuzz [SECONDS=40]   search, guided by coverage, for bytes that the extensions read wrong
# make requirements   pin what the image installs to what is newest now, with hashes
# make docs   docs/metrics.md and docs/settings.md from the tables in the code
# make lint   ruff, mypy, cython-lint and bandit, without the tests
#
# TRADECORE_DEBUG=1 builds the extensions with bounds checks and assertions.
# PYTHON=python3.13 chooses the interpreter of a new .venv.

VENV := .venv
PY := $(VENV)/bin/python
MODE := $(if $(filter 1,$(TRADECORE_DEBUG)),debug,release)
BUILT := $(VENV)/.built-$(MODE)
SOURCES := $(shell find tradecore -name '*.pyx' -o -name '*.pxd')

.PHONY: run test levels image clients install demo bench bench-report instructions peers bench-peers torture pythons sanitize fuzz requirements docs lint venv clean
.NOTPARALLEL:

run: venv
	@exec $(VENV)/bin/tradecore run

test: venv levels clients image
	$(PY) -m pytest -n auto --maxprocesses=4 --dist worksteal

# What this machine cannot have is said here, and skipped by the tests.
clients: $(VENV)/clients/.installed

$(VENV)/clients/.installed: pyproject.toml tools/clients.sh | venv
	@if sh tools/clients.sh $(VENV)/clients $(PY); then touch $@; fi

levels: venv
	@$(PY) -m tests.levels
	@$(PY) -m tests.machine

image: venv
	@$(PY) -m tests.images

demo: venv
	$(PY) bench/demo.py

bench: venv
	$(PY) bench/run.py

# What this machine cannot have is said, and left out.
peers: venv
	@$(PY) -m tools.peers

bench-peers: peers
	$(PY) bench/bench_peers.py

instructions: venv
	$(PY) bench/instructions.py --keep

bench-report: venv
	@$(PY) -c 'import matplotlib' 2>/dev/null || $(PY) -m tools.extra report
	$(PY) bench/report.py $(if $(FULL),--full)

install:
	@DESTDIR="$(DESTDIR)" PYTHON="$(PYTHON)" WHEEL="$(WHEEL)" sh deploy/systemd/install.sh

torture: venv
	$(PY) -m tests.torture --rounds $(or $(ROUNDS),100) $(if $(SEED),--seed $(SEED)) \
		$(if $(FAULTS),--faults $(FAULTS))

pythons: venv
	$(PY) -m tests.pythons
	@$(PY) -m tests.debian_python

sanitize: venv
	$(PY) -m tests.instrumented sanitize

fuzz: venv
	$(PY) -m tests.instrumented fuzz $(or $(SECONDS),40)

requirements: venv
	sh tools/requirements.sh $(VENV)/bin

docs: venv
	$(PY) -m tools.docs

lint: venv
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	PATH=$(VENV)/bin:$$PATH cython-lint tradecore
	$(PY) -m bandit -qr -c pyproject.toml tradecore setup.py

venv: $(BUILT)

$(VENV)/.installed: pyproject.toml setup.py tools/venv.sh
	@sh tools/venv.sh $(VENV)
	@touch $@ $(BUILT)

# Compiles what has changed; the other kind of build is thrown away as a whole.
$(BUILT): $(VENV)/.installed $(SOURCES)
	@for other in $(filter-out $@,$(wildcard $(VENV)/.built-*)); do rm -rf build $$other; done
	@$(PY) setup.py --quiet build_ext --inplace $$([ -e $@ ] || echo --force)
	@touch $@

clean:
	rm -rf $(VENV) build bench/peers/build *.egg-info
	find tradecore bench -name '*.so' -delete
