# `make demo`: the whole way from raw text to a scored program, on this machine, offline; stopped, it goes on.
# `make test`: the test suite. Both make .venv first. `make PYTHON=python3.12 demo` chooses the interpreter.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test clean-demo

demo: .venv/ready
	@$(RUN) -c "import time; print(time.time())" > .venv/demo-start
	$(RUN) prepare.py config/demo.py
	$(RUN) train.py config/demo.py
	$(RUN) lintseq.py config/demo.py
	$(RUN) prepare.py config/demo_programs.py
	$(RUN) train.py config/demo_programs.py
	$(RUN) prepare.py config/demo_edits.py
	$(RUN) train.py config/demo_edits.py
	$(RUN) evaluate.py config/demo.py
	$(RUN) sample.py config/demo_edits.py
	@$(RUN) -c "import time; print(f'make demo: {(time.time() - float(open(\".venv/demo-start\").read())) / 60:.1f} min')"

test: .venv/ready-dev
	$(RUN) -m pytest -q tests

clean-demo:
	rm -rf data/demo* out-demo*

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(RUN) -m pip install -q -r requirements-dev.txt
	@touch $@
