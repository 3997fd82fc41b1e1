#!/usr/bin/env bash
# launch/tpu_vm.sh NAME ZONE -m experiments.compress --out=gs-or-nfs-folder
# The same command on all hosts of a Cloud TPU slice; the checkout must be there, in ~/kvjax, with
# its environment: gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#   --command='git clone URL kvjax && cd kvjax && make setup && .venv/bin/pip install "jax[tpu]"'
set -euo pipefail
[ $# -ge 3 ] || { sed -n 2,5p "$0" >&2; exit 2; }
name=$1 zone=$2
shift 2
command="cd ${KVJAX_FOLDER:-kvjax} && unset TPU_SKIP_MDS_QUERY JAX_PLATFORMS && \
KVJAX_DISTRIBUTED=auto .venv/bin/python $(printf '%q ' "$@")"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
