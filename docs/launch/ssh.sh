#!/usr/bin/env bash
# bash ssh.sh "host1 host2" -m comfyui_deltaconv.cli distill --config distill.yaml
# Runs torchrun on every host, in this folder's path, which all of them must have. PROCESSES per
# host (default: its GPUs), PORT of the first host, PYTHON and COMFYUI_PATH count on all of them.
set -euo pipefail

read -ra hosts <<<"$1"
shift
arguments=$(printf '%q ' "$@")
environment=""
[ -z "${COMFYUI_PATH:-}" ] || environment="COMFYUI_PATH=$(printf '%q' "$COMFYUI_PATH") "

started=()
# A terminal that goes away ends what runs in it: the processes save first.
trap 'kill "${started[@]}" 2>/dev/null || true' INT TERM
for number in "${!hosts[@]}"; do
    "${SSH:-ssh}" -tt "${hosts[$number]}" "cd $(printf '%q' "$PWD") && $environment${PYTHON:-python3} \
        -m torch.distributed.run --nnodes ${#hosts[@]} --node-rank $number \
        --nproc-per-node ${PROCESSES:-gpu} --master-addr ${hosts[0]} \
        --master-port ${PORT:-29500} $arguments" </dev/null &
    started+=($!)
done
failed=0
for process in "${started[@]}"; do
    wait "$process" || failed=1
done
exit "$failed"
