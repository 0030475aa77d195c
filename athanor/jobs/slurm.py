"""Jobs on Slurm: a readable batch script with one long-lived agent per node, and what Slurm says about it.

What training ends with never reaches Slurm raw. The batch script ends with 0 when the work is done, with 85 when Slurm is to
start it again (after a signal, a lost node, a killed agent: it goes on from the newest checkpoint), with 86 when somebody must
look. Ranks that fail are started again inside the allocation, by the agents (jobs/nodes.py), without Slurm noticing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from athanor.foundation.errors import UserError
from athanor.foundation.events import EXIT_DONE, EXIT_HOLD, EXIT_REQUEUE
from athanor.foundation.recipe import Recipe
from athanor.foundation.run_folder import append_jsonl, read_jsonl, write_atomic
from athanor.jobs.nodes import Leader, join
from athanor.jobs.queue import CANCELLED, HELD, LOST, RUNNING, STOPPED, WAITING, Job, Queue

PATIENCE_SECONDS = 20.0  # for Slurm's commands
MOST_LIVES = 5  # in a row without a step further
SIGNAL_SECONDS = 120  # before the time limit, to finish a step and to save
HOLDS = ("SPECIAL_EXIT", "REQUEUE_HOLD")
ENDED = {"CANCELLED": CANCELLED, "TIMEOUT": STOPPED, "DEADLINE": STOPPED} | dict.fromkeys(HOLDS, HELD)
WAITS = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED")
RUNS = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
HELP = {"sbatch": "mend the option, or give others with --sbatch", "controller": "`scontrol ping` tells whether it is up"}

SCRIPT = """#!/bin/bash
# {id}, written by `athanor jobs submit --slurm`. Nothing depends on it once it was submitted.
{directives}

# where the agents of this life of the job meet, and tell how it ended
life={meet}/$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}
mkdir -p "$life"
export ATHANOR_RUNS={runs}

# before the time limit, and when asked to stop, the ranks finish their step and save
trap 'touch "$life/stop"' USR1 TERM

srun --no-kill --kill-on-bad-exit=0 --ntasks-per-node=1 --cpu-bind=none \\
  {agent} &
step=$!

# a signal ends `wait`, not the step; a lost node may keep srun waiting after the leading agent has ended
while kill -0 $step 2>/dev/null && [ ! -e "$life/verdict" ]; do sleep 0.5 & wait $!; done
for _ in $(seq 20); do kill -0 $step 2>/dev/null || break; sleep 0.5; done
kill -0 $step 2>/dev/null || {{ wait $step; code=$?; }}

verdict=$(cat "$life/verdict" 2>/dev/null)
if [ -z "$verdict" ]; then  # the leading agent was killed; when it never began, not by a signal, somebody must look
  [ -e "$life/begun" ] || [ "${{code:-1}}" -ge 128 -a "${{SLURM_RESTART_COUNT:-0}}" -lt 3 ] && verdict=85
fi
case $verdict in
{cases}
esac
"""


def settle(recipe: Recipe, *, nodes: int | None, ranks_per_node: int | None, spares: int, partition: str | None,
           time_limit: str | None, signal_seconds: int, options: Sequence[str]) -> dict[str, Any]:
    """What a job asks Slurm for. Raises UserError when the nodes' ranks are not those of the recipe."""
    per_node = ranks_per_node or recipe.cluster.per_node or 1
    devices = recipe.cluster.devices
    if nodes is None:
        nodes = -(-(devices or 1) // per_node)
    if devices is not None and devices != nodes * per_node:
        advice = "give --ranks-per-node a divisor of it" if devices % per_node else "leave --nodes out"
        raise UserError(f"cluster.devices is {devices}, but {nodes} nodes of {per_node} ranks each have {nodes * per_node}; "
                        f"{advice}")
    return {"nodes": nodes, "ranks_per_node": per_node, "spares": spares, "partition": partition, "time": time_limit,
            "signal_seconds": signal_seconds, "options": list(options)}


def script_of(job: Job, root: Path) -> str:
    """The text of a job's batch script; `root`: the folder of all runs."""
    wish = job.slurm or {}
    spare = wish["spares"]
    lines = {"job-name": job.id, "nodes": wish["nodes"] + spare, "ntasks-per-node": 1, "output": job.log, "open-mode": "append",
             "chdir": job.folder, "partition": wish["partition"], "time": wish["time"],
             "signal": f"B:USR1@{wish['signal_seconds']}"}
    directives = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in lines.items() if value is not None]
    directives += ["#SBATCH --exclusive", "#SBATCH --requeue", "#SBATCH --no-kill"]
    directives += [f"#SBATCH {option}" for option in wish["options"]]
    requeue = f"exit {EXIT_REQUEUE}" if _requeues() else 'exec scontrol requeue "$SLURM_JOB_ID"'
    cases = [f"  {EXIT_DONE}) exit {EXIT_DONE} ;;", f"  {EXIT_REQUEUE}) {requeue} ;;",
             '  cancelled) exec scancel "$SLURM_JOB_ID" ;;', f"  *) exit {EXIT_HOLD} ;;"]
    agent = shlex.join([sys.executable, "-m", "athanor", "jobs", "agent", job.id])
    return SCRIPT.format(id=job.id, directives="\n".join(directives), meet=shlex.quote(str(_meeting(job))),
                         runs=shlex.quote(str(root.resolve())), agent=agent, cases="\n".join(cases))


def start(queue: Queue, job: Job) -> Job:
    """Give a job to Slurm. Raises UserError with Slurm's own words when there is none or it refuses."""
    assert job.slurm is not None
    if "id" in job.slurm and state_of(job.slurm["id"])[0] in (*WAITS, *RUNS, *HOLDS):
        _call("scancel", str(job.slurm["id"]))  # what is left of the last time
    file = job.log.with_suffix(".sbatch")
    write_atomic(file, script_of(job, queue.root))
    said = _call("sbatch", "--parsable", str(file))
    return queue.update(job, state=RUNNING, process=None, exit_code=None, sentence="", ended=None, is_cancelled=False,
                        slurm={**job.slurm, "id": int(said.splitlines()[-1].split(";")[0])})


def seen(queue: Queue, job: Job) -> Job:
    """A job that has not ended, as Slurm sees it now."""
    assert job.slurm is not None
    if "id" not in job.slurm:
        return replace(job, sentence="it is being given to Slurm")
    try:
        state, reason, nodes = state_of(job.slurm["id"])
    except UserError as error:
        return replace(job, sentence=str(error))
    if state in WAITS:
        return replace(job, state=WAITING, sentence=f"Slurm has it as job {job.slurm['id']}, {state.lower()}"
                       + (f": {reason}" if reason not in ("", "None") else ""))
    if state in RUNS:
        return replace(job, sentence=f"Slurm job {job.slurm['id']} on {nodes}")
    ended = queue.get(job.id)  # its agent may have told meanwhile
    if ended.state != RUNNING:
        return ended
    ended_as = CANCELLED if job.is_cancelled else ENDED.get(state, LOST)
    return queue.update(job, only_running=True, state=ended_as, ended=time.time(),
                        sentence=f"Slurm says of job {job.slurm['id']}: {state.lower().replace('_', ' ')}"
                        f"; `athanor jobs resume {job.id}` goes on from the newest checkpoint")


def state_of(number: int) -> tuple[str, str, str]:
    """State, reason and nodes of a job; "unknown" when Slurm has forgotten it."""
    try:
        said = _call("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T|%r|%N")
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        said = ""
    state, _, rest = (said.splitlines() or ["unknown||"])[-1].partition("|")
    reason, _, nodes = rest.partition("|")
    return state, reason, nodes


def cancel(queue: Queue, job: Job) -> Job:
    """Ask a running job to finish its step, save and end, and a waiting one to leave Slurm's queue."""
    assert job.slurm is not None
    if "id" not in job.slurm:
        raise UserError(f"{job.id} is being given to Slurm; try again in a moment")
    asked = queue.update(job, only_running=True, is_cancelled=True)
    if state_of(job.slurm["id"])[0] in WAITS:
        _call("scancel", str(job.slurm["id"]))
        return queue.update(job, only_running=True, state=CANCELLED, ended=time.time(),
                            sentence=f"it was cancelled while it waited; `athanor jobs resume {job.id}` goes on")
    _call("scancel", "--batch", "--signal=USR1", str(job.slurm["id"]))
    return asked


def serve(queue: Queue, job: Job, work: Callable[[], int]) -> int:
    """Be the agent of one node of a job; the first does the job's work and leads the others. Returns an exit code."""
    assert job.slurm is not None
    number, node = int(os.environ["SLURM_PROCID"]), os.environ.get("SLURMD_NODENAME", socket.gethostname())
    life = _meeting(job) / f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    if number > 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the leader tells when and how to stop
        return join(life / "leader.json", number, node)
    write_atomic(life / "begun", "")
    lives = read_jsonl(job.lives)
    nodes = int(os.environ["SLURM_NNODES"])
    append_jsonl(job.lives, {"life": life.name, "begun": time.time(), "step": _steps(job), "nodes": nodes})
    queue.update(job, state=RUNNING, process=os.getpid(), exit_code=None, sentence="", ended=None)
    threading.Thread(target=_listen, args=(life / "stop",), daemon=True).start()
    mine = [row["step"] for row in lives if "begun" in row and row["life"].startswith(f"{os.environ['SLURM_JOB_ID']}-")]
    if len(mine) >= MOST_LIVES and set(mine[-MOST_LIVES:]) == {_steps(job)}:
        queue.update(job, state=HELD, exit_code=EXIT_HOLD, ended=time.time(),
                     sentence=f"Slurm started it {MOST_LIVES} times in a row without a step further, so it is not tried again")
        code = EXIT_HOLD
    elif queue.get(job.id).is_cancelled:
        code = EXIT_REQUEUE
    else:
        with Leader(life / "leader.json", nodes, job.slurm["ranks_per_node"], node):
            code = work()
    append_jsonl(job.lives, {"life": life.name, "ended": time.time(), "code": code})
    is_cancelled = code == EXIT_REQUEUE and queue.get(job.id).is_cancelled
    write_atomic(life / "verdict", "cancelled" if is_cancelled else str(code))
    return code


def attempts(job: Job) -> list[dict[str, Any]]:
    """Each start of a job by Slurm: begun, ended or last seen (seconds since 1970), state, device-seconds.

    From Slurm's accounting where there is one, else from what the job's own agents wrote.
    """
    assert job.slurm is not None
    try:
        said = _call("sacct", "-D", "-X", "-P", "-n", "-j", str(job.slurm["id"]), "-o", "Start,ElapsedRaw,State,NNodes",
                     environment={"SLURM_TIME_FORMAT": "%s"})
    except UserError:
        said = ""
    found = []
    for begun, seconds, state, nodes in (line.split("|") for line in said.splitlines()):
        if begun.isdigit():
            seconds_paid = float(seconds)
            found.append({"begun": float(begun), "ended": float(begun) + seconds_paid, "state": state.lower(),
                          "device_seconds": seconds_paid * int(nodes) * job.slurm["ranks_per_node"]})
    return found or job.starts()


def _requeues() -> bool:
    """Whether this Slurm starts a job again by itself when it ends with the code that asks for it."""
    for line in _call("scontrol", "show", "config").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "RequeueExit":
            return str(EXIT_REQUEUE) in value.strip().split(",")
    return False


def _meeting(job: Job) -> Path:
    return job.log.with_suffix("")


def _steps(job: Job) -> int:
    """Steps that all stages of a job's run have done together."""
    return sum(max((row["step"] for row in read_jsonl(file)), default=0) for file in Path(job.run).glob("*/metrics.jsonl"))


def _listen(file: Path) -> None:
    """Turn the batch script's stop file into the signal that stops a job, once somebody here listens to it."""
    while not (file.exists() and callable(signal.getsignal(signal.SIGTERM))):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


def _call(command: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """What one of Slurm's commands prints. Raises UserError with its words, and what to do."""
    if shutil.which(command) is None:
        raise UserError(f"Slurm's command {command} is not on PATH of this machine; submit from one of the cluster's, or leave "
                        "--slurm out to train here")
    try:
        done = subprocess.run([command, *arguments], text=True, capture_output=True, timeout=PATIENCE_SECONDS, check=False,
                              env={**os.environ, **(environment or {})})
    except subprocess.TimeoutExpired:
        raise UserError(f"Slurm's {command} has not answered for {PATIENCE_SECONDS:g} s; {HELP['controller']}") from None
    if done.returncode:
        words = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip()) or f"exit code {done.returncode}"
        is_down = any(sign in words for sign in ("Unable to contact", "Connection refused", "Could not establish a config"))
        raise UserError(f"Slurm's controller cannot be reached: {words}; {HELP['controller']}" if is_down else
                        f"Slurm refused: {words}; {HELP['sbatch']}")
    return done.stdout.strip()
