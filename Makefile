# Each target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo smoke test quality style docs clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(INSTALLED)

demo: $(INSTALLED)  ## the main job on real digits, written to outputs/digits; overview.png shows it
	$(BIN)/python examples/digits.py

smoke: $(INSTALLED)  ## every part of the runs on ImageNet and on prompts, on random weights
	$(BIN)/accelerate launch --cpu --num_processes 1 examples/sit_imagenet.py --config examples/configs/sit_s_smoke.yaml
	$(BIN)/accelerate launch --cpu --num_processes 1 examples/sit_imagenet.py --config examples/configs/dit_smoke.yaml
	$(BIN)/python examples/tiny_sd3.py outputs/tiny-sd3
	$(BIN)/trl-distreward train --config examples/configs/sd3_smoke.yaml

test: $(INSTALLED)  ## the default test suite, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

quality: $(INSTALLED)  ## linter, formatter and type checker, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED)  ## mends what the linter and formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## the documentation's site, written to site
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist site *.egg-info
