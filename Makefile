# Two commands do everything on a fresh machine (Python >= 3.10 with venv, and a network for the first install):
#   make demo   record bags of a simulated UR10e, train ACT on them, let the policy do its task in closed loop
#   make test   all tests and linters
# and one for those who want to see how far it goes:
#   make proof  most of an hour: more data, light and camera varied, 500 scenes, also under disturbances
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PY := .venv/bin/python
UV := $(shell command -v uv || echo .uv/bin/uv)
DEMO_EPISODES ?= 300
DEMO_ROLLOUTS := --checkpoint outputs/demo --episodes 200 --output outputs/demo-rollouts --gif outputs/demo.gif
DEMO_GATE ?= # for example --min-success 0.9: below it the demo fails
PROOF_TRAINING := data.bag_dir=outputs/proof-bags data.cache_dir=outputs/proof-cache training.output_dir=outputs/proof \
	training.steps=8000 training.save_freq=4000
PROOF_ROLLOUTS := --checkpoint outputs/proof --episodes 500 --robustness --min-success 0.98 --max-blind 0.1 \
	--output outputs/proof-rollouts
TESTS ?= tests
LEROBOT_06_PYTHON ?= 3.12 # or newer: a version, which uv gets where it is not there, or the path of a python

.PHONY: demo proof test test-lerobot-0.6 system-tools lint constraints clean

demo: .venv/installed-trainer
	@echo "== 1/3 sample bags of a simulated UR10e (about a minute, once)"
	@$(PY) -m sim.record --out outputs/demo-bags --episodes $(DEMO_EPISODES) --seed 1 --storage mcap \
		--height 120 --width 160
	@echo "== 2/3 training ACT on them (about 4 minutes on 2 cores)"
	@echo "   python train.py --config sim/demo.yaml --overwrite"
	@$(PY) train.py --config sim/demo.yaml --overwrite
	@echo "== 3/3 the policy drives the simulated arm, on 200 scenes that no recording has"
	@echo "   python -m sim.rollout $(DEMO_ROLLOUTS) $(DEMO_GATE)"
	@$(PY) -m sim.rollout $(DEMO_ROLLOUTS) $(DEMO_GATE)

proof: .venv/installed-trainer
	@echo "== 1/3 800 sample bags, each with a light and a camera pose of its own (about 3 minutes, once)"
	@$(PY) -m sim.record --out outputs/proof-bags --episodes 800 --seed 1 --storage mcap --height 120 --width 160 --varied
	@echo "== 2/3 training ACT on them (about half an hour on 2 cores)"
	@echo "   python train.py --config sim/demo.yaml --overwrite $(PROOF_TRAINING:%=--override %)"
	@$(PY) train.py --config sim/demo.yaml --overwrite $(PROOF_TRAINING:%=--override %)
	@echo "== 3/3 the policy drives the simulated arm, on 500 scenes that no recording has, undisturbed and disturbed"
	@echo "   python -m sim.rollout $(PROOF_ROLLOUTS)"
	@$(PY) -m sim.rollout $(PROOF_ROLLOUTS)

# A part of them: make test TESTS=tests/test_train.py; without the containers, which take a third of the time:
# make test TESTS="tests --ignore=tests/test_osmo_images.py"
test: .venv/installed-all .venv-lerobot-0.4.4/installed .venv-mlflow/installed .ros2/installed .node/installed \
		system-tools lint
	@$(PY) -m pytest -n 2 --dist loadgroup $(TESTS)

# The newest LeRobot needs Python 3.12 or newer; uv gets one where there is none.
test-lerobot-0.6: .venv/installed-all .venv-lerobot-0.6/installed
	@$(PY) -m tests.with_lerobot .venv-lerobot-0.6/bin/python

lint: .venv/installed-all
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/ty check
	@.venv/bin/shellcheck .ci/run osmo/*.sh
	@.venv/bin/hadolint osmo/Dockerfile osmo/Dockerfile.eval

# -- environments: made once, made again when a pin changes ------------------------------------------------------

.uv/bin/uv:
	@echo "== installing uv into .uv"
	@python3 -m venv .uv || (echo "error: python3 has no venv module; Debian: apt-get install python3-venv" >&2; exit 1)
	@.uv/bin/pip install --quiet uv

.venv/installed-trainer: constraints.txt pyproject.toml | $(filter .uv/bin/uv,$(UV))
	@echo "== installing the trainer into .venv (about a minute; 5 GB, most of it torch's CUDA libraries)"
	@test -x $(PY) || $(UV) venv --quiet .venv
	@$(UV) pip install --quiet --python $(PY) -c constraints.txt -r pyproject.toml --extra plots pyarrow av
	@$(UV) pip install --quiet --python $(PY) --no-deps -e .
	@touch $@

.venv/installed-all: .venv/installed-trainer
	@echo "== installing what the tests need into .venv (lerobot 0.3.2, wandb, linters)"
	@$(UV) pip install --quiet --python $(PY) -c constraints.txt -r pyproject.toml --all-extras
	@touch $@

.venv-lerobot-0.4.4/installed: constraints-lerobot-0.4.4.txt | $(filter .uv/bin/uv,$(UV))
	@echo "== installing lerobot 0.4.4 into .venv-lerobot-0.4.4, for the parity tests (about a minute)"
	@test -x .venv-lerobot-0.4.4/bin/python || $(UV) venv --quiet .venv-lerobot-0.4.4
	@$(UV) pip install --quiet --python .venv-lerobot-0.4.4/bin/python -c constraints-lerobot-0.4.4.txt lerobot==0.4.4
	@touch $@

.venv-lerobot-0.6/installed: constraints-lerobot-0.6.1.txt | $(filter .uv/bin/uv,$(UV))
	@echo "== installing lerobot 0.6.1 into .venv-lerobot-0.6 (some minutes; 6 GB, most of it torch's CUDA libraries)"
	@test -x .venv-lerobot-0.6/bin/python || $(UV) venv --quiet --python $(LEROBOT_06_PYTHON) .venv-lerobot-0.6
	@$(UV) pip install --quiet --python .venv-lerobot-0.6/bin/python -c constraints-lerobot-0.6.1.txt \
		'lerobot[training]==0.6.1' rosbags
	@touch $@

# Its own environment, because the server asks for other versions than the trainer, which needs the client alone.
.venv-mlflow/installed: constraints-mlflow.txt | $(filter .uv/bin/uv,$(UV))
	@echo "== installing an MLflow server into .venv-mlflow, for the tests of the tracker"
	@test -x .venv-mlflow/bin/python || $(UV) venv --quiet .venv-mlflow
	@$(UV) pip install --quiet --python .venv-mlflow/bin/python -c constraints-mlflow.txt 'mlflow[auth]'
	@touch $@

# rclpy without ROS, for the tests of --robot ros2: wheels beside .venv, of which nothing is installed twice, since the
# pins leave out what .venv has. They are built for Python 3.11 on x86-64 alone.
.ros2/installed: constraints-ros2.txt .venv/installed-trainer
	@$(PY) -c 'import platform, sys; sys.exit(sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64")' || { \
		echo "note: ROS 2's wheels are for Python 3.11 on x86-64 alone: tests of --robot ros2 will be skipped"; exit 0; }; \
	echo "== installing ROS 2's Python client into .ros2, for the tests of --robot ros2"; \
	rm -rf .ros2; \
	$(UV) pip install --quiet --python $(PY) --target .ros2 --no-deps -r constraints-ros2.txt; \
	touch $@

# Azurite, a Blob server, and azcopy: for the tests of osmo/download-blob.sh.
.node/installed: | system-tools
	@mkdir -p .node/bin && echo '*' >.node/.gitignore
	@command -v npm >/dev/null || { echo "note: no npm here: tests against a Blob server will be skipped"; exit 0; }; \
	echo "== installing Azurite and azcopy into .node"; \
	npm install --prefix .node --no-audit --no-fund --loglevel=error azurite@3.35.0 @azure-tools/azcopy-linux@10.32.2; \
	chmod +x .node/node_modules/@azure-tools/azcopy-linux/dist/bin/azcopy_linux_amd64; \
	ln -sf ../node_modules/.bin/azurite-blob .node/bin/azurite-blob; \
	ln -sf ../node_modules/@azure-tools/azcopy-linux/dist/bin/azcopy_linux_amd64 .node/bin/azcopy; \
	touch $@

# Debian packages for the tests of osmo/ (network namespaces, containers, azcopy's library, npm). Only root can install
# and use them; anybody else's tests skip, and say so.
system-tools:
	@missing=$$(for tool in buildah podman runc mmdebstrap npm; do command -v $$tool >/dev/null || echo $$tool; done; \
		command -v ip >/dev/null || echo iproute2; \
		ldconfig -p | grep libsecret-1.so.0 >/dev/null || echo libsecret-1-0); \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "== installing Debian packages for the tests of osmo/:" $$missing; \
		apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			$$missing >/dev/null; \
	else \
		echo "note: not root on Debian: without" $$missing "some tests of osmo/ will be skipped"; \
	fi

# What rclpy's wheels ask for and .venv has, or what only their building needs (empy, lark-parser).
IN_VENV := numpy pyyaml typing-extensions setuptools empy lark-parser

# Pins for Python 3.10 and up, without any index's host name. torch and torchvision go together.
constraints: | $(filter .uv/bin/uv,$(UV))
	$(UV) pip compile --quiet --universal --python-version 3.10 --no-emit-index-url --no-header --no-annotate \
		--all-extras --upgrade-package torch==2.13.0 --upgrade-package torchvision==0.28.0 -o constraints.txt pyproject.toml
	echo lerobot==0.4.4 | $(UV) pip compile --quiet --universal --python-version 3.10 --no-emit-index-url --no-header \
		--no-annotate - -o constraints-lerobot-0.4.4.txt
	printf '%s\n' 'lerobot[training]==0.6.1' rosbags torch==2.10.0 torchvision==0.25.0 | $(UV) pip compile --quiet \
		--universal --python-version 3.12 --no-emit-index-url --no-header --no-annotate - -o constraints-lerobot-0.6.1.txt
	echo 'mlflow[auth]' | $(UV) pip compile --quiet --universal --python-version 3.10 --no-emit-index-url --no-header \
		--no-annotate - -o constraints-mlflow.txt
	printf 'ros-kilted-%s\n' rclpy rmw-fastrtps-cpp sensor-msgs std-msgs std-srvs trajectory-msgs | $(UV) pip compile \
		--quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-index-url --no-header \
		--no-annotate $(IN_VENV:%=--no-emit-package %) - -o constraints-ros2.txt

clean:
	rm -rf .venv .venv-lerobot-0.4.4 .venv-lerobot-0.6 .venv-mlflow .ros2 .uv .node outputs
