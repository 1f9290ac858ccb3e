"""How much of the in-process speed is left over HTTP: ResNet-20 behind `robustbox.serve` on loopback, all sides in turns.

    python scripts/bench_http.py --threads 1

Sides: the model in this process (batches of 32, and single images), and the same through the client, as floats and as 8 bits in
batches of 32 (bar: 0.7 of the rows a second in process), and in single-image requests, 32 at once. The median round counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import uvicorn
from torch import Tensor

import robustbox as rb
from robustbox.accounts import Accounts
from robustbox.boxes import as_black_box
from robustbox.models.remote import RemoteBox
from robustbox.models.service_file import Request, ServiceFile
from robustbox.protocol import Answer, BlackBox
from robustbox.service import Service

BATCH, BAR, CONCURRENCY = 32, 0.7, 32


def sides(address: str, rows: Tensor) -> dict[str, Callable[[], int]]:
    """What each side does in one step: it returns how many rows it asked."""
    single = Request(batch=1)
    here = as_black_box(rb.load_model("cifar10-resnet20"))
    floats = RemoteBox(ServiceFile(url=address), "floats")
    bits = RemoteBox(ServiceFile(url=address, request=Request(encoding="uint8")), "8 bits")
    many = RemoteBox(ServiceFile(url=address, request=single, concurrency=CONCURRENCY), "single")
    accounts = torch.zeros(len(rows), dtype=torch.int64)

    def ask(box: Any, n: int) -> Callable[[], int]:
        def step() -> int:
            return len(box.answer(rows[:n], accounts[:n]))

        return step

    return {
        "in process, batches of 32": ask(here, BATCH),
        "http, batches of 32, floats": ask(floats, BATCH),
        "http, batches of 32, 8 bits": ask(bits, BATCH),
        "in process, single images": ask(here, 1),
        f"http, single images, {CONCURRENCY} at once": ask(many, 4 * CONCURRENCY),
    }


def rates(
    steps: dict[str, Callable[[], int]], rounds: int, seconds: float, process: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Rows a second, and a second of processor time of both processes, of each side in each round, the sides in turns."""
    speed: dict[str, list[float]] = {name: [] for name in steps}
    thrift: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            rows, start, before = 0, time.perf_counter(), used(process)
            while time.perf_counter() - start < seconds:
                rows += step()
            speed[name].append(rows / (time.perf_counter() - start))
            thrift[name].append(rows / max(used(process) - before, 1e-9))
    return speed, thrift


def shares(found: dict[str, list[float]]) -> dict[str, float]:
    """Each side's part of the model in process in batches, neighbour by neighbour: medians over rounds."""
    base = found["in process, batches of 32"]
    return {name: statistics.median(a / b for a, b in zip(each, base, strict=True)) for name, each in found.items()}


def used(process: int) -> float:
    """Processor time of this process and another one, in seconds; of this one alone where the system does not tell."""
    stat = Path(f"/proc/{process}/stat")
    other = sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) if stat.is_file() else 0
    return time.process_time() + other / os.sysconf("SC_CLK_TCK")


class Null(BlackBox):
    """A model that costs nothing."""

    name, input_shape, classes, scores = "null", (3, 32, 32), 10, "logit"

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        return Answer.of(torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows), 10))


def overhead(rows: Tensor, requests: int = 200) -> dict[str, float]:
    """Milliseconds of processor time, client and service together, of a request of 32 rows to a model that costs nothing."""
    found = {}
    with socket.socket(
        proto=socket.IPPROTO_TCP
    ) as door:  # by which asyncio knows that it may send small answers at once
        door.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(Service(Null(), Accounts()).application(), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        for encoding in ("npy", "uint8"):
            request = Request(encoding=encoding)
            box = RemoteBox(ServiceFile(url=f"http://127.0.0.1:{door.getsockname()[1]}", request=request), encoding)
            accounts = torch.zeros(BATCH, dtype=torch.int64)
            box.answer(rows[:BATCH], accounts)
            start = time.process_time()
            for _ in range(requests):
                box.answer(rows[:BATCH], accounts)
            found[encoding] = 1e3 * (time.process_time() - start) / requests
            box.close()
        server.should_exit = True
        thread.join()
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all sides in turns (9)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds a side and round (2)")
    parser.add_argument("--threads", type=int, help="threads of torch on both sides (its default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    environment = dict(os.environ)
    if options.threads:
        torch.set_num_threads(options.threads)
        environment["OMP_NUM_THREADS"] = str(options.threads)
    command = [sys.executable, "-m", "robustbox.serve", "--model", "cifar10-resnet20", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as service:
        try:
            assert service.stdout is not None
            address = service.stdout.readline().split()[-1]
            data = rb.load_data("foolbox:cifar10").images
            rows = data.repeat(7, 1, 1, 1)[: 4 * CONCURRENCY]  # 8-bit images: on the grid that uint8 needs
            speed, thrift = rates(sides(address, rows), options.rounds, options.seconds, service.pid)
        finally:
            service.terminate()
    report: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "rows_per_second": {name: statistics.median(each) for name, each in speed.items()},
        "share": shares(speed),
        "share_by_cpu": shares(thrift),
        "overhead_ms": overhead(rows),
    }
    for name, rate in report["rows_per_second"].items():
        share, by_cpu = report["share"][name], report["share_by_cpu"][name]
        bar = f"   bar {BAR} {'met' if share >= BAR else 'MISSED'}" if name.startswith("http, batches") else ""
        print(f"{name:<34}{rate:>8,.0f} rows/s   {share:.2f} of in process, {by_cpu:.2f} by processor time{bar}")
    costs = ", ".join(f"{encoding} {cost:.1f}" for encoding, cost in report["overhead_ms"].items())
    print(f"processor time of a request of {BATCH} rows beyond the model, client and service, ms: {costs}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
