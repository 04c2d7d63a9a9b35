#!/bin/bash
# Several nodes under Slurm:   sbatch rethinker/recipes/launch/slurm.sh qwen2_5_vl_72b --run.name stage1
# Shortly before its time is up the job saves the run and queues itself again; the next one goes on from there. After a
# lost rank torchrun starts all ranks again from the newest checkpoint. run.dir must be a folder that all nodes share.
#SBATCH --job-name=rethinker
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -u

recipe=${1:?name a recipe, as qwen2_5_vl_72b}
case " $* " in
*" --run.name "*) shift ;;
*) echo 'error: give --run.name NAME, by which the next job finds the run' >&2; exit 2 ;;
esac

# torchrun's own store would keep the addresses of dead ranks; so each start of the ranks gets a new one.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

stopped=
stop() { # to the ranks alone: torchrun would give them 30 seconds
    stopped=1
    srun --overlap --ntasks-per-node=1 pkill -USR1 -f 'python[^ ]* -u -m rethinker train'
}
trap stop USR1 TERM

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first_node:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m rethinker train "$recipe" --resume auto "$@" &
job=$!
wait "$job"
code=$?
while kill -0 "$job" 2>/dev/null; do # a signal ends `wait` before the job ends
    wait "$job"
    code=$?
done
if [ -n "$stopped" ] && [ "$code" = 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
