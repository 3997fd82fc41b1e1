#!/usr/bin/env bash
# launch/xpk.sh WORKLOAD CLUSTER TPU_TYPE IMAGE -m experiments.compress --out=/mounted/folder
# A workload on GKE by xpk (JobSet and Kueue below). IMAGE: from launch/Dockerfile. Restarted
# workloads go on with the same --out.
set -euo pipefail
[ $# -ge 5 ] || { sed -n 2,4p "$0" >&2; exit 2; }
workload=$1 cluster=$2 type=$3 image=$4
shift 4
exec xpk workload create --workload "$workload" --cluster "$cluster" --tpu-type "$type" \
  --num-slices "${SLICES:-1}" --max-restarts "${RESTARTS:-50}" --docker-image "$image" \
  --command "KVJAX_DISTRIBUTED=auto python $(printf '%q ' "$@")"
