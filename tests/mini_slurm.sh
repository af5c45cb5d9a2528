#!/usr/bin/env bash
# A Slurm of two nodes on this host, for tests: real daemons, no systemd, no cgroups, no accounting.
#
#   mini_slurm.sh start FOLDER   needs root; FOLDER becomes the place of all of its files
#   mini_slurm.sh stop FOLDER    ends the daemons that start began, by their process ids
#
# Clients need SLURM_CONF=FOLDER/slurm.conf. The partition "urgent" preempts "batch", whose jobs have
# GRACE_S (default 60) seconds to leave and are then requeued.
set -euo pipefail

action=$1
folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf

free_port() {
    local port
    for port in $(shuf -i "20000-31000" -n 50); do
        if ! (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    return 1
}

configuration() {
    local host
    host=$(uname -n)
    cat <<CONF
ClusterName=test
SlurmctldHost=${host%%.*}(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
MinJobAge=3600
ReturnToService=2
NodeName=n1 NodeHostname=${host%%.*} NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname=${host%%.*} NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2 RealMemory=1000
PartitionName=batch Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=${GRACE_S:-60}
PartitionName=urgent Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
CONF
}

start() {
    local node
    mkdir -p "$folder/munge" "$folder/state" "$folder/spool-n1" "$folder/spool-n2"
    chmod 755 "$folder" "$folder/munge"
    # Keys that munged accepts belong to its own user.
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
    chown -R munge: "$folder/munge"
    # --force: it dislikes parents that others may write to, as /tmp is.
    runuser -u munge -- munged --force --num-threads=2 --key-file="$folder/munge/key" \
        --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    configuration >"$SLURM_CONF"
    slurmctld -c -f "$SLURM_CONF"
    for node in n1 n2; do slurmd -N "$node" -f "$SLURM_CONF"; done
    for _ in $(seq 100); do
        if [[ $(sinfo -h -p batch -t idle -o %D 2>/dev/null) == 2 ]]; then return; fi
        sleep 0.1
    done
    echo "mini_slurm: the nodes did not come up" >&2
    tail -n 5 "$folder"/*.log >&2
    return 1
}

stop() {
    local files=("$folder"/slurmd-n?.pid "$folder/slurmctld.pid" "$folder/munge/pid") file left
    # Jobs first: an srun whose daemons are gone would wait for ever.
    scancel --quiet --user=root 2>/dev/null || true
    for _ in $(seq 150); do
        if [[ -z $(squeue -h 2>/dev/null) ]]; then break; fi
        sleep 0.1
    done
    for file in "${files[@]}"; do
        if [[ -s $file ]]; then kill "$(<"$file")" 2>/dev/null || true; fi
    done
    for _ in $(seq 50); do # each removes its file when it ends
        left=0
        for file in "${files[@]}"; do if [[ -e $file ]]; then left=1; fi; done
        if ((left == 0)); then return; fi
        sleep 0.1
    done
}

"$action"
