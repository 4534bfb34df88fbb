#!/usr/bin/env python3
"""Measures burla beside the tools that one would use instead, in one run on one machine.

    cargo build --release --package burla-cli && python3 bench/run.py
    python3 bench/run.py --only cold,calls --rounds 9
    python3 bench/run.py --peers                  # without burla

bench/README.md says what each workload is. Python 3.9 or later, standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import filecmp
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Optional

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
MIB = 1 << 20
TAG = "BURLA_BENCH_RUN"
LIMIT = 600  # seconds, after which a run counts as hanging


# --- one run of one contender ---------------------------------------------------------------------------


@dataclass
class Contender:
    """One way of doing a workload: argv reads what `feed` (a command or a file) gives on stdin."""

    name: str
    argv: list[str]
    feed: list[str] | Path | None = None
    most_rounds: int = 1000

    @property
    def program(self) -> str:
        return self.argv[0]


@dataclass
class Run:
    wall: float
    cpu: float  # of the driver and all the children that it waited for
    peak_kib: int  # of the driver alone, its VmHWM
    error: str | None


class Watcher(threading.Thread):
    """Samples the peak memory of one process, and kills its session when it takes too long."""

    def __init__(self, pid: int, every: float):
        super().__init__(daemon=True)
        self.pid, self.every = pid, every
        self.peak_kib, self.hung, self.over = 0, False, threading.Event()

    def run(self) -> None:
        end = time.monotonic() + LIMIT
        while not self.over.wait(self.every):
            with contextlib.suppress(OSError, StopIteration), open(f"/proc/{self.pid}/status") as status:
                peak = next(line for line in status if line.startswith("VmHWM:"))
                self.peak_kib = max(self.peak_kib, int(peak.split()[1]))
            if time.monotonic() > end:
                self.hung = True
                with contextlib.suppress(OSError):
                    os.killpg(self.pid, signal.SIGKILL)
                return


def run_once(who: Contender, cwd: Path, env: dict[str, str], sample_every: float) -> Run:
    """Runs a contender with stdout and stderr in files of `cwd`."""
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(cwd / "out", "wb"))
        err = stack.enter_context(open(cwd / "err", "wb"))
        started = time.perf_counter()
        producer = None
        if isinstance(who.feed, list):
            producer = subprocess.Popen(who.feed, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)
            stdin = producer.stdout
        elif who.feed:
            stdin = stack.enter_context(open(who.feed, "rb"))
        else:
            stdin = subprocess.DEVNULL
        driver = subprocess.Popen(who.argv, stdin=stdin, stdout=out, stderr=err, env=env, cwd=ROOT,
                                  start_new_session=True)
        if producer:
            producer.stdout.close()
        watcher = Watcher(driver.pid, sample_every)
        watcher.start()
        _, status, usage = os.wait4(driver.pid, 0)
        wall = time.perf_counter() - started
        driver.returncode = os.waitstatus_to_exitcode(status)
        watcher.over.set()
        watcher.join()
        if producer:
            producer.wait()
    left = kill_leftovers(env[TAG])
    error = None
    if watcher.hung:
        error = f"killed after {LIMIT} s"
    elif driver.returncode:
        last = (cwd / "err").read_bytes()[-2000:].decode(errors="replace").strip().splitlines()[-3:]
        error = f"exit {driver.returncode}: {' | '.join(last)}"
    elif left:
        error = f"left {left} processes behind"
    return Run(wall, usage.ru_utime + usage.ru_stime, watcher.peak_kib, error)


def kill_leftovers(tag: str) -> int:
    """Kills what a run started and did not end, and tells how many processes that were."""
    if not tagged(tag):
        return 0
    time.sleep(0.1)  # those that are just about to end are no leftovers
    left = tagged(tag)
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return len(left)


def tagged(tag: str) -> list[int]:
    """The processes that a run started: their environment says so, whatever their parent and session."""
    mark, found = f"{TAG}={tag}".encode(), []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
            if mark in environ.read().split(b"\0"):
                found.append(int(pid))
    return found


# --- workloads ------------------------------------------------------------------------------------------


@dataclass
class Workload:
    name: str
    title: str
    unit: str
    amount: float | None  # of units that one run gets through; None: a run's time is the result
    goal: str
    contenders: list[Contender]
    check: Callable[[Path, Path, Contender], Optional[str]] = lambda out, err, who: None
    rounds: int | None = None  # None: as --rounds says
    sample_every: float = 0.02
    meets: Callable[[dict, list[dict]], Optional[bool]] = lambda row, rows: None  # does burla's row, beside all
    runs: dict[str, list[Run]] = field(default_factory=dict)


def python(*args: str) -> list[str]:
    return ["python3", *args]


PEER = str(ROOT / "bench" / "peer.py")


def cold(a) -> Workload:
    three = ["printf", r"1\n2\n3\n"]
    twice = "import sys; print(int(sys.argv[1]) * 2)"
    return Workload(
        "cold", "a cold map of 3 inputs", "s", None, "0.15 s",
        [
            Contender("burla", [a.burla, "map", "examples/arithmetic.py:double"], three),
            Contender("multiprocessing Pool.map", python(PEER, "map", "double"), three),
            Contender(f"xargs -P{CORES} python3 -c", ["xargs", f"-P{CORES}", "-n1", *python("-c", twice)], three),
            Contender(f"parallel -j{CORES} python3 -c",
                      ["parallel", f"-j{CORES}", "-q", *python("-c", twice)], three),
            Contender(f"xargs -P{CORES} echo (no Python)", ["xargs", f"-P{CORES}", "-n1", "echo"], three),
            Contender(f"parallel -j{CORES} echo (no Python)", ["parallel", f"-j{CORES}", "echo"], three),
        ],
        check=lambda out, err, who: None if len(out.read_bytes().split()) == 3 else "not 3 results",
        rounds=3 * a.rounds, sample_every=0.004,
        meets=lambda row, rows: row["median"] <= 0.15,
    )


def commands(a) -> Workload:
    n = 200 if a.quick else 2000
    seq = ["seq", str(n)]
    return Workload(
        "commands", f"{n:,} x /bin/true {{}}", "commands/s", n, "the rate of xargs -P",
        [
            Contender("burla", [a.burla, "map", "--", "/bin/true", "{}"], seq),
            Contender(f"xargs -P{CORES} -I{{}}", ["xargs", f"-P{CORES}", "-I{}", "/bin/true", "{}"], seq),
            Contender(f"xargs -P{CORES} -n1", ["xargs", f"-P{CORES}", "-n1", "/bin/true"], seq),
            Contender(f"parallel -j{CORES}", ["parallel", f"-j{CORES}", "/bin/true", "{}"], seq, 3),
            Contender("multiprocessing, subprocess.run", python(PEER, "commands", "/bin/true"), seq),
        ],
        meets=as_fast_as_xargs,
    )


def as_fast_as_xargs(row: dict, rows: list[dict]) -> bool | None:
    rates = [other["median"] for other in rows if other["who"].startswith("xargs")]
    return row["median"] >= max(rates) if rates else None


def doubles(a, n: int):
    """A check that line i of the output is twice line i of `seq n`."""
    expected = a.tmp / f"doubled-{n}"
    if not expected.exists():
        with open(expected, "w") as file:
            file.writelines(f"{2 * i}\n" for i in range(1, n + 1))
    return lambda out, err, who: None if filecmp.cmp(out, expected, shallow=False) else "wrong results"


def calls(a) -> Workload:
    n = 100_000 if a.quick else 1_000_000
    seq = ["seq", str(n)]
    return Workload(
        "calls", f"{n:,} trivial Python calls", "calls/s", n, "400,000 calls/s on two cores",
        [
            Contender("burla", [a.burla, "map", "examples/arithmetic.py:double", "-"], seq),
            Contender("multiprocessing Pool.map", python(PEER, "map", "double"), seq),
            Contender("multiprocessing imap, chunks of 1,000", python(PEER, "imap", "double", "1000"), seq),
            Contender(f"parallel --pipe -j{CORES}, a loop each",
                      ["parallel", "--pipe", "-k", f"-j{CORES}", "--block", "1M", *python(PEER, "loop", "double")],
                      seq),
            Contender("a loop in one process", python(PEER, "loop", "double"), seq),
        ],
        check=doubles(a, n), meets=lambda row, rows: row["median"] >= 400_000,
    )


def text(a) -> Workload:
    n = 100 if a.quick else 1000
    file = a.tmp / "text.txt"
    write_text(file, n)

    def check(out: Path, err: Path, who: Contender) -> str | None:
        return None if out.read_bytes() == f"{MIB}\n".encode() * n else "wrong results"

    return Workload(
        "text", f"{n:,} lines of 1 MiB of text", "MiB/s", n, "500 MiB/s",
        [
            Contender("burla", [a.burla, "map", "--input-format", "lines", "examples/words.py:length", str(file)]),
            Contender("multiprocessing imap", python(PEER, "imap", "length", "1"), file),
            Contender("multiprocessing imap, chunks of 10", python(PEER, "imap", "length", "10"), file),
            Contender(f"parallel --pipepart -j{CORES}, a loop each",
                      ["parallel", "--pipepart", "-k", f"-j{CORES}", "--block", "32M", "-a", str(file),
                       *python(PEER, "loop", "length")]),
            Contender("a loop in one process", python(PEER, "loop", "length"), file),
        ],
        check=check, meets=lambda row, rows: row["median"] >= 500,
    )


def write_text(path: Path, lines: int) -> None:
    """Lines of exactly 1 MiB of ASCII prose, quotes and backslashes included; no two are alike."""
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkqjxz", k=rng.randint(1, 10))) for _ in range(5000)]
    marks = [",", ".", ";", "!", "?", '"', "'", "\\", "\t"]
    prose = []
    for _ in range(250_000):
        prose.append(rng.choice(words) + (rng.choice(marks) if rng.random() < 0.15 else ""))
    block = " ".join(prose)[:MIB]
    assert len(block) == MIB
    with open(path, "w") as file:
        for i in range(lines):
            file.write(f"{i:08d}{block[8:]}\n")


def big_map(a) -> Workload:
    n = 500_000 if a.quick else 5_000_000
    seq = ["seq", str(n)]
    return Workload(
        "big-map", f"{n:,} inputs doubled, in bounded memory", "s", None, "a peak under 300 MB",
        [
            Contender("burla", [a.burla, "map", "examples/arithmetic.py:double", "-"], seq),
            Contender("multiprocessing Pool.map", python(PEER, "map", "double"), seq, 1),
            Contender("multiprocessing imap, chunks of 10,000", python(PEER, "imap", "double", "10000"), seq, 1),
        ],
        check=doubles(a, n), rounds=1 if a.quick else min(3, a.rounds),
        meets=lambda row, rows: row["peak_mib"] * 1.048576 < 300,
    )


def logs(a) -> Workload:
    n, each = (100 if a.quick else 1000), 100
    seq = ["seq", "0", str(n - 1)]

    def check(out: Path, err: Path, who: Contender) -> str | None:
        if who.name == "burla":
            found = re.findall(rb"^\[(\d+)\] L (\d+) (\d+)$", err.read_bytes(), re.M)
            astray = sum(index != call for index, call, _ in found)
        else:
            found = [(None, *hit) for hit in re.findall(rb"^L (\d+) (\d+)$", out.read_bytes(), re.M)]
            astray = 0
        lost = n * each - len({(call, line) for _, call, line in found})
        repeated = len(found) + lost - n * each
        return f"{lost} lost or torn, {repeated} repeated, {astray} astray" if lost or repeated or astray else None

    return Workload(
        "logs", f"{n:,} calls that print {each} lines each", "lines/s", n * each, "none lost, none torn",
        [
            Contender("burla", [a.burla, "map", "bench/chatty.py:chatty", "-"], seq),
            Contender("multiprocessing (lines without their call)", python(PEER, "logs"), seq),
        ],
        check=check, meets=lambda row, rows: not row["error"],
    )


WORKLOADS = {"cold": cold, "commands": commands, "calls": calls, "text": text, "big-map": big_map, "logs": logs}


# --- running them side by side --------------------------------------------------------------------------


def measure(workload: Workload, a, env: dict[str, str]) -> list[dict]:
    """All contenders in turn, round after round, so that a slow minute of the machine hits them alike."""
    rounds = workload.rounds or a.rounds
    cwd = a.tmp / "run"
    cwd.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    first = -1 if workload.sample_every < 0.02 else 0  # short runs get a round that does not count
    errors: dict[str, str] = {}
    for turn in range(first, rounds):
        for who in workload.contenders:
            if turn >= who.most_rounds:
                continue
            note(f"{workload.name}: round {turn + 1} of {rounds}: {who.name}")
            run = run_once(who, cwd, env, workload.sample_every)
            run.error = run.error or workload.check(cwd / "out", cwd / "err", who)
            if run.error:
                errors[who.name] = run.error
            if turn >= 0:
                workload.runs.setdefault(who.name, []).append(run)
    note("")
    rows = [row_of(workload, who.name, errors.get(who.name), load) for who in workload.contenders]
    for row in rows:
        if row["who"] == "burla":
            row["meets_goal"] = workload.meets(row, rows)
    return rows


def row_of(workload: Workload, name: str, error: str | None, load: float) -> dict:
    runs = workload.runs[name]
    values = [workload.amount / run.wall if workload.amount else run.wall for run in runs]
    return {
        "workload": workload.name, "who": name, "unit": workload.unit, "runs": len(runs),
        "median": statistics.median(values), "min": min(values), "max": max(values),
        "wall_s": [run.wall for run in runs],
        "cpu_s": statistics.median(run.cpu for run in runs),
        "peak_mib": max(run.peak_kib for run in runs) / 1024,
        "error": error, "load_at_start": load,
    }


def note(text: str) -> None:
    """Shows on a terminal what is going on."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def table(workload: Workload, rows: list[dict]) -> str:
    def number(x: float) -> str:
        return f"{x:.3f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}"

    lines = [
        f"\n**{workload.name}**: {workload.title}; goal: {workload.goal}\n",
        f"| who | {workload.unit} (median) | min .. max | runs | CPU s | driver's peak MiB | |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        remark = row["error"] or {True: "meets the goal", False: "misses the goal"}.get(row.get("meets_goal"), "")
        remark = remark.replace("|", "/")
        name, median = row["who"], number(row["median"])
        if name == "burla":
            name, median = f"**{name}**", f"**{median}**"
        lines.append(f"| {name} | {median} | {number(row['min'])} .. {number(row['max'])} | {row['runs']} "
                     f"| {row['cpu_s']:.2f} | {row['peak_mib']:.0f} | {remark} |")
    return "\n".join(lines)


def machine() -> dict:
    model = "unknown CPU"
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as info:
        model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model, "cores": CORES, "memory_gib": round(memory / 2**30, 1), "kernel": platform.release(),
        "python": platform.python_version(), "load_at_start": os.getloadavg(),
        "xargs": version("xargs"), "parallel": version("parallel"),
    }


def version(program: str) -> str | None:
    if not shutil.which(program):
        return None
    out = subprocess.run([program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    return (re.findall(r"\d[\d.]+", out) or ["unknown"])[0]


def environment(tmp: Path) -> dict[str, str]:
    """As at a user's shell, with python3 the interpreter that runs this script, for burla and its peers alike."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED" and not k.startswith("BURLA_")}
    folder = Path(sys.executable).parent
    if (folder / "python3").exists():
        env["PATH"] = f"{folder}{os.pathsep}{env.get('PATH', os.defpath)}"
    parallel_home = tmp / "parallel"
    parallel_home.mkdir()
    (parallel_home / "will-cite").touch()
    env["PARALLEL_HOME"] = str(parallel_home)
    env[TAG] = f"{os.getpid()}-{time.time_ns()}"
    os.environ["PATH"] = env["PATH"]  # what is looked up below is what will run
    return env


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description="Measures burla beside GNU parallel, xargs and multiprocessing.")
    ap.add_argument("--only", metavar="W,...", help=f"of {', '.join(WORKLOADS)}")
    ap.add_argument("--rounds", type=int, default=5, help="how often each contender runs (default 5; a cold map thrice as often)")
    ap.add_argument("--quick", action="store_true", help="a tenth of the work, two rounds: does it run at all?")
    ap.add_argument("--burla", default=os.environ.get("BURLA", str(ROOT / "target/release/burla")), metavar="PATH")
    who = ap.add_mutually_exclusive_group()
    who.add_argument("--peers", action="store_true", help="leave burla out")
    who.add_argument("--alone", action="store_true", help="leave the peers out")
    ap.add_argument("--tmp", type=Path, help="where temporary files go (1.1 GB)")
    ap.add_argument("--json", type=Path, metavar="FILE", help="default: a file by date in bench/results/")
    a = ap.parse_args()
    a.names = a.only.split(",") if a.only else list(WORKLOADS)
    unknown = [name for name in a.names if name not in WORKLOADS]
    if unknown:
        ap.error(f"no workload is called {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if a.rounds < 1:
        ap.error("--rounds must be at least 1")
    if a.quick:
        a.rounds = min(2, a.rounds)
    a.burla = os.path.abspath(a.burla)
    if not a.peers and not os.access(a.burla, os.X_OK):
        ap.error(f"there is no {a.burla}\nhint: cargo build --release --package burla-cli, or --peers")
    return a


def wanted(who: Contender, a) -> bool:
    if who.name == "burla":
        return not a.peers
    return not a.alone and shutil.which(who.program) is not None


def main() -> int:
    a = arguments()
    facts = machine()
    print(f"{facts['cpu']}, {CORES} cores, {facts['memory_gib']} GiB, Linux {facts['kernel']}, "
          f"Python {facts['python']}, xargs {facts['xargs']}, GNU parallel {facts['parallel']}; "
          f"load at start {facts['load_at_start'][0]:.2f}")
    missing = [program for program in ("xargs", "parallel") if not facts[program]]
    if missing and not a.alone:
        print(f"not installed, so not measured: {', '.join(missing)}")
    if facts["load_at_start"][0] > 0.5:
        print(f"warning: a load of {facts['load_at_start'][0]:.2f} before anything ran; others use this machine")

    results: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="burla-bench-", dir=a.tmp) as tmp:
        a.tmp = Path(tmp)
        env = environment(a.tmp)
        try:
            for name in a.names:
                workload = WORKLOADS[name](a)
                workload.contenders = [who for who in workload.contenders if wanted(who, a)]
                if workload.contenders:
                    rows = measure(workload, a, env)
                    results += rows
                    print(table(workload, rows), flush=True)
        finally:
            kill_leftovers(env[TAG])
    save(a, {"machine": facts, "quick": a.quick, "rounds": a.rounds, "rows": results})
    return 1 if any(row["who"] == "burla" and row["error"] for row in results) else 0


def save(a, report: dict) -> None:
    file = a.json or ROOT / "bench" / "results" / f"{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    shown = os.path.relpath(file)
    print(f"\nevery run is in {file if shown.startswith('..') else shown}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
