#!/usr/bin/env bash
# Runs a configuration where there is something to run it on: submits itself to Slurm, trains on this
# machine's GPUs, or prints the plan.
#
#   CONFIG=my_run.yaml bash examples/launch.sh [--dry-run] [key.sub=value ...]
#
# LAUNCH=auto (the default) decides:
#   inside a Slurm job   trains in it: one launcher per node under srun
#   sbatch is there      submits a job that calls this script again
#   GPUs are there       trains on this machine
#   none of these        prints the plan
# LAUNCH=slurm, local or plan says it; local works without a GPU too.
#
# --dry-run prints the job, a complete batch script, with the resolved configuration as a comment.
#
# Variables, with their defaults:
#   CONFIG            the run; overrides follow as arguments
#   NODES=1           nodes of the job
#   NPROC_PER_NODE=8  processes of a node, one per GPU (LAUNCH=local: as many as there are GPUs)
#   GPUS_PER_NODE     GPUs to ask Slurm for (NPROC_PER_NODE); 0 asks for none
#   PARTITION, ACCOUNT, QOS, JOB_NAME     as in sbatch; JOB_NAME is by default the configuration's
#   DEPENDENCY        jobs that must end well before this one begins, as in sbatch: afterok:41
#   NODES_AFTER_PRUNE fewer nodes, once the model is small: the run saves and a job on so many goes on
#   TIME_LIMIT=24:00:00   of one job; the run goes on in the next, see below
#   STOP_BEFORE_S=600     seconds before the limit at which the run saves and requeues itself
#   EXCLUSIVE=1       whole nodes, all of their memory; 0 takes the partition's defaults
#   LOG_DIR=runs/logs     one file a job, JOB_NAME-JOB_ID.log, appended to after a requeue
#   CONTAINER         image to run in; without it .venv, else what is on PATH
#   CONTAINER_RUNTIME=pyxis   or apptainer
#   CONTAINER_MOUNTS  as the runtime takes them; default: this folder under its own name
#   MASTER_ADDR, MASTER_PORT  where the nodes meet (Slurm's address of the first one, a free port)
# sbatch's own SBATCH_* and srun's SLURM_* variables work as everywhere, and everything else that is
# exported (NCCL_*, CUDA_*, OMP_NUM_THREADS) reaches the processes as it is; docs/running_at_scale.md
# says what train itself sets where nobody has.
#
# A job that is told to stop (SIGUSR1 from Slurm before the limit, SIGTERM at preemption, a signal
# from you: scancel --signal=USR1 JOB) finishes its step, saves, ends with status 75, and is requeued.
# Any other failure is not tried again. A run goes on wherever its run_dir's last checkpoint is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STOPPED=75     # exit status of a run that a signal stopped before its end
FEWER_NODES=76 # of one that is to go on on NODES_AFTER_PRUNE nodes

fail() {
    echo "launch: $*" >&2
    exit 2
}

say() { echo "launch: $*" >&2; }

# ---- settings -------------------------------------------------------------------------------------

whole_number() { # NAME LEAST
    if [[ ! ${!1} =~ ^[0-9]{1,12}$ ]] || ((10#${!1} < $2)); then
        fail "$1 is '${!1}'; it must be a whole number, at least $2"
    fi
}

# These become lines of the job: one word each, and none that Slurm or a shell reads otherwise.
one_word() { # NAME
    [[ ${!1} =~ ^[A-Za-z0-9_.,:/@=+-]*$ ]] ||
        fail "$1 is '${!1}'; it may have letters, digits and any of _.,:/@=+-"
}

# Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
seconds() { # TIME
    local days=0 rest=$1 parts
    [[ $rest =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || return 1
    IFS=: read -r -a parts <<<"${rest#*-}"
    parts+=(0 0)
    if [[ $rest == *-* ]]; then
        days=${rest%%-*}
    elif [[ $rest != *:* ]]; then
        parts=(0 "${parts[0]}" 0)
    elif [[ $rest != *:*:* ]]; then
        parts=(0 "${parts[0]}" "${parts[1]}")
    fi
    echo $((10#$days * 86400 + 10#${parts[0]} * 3600 + 10#${parts[1]} * 60 + 10#${parts[2]}))
}

dry_run=0
overrides=()
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=1 ;;
        -h | --help)
            sed -n '2,/^set -e/{/^#/s/^# \{0,1\}//p}' examples/launch.sh
            exit 0
            ;;
        -*) fail "unknown option $argument; there is --dry-run, everything else is key.sub=value" ;;
        *=*) overrides+=("$argument") ;;
        *) fail "'$argument' is not of the form key.sub=value" ;;
    esac
done

CONFIG=${CONFIG:-}
LAUNCH=${LAUNCH:-auto}
NODES=${NODES:-1}
TIME_LIMIT=${TIME_LIMIT:-24:00:00}
STOP_BEFORE_S=${STOP_BEFORE_S:-600}
EXCLUSIVE=${EXCLUSIVE:-1}
LOG_DIR=${LOG_DIR:-runs/logs}
PARTITION=${PARTITION:-}
ACCOUNT=${ACCOUNT:-}
QOS=${QOS:-}
DEPENDENCY=${DEPENDENCY:-}
NODES_AFTER_PRUNE=${NODES_AFTER_PRUNE:-}
CONTAINER=${CONTAINER:-}
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-pyxis}
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-$PWD:$PWD}

[[ -n $CONFIG ]] || fail "CONFIG is empty; for example CONFIG=examples/configs/300m.yaml"
[[ -f $CONFIG ]] || fail "no configuration file at $CONFIG (paths count from $PWD)"
JOB_NAME=${JOB_NAME:-$(basename -- "$CONFIG" .yaml)}

count_gpus() { nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true; }

if [[ $LAUNCH == auto ]]; then
    if [[ -n ${SLURM_JOB_ID:-} ]] || command -v sbatch >/dev/null; then
        LAUNCH=slurm
    elif (($(count_gpus) > 0)); then
        LAUNCH=local
    else
        LAUNCH=plan
    fi
fi
if [[ -z ${NPROC_PER_NODE:-} ]]; then
    NPROC_PER_NODE=8
    if [[ $LAUNCH == local ]] && (($(count_gpus) > 0)); then NPROC_PER_NODE=$(count_gpus); fi
fi
GPUS_PER_NODE=${GPUS_PER_NODE:-$NPROC_PER_NODE}

whole_number NODES 1
of_job=() # overrides that a job's script does not repeat: it exports their variable
if [[ -n $NODES_AFTER_PRUNE ]]; then
    whole_number NODES_AFTER_PRUNE 1
    of_job=("nodes_after_prune=$NODES_AFTER_PRUNE")
fi
whole_number NPROC_PER_NODE 1
whole_number GPUS_PER_NODE 0
whole_number STOP_BEFORE_S 1
# Slurm's own and REQUEUE are counted with, and in bash counting is evaluating: a[$(rm x)] is run.
for name in SLURM_JOB_ID SLURM_RESTART_COUNT REQUEUE; do
    if [[ -n ${!name:-} ]]; then whole_number "$name" 0; fi
done
for name in JOB_NAME PARTITION ACCOUNT QOS DEPENDENCY LOG_DIR; do one_word "$name"; done
limit_s=$(seconds "$TIME_LIMIT") ||
    fail "TIME_LIMIT is '$TIME_LIMIT'; write minutes, H:M:S or D-H:M:S, as for sbatch"
((STOP_BEFORE_S < limit_s)) ||
    fail "STOP_BEFORE_S ($STOP_BEFORE_S) must be below TIME_LIMIT ($TIME_LIMIT = $limit_s s)"
[[ $EXCLUSIVE == [01] ]] || fail "EXCLUSIVE is '$EXCLUSIVE'; it is 0 or 1"
[[ $LAUNCH == slurm || $LAUNCH == local || $LAUNCH == plan ]] ||
    fail "LAUNCH is '$LAUNCH'; it is auto, slurm, local or plan"
[[ $CONTAINER_RUNTIME == pyxis || $CONTAINER_RUNTIME == apptainer ]] ||
    fail "CONTAINER_RUNTIME is '$CONTAINER_RUNTIME'; it is pyxis or apptainer"

# ---- the program ----------------------------------------------------------------------------------

# Without the safe path, the folder kernels/ here would be importable under that name.
export PYTHONSAFEPATH=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
venv=${MEGATRON_IDEA_VENV:-$PWD/.venv}
if [[ -x $venv/bin/megatron-idea ]]; then export PATH="$venv/bin:$PATH"; fi

installed() { command -v megatron-idea >/dev/null; }

install_here() {
    installed && return
    bash examples/setup.sh >&2
    export PATH="$venv/bin:$PATH"
}

# The whole configuration as YAML; fails with the program's own words.
resolve() {
    megatron-idea train "$CONFIG" --nproc "$NPROC_PER_NODE" --nnodes "$NODES" --dry-run \
        "${of_job[@]}" "${overrides[@]}"
}

# The same, checked and kept; nodes_after_prune of the configuration counts as the variable does.
take_config() {
    resolved=$(resolve) || exit "$?"
    if [[ -z $NODES_AFTER_PRUNE ]]; then
        NODES_AFTER_PRUNE=$(sed -n 's/^nodes_after_prune: \([1-9][0-9]*\)$/\1/p' <<<"$resolved")
    fi
}

# ---- outside of a job: submit ---------------------------------------------------------------------

directive() { # OPTION VALUE; nothing for an empty value
    if [[ -n $2 ]]; then echo "#SBATCH --$1=$2"; fi
}

job_text() {
    local name
    echo "#!/usr/bin/env bash"
    directive job-name "$JOB_NAME"
    directive partition "$PARTITION"
    directive account "$ACCOUNT"
    directive qos "$QOS"
    directive dependency "$DEPENDENCY"
    # Else a job would wait for ever for one that has failed.
    if [[ -n $DEPENDENCY ]]; then directive kill-on-invalid-dep yes; fi
    directive nodes "$NODES"
    directive ntasks-per-node 1
    if ((GPUS_PER_NODE > 0)); then directive gpus-per-node "$GPUS_PER_NODE"; fi
    if ((EXCLUSIVE)); then printf '#SBATCH --exclusive\n#SBATCH --mem=0\n'; fi
    directive time "$TIME_LIMIT"
    echo "# Before the limit the script below is told, and has the run saved and the job requeued."
    directive signal "B:USR1@$STOP_BEFORE_S"
    echo "#SBATCH --requeue"
    directive open-mode append
    directive output "$LOG_DIR/%x-%j.log"
    echo
    printf 'cd %q\n' "$PWD"
    local names=(CONFIG NPROC_PER_NODE GPUS_PER_NODE CONTAINER CONTAINER_RUNTIME CONTAINER_MOUNTS)
    if [[ -n $NODES_AFTER_PRUNE ]]; then # what it takes to submit another one
        names+=(NODES_AFTER_PRUNE JOB_NAME PARTITION ACCOUNT QOS TIME_LIMIT STOP_BEFORE_S EXCLUSIVE
            LOG_DIR)
    fi
    for name in "${names[@]}"; do printf 'export %s=%q\n' "$name" "${!name}"; done
    echo "export LAUNCH=slurm REQUEUE=1"
    printf 'exec bash examples/launch.sh'
    if ((${#overrides[@]})); then printf ' %q' "${overrides[@]}"; fi
    echo
}

submit() {
    local resolved job
    if installed; then
        take_config
        [[ $resolved != *$'\n  train: []\n'* ]] ||
            fail "data.train is empty; for example 'data.train=[{prefix: data/web_train}]'"
    elif [[ -n $CONTAINER ]]; then
        say "no megatron-idea here: the configuration is not checked before the job runs"
    else
        fail "no megatron-idea here; run 'bash examples/setup.sh' or set CONTAINER"
    fi
    mkdir -p "$LOG_DIR"
    job=$(job_text | sbatch --parsable)
    job=${job%%;*}
    say "submitted job $job: $NODES x $NPROC_PER_NODE processes; log: $LOG_DIR/$JOB_NAME-$job.log"
    echo "$job"
}

# ---- inside of a job: one launcher per node -------------------------------------------------------

node_address() { # NODE: its address for Slurm, which need not be its name
    [[ $(scontrol show node -o "$1") =~ \ NodeAddr=([^ ]+) ]] && echo "${BASH_REMATCH[1]}"
}

# Another one for every job and every requeue of it: what is left of the last one may hold its own.
# Below 32768, from where on kernels hand ports to outgoing connections.
free_port() {
    local port=$((20000 + (SLURM_JOB_ID * 13 + ${SLURM_RESTART_COUNT:-0} * 101) % 12000))
    while (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

run_in_job() {
    local nodes address port step status=0 prefix=() options=()
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    ((${#nodes[@]})) || fail "scontrol names no node for '$SLURM_JOB_NODELIST'"
    address=${MASTER_ADDR:-$(node_address "${nodes[0]}")} ||
        fail "Slurm gives no address of node ${nodes[0]}; set MASTER_ADDR"
    port=${MASTER_PORT:-$(free_port)}
    if [[ -n $CONTAINER && $CONTAINER_RUNTIME == pyxis ]]; then
        options=(--container-image="$CONTAINER" --container-mounts="$CONTAINER_MOUNTS"
            --container-workdir="$PWD")
    elif [[ -n $CONTAINER ]]; then
        prefix=(apptainer exec --bind "$CONTAINER_MOUNTS" --pwd "$PWD")
        if ((GPUS_PER_NODE > 0)); then prefix+=(--nv); fi
        prefix+=("$CONTAINER")
    elif ! installed; then
        fail "megatron-idea is not installed on $(uname -n); set MEGATRON_IDEA_VENV or CONTAINER"
    fi
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date -u +%FT%TZ):" \
        "${#nodes[@]} nodes x $NPROC_PER_NODE, meeting at $address:$port"

    # srun hands the signal to the launcher of every node. SIGTERM comes with Slurm's own.
    trap 'say "told to stop: passing it on"; kill -s USR1 "$step" 2>/dev/null || true' USR1 TERM
    # All nodes stop together, but not in the same second: one that has saved and left must not have
    # the others killed. One that failed may, some seconds later.
    # shellcheck disable=SC2016  # SLURM_NODEID is the task's own
    srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=0 --wait=20 --label "${options[@]}" "${prefix[@]}" \
        bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' launch megatron-idea train "$CONFIG" \
        --nproc "$NPROC_PER_NODE" --nnodes "${#nodes[@]}" --master "$address:$port" \
        "${of_job[@]}" "${overrides[@]}" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a signal ends wait, not srun
    wait "$step" || status=$?
    finish "$status"
}

finish() { # STATUS of the run
    local status=$1
    case $status in
        0) say "the run is finished" ;;
        "$STOPPED") requeue ;;
        "$FEWER_NODES")
            if [[ -n $NODES_AFTER_PRUNE ]]; then go_on_smaller; fi
            say "pruned, and to go on on fewer nodes: submit it again with NODES=nodes_after_prune"
            ;;
        *) say "the run failed with status $status: the first error above says why" ;;
    esac
    exit "$status"
}

# The model is small now. A job's own nodes cannot be changed by a requeue: another job goes on.
go_on_smaller() {
    say "pruned: going on on $NODES_AFTER_PRUNE nodes"
    NODES=$NODES_AFTER_PRUNE DEPENDENCY=
    unset SLURM_RESTART_COUNT
    submit
    exit 0
}

requeue() {
    if ((${REQUEUE:-0} == 0)); then
        say "stopped before its end; the same call goes on"
    elif [[ ! $(scontrol show job -o "$SLURM_JOB_ID") =~ \ JobState=RUNNING ]]; then
        # scancel, or the limit came before the run was saved: a requeue now would undo the former.
        say "stopped before its end, by the end of its job: Slurm requeues it, or you submit it again"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "stopped before its end; requeued"
        exit 0
    else
        say "stopped before its end, and Slurm does not requeue it: submit it again"
    fi
}

# ---- without Slurm --------------------------------------------------------------------------------

run_here() {
    ((NODES == 1)) || fail "NODES is $NODES; without Slurm there is this machine only"
    [[ -z $NODES_AFTER_PRUNE ]] || fail "NODES_AFTER_PRUNE is for Slurm: leave it out here"
    install_here
    exec megatron-idea train "$CONFIG" --nproc "$NPROC_PER_NODE" "${overrides[@]}"
}

print_plan() {
    install_here
    say "no Slurm and no GPU here: nothing is started. The plan for $NODES x $NPROC_PER_NODE processes:"
    local processes=$((NODES * NPROC_PER_NODE)) on=--gpus # memory and GPU-hours as well
    if ((GPUS_PER_NODE == 0)); then on=--nproc; fi
    megatron-idea plan "$CONFIG" "$on" "$processes" "${overrides[@]}"
}

print_job() {
    local resolved="not known here: megatron-idea is in the container only"
    if [[ -z $CONTAINER ]] || installed; then
        install_here
        take_config
    fi
    job_text
    printf '\n# The configuration, resolved:\n'
    printf '%s\n' "$resolved" | sed 's/^/# /'
}

if ((dry_run)); then
    print_job
elif [[ $LAUNCH == slurm && -n ${SLURM_JOB_ID:-} ]]; then
    run_in_job
else
    case $LAUNCH in
        slurm) submit ;;
        local) run_here ;;
        plan) print_plan ;;
    esac
fi
