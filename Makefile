# `make train` and `make test` are all a newcomer needs: both first make .venv and build the extension. `make` lists the rest.
#
# Environment: PYTHON (3.10 to 3.13; used once, to make .venv), MAX_JOBS (compiler processes), PIP_* (as for pip itself), and
# the variables of setup.py: DK_DETECTION_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST. After a change of those: `make clean`.
# On the command line: CONFIG (what `make train` trains), OP (what `make bench` times), ARGS (passed on to the
# command behind train, test and bench).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
CONFIG ?= configs/mmdet/deformed_shapes/mask-rcnn_r18-dkmdconv-c3-c5_fpn_mdpool_mimic_1k_deformed-shapes.py
OP ?= deform_conv2d
ARGS ?=

export DK_DEFORMED_SHAPES_ROOT ?= data/deformed_shapes
export DK_DEFORMED_SHAPES_CLS_ROOT ?= data/deformed_shapes_cls
export DK_DEFORMED_SHAPES_SEG_ROOT ?= data/deformed_shapes_seg
# What `make train` draws: for configs of MMPretrain images to classify, of MMSegmentation those to segment, for all others
# those to detect in.
DRAWN = $(if $(findstring /mmpretrain/,$(CONFIG)),--task classification --out $(DK_DEFORMED_SHAPES_CLS_ROOT),$\
	$(if $(findstring /mmseg/,$(CONFIG)),--task segmentation --out $(DK_DEFORMED_SHAPES_SEG_ROOT),$\
	--out $(DK_DEFORMED_SHAPES_ROOT)))
WORK_DIR := work_dirs/$(basename $(notdir $(CONFIG)))
BIN := .venv/bin
STAMPS := .venv/stamps
CXX_FILES = $(shell find csrc -type f)

# The version of a package as pinned in pyproject.toml: $(call pin,torch) is torch==2.11.0.
pin = $(shell sed -nE 's/^ *"($(1)==[^";]*).*/\1/p' pyproject.toml)

# One compiler process takes 1 to 3 GB of memory: never more of them than cores.
export MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test test-cuda bench lint format clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*  ## /\1\t/p' Makefile | expand -t 12

setup: $(STAMPS)/extension $(STAMPS)/packages  ## make .venv and build the extension; the other targets do it by themselves

train: setup  ## train and evaluate the small deformable Mask R-CNN, or CONFIG; continues where it was stopped
	$(BIN)/python -m dk_detection.datasets.deformed_shapes $(DRAWN)
	@cpu=$$($(BIN)/python -c "$$CHECK_CUDA" 2>&1 && $(BIN)/python -c "$$CHECK_MMCV_CUDA" 2>&1) || { \
		echo "Training on the CPU: $$cpu."; \
		export CUDA_VISIBLE_DEVICES=; \
	}; \
	exec $(BIN)/python tools/train_net.py --config $(CONFIG) --resume $(ARGS)

test: setup  ## run all tests
	$(BIN)/python -m pytest $(ARGS)

test-cuda: setup  ## run the tests that need a GPU
	@$(BIN)/python -c "$$CHECK_CUDA"
	$(BIN)/python -m pytest -m cuda $(ARGS)

bench: setup  ## time an operator beside its peers: OP=deform_conv2d, deform_kernel_conv2d, deform_roi_pool, kernel_evolution_conv2d
	$(BIN)/python benchmarks/bench_$(OP).py $(ARGS)

lint: setup  ## check the style: Python with ruff, C++ and CUDA with clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: setup  ## bring all sources into that style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove build products, the made data set and the results of `make train`; .venv and all else stay
	rm -rf build *.egg-info dk_detection/_C*.so .pytest_cache .ruff_cache $(STAMPS)/extension data/deformed_shapes data/deformed_shapes_cls data/deformed_shapes_seg $(WORK_DIR)
	find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +

# Set-up. Each step leaves a stamp and is repeated when a file that it depends on changes.

$(STAMPS)/python:
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@command -v $${CXX:-c++} >/dev/null || { echo "There is no C++ compiler: install g++, or say which with CXX." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: pyproject.toml | $(STAMPS)/python
	$(BIN)/python -m pip install "setuptools<82" wheel $(call pin,ninja) $(call pin,torch) $(call pin,torchvision)
	@touch $@

$(STAMPS)/extension: pyproject.toml setup.py $(shell find csrc) | $(STAMPS)/torch
	@echo "Building the extension: a minute or two, with CUDA some more."
	$(BIN)/python -m pip install --no-build-isolation -e .
	@$(BIN)/python -c "import sys; from dk_detection import _extension; \
		_extension.is_available() or sys.exit(str(_extension.missing('make'))); \
		print('The extension is built', 'with CUDA.' if _extension.built_with_cuda() else 'for the CPU only.')"
	@touch $@

# mmcv is built for the GPU where our extension was: a GPU without a fitting toolkit would make its build fail. dk-detection itself
# is installed by now, so that the last pip line only adds what its extras name.
$(STAMPS)/packages: pyproject.toml | $(STAMPS)/extension
	@echo "Installing MMDetection, MMPretrain and MMSegmentation. Unless pip finds a wheel of mmcv it is built from source: 10 to 20 minutes on 2 cores, once."
	@$(BIN)/python -c "$$CHECK_CUDA" 2>/dev/null || export CUDA_VISIBLE_DEVICES=; \
		$(BIN)/python -m pip install --no-build-isolation $(call pin,mmcv)
	$(BIN)/python -m pip install --no-build-isolation "dk-detection[mmdet,classification,segmentation,evaluation,visualization,dev]"
	@$(BIN)/python -c "import cv2" || { echo "OpenCV lacks system libraries: install libgl1 and libglib2.0-0." >&2; exit 1; }
	@touch $@

# Checks that the recipes above make with Python.

define CHECK_PYTHON
import os, sys, sysconfig
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit("Python 3.10 to 3.13 is needed, $(PYTHON) is %d.%d: try `make PYTHON=python3.12 ...`." % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv).")
if not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    sys.exit("$(PYTHON) has no C headers: install its development package (Debian, Ubuntu: python3-dev).")
endef
export CHECK_PYTHON

define CHECK_CUDA
import sys, torch
from dk_detection import _extension
if not torch.cuda.is_available():
    sys.exit("no CUDA device is available")
if not _extension.built_with_cuda():
    sys.exit("the extension was built without CUDA; `make clean` and `DK_DETECTION_CUDA=1 make setup` tells why")
endef
export CHECK_CUDA

define CHECK_MMCV_CUDA
import sys
from mmcv.ops import get_compiling_cuda_version
if get_compiling_cuda_version() == "not available":
    sys.exit("mmcv was built without CUDA")
endef
export CHECK_MMCV_CUDA
