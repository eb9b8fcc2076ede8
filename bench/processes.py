"""CPU time of this process and its children, from /proc (Linux), and when they rest."""

import os
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
POLL = 0.05  # seconds between two looks


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
