# Every target makes .venv and installs everything into it by pip first, if that is not done yet.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=
RUN     = .venv/bin/
READY   = .venv/installed

help:            ## Say what the targets do.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo "PYTHON=$(PYTHON) makes .venv, TORCH=$(TORCH) is installed first, ARGS go to the command."
demo: $(READY)   ## Sample, run layers on the RTL, compare, draw: build/demo.
	$(RUN)sqdm demo --out build/demo $(ARGS)
test: $(READY)   ## Run the tests that take less than 20 minutes in all.
	PYTHONWARNINGS=error $(RUN)python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)
test-full: $(READY)  ## Run all tests.
	PYTHONWARNINGS=error $(RUN)python -m pytest -n auto --dist worksteal $(ARGS)
bench: $(READY)  ## Measure the array on the cycle model, and the tools: build/bench.
	$(RUN)sqdm bench --out build/bench $(ARGS)
verilog: $(READY)  ## Write the Verilog of the preset small: build/verilog.
	$(RUN)sqdm generate --preset small --out build/verilog $(ARGS)
fpga: $(READY)   ## Build a bitstream for ULX3S-85F: build/fpga.
	$(RUN)sqdm fpga --board ulx3s-85f --preset tiny --out build/fpga $(ARGS)
lint: $(READY)   ## Check the code's style, and the generated tables in docs/.
	$(RUN)ruff check --ignore-noqa .
	$(RUN)python -m tests.docs_check
clean:           ## Delete build/, trained models in it included.
	rm -rf build

$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "sqdm needs python3 >= 3.11 with venv: install it, or name it: make PYTHON=..."; exit 1; }
	@$(PYTHON) .ci/preflight.py
	$(PYTHON) -m venv .venv
	$(RUN)pip install --quiet "$(TORCH)"
	$(RUN)pip install --quiet -e ".[test]"
	touch $@

.PHONY: help demo test test-full bench verilog fpga lint clean
