#!/bin/bash
# Start or continue a run on whole nodes: sbatch docs/slurm.sh RUN --preset NAME --data.root PATH ...
# RUN is the run directory, on a file system that all nodes share. See docs/cluster.md.
#SBATCH --job-name=cjepa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -u
run=$1
shift
if compgen -G "$run/checkpoints/step-*" > /dev/null; then
    arguments=(--resume "$run")
else
    arguments=(--run.dir "$run" "$@")
fi
before=$(cat "$run/run_state.json" 2> /dev/null)
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun passes on only the signals listed here: without USR1 in the list, USR1 would end torchrun alone and orphan its
# processes. torch 2.11 has no --shutdown-timeout: leave it out there, and a checkpoint must fit in 30 s with
# run.log_every steps.
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node gpu \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 110 \
    -m cjepa_fast.train "${arguments[@]}"
code=$? # 1 after a signal, even if the checkpoint is complete
# A job that fails before its first step leaves the state of the previous job. So requeue only if the state has changed,
# or the job would be queued without end.
if [ "$before" != "$(cat "$run/run_state.json")" ] && grep -q '"status": "preempted"' "$run/run_state.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
