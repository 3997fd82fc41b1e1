#!/usr/bin/env bash
# launch/openmpi.sh HOSTFILE PROCESSES -m experiments.compress --out=results/x
# Open MPI only: JAX reads OMPI_* and the launcher's address. mpirun ends all when one fails.
set -euo pipefail
[ $# -ge 3 ] || { sed -n 2,3p "$0" >&2; exit 2; }
hosts=$1 processes=$2
shift 2
unset TPU_SKIP_MDS_QUERY
exec mpirun --hostfile "$hosts" -np "$processes" --tag-output \
  -x PATH -x PYTHONPATH="${PYTHONPATH:-.}" -x JAX_PLATFORMS \
  "${PYTHON:-.venv/bin/python}" "$@"
