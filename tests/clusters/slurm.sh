#!/usr/bin/env bash
# A SLURM of one node on this machine, for tests. Needs root, and Debian's slurm-wlm and munge.
#
#   slurm.sh up FOLDER PORT PORT   starts it; everything it writes is in FOLDER; jobs need SLURM_CONF=FOLDER/slurm.conf
#   slurm.sh down FOLDER           stops it
set -euo pipefail

folder=$2
host=$(hostname -s)

up() {
  mkdir -p "$folder"/{state,spool,munge}
  chmod 755 "$folder" && chmod 700 "$folder/munge"
  dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
  chmod 400 "$folder/munge/key"
  munged --force --key-file "$folder/munge/key" --socket "$folder/munge/socket" --pid-file "$folder/munge/pid" \
    --seed-file "$folder/munge/seed" --log-file "$folder/munge/log"
  cat >"$folder/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPort=$2
SlurmdPort=$3
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN)
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
  slurmctld -f "$folder/slurm.conf" -i
  slurmd -f "$folder/slurm.conf"
  # A job that comes before the node has registered may wait for ever.
  for _ in $(seq 50); do
    SLURM_CONF=$folder/slurm.conf sinfo -h -o %T 2>/dev/null | grep -qx idle && sleep 1 && break
    sleep 0.2
  done
  SLURM_CONF=$folder/slurm.conf timeout 30 srun true && return
  cat "$folder"/slurm*.log >&2
  return 1
}

down() {
  for name in slurmd slurmctld munge/; do
    [[ -f $folder/${name%/}.pid ]] && kill "$(<"$folder/$name.pid")" 2>/dev/null || true
  done
  [[ -f $folder/munge/pid ]] && kill "$(<"$folder/munge/pid")" 2>/dev/null || true
}

case "$1" in up | down) "$@" ;; *) exit 2 ;; esac
