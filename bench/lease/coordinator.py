"""Starts every worker, lets them measure one at a time, writes each figure when it comes, and prints the table.

Arguments: full or tiny; then names of jobs (see jobs.py), if not all are wanted. Environment, in seconds from the start: a
worker that has not asked for a turn by DEADLINE is ended; everything ends by END. OUT and WORK are folders.

While a worker has its turn, all others are stopped (SIGSTOP). So they can prepare side by side, and nothing runs beside what
is timed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import packages
import processes
import table
import timing
from jobs import MODEL, Job, jobs

HERE = Path(__file__).resolve().parent
OUT, WORK = Path(os.environ["OUT"]), Path(os.environ["WORK"])
# A turn that takes longer ends its worker.
TURN_SECONDS = {"full": 150, "tiny": 900}
LARGE_BATCH = {"full": 8, "tiny": 2}
# What is left for CUDA's contexts.
MEMORY_SHARE = 0.93
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.draw,temperature.gpu"


def main() -> None:
    started = time.monotonic()
    size, *names = sys.argv[1:]
    known = {job.name: job for job in (MODEL, *jobs(LARGE_BATCH[size]))}
    if set(names) - set(known):
        sys.exit(f"unknown jobs: {' '.join(set(names) - set(known))}; there are: {' '.join(known)}")
    complaint = packages.complaint()
    if complaint:
        sys.exit(complaint)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clean(size)
    with (OUT / "results.jsonl").open("w") as file:
        lease = Lease(size, [job for name, job in known.items() if not names or name in names], started, file)
        try:
            lease.run()
        finally:
            lease.end()
            print(table.render(OUT / "results.jsonl", WORK / "outputs"), flush=True)


def clean(size: str) -> None:
    """Removes what an earlier run left, except a model of the same size."""
    told = WORK / "complete"
    if not told.exists() or told.read_text() != size:
        shutil.rmtree(WORK, ignore_errors=True)
    shutil.rmtree(WORK / "outputs", ignore_errors=True)
    (WORK / "outputs").mkdir(parents=True)
    (OUT / "logs").mkdir(parents=True, exist_ok=True)


class Running:
    """A job that has been started."""

    def __init__(self, job: Job, size: str):
        self.job, self.measured, self.waits_for = job, 0, ""
        self.connection, theirs = Pipe()
        self.log = OUT / "logs" / f"{job.name}.log"
        caches = {
            "JAX_COMPILATION_CACHE_DIR": WORK / "programs",
            "TORCHINDUCTOR_CACHE_DIR": WORK / "inductor" / job.name,
            "TRITON_CACHE_DIR": WORK / "triton" / job.name,
        }
        own = {"LEASE_CONNECTION": theirs.fileno(), "LEASE_WORKER": job.name, "LEASE_SIZE": size}
        own["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share the GPU
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, HERE / job.script, *job.flags],
                env=os.environ | {name: str(value) for name, value in (caches | own).items()},
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        theirs.close()

    def last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:200] if lines else "nothing was printed"


class Lease:
    """All workers of one run.

    Args:
      size: full or tiny.
      wanted: the jobs, in the order of their turns.
      started: `time.monotonic()` when the run began.
      file: gets one JSON object a line.
    """

    def __init__(self, size: str, wanted: list[Job], started: float, file: Any):
        self.size, self.order, self.started, self.file = size, wanted, started, file
        self.deadline, self.last_second = float(os.environ["DEADLINE"]), float(os.environ["END"])
        self.waiting = [MODEL, *(job for job in wanted if job is not MODEL)]
        self.running: list[Running] = []
        card = gpu()
        self.on_gpu = bool(card)
        self.gigabytes = MEMORY_SHARE * card["memory.total"] / 1000 if card else float("inf")
        self.at_once = len(os.sched_getaffinity(0)) if card else 2
        versions = timing.installed("jax", "flax", "optax", "torch", "diffusers", "peft")
        self.write(
            "coordinator", machine=card or "no GPU", cores=os.cpu_count(), size=size, versions=versions
        )

    def now(self) -> float:
        return time.monotonic() - self.started

    def write(self, worker: str, **figures: Any) -> None:
        line = json.dumps({"second": round(self.now(), 1), "worker": worker} | figures)
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def run(self) -> None:
        while (self.waiting or self.running) and self.now() < self.last_second:
            self.start()
            self.listen()
            self.drop_the_late()
            ready = [one for one in self.running if one.waits_for]
            if ready:
                self.give_turn(min(ready, key=lambda one: self.order.index(one.job)))

    def start(self) -> None:
        """Starts jobs in order while they fit. A job that does not fit lets smaller ones pass."""
        for job in list(self.waiting):
            taken = sum(one.job.gigabytes for one in self.running)
            fits = not self.running or taken + job.gigabytes <= self.gigabytes
            if fits and len(self.running) < self.at_once:
                self.waiting.remove(job)
                self.running.append(Running(job, self.size))

    def listen(self) -> None:
        """Takes messages that have come, or waits a moment for one."""
        by_connection = {one.connection: one for one in self.running}
        for connection in wait(list(by_connection), timeout=0.2):
            assert isinstance(connection, Connection)
            self.take(by_connection[connection])

    def take(self, one: Running) -> str:
        """Takes one message and returns its kind; "ended" if the worker has ended."""
        try:
            kind, content = one.connection.recv()
        except (EOFError, ConnectionResetError):
            self.ended(one)
            return "ended"
        if kind == "figures":
            self.write(one.job.name, **content)
        if kind == "ready":
            one.waits_for = content
        if kind == "done":
            one.measured += 1
        return kind

    def ended(self, one: Running) -> None:
        status = one.process.wait()
        self.running.remove(one)
        if status:
            self.write(one.job.name, failed=f"exit status {status}: {one.last_line()}")
        if status and one.job is MODEL:
            sys.exit("the model could not be made; see logs/model.log")

    def drop(self, one: Running, why: str) -> None:
        processes.end([one.process.pid])
        one.process.wait()
        self.running.remove(one)
        self.write(one.job.name, failed=why)

    def drop_the_late(self) -> None:
        if self.now() < self.deadline:
            return
        for one in [one for one in self.running if not one.measured and not one.waits_for]:
            self.drop(one, f"not ready after {self.deadline:.0f} s; last: {one.last_line()}")
        while self.waiting:
            self.write(self.waiting.pop(0).name, failed="not started: no room beside the others")

    def give_turn(self, one: Running) -> None:
        """Stops all other workers until this one has measured."""
        others = [other.process.pid for other in self.running if other is not one]
        what, one.waits_for = one.waits_for, ""
        processes.tell(others, signal.SIGSTOP)
        if self.on_gpu:
            time.sleep(0.5)  # the others' kernels that are queued
        begun = self.now()
        try:
            one.connection.send("go")
            self.measure(one, min(begun + TURN_SECONDS[self.size], self.last_second))
        except BrokenPipeError:
            self.ended(one)
        finally:
            self.write(one.job.name, turn=what, seconds=round(self.now() - begun, 1), after=gpu())
            processes.tell(others, signal.SIGCONT)

    def measure(self, one: Running, until: float) -> None:
        """Listens to one worker until its turn is over."""
        while self.now() < until:
            if one.connection.poll(0.05) and self.take(one) in ("done", "ended"):
                return
        self.drop(one, f"its turn was not over after {until:.0f} s")

    def end(self) -> None:
        """Ends everything that still runs and names it."""
        processes.end(one.process.pid for one in self.running)
        for one in self.running:
            self.write(one.job.name, failed=f"ended after {self.now():.0f} s; last: {one.last_line()}")
        for job in self.waiting:
            self.write(job.name, failed="not started: the time was over")
        shutil.make_archive(str(OUT / "logs"), "gztar", OUT / "logs")
        shutil.rmtree(OUT / "logs")


def gpu() -> dict[str, Any]:
    """Name, driver, memory and clocks of the first GPU; {} without one."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "--id=0"]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        return {}
    found: dict[str, Any] = dict(zip(QUERY.split(","), told.stdout.strip().split(", "), strict=True))
    return found | {"memory.total": float(found["memory.total"]) * 1.048576}


if __name__ == "__main__":
    main()
