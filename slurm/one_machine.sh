#!/usr/bin/env bash
# A real SLURM on this one machine, to try jobs without a cluster: installs (Debian, Ubuntu), configures and starts munged,
# slurmctld and slurmd. As root. Does nothing where it runs already.
set -euo pipefail

say() { echo "one_machine.sh: $*"; }
running() { timeout 20 sinfo --noheader --format %T 2>/dev/null | grep -Eq '^(idle|mixed|allocated|completing)'; }

if running; then
  say "SLURM is running"
  exit 0
fi
[ "$(id -u)" = 0 ] || { say "run it as root" >&2; exit 1; }

conf=/etc/slurm/slurm.conf
mark="# Written by bitnet_train's slurm/one_machine.sh"
if [ -e "$conf" ] && ! grep -qF "$mark" "$conf"; then
  say "$conf is somebody else's: this is no machine to play on" >&2
  exit 1
fi

if ! command -v slurmctld slurmd munged >/dev/null; then
  say "installing slurm-wlm and munge"
  export DEBIAN_FRONTEND=noninteractive
  # A container has no init system that could start daemons.
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
  chmod +x /usr/sbin/policy-rc.d
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
fi

host=$(hostname -s)
cpus=$(nproc)
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
state=/var/lib/slurm_one_machine
mkdir -p /etc/slurm "$state/ctld" "$state/d" /var/log/slurm
# Twice the cores, so that jobs of several tasks start on a small machine.
cat >"$conf" <<CONF
$mark
ClusterName=one_machine
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
# A requeued job waits until its old credential has expired: two minutes by default.
AuthInfo=cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/d
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,batch_sched_delay=0,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=300
NodeName=$host NodeAddr=127.0.0.1 CPUs=$((2 * cpus)) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

mkdir -p /run/munge /var/lib/munge /var/log/munge
chown -R munge: /run/munge /var/lib/munge /var/log/munge /etc/munge
chmod 755 /run/munge
if [ ! -s /etc/munge/munge.key ]; then
  (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
  chown munge: /etc/munge/munge.key
fi
munge --no-input >/dev/null 2>&1 || setpriv --reuid munge --regid munge --clear-groups /usr/sbin/munged --force
pidof slurmctld >/dev/null || slurmctld
pidof slurmd >/dev/null || slurmd

for _ in $(seq 60); do
  if running; then
    say "SLURM is running: $((2 * cpus)) CPUs on $host"
    exit 0
  fi
  # A node that was down when slurmctld stopped.
  scontrol update "NodeName=$host" State=RESUME >/dev/null 2>&1 || true
  sleep 1
done
say "SLURM did not start; its logs are in /var/log/slurm" >&2
exit 1
