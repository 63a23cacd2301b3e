#!/usr/bin/env bash
# Real files through the ordinary commands: photographs with class names, spoken digits, Shakespeare.
# bash benchmarks/real_small.sh DIR, where DIR holds cifar10-images.tar, spoken-digits.tar and tinyshakespeare.txt
# (any folders of the same shape do). Writes runs/real; what it reached stands in docs/results.md.
set -euo pipefail
src=${1:?usage: bash benchmarks/real_small.sh DIR}
out=runs/real
mm() { echo "\$ mm $*"; python -m mm "$@"; }

digits=()
for pair in 0=zero 1=one 2=two 3=three 4=four 5=five 6=six 7=seven 8=eight 9=nine; do digits+=(--caption-map "$pair"); done
mm data pack "$src/cifar10-images.tar" --out $out/data/cifar --caption-from parent
mm data pack "$src/spoken-digits.tar" --out $out/data/digits --caption-regex '(?P<text>\d)_' "${digits[@]}"
mm data pack "$src/tinyshakespeare.txt" --out $out/data/shakespeare --val-share 0.1

mm tokenizer train configs/tokenizer/text.yaml --data $out/data/shakespeare --out $out/tokenizers/text tokenizer.vocab_size=1024
OMP_NUM_THREADS=1 mm tokenizer train configs/tokenizer/photos.yaml --data $out/data/cifar --out $out/tokenizers/image &
OMP_NUM_THREADS=1 mm tokenizer train configs/tokenizer/audio.yaml --data $out/data/digits --out $out/tokenizers/audio stages.0.budget.steps=800
wait $!
mm tokenizer eval $out/tokenizers/text --data $out/data/shakespeare --split val --json $out/tokenizers/text/eval.json
mm tokenizer eval $out/tokenizers/image --data $out/data/cifar --out $out/tokenizers/image/eval --json $out/tokenizers/image/eval.json
mm tokenizer eval $out/tokenizers/audio --data $out/data/digits --out $out/tokenizers/audio/eval --json $out/tokenizers/audio/eval.json

mm data pack $out/data/cifar --tokenizers $out/tokenizers --out $out/tokens/cifar
mm data pack $out/data/digits --tokenizers $out/tokenizers --vocabulary $out/tokens/cifar/vocabulary.json --out $out/tokens/digits
mm data pack $out/data/shakespeare --tokenizers $out/tokenizers --vocabulary $out/tokens/digits/vocabulary.json --out $out/tokens/shakespeare

echo "\$ torchrun --standalone --nproc_per_node 2 -m mm train configs/pretrain/real_small.yaml"
OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node 2 -m mm train configs/pretrain/real_small.yaml
mm eval $out --json $out/results.json
mm report $out
