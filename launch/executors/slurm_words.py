"""What Slurm says of jobs and submissions, and what follows from it.

Sources: Slurm's own lists of reasons and errors (src/common/job_state_reason.c, slurm_errno.c) and those of `man squeue`.
"""

from __future__ import annotations

import re

# Reasons for which a job waits, in words; others are shown as Slurm calls them.
REASONS = {
    "BeginTime": "waits for its begin time, two minutes after a requeue",
    "Dependency": "waits for the end of another job of this cell",
    "Priority": "waits behind jobs of higher priority",
    "Resources": "waits for nodes",
    "JobHeldAdmin": "held by an administrator",
    "JobHeldUser": "held: scontrol release {id}",
    "ReqNodeNotAvail": "waits for nodes that are down or reserved",
}
# Reasons for which a job never starts: something must be changed first.
NEVER = (
    "AccountNotAllowed", "AssocMaxCpuPerJobLimit", "AssocMaxNodePerJobLimit", "AssocMaxWallDurationPerJobLimit",
    "BadConstraints", "DependencyNeverSatisfied", "InvalidAccount", "InvalidQOS", "PartitionConfig", "PartitionTimeLimit",
    "QOSMaxCpuPerJobLimit", "QOSMaxNodePerJobLimit", "QOSMaxWallDurationPerJobLimit", "QOSNotAllowed", "QOSTimeLimit",
)  # fmt: skip
NOT_LAUNCHED = "launch failed"  # in the words for a job that Slurm holds because it could not start it, on some node
HELD_AFTER = "JobHoldMaxRequeue"  # it failed to start too often


# Limits in what sbatch says that only another job would meet: of one job, of one node, least ones, of its time.
_OF_THE_JOB = re.compile(r"\b(?:QOS|Assoc|Max|Partition)\w*(?:PerJob|PerNode|Min\w+|WallDuration|TimeLimit|NodeLimit)")
# What it says where a later attempt may do better, in lower case. All else would be said again.
PASSING = (
    # The controller is not reached, or too busy.
    "unable to contact", "communication", "message send failure", "message receive failure", "unexpected message",
    "timed out", "connection refused", "connection reset", "connection failure", "connection rejected", "quiesce",
    "transport endpoint", "delayed socket error", "missing socket", "would block", "zero bytes were", "shutting down",
    "standby", "rate limit", "temporarily unavailable", "temporarily unable", "i/o error", "slurm internal error",
    # It does not know who asks: munge is down there or here, or the clocks differ.
    "munge", "credential", "protocol authentication error", "token generation failed", "unable to connect to database",
    # Limits of a user, an account or the cluster, which other jobs use up. Slurm gives the name of the limit on a line of its
    # own, or with the policy's words alone, where it may be any.
    "accounting/qos policy", "submitjob", "maxsubmit", "grpsubmit", "maxjobcount", "qos usage threshold",
    # What is asked for is there, but not now.
    "partition not available", "partition in down state", "partition is in use", "node not available", "nodes are busy",
    "nodes lack available resources", "not available now", "reservation is in use", "reservation not usable now",
    "maintenance reservation", "licenses currently unavailable", "ports are in use", "max powered up nodes",
    "submissions disabled", "presently disabled", "reboot already in progress", "prologslurmctld is still running",
    "try again later", "waiting for burst buffer", "burst buffer resource limit",
)  # fmt: skip


def may_pass(stderr: str) -> bool:
    """Whether a submission that sbatch refused in these words may be taken later as it is."""
    names = set(re.findall(r"\w+", stderr))
    return not (names & set(NEVER) or _OF_THE_JOB.search(stderr)) and any(words in stderr.lower() for words in PASSING)
