#!/bin/bash
@directives@

# Slurm sends SIGTERM before it ends a job: training saves, and this script waits for that.
trap : TERM

# What `python -m launch status` shows where no training process was there to say more.
failed() {
    printf '{"class": "infrastructure", "reason": "%s: see log.txt", "time": %s, "job": "%s"}\n' \
        "$1" "$(date +%s)" "$SLURM_JOB_ID" >@folder@/host-failure.json
}
echo "--- $(date '+%Y-%m-%d %H:%M:%S') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restarts: ${SLURM_RESTART_COUNT:-0}"

@exports@
@setup@
# A process that ends does not end the others at once: they may be saving.
srun @srun@ \
    @command@
code=$?

# A job that Slurm itself ends is not RUNNING any more: it was cancelled, or comes back without this.
if [ "$code" != 0 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    if [ "$code" = @preempted@ ]; then # asked to end, and saved
        scontrol requeue "$SLURM_JOB_ID"
    elif ! grep -qsF "\"job\": \"$SLURM_JOB_ID\"" @folder@/exit.json @folder@/attempts/*.json; then
        failed "srun ended with code $code before training began"
    fi
fi
exit "$code"
