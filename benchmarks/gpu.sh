#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: bash benchmarks/gpu.sh [OUT]
# Kernel tests on the device, tuning (a kernel's first launch at a shape times its configurations), layers at the shapes of
# 2B4T, whole steps of 125m and 700m, and a short real training run. PYTHON chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results/gpu}}
python=${PYTHON:-python3}
mkdir -p "$out"
nvidia-smi | tee "$out/nvidia-smi.txt"
"$python" -m pytest tests/kernels -p no:cacheprovider 2>&1 | tee "$out/kernel-tests.txt"
bench() { # name, overrides
  name=$1; shift
  "$python" -m bitnet_train "$@" command=benchmark run_name="$name" paths.runs="$out/runs" benchmark.profile=true 2>&1 | tee "$out/$name.txt"
}
bench layers-2b4t +recipe=2b4t benchmark.what=layers 'benchmark.tokens=[4096,8192,16384,32768]' \
  'benchmark.shapes=[[2560,3840],[2560,2560],[2560,13824],[6912,2560]]'
step=(trainer.batch_tokens=32768 trainer.micro_batch=8)
bench step-125m +recipe=125m "${step[@]}" 'benchmark.variants=[{name:dw_int8,overrides:["quant.gradient.dw=int8"]},{name:dx_fp8,overrides:["quant.gradient.dx=fp8"]}]'
bench step-700m +recipe=700m "${step[@]}" 'benchmark.variants=[{name:dw_int8,overrides:["quant.gradient.dw=int8"]},{name:dx_fp8,overrides:["quant.gradient.dx=fp8"]}]'
"$python" -m bitnet_train +recipe=tiny run_name=tiny paths.runs="$out/runs" paths.data="$out/data" 2>&1 | tee "$out/tiny.txt"
