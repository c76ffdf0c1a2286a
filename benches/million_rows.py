#!/usr/bin/env python3
"""Measures `plan`, `submit` and the time until the first step for a dataset of many short rows.

    python3 benches/million_rows.py BASE --programs target/release --dir DIR [--rows 1000000]

BASE is the directory of a base with a chat template, such as that of examples/smollm2. `--dir` is
for the rows, the caches and the state of the coordinator. The table has seconds and the peak of the
resident memory, for the first call and for a second one, which finds the tokens in the cache.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

WORDS = """time year people way day man thing woman life child world school state family student
group country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book eye job
word business issue side kind head house service friend father power hour game line end member law
car city community name president team minute idea kid body information back parent face others
level office door health person art war history party result change morning reason research girl guy
moment air teacher force education""".split()


def write_rows(path, rows):
    rng = random.Random(1)
    def text(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))
    with path.open("w") as file:
        for _ in range(rows):
            messages = [{"role": "user", "content": text(5, 40) + "?"},
                        {"role": "assistant", "content": text(3, 40) + "."}]
            file.write(json.dumps({"messages": messages}) + "\n")


def measure(command, env):
    """Returns the seconds and peak memory (MB) of a command, and what it printed."""
    started = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], env=env, stdout=subprocess.PIPE)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status != 0:
        sys.exit(f"{command[1]} failed")
    return seconds, usage.ru_maxrss / 1000, output


def peak_mb(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    data = args.dir / f"rows-{args.rows}.jsonl"
    if not data.exists():
        write_rows(data, args.rows)
    work = args.dir / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    job = work / "job.yaml"
    job.write_text(f"name: rows\nmodel: {{base: {args.base.resolve()}}}\n"
                   f"data: {{train: {data.resolve()}, max_length: 256}}\n"
                   "training: {max_steps: 1, global_batch_size: 4, micro_batch_size: 4}\n")
    env = os.environ | {"XDG_CACHE_HOME": str(work / "cache")}
    loractl = args.programs.resolve() / "loractl"
    print(f"{args.rows} rows, {data.stat().st_size / 1e6:.0f} MB")
    print("| | seconds | peak memory (MB) |\n| --- | --- | --- |")
    def row(name, seconds, memory):
        print(f"| {name} | {seconds:.1f} | {memory:.0f} |", flush=True)
    for name in ["`plan`", "`plan` again"]:
        seconds, memory, output = measure([loractl, "plan", job, "-o", "json"], env)
        row(name, seconds, memory)
    tokens = json.loads(output)["train"]["report"]["tokens"]
    address = f"127.0.0.1:{free_port()}"
    coordinator = subprocess.Popen(
        [args.programs / "lora-coordinator", "--set", f"state_dir={work / 'state'}",
         "--set", f"grpc.listen={address}", "--set", "http.listen="], stderr=subprocess.DEVNULL)
    worker = subprocess.Popen(
        [args.programs / "lora-worker", "--set", f"coordinator=http://{address}", "--set", "name=w0",
         "--set", f"cache_dir={work / 'worker'}", "--set", "peer.listen=127.0.0.1:0",
         "--set", "http.listen="], stderr=subprocess.DEVNULL)
    try:
        for name, cache in [("`submit`", "other"), ("`submit` again", "other")]:
            env["XDG_CACHE_HOME"] = str(work / cache)
            command = [loractl, "submit", job, "-o", "json", "--coordinator", address]
            deadline = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(address.split(":")).close()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        sys.exit("the coordinator does not listen")
                    time.sleep(0.05)
            seconds, memory, output = measure(command, env)
            row(name, seconds, memory)
            submitted, job_id = time.monotonic(), json.loads(output)["job_id"]
            while True:
                status = subprocess.run([loractl, "status", job_id, "-o", "json", "--coordinator", address],
                                        capture_output=True, check=True).stdout
                state = json.loads(status)
                if state["completed_steps"] >= 1:
                    break
                if state["state"] == "failed":
                    sys.exit(state["failure"])
                time.sleep(0.1)
            row(f"from {name} to the first step (worker)", time.monotonic() - submitted, peak_mb(worker.pid))
        row("coordinator", 0, peak_mb(coordinator.pid))
    finally:
        for process in [worker, coordinator]:
            process.send_signal(signal.SIGKILL)
            process.wait()
    print(f"{tokens} tokens, {tokens / args.rows:.0f} a row")


if __name__ == "__main__":
    main()
