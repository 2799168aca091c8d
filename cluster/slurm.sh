#!/usr/bin/env bash
# Trains on several nodes under SLURM, one task per GPU, and goes on by itself after a preemption or a failed node.
#
#   sbatch cluster/slurm.sh --pretrained_model_name_or_path sd3 --data_dir prepared --output_dir runs/tsdsr FLAGS...
#
# TSDSR names another script: TSDSR=train/teacher.py. PYTHON names the interpreter.
#SBATCH --job-name=tsdsr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Again after a preemption or a failed node; the checkpoint says where to continue.
#SBATCH --requeue
# Two minutes before the time is over, so that the run can save.
#SBATCH --signal=TERM@120
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
python=${PYTHON:-}
[[ -n $python ]] || { [[ -x .venv/bin/python ]] && python=.venv/bin/python || python=python3; }
script=${TSDSR:-train/distill.py}

# Lets the adapters' gradients travel while the rest of the backward pass computes.
export XLA_FLAGS="${XLA_FLAGS:-} ${TSDSR_XLA_FLAGS:---xla_gpu_enable_latency_hiding_scheduler=true}"

newest() { ls -d "$output"/checkpoint_* 2>/dev/null | tail -n 1; }
output=runs/slurm-$SLURM_JOB_ID
for ((i = 1; i <= $#; i++)); do
  case "${!i}" in
    --output_dir) i=$((i + 1)) && output=${!i:-} ;;
    --output_dir=*) output=${!i#*=} ;;
  esac
done
before=$(newest)

srun "$python" "$script" --output_dir "$output" --resume_from_checkpoint latest "$@"
status=$?

# 143: stopped by the signal above, after saving. 75: another task or its node failed. 137: a task was killed, perhaps because
# memory ran out; then only once more for each new checkpoint. Anything else is an error to look at.
again=no
case "$status" in
  75 | 143) again=yes ;;
  134 | 137) [[ $(newest) != "$before" ]] && again=yes ;;
esac
if [[ $again == yes && ${SLURM_RESTART_COUNT:-0} -lt ${TSDSR_RESTARTS:-100} ]]; then
  echo "status $status: requeuing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
