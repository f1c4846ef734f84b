# Two commands for a newcomer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
PY := $(VENV)/bin/python
OUT ?= benchmarks/results
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-lowest bench gpu world install clean

demo: install
	$(PY) -m nitrofusion demo --output runs/demo

test: install
	$(VENV)/bin/ruff check .
	$(PY) -m pytest -q -n auto --dist worksteal

# The same with the lowest versions that pyproject.toml allows, in an environment of their own.
test-lowest:
	mkdir -p build
	$(PYTHON) tools/lowest.py >build/lowest.txt
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=build/lowest.txt

bench: install
	$(PY) -m pytest benchmarks/ --benchmark-only --benchmark-group-by=group --benchmark-json=$(OUT)/cpu.json

# On a machine with an NVIDIA GPU, with the Python that is there and no network: build, tests, benchmarks;
# what they print and write is packed into $$OUT/gpu.tar.gz after each.
gpu:
	PYTHON="$(PYTHON)" OUT="$(OUT)" sh tools/gpu.sh

# The embedded world's weights from nothing, about seven hours on two cores; every line resumes where it stopped.
BUILD := OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc_per_node 2 -m
RUN := $(BUILD) nitrofusion.train --teacher runs/world/teacher
world: install
	$(BUILD) nitrofusion.world.build vae --output runs/world --steps 1600
	$(BUILD) nitrofusion.world.build judge --output runs/world --steps 700
	$(PY) -m nitrofusion.world.build features --output runs/world --steps 1500
	$(BUILD) nitrofusion.world.build teacher --output runs/world --steps 3200
	$(BUILD) nitrofusion.world.build teacher --output runs/world --steps 5500 --restart 3200 --detail --lr_scale 0.6
	$(BUILD) nitrofusion.world.build teacher --output runs/world --steps 8500 --restart 5500 --detail --lr_scale 0.6
	$(RUN) --preset world-start --output runs/world/start-1
	$(RUN) --preset world-start-2 --output runs/world/start-2 --init runs/world/start-1
	$(RUN) --preset world-start-3 --output runs/world/start-3 --init runs/world/start-2 --cache runs/world/samples-3
	$(RUN) --preset world-start-4 --output runs/world/start-4 --init runs/world/start-3 --cache runs/world/samples-3
	$(RUN) --preset world-student --output runs/world/student --init runs/world/start-4
	$(PY) -m nitrofusion.world.ship --world runs/world --start runs/world/start-? --student runs/world/student

install:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" CONSTRAINTS="$(CONSTRAINTS)" sh tools/install.sh

clean:
	rm -rf build *.egg-info nitrokernels/*.so .pytest_cache .ruff_cache .benchmarks
