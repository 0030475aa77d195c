"""Slurm with several nodes on this machine, for tests and for trying things out; root and ordinary users can run it.

    python tests/slurm/cluster.py start FOLDER [--nodes 4]     # prints what to export
    python tests/slurm/cluster.py stop FOLDER

Slurm comes from PATH, or its Debian packages are unpacked (not installed) under FOLDER. Everything else lies there, too: the
key, the configuration, logs. Each node is one slurmd on its own port; a file FOLDER/unhealthy.n2 makes n2's prolog fail.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "libmunge2", "libhwloc15", "libjson-c5",
            "libnuma1")
CONFIGURATION = """
ClusterName=athanor
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
PluginDir={plugins}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,nohold_on_prolog_fail
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=20
MinJobAge=3600
JobRequeue=1
RequeueExit=85
RequeueExitHold=86
Prolog={folder}/prolog.sh
PrologFlags=Alloc
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=600 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes={names} MaxTime=600 PriorityTier=10 PreemptMode=OFF
"""
PROLOG = '#!/bin/sh\n[ ! -e "{folder}/unhealthy.$SLURMD_NODENAME" ]\n'


class Unavailable(Exception):
    """Slurm cannot be had here; the sentence says why."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster: the folder it lives in, its nodes' names, and the environment in which its commands are found."""

    folder: Path
    nodes: tuple[str, ...]
    environment: dict[str, str]

    def call(self, *command: str, timeout: float = 60) -> str:
        """What a command of Slurm prints. Raises CalledProcessError with its words when it fails."""
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=timeout, check=False)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout.strip()

    def start_controller(self) -> None:
        self.call("slurmctld", "-f", str(self.folder / "slurm.conf"))

    def start_node(self, name: str) -> None:
        stepd = shutil.which("slurmstepd", path=self.environment["PATH"])
        self.call("slurmd", *(["-d", stepd] if stepd else []), "-f", str(self.folder / "slurm.conf"), "-N", name)

    def kill(self, daemon: str) -> None:
        """Kill -9 slurmctld, or slurmd.n2."""
        os.kill(int((self.folder / f"{daemon}.pid").read_text()), signal.SIGKILL)

    def crash(self, node: str) -> float:
        """Kill -9 all that runs on a node, its slurmd first; returns when (seconds since 1970)."""
        self.kill(f"slurmd.{node}")
        found = dict(processes(f"SLURMD_NODENAME={node}"))
        stepds = {parent for parent in found.values() if "slurmstepd" in command_of(parent)}
        now = time.time()
        for pid in [*stepds, *found]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return now

    def until_idle(self, seconds: float = 60) -> None:
        """Wait until every node is ready for work. Raises TimeoutError with what sinfo says."""
        deadline = time.monotonic() + seconds
        states = ""
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.CalledProcessError):
                states = self.call("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t")
                if all(line.endswith(" idle") for line in states.splitlines()) and states:
                    return
            time.sleep(0.1)
        raise TimeoutError(f"the nodes are not ready after {seconds:g} s: {states}")

    def until_empty(self, seconds: float = 90) -> None:
        """Wait until no job is left. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while left := self.call("squeue", "--noheader"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"jobs are left after {seconds:g} s: {left}")
            time.sleep(0.1)


def processes(wanted: str, is_prefix: bool = False) -> Iterator[tuple[int, int]]:
    """Process numbers (and their parents') of processes that have `NAME=value` in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            entries = (folder / "environ").read_bytes().split(b"\0")
            if any(entry.startswith(wanted.encode()) if is_prefix else entry == wanted.encode() for entry in entries):
                yield int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def command_of(pid: int) -> str:
    """The command line of a process, empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def find_or_unpack(folder: Path) -> dict[str, str]:
    """An environment in which Slurm's commands are found, unpacked under `folder` unless this machine has them. Raises
    Unavailable."""
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "srun", "munged")):
        return dict(os.environ)
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Unavailable("Slurm is not installed, and there is no apt-get to get it with")
    packages, root = folder / "packages", folder / "root"
    if not root.is_dir():
        packages.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=packages, text=True, capture_output=True,
                              timeout=120, check=False)
        if done.returncode:
            raise Unavailable(f"apt-get cannot download Slurm: {done.stderr.strip().splitlines()[-1]}")
        unpacking = folder / "unpacking"
        for package in packages.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(unpacking)], check=True)
        for program in ("slurmctld", "slurmd", "slurmstepd"):
            (unpacking / "usr" / "sbin" / program).symlink_to(f"{program}-wlm")
        unpacking.rename(root)
    libraries = next((root / "usr" / "lib").glob("*/slurm-wlm"))
    return {**os.environ, "PATH": os.pathsep.join([f"{root}/usr/bin", f"{root}/usr/sbin", os.environ["PATH"]]),
            "LD_LIBRARY_PATH": os.pathsep.join([str(libraries), str(libraries.parent)])}


def start(folder: Path, nodes: int = 4) -> Cluster:
    """Start Slurm in `folder` (an absolute path, short enough for a socket) and wait until its nodes are ready."""
    environment = find_or_unpack(folder)
    (folder / "state").mkdir(parents=True, exist_ok=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    program = Path(shutil.which("slurmctld", path=environment["PATH"]) or "")
    plugins = next((program.parents[1] / "lib").glob("*/slurm-wlm"), Path("/usr/lib/slurm"))
    ports, host = free_ports(nodes + 1), socket.gethostname().split(".")[0]
    names = tuple(f"n{number + 1}" for number in range(nodes))
    lines = [f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
             for name, port in zip(names, ports[1:], strict=True)]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, user=getpass.getuser(), plugins=plugins,
                                                            port=ports[0], nodes="\n".join(lines), names=",".join(names)))
    (folder / "prolog.sh").write_text(PROLOG.format(folder=folder))
    (folder / "prolog.sh").chmod(0o755)
    cluster = Cluster(folder, names, {**environment, "SLURM_CONF": str(folder / "slurm.conf")})
    cluster.call("munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
                 f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed", "--num-threads=2")
    cluster.start_controller()
    for name in names:
        (folder / f"spool.{name}").mkdir(exist_ok=True)
        cluster.start_node(name)
    cluster.until_idle()
    return cluster


def stop(folder: Path) -> None:
    """End everything that `start` started, and the jobs."""
    for file in [*folder.glob("slurmd.*.pid"), folder / "slurmctld.pid", folder / "munged.pid"]:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(file.read_text()), signal.SIGKILL)
        file.unlink(missing_ok=True)
    in_jobs = {pid for pid, _ in processes("SLURM_JOB_ID=", is_prefix=True)}
    for pid, _ in processes(f"SLURM_CONF={folder}/slurm.conf"):
        if pid in in_jobs or command_of(pid).startswith("slurmstepd"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["start", "stop"])
    parser.add_argument("folder", type=Path, help="where the cluster lives")
    parser.add_argument("--nodes", type=int, default=4, help="how many nodes it has")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.verb == "stop":
        stop(folder)
        return
    try:
        cluster = start(folder, options.nodes)
    except Unavailable as reason:
        raise SystemExit(f"cluster.py: {reason}") from None
    for name in ("PATH", "LD_LIBRARY_PATH", "SLURM_CONF"):
        if name in cluster.environment:
            print(f"export {name}={shlex.quote(cluster.environment[name])}")


if __name__ == "__main__":
    main()
