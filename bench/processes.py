"""CPU time of this process and its children, from /proc (Linux), and when they rest; processes as ranks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.record import ROOT
from segformer.distributed.rendezvous import free_port

TICKS = os.sysconf("SC_CLK_TCK")
POLL = 0.05  # seconds between two looks
START_S = 600  # within which ranks must end


def cpu_seconds(children: list[int]) -> float:
    """CPU seconds, user and system, of this process and of live children."""
    return time.process_time() + sum(_of(pid) for pid in children)


def _of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def settle(children: list[int], seconds: float = 60) -> None:
    """Wait until the children have used no CPU for four looks: their queues are full."""
    still, last, end = 0, -1.0, time.monotonic() + seconds
    while still < 4 and time.monotonic() < end:
        time.sleep(POLL)
        now = sum(_of(pid) for pid in children)
        still, last = (still + 1 if now == last else 0), now


def resident_mib(pid: int) -> float:
    """Memory of a process that no other one shares, MiB (private pages of smaps_rollup)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def on_ranks(module: str, turn: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """Run `python -m <module> '<turn>'` as so many ranks; what each prints last, JSON."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(turn)],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=START_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, said, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"{turn}: a rank ended with {process.returncode}: {error[-3000:]}")
    return [json.loads(text.splitlines()[-1]) for text, _ in said]
