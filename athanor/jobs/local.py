"""Jobs on this machine: a detached agent for each, which holds a lock on its log as long as it lives.

Jobs on Slurm are submitted, looked at and cancelled by the same functions, which leave to `jobs/slurm.py` what differs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from athanor.foundation.errors import AthanorError, UserError
from athanor.foundation.events import EXIT_DONE, EXIT_HOLD, EXIT_REQUEUE
from athanor.foundation.run_folder import append_when_possible, disk_errors, is_held
from athanor.jobs import slurm
from athanor.jobs.agent import Stopped
from athanor.jobs.queue import CANCELLED, DONE, HELD, LOST, RUNNING, STOPPED, WAITING, Job, Queue

MOST_MINUTES = 10_000_000  # of a job: 19 years
GO_ON = "run the same command to go on"  # which is another one of a job
STARTING_SECONDS = 10.0  # that a new job may be without an agent
EXIT_CODES = {DONE: EXIT_DONE, STOPPED: EXIT_REQUEUE, HELD: EXIT_HOLD}


def submit(queue: Queue, **fields: Any) -> Job:
    """List a new job (the arguments of `Queue.add`) and start its agent. Raises UserError when another has its run folder."""
    refuse_busy(queue, fields["run"])
    job = queue.add(**fields)
    try:
        return start(queue, job)
    except AthanorError:
        queue.remove(job)
        with contextlib.suppress(OSError):  # there is more in it, or it is no folder
            job.log.with_suffix(".sbatch").unlink(missing_ok=True)
            job.log.parent.rmdir()
            job.log.parent.parent.rmdir()
        raise


def refuse_busy(queue: Queue, run: Path) -> None:
    """Raises UserError when a job works in this run folder, or is about to."""
    for job in jobs(queue):
        if job.state in (RUNNING, WAITING) and job.run == str(run.resolve()):
            raise UserError(f"{job.id} is working in {job.run}; wait for it, cancel it, or give the run another name")


def resume(queue: Queue, reference: str, refuse: Callable[[Job], None] = lambda job: None) -> Job:
    """Start the agent of a job anew that has ended before its work was done; `refuse` raises what it would refuse."""
    job = find(queue, reference)
    if job.state in (RUNNING, WAITING, DONE):
        raise UserError(f"{job.id} is {job.state}" + ("; nothing is left to do" if job.state == DONE else " already"))
    refuse(job)
    return start(queue, job)


def start(queue: Queue, job: Job) -> Job:
    """Start `athanor jobs agent`, detached from this terminal; it inherits the lock, so that there is no gap without one."""
    if job.slurm is not None:
        return slurm.start(queue, job)
    with disk_errors(job.log):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
    with log, job.log.open("rb") as lock:
        _lock(job, lock)
        job = queue.update(job, state=RUNNING, process=None, exit_code=None, sentence="", ended=None, is_cancelled=False)
        process = subprocess.Popen([sys.executable, "-m", "athanor", "jobs", "agent", job.id, "--lock", str(lock.fileno())],
                                   cwd=job.folder, env={**os.environ, "ATHANOR_RUNS": str(queue.root.resolve())},
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()],
                                   start_new_session=True)
    return queue.update(job, only_running=True, process=process.pid)


def jobs(queue: Queue) -> list[Job]:
    """All jobs as they are now, the newest first: one whose agent was killed is lost."""
    return [_seen(queue, job) for job in queue.all()]


def find(queue: Queue, reference: str) -> Job:
    """One job as it is now. Raises UserError with the nearest when there is none of that id."""
    return _seen(queue, queue.get(reference))


def cancel(queue: Queue, reference: str) -> Job:
    """Ask a job to finish its step, save and end; returns at once. Raises UserError when it has ended already."""
    job = find(queue, reference)
    if job.state not in (RUNNING, WAITING):
        raise UserError(f"{job.id} has ended already: {job.state}" + (f" ({job.sentence})" if job.sentence else ""))
    if job.slurm is not None:
        return slurm.cancel(queue, job)
    if job.process is None:
        raise UserError(f"{job.id} is being started; try again in a moment")
    asked = queue.update(job, only_running=True, is_cancelled=True)
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(job.process, signal.SIGTERM)
    return asked


def work(queue: Queue, job: Job, command: Callable[[], object]) -> int:
    """Do a job's work in this process, its agent, and note how it ended. Returns 0, 85 (go on later) or 86 (hold), never more.

    SIGTERM and the end of the job's time limit ask it to stop.
    """
    def ask(*_: object) -> None:
        raise Stopped("stopped between two stages, as asked")

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    if job.minutes is not None:
        signal.setitimer(signal.ITIMER_REAL, 60 * job.minutes)
    state, sentence, life = HELD, "its agent failed; see its log", str(time.time())
    if job.slurm is None:  # there it has written this before
        append_when_possible(job.lives, {"life": life, "begun": time.time()})
    try:
        command()
        state, sentence = DONE, ""
    except Stopped as error:
        state, sentence = STOPPED, str(error)
    except AthanorError as error:
        sentence = str(error)
    except Exception:  # no other exit code may reach who started us
        traceback.print_exc()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)
    ended_as = state
    if state == STOPPED:  # Slurm starts it again, unless that was not wanted
        ended_as = CANCELLED if queue.get(job.id).is_cancelled else STOPPED if job.slurm is None else RUNNING
    goes_on = "Slurm starts it again" if ended_as == RUNNING else f"`athanor jobs resume {job.id}` goes on"
    if job.slurm is None:
        with contextlib.suppress(AthanorError):  # its folder was moved away
            append_when_possible(job.lives, {"life": life, "ended": time.time(), "code": EXIT_CODES[state]})
    sentence = sentence.replace(GO_ON, goes_on)
    with contextlib.suppress(AthanorError):  # a full disk must not change the exit code; then the job is found to be lost
        queue.update(job, state=ended_as, exit_code=EXIT_CODES[state], sentence=sentence,
                     ended=None if ended_as == RUNNING else time.time())
    try:
        print(f"athanor: {sentence}\n" if sentence else "", file=sys.stderr, end="", flush=True)
    except OSError:  # the same; what was not written would be at the end, for which Python has a code of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return EXIT_CODES[state]


def _seen(queue: Queue, job: Job) -> Job:
    if job.state == RUNNING and job.slurm is not None:
        return slurm.seen(queue, job)
    is_starting = job.process is None and time.time() - job.submitted < STARTING_SECONDS
    if job.state != RUNNING or is_starting or is_held(job.log):
        return job
    why = "it was cancelled while it started" if job.is_cancelled else "its agent was killed"
    return queue.update(job, only_running=True, state=CANCELLED if job.is_cancelled else LOST, ended=time.time(),
                        sentence=f"{why}; `athanor jobs resume {job.id}` goes on from the newest checkpoint")


def _lock(job: Job, lock: BinaryIO) -> None:
    """Take the lock on a job's log, which a reader may hold for a moment. Raises UserError when an agent holds it."""
    for _ in range(20):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    raise UserError(f"{job.id} is running already")
