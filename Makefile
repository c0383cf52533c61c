# make demo               the whole way from raw text to a scored program, on this machine, offline
# make 150m GPUS=4        the paper's run, step by step; or make 400m (make -n 150m shows the steps)
# make test               the test suite
# Stopped, each goes on. Each makes .venv first; PYTHON=python3.12 chooses the interpreter.
# make clean-demo         deletes data/demo* and out-demo*
PYTHON ?= python3
GPUS ?= 1
UNSAFE ?=
# UNSAFE=--unsafe: run a model's programs with your own rights, where the kernel gives no sandbox
RUN = .venv/bin/python
RANKS = .venv/bin/torchrun --standalone --nproc_per_node=$(GPUS)

.PHONY: demo 150m 400m test clean-demo

demo: .venv/ready
	@$(RUN) -m config._preflight $@ "$(GPUS)" $(UNSAFE)
	@$(RUN) -c "import time; print(time.time())" > .venv/demo-start
	$(RUN) prepare.py config/demo.py
	$(RUN) train.py config/demo.py
	$(RUN) lintseq.py config/demo.py
	$(RUN) prepare.py config/demo_programs.py
	$(RUN) train.py config/demo_programs.py
	$(RUN) prepare.py config/demo_edits.py
	$(RUN) train.py config/demo_edits.py
	$(RUN) evaluate.py config/demo.py --init_from=out-demo,out-demo-programs,out-demo-edits --edit_retries=0,2 $(UNSAFE)
	$(RUN) sample.py config/demo_edits.py < /dev/null
	@$(RUN) -m config._demo_pictures && $(RUN) train.py --plot=out-demo-eval/loss.png \
		out-demo/log.jsonl out-demo-programs/log.jsonl out-demo-edits/log.jsonl || true
	@$(RUN) -c "import time; print(f'make demo: {(time.time() - float(open(\".venv/demo-start\").read())) / 60:.1f} min')"

150m 400m: .venv/ready-real
	@$(RUN) -m config._preflight $@ "$(GPUS)" $(UNSAFE)
	$(RUN) prepare.py config/$@.py
	$(RANKS) train.py config/$@.py
	$(RUN) prepare.py config/finetune_$@.py --form=
	$(RUN) lintseq.py config/finetune_$@.py
	$(RUN) prepare.py config/finetune_$@.py
	$(RANKS) train.py config/finetune_$@.py
	$(RUN) prepare.py config/finetune_$@_programs.py
	$(RANKS) train.py config/finetune_$@_programs.py
	$(RANKS) evaluate.py config/finetune_$@.py --init_from=out-$@-edits,out-$@-programs $(UNSAFE)
	$(RANKS) evaluate.py config/finetune_$@.py --init_from=out-$@-edits,out-$@-programs --benchmark=mbppplus $(UNSAFE)
	$(RUN) prepare.py --export=out-$@-edits

test: .venv/ready-dev
	$(RUN) -m pytest -q tests

clean-demo:
	rm -rf data/demo* out-demo*

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	@touch $@

.venv/ready-real: .venv/ready
	$(RUN) -m pip install -q pyarrow safetensors huggingface_hub tokenizers
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(RUN) -m pip install -q -r requirements-dev.txt
	@touch $@
