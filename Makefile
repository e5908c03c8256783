# Every target sets up what it needs: a virtual environment (VENV=… moves it) with the tested versions.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := runs/digits

.PHONY: help demo test test-long lint house docs bench bench-quick clean

help:
	@echo "make demo       train a small CLIP on real handwriting, evaluate it, and write a report"
	@echo "make test       the tests (a quarter of an hour on two cores); make test-long for all of every matrix"
	@echo "make lint       formatting, lint, types, order of imports"
	@echo "make docs       the site, in docs/_build: guide, reference, how CLIP works"
	@echo "make house      what a reader of the code sees, in figures: files, lines, knobs"
	@echo "make bench      speed beside open_clip and transformers (under an hour; make bench-quick: minutes)"

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.demo

# CLIP_benchmark can't run with the tested NumPy: an older one lies with it in a folder that only its own process sees.
$(VENV)/.clip_benchmark: tests/clip_benchmark.txt | $(VENV)/.test
	rm -rf $(VENV)/clip_benchmark
	$(BIN)/pip install --no-deps --target $(VENV)/clip_benchmark -r tests/clip_benchmark.txt
	@touch $@

$(VENV)/.webdataset_oldest: tests/webdataset_oldest.txt | $(VENV)/.test
	rm -rf $(VENV)/webdataset_oldest
	$(BIN)/pip install --no-deps --target $(VENV)/webdataset_oldest -r tests/webdataset_oldest.txt
	@touch $@

# The same steps as for data of one's own; each line can be typed by hand.
demo: $(VENV)/.demo
	rm -rf $(DEMO)/data $(DEMO)/report
	$(BIN)/python examples/digits.py $(DEMO)/data
	$(BIN)/miniclip shards $(DEMO)/data/train $(DEMO)/shards/train --overwrite
	$(BIN)/miniclip shards $(DEMO)/data/val $(DEMO)/shards/val --overwrite
	$(BIN)/python train.py fit --config configs/digits.yaml --overwrite true
	$(BIN)/python eval_zeroshot.py --model $(DEMO)/best --out $(DEMO)/report --group-column scan \
	    --data $(DEMO)/data/digits.csv $(DEMO)/data/inks.csv $(DEMO)/data/unseen.csv

# A module stays in one process, for its fixtures; tests/conftest.py has those that take long come first.
IN_TWO := -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0

test: $(VENV)/.test $(VENV)/.clip_benchmark $(VENV)/.webdataset_oldest
	$(BIN)/python -m pytest $(IN_TWO) -m "not long"

test-long: $(VENV)/.test $(VENV)/.clip_benchmark $(VENV)/.webdataset_oldest
	$(BIN)/python -m pytest $(IN_TWO)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -j 2 -W --keep-going docs docs/_build
	@echo "open docs/_build/index.html"

# CHECKOUTS="OLDER ." puts other checkouts beside this one.
house: $(VENV)/.demo
	$(BIN)/python benchmarks/house.py $(CHECKOUTS)

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/packing.py
	if [ -d $(DEMO)/best ]; then $(BIN)/python benchmarks/finetune.py; fi

bench-quick: $(VENV)/.test
	$(BIN)/python benchmarks/run.py --quick

clean:
	rm -rf $(VENV) runs reports .pytest_cache .mypy_cache .ruff_cache build *.egg-info
