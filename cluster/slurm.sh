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

# --kill-on-bad-exit: a task that is gone ends the step. Each says why before.
srun --kill-on-bad-exit=1 "$python" "$script" --resume_from_checkpoint latest "$@"
status=$?

# 143: stopped by the signal above, after saving. 75: another task or its node failed. Anything else is an error to look at.
if ((status == 143 || status == 75)) && [[ ${SLURM_RESTART_COUNT:-0} -lt ${TSDSR_RESTARTS:-100} ]]; then
  echo "status $status: requeuing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
