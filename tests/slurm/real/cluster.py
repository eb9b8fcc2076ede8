"""A real Slurm on this machine: slurmctld, slurmdbd and some nodes, each in namespaces of its own.

    with Cluster(folder, nodes=2) as cluster:
        cluster.run("sinfo")                        on the login node, which is also the controller's
        cluster.cut_power("n1"); cluster.boot("n1")

The controller and every node have their own network, host name, mounts and process tree; the bridge between
them lies in the controller's namespace, so that nothing of the machine changes and clusters can run side by
side. SIGKILL of a node's first process is a power cut. Daemons, files and database live in `folder`; the rest
of the file system is shared, as it is on a cluster. Timers are those of tests, not of a site: a requeued job
waits 5 s, a node counts as lost after 10 s without an answer.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

PACKAGES = "slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin mariadb-server-core iproute2"
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "mariadbd", "sbatch", "ip", "unshare", "nsenter", "setpriv")
CONTROLLER = "ctl"
CTL_PORT, SLURMD_PORT, DBD_PORT = 16817, 16820, 16819
CPUS, MEMORY = 8, 8000  # of each node as Slurm believes it, whatever this machine has

# The first process of a namespace: bash, because it reaps what its children leave behind.
INIT = """
hostname {name}
mount --bind {hosts} /etc/hosts
ip link set lo up
{network}
echo ready > {ready}
while :; do sleep 3600 & wait; done
"""


class Cluster:
    """A running Slurm of nodes n0, n1, ...; partitions main (default) and urgent, which preempts it.

    The last `apart` nodes are a partition of their own, for what must not be disturbed.
    """

    def __init__(self, folder: Path, nodes: int = 2, apart: int = 0) -> None:
        self.folder = folder
        self.nodes = [f"n{index}" for index in range(nodes + apart)]
        self.main, self.apart = self.nodes[:nodes], self.nodes[nodes:]
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []

    @staticmethod
    def missing() -> str:
        """Why no cluster can be started here; empty where one can."""
        absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
        if absent:
            return f"needs {', '.join(absent)}: apt-get install {PACKAGES}"
        if os.geteuid() != 0:
            return "needs root, to give each node namespaces of its own"
        tried = subprocess.run(["unshare", "-n", "-u", "-m", "-p", "--fork", "true"], capture_output=True)
        return "" if tried.returncode == 0 else "needs namespaces, which this container does not allow"

    def __enter__(self) -> Self:
        try:
            self._write_files()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for init in self._inits.values():
            init.kill()
        for process in [*self._inits.values(), *self._daemons]:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    # What a test does to the cluster

    def run(
        self, *command: str | Path, check: bool = True, where: str = CONTROLLER, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, in the working directory of the caller."""
        command, environment = self._inside(where, command), self._environment()
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=180, **options
        )
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def cut_power(self, node: str) -> None:
        """SIGKILL everything on the node at once."""
        self._inits[node].kill()
        self._inits[node].wait()

    def boot(self, node: str) -> None:
        """Start a node, again after a power cut."""
        self._start_namespace(node)
        self.start_slurmd(node)

    def start_slurmd(self, node: str) -> None:
        """Start the node's daemon."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def nodes_of(self, job: str | int) -> list[str]:
        """The nodes that the job has now."""
        names = self.job(job).get("NodeList", "")
        if not names or "null" in names:
            return []
        return self.run("scontrol", "show", "hostnames", names).stdout.split()

    def ranks(self, node: str) -> list[str]:
        """The process ids, on the node, of the ranks that run there."""
        pattern = "^[^ ]*python[^ ]* .*slurm_job.py rank"
        return self.run("pgrep", "-f", pattern, where=node, check=False).stdout.split()

    def signal(self, name: str, node: str) -> bool:
        """Send a signal to the ranks on a node; False where there are none."""
        found = self.ranks(node)
        return bool(found) and self.run("kill", f"-{name}", *found, where=node, check=False).returncode == 0

    def signaled(self, node: str) -> bool:
        """Whether a USR2 waits for every rank on the node: they are stopped, or busy in C."""
        text = self.run(
            "grep", "-hE", "^(SigPnd|ShdPnd)", *(f"/proc/{rank}/status" for rank in self.ranks(node)),
            "/proc/1/status", where=node, check=False,
        ).stdout  # fmt: skip
        masks = [int(line.split()[1], 16) >> (signal.SIGUSR2 - 1) & 1 for line in text.splitlines()]
        return all(own | shared for own, shared in zip(masks[:-2:2], masks[1:-2:2], strict=True))

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL the node's daemon; the steps of its jobs live on."""
        self.run("pkill", "-KILL", "-x", "slurmd", where=node)

    def restart_controller(self) -> None:
        """SIGKILL slurmctld and start it again: it reads what it has saved."""
        self.run("pkill", "-KILL", "-x", "slurmctld")
        self._daemon(CONTROLLER, "slurmctld", "-D")
        self.wait(lambda: self.run("scontrol", "ping", check=False).stdout.count("UP"), 30, "slurmctld again")

    def down(self, node: str) -> bool:
        """Whether the node is without power or without its daemon."""
        if self._inits[node].poll() is not None:
            return True
        return self.run("pgrep", "-x", "slurmd", where=node, check=False).returncode != 0

    def idle(self) -> bool:
        """Whether every node of main could take a job now."""
        found = self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False).stdout.split()
        return found == [str(len(self.main))]

    def job(self, job: str | int) -> dict[str, str]:
        """What the controller knows of a job, by the names of `scontrol show job`."""
        text = self.run("scontrol", "show", "job", "-o", str(job)).stdout
        pairs = (word.partition("=") for word in text.split())
        return {key: value for key, _, value in pairs}

    def wait(self, what: Callable[[], object], timeout_s: float, why: str = "") -> None:
        """Wait until a condition holds; the end of every log where it doesn't in time."""
        end = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() > end:
                raise TimeoutError(f"{why or what} within {timeout_s:.0f} s\n{self.logs()}")
            time.sleep(0.2)

    def wait_for_state(self, job: str | int, *states: str, timeout_s: float) -> None:
        """Wait until the job is in one of these states."""
        self.wait(lambda: self.job(job)["JobState"] in states, timeout_s, f"job {job} {' or '.join(states)}")

    def logs(self, lines: int = 15) -> str:
        """The end of each daemon's log and of the queue."""
        tails = []
        for path in sorted((self.folder / "log").glob("*.log")):
            tails.append(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-lines:]))
        queue = self.run("squeue", "-a", check=False)
        return "\n".join([*tails, queue.stdout + queue.stderr])

    # How it comes up

    def _start(self) -> None:
        self._start_namespace(CONTROLLER)
        self._daemon(CONTROLLER, "mariadbd", f"--defaults-file={self.folder}/my.cnf")
        self._until((self.folder / "mysql.sock").exists, "mariadbd")
        self._daemon(CONTROLLER, "slurmdbd", "-D")
        port = f":{DBD_PORT:04X}"
        self._until(
            lambda: port in self.run("cat", "/proc/net/tcp", "/proc/net/tcp6", check=False).stdout, "slurmdbd"
        )
        self.run("sacctmgr", "-i", "-Q", "add", "cluster", "mini")
        self._daemon(CONTROLLER, "slurmctld", "-D", "-i")
        for node in self.nodes:
            self.boot(node)
        self._until(self.idle, "idle nodes")

    def _until(self, what: Callable[[], object], name: str) -> None:
        self.wait(what, 60, f"{name} up")

    def _start_namespace(self, name: str) -> None:
        ready = self.folder / f"ready.{name}"
        ready.unlink(missing_ok=True)
        index = 254 if name == CONTROLLER else self.nodes.index(name) + 1
        bridge = "ip link add br0 type bridge; ip addr add 10.77.0.254/24 dev br0; ip link set br0 up"
        network = bridge if name == CONTROLLER else "while ! ip link set eth0 up; do sleep 0.02; done"
        script = INIT.format(name=name, hosts=self.folder / "hosts", ready=ready, network=network)
        flags = ["-n", "-u", "-m", "-p", "--fork", "--kill-child", "--mount-proc"]
        # The kernel ends the cluster with the process that has made it, however that ends.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *flags, "bash", "-c", script]
        self._inits[name] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        if name != CONTROLLER:
            self._connect(name, index)
        self._until(ready.exists, f"namespace {name}")

    def _connect(self, name: str, index: int) -> None:
        """A cable from the node to the bridge, which lies in the controller's namespace."""
        outer, inner, port = self._first_process(CONTROLLER), self._first_process(name), f"p{index}"

        def ip(process: int, command: str, check: bool = True) -> None:
            enter = ["nsenter", "-t", str(process), "-n", "ip", *command.split()]
            subprocess.run(enter, check=check, capture_output=not check)

        ip(outer, f"link del {port}", check=False)  # of before a power cut
        ip(outer, f"link add {port} type veth peer name eth0 netns {inner}")
        ip(outer, f"link set {port} master br0 up")
        ip(inner, f"addr add 10.77.0.{index}/24 dev eth0")

    def _first_process(self, name: str) -> int:
        """The process that `unshare` has forked: PID 1 of the namespace."""
        children = Path(f"/proc/{self._inits[name].pid}/task/{self._inits[name].pid}/children")
        end = time.monotonic() + 10
        while not (found := children.read_text().split()):
            if time.monotonic() > end:
                raise TimeoutError(f"no first process of {name}")
            time.sleep(0.01)
        return int(found[0])

    def _inside(self, where: str, command: Sequence[str | Path]) -> list[str]:
        target = ["nsenter", "-t", str(self._first_process(where)), "-n", "-u", "-m", "-p"]
        return [*target, f"--wd={Path.cwd()}", *map(str, command)]

    def _daemon(self, where: str, *command: str) -> None:
        name = command[0] if where == CONTROLLER else f"{command[0]}.{where}"
        options = {"env": self._environment(), "start_new_session": True}
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(self._inside(where, command), stdout=log, stderr=log, **options)
            )

    def _environment(self) -> dict[str, str]:
        own = {"SLURM_CONF": f"{self.folder}/slurm.conf", "MYSQL_UNIX_PORT": f"{self.folder}/mysql.sock"}
        return {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | own | {"PATH": _path()}

    def _write_files(self) -> None:
        folder = self.folder
        for name in ("log", "state", "db", "tmp", "dev", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(8):  # copies of /dev/null: a plain file is refused, a count alone counts none
            os.mknod(folder / f"dev/gpu{index}", 0o666 | 0o020000, os.makedev(1, 3))
        addresses = {CONTROLLER: "10.77.0.254"}
        addresses |= {node: f"10.77.0.{index}" for index, node in enumerate(self.nodes, start=1)}
        files = {
            "slurm.conf": self._slurm_conf(),
            "gres.conf": f"Name=gpu Type=a100 File={folder}/dev/gpu[0-3]\n"
            f"Name=gpu Type=a100_1g.5gb File={folder}/dev/gpu[4-7]\n",
            "slurmdbd.conf": SLURMDBD.format(folder=folder, ctl=CONTROLLER, port=DBD_PORT),
            "my.cnf": MARIADB.format(folder=folder),
            "hosts": "127.0.0.1 localhost\n"
            + "".join(f"{a} {n}\n::ffff:{a} {n}\n" for n, a in addresses.items()),
        }
        for name, text in files.items():
            (folder / name).write_text(text)
        (folder / "slurmdbd.conf").chmod(0o600)

    def _slurm_conf(self) -> str:
        nodes = "".join(
            f"NodeName={node} NodeHostname={node} NodeAddr=10.77.0.{index} Port={SLURMD_PORT} CPUs={CPUS} "
            f"RealMemory={MEMORY} Gres=gpu:a100:4,gpu:a100_1g.5gb:4\n"
            for index, node in enumerate(self.nodes, start=1)
        )
        apart = f"PartitionName=apart Nodes={','.join(self.apart)}\n" if self.apart else ""
        names = {"folder": self.folder, "ctl": CONTROLLER, "ctl_port": CTL_PORT, "dbd_port": DBD_PORT}
        return SLURM.format(**names, nodes=nodes, names=",".join(self.main)) + apart


def _path() -> str:
    """Daemons lie in folders that a user's PATH often lacks."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


SLURM = """
ClusterName=mini
SlurmctldHost={ctl}(10.77.0.254)
SlurmctldPort={ctl_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
# no cgroups, no pinning: the nodes share one machine
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
# the machine has fewer cores and less memory than the nodes say
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={ctl}
AccountingStoragePort={dbd_port}
AccountingStorageTRES=gres/gpu
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0
JobRequeue=1
MinJobAge=3600
KillWait=10
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}PartitionName=main Nodes={names} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes={names} PriorityTier=10 PreemptMode=OFF
"""

SLURMDBD = """
AuthType=auth/none
DbdHost={ctl}
DbdPort={port}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
"""

# Names of temporary tables hold the process id, which two clusters in namespaces of their own share.
MARIADB = """
[mariadbd]
datadir={folder}/db
tmpdir={folder}/tmp
socket={folder}/mysql.sock
pid-file={folder}/mysql.pid
user=root
skip-grant-tables
skip-networking
innodb_buffer_pool_size=64M
innodb_log_file_size=16M
innodb_lock_wait_timeout=900
innodb_flush_log_at_trx_commit=0
innodb_flush_method=nosync
performance_schema=OFF
"""
