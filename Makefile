# make demo   plays a bag into the real pose node; needs no ROS installation and no torch (.venv-demo, < 400 MB)
# make test   linters, type checker and every test (.venv, with torch; two small ones with OpenCV 4.5 and 4.6)
# make lint, make test-opencv, make bench, make clean
#
# PYTHON=python3.11          the interpreter the environments are made from (3.10 to 3.12)
# TORCH_INDEX_URL=https://…  another package index for torch, such as one with CPU or CUDA builds
# DEMO_ARGS, TEST_ARGS       more arguments for the demo and for pytest

PYTHON ?= python3
TORCH_INDEX_URL ?=
DEMO_ARGS ?=
TEST_ARGS ?=
export TORCH_INDEX_URL

.NOTPARALLEL:
.PHONY: help demo test lint test-opencv bench clean env-demo env-test env-opencv python

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

demo: env-demo
	.venv-demo/bin/python -m ukd_ros demo $(DEMO_ARGS)

# A file at a time on each of two cores; with TEST_ARGS, what they ask for and nothing beside it.
test: env-test env-opencv lint
	.venv/bin/python -m pytest $(if $(strip $(TEST_ARGS)),$(TEST_ARGS),--numprocesses 2 --dist loadfile)

lint: env-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check --quiet .
	.venv/bin/mypy

test-opencv: env-test env-opencv
	.venv/bin/python -m pytest test/perception/test_opencv_versions.py

bench: env-test
	.venv/bin/python -m ukd_ros bench latency

env-demo: python
	@$(PYTHON) tools/environment.py demo

env-test: python
	@$(PYTHON) tools/environment.py test

env-opencv: python
	@$(PYTHON) tools/environment.py opencv-4.5
	@$(PYTHON) tools/environment.py opencv-4.6

python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "ukd_ros: $(PYTHON) is not installed: 'sudo apt-get install python3 python3-venv', or name another with 'make PYTHON=...'." >&2; exit 1; }

clean:
	rm -rf .venv .venv-demo .venv-opencv-4.5 .venv-opencv-4.6 demo_out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find ukd_ros test tools benchmarks launch -name __pycache__ -type d -prune -exec rm -rf {} +
