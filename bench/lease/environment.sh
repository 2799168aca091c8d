# Sourced by run.sh and cli.sh.
case "${1:-}" in
  full) export DEADLINE=${DEADLINE:-400} END=${END:-470} ;;
  tiny) export DEADLINE=${DEADLINE:-1500} END=${END:-1800} ;;
  *) echo "usage: bash $0 full|tiny" >&2; exit 2 ;;
esac
export OUT=$(realpath -m "${OUT:-/tmp/tsdsr-lease-results}")   # figures and logs
export WORK=$(realpath -m "${WORK:-/tmp/tsdsr-lease}")         # the random model; both scripts share it
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=$PWD:$PWD/bench:$PWD/tests/support:${PYTHONPATH:-}
export PYTHONUNBUFFERED=1 TQDM_DISABLE=1
mkdir -p "$OUT" "$WORK"
