"""Throws bytes at `python -m robustbox.serve`: good bodies with errors, and requests that are no HTTP; nothing may break.

    python scripts/fuzz_serve.py --seconds 600

A run fails at the first answer of 5xx, the first body that hangs, or when the service dies, grows by more than 200 MiB, or no
longer answers a good request as at the start. Prints what it sent and what came of it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np
from PIL import Image

from robustbox.wire import NPY, pack

ROWS = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
GROWTH = 200 * 2**20
"""Bytes by which the service may grow."""
JUNK = [
    b"\x00",
    b"\xff",
    b"{",
    b"[",
    b'"',
    b"\\",
    b"nan",
    b"1e999",
    b"-1",
    b"99999999999999999999",
    b"(",
    b"'|O'",
    b"\r\n",
]


def picture(kind: str) -> bytes:
    """A grey picture as a file."""
    file = io.BytesIO()
    Image.fromarray((ROWS[0, 0] * 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def corpus() -> list[tuple[str, bytes]]:
    """Good bodies, by content type."""
    files = [base64.b64encode(picture(kind)).decode() for kind in ("PNG", "JPEG")]
    return [
        (NPY, pack(ROWS)),
        (NPY, pack((ROWS * 255).astype(np.uint8), np.array([0, -1, 5]))),
        ("application/json", json.dumps({"rows": ROWS[:1].tolist(), "accounts": [3]}).encode()),
        ("application/json", json.dumps({"images": files}).encode()),
        ("image/png", picture("PNG")),
        ("image/jpeg", picture("JPEG")),
    ]


def harmed(body: bytes, rng: random.Random, everything: list[tuple[str, bytes]]) -> bytes:
    """A body with some errors."""
    found = bytearray(body)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(found) + 1)
        what = rng.randrange(7)
        if what == 0 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del found[at:]
        elif what == 2:
            found[at:at] = rng.choice(JUNK) * rng.choice((1, 1, 5, 2000))
        elif what == 3:
            del found[at : at + rng.randrange(64)]
        elif what == 4:
            other = rng.choice(everything)[1]
            found[at:at] = other[rng.randrange(len(other)) :]
        elif what == 5 and found:
            head = min(len(found), 128)  # where the headers of formats stand
            found[rng.randrange(head)] = rng.randrange(256)
        else:
            found += found[:at]
    return bytes(found[: 2**20])


def raw(port: int, request: bytes) -> int:
    """Send bytes, hear a status; 0 where the service hung up or waits for more."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line, contextlib.suppress(OSError):
        line.sendall(request)
        line.shutdown(socket.SHUT_WR)
        answer = line.recv(65536)
        if answer.startswith(b"HTTP/1.1 "):
            return int(answer[9:12])
    return 0


def request_of(kind: str, body: bytes, rng: random.Random) -> bytes:
    """A request as bytes, with a length or type or key that need not be true."""
    length = rng.choice((len(body), len(body), len(body) // 2, len(body) + 9, -1, 10**12))
    head = [
        rng.choice(
            (
                b"POST /v1/answer HTTP/1.1",
                b"POST /v1/answer HTTP/1.0",
                b"PUT /v1/answer HTTP/1.1",
                b"GET /v1/model HTTP/1.1",
            )
        ),
        b"Host: x",
        b"Content-Type: " + kind.encode(),
        rng.choice((b"Content-Length: %d" % length, b"Transfer-Encoding: chunked", b"X: y")),
        rng.choice(
            (b"Idempotency-Key: k%d" % rng.randrange(9), b"Robustbox-Account: %d" % rng.getrandbits(70), b"Accept: */*")
        ),
        b"Authorization: " + bytes(rng.randrange(256) for _ in range(rng.randrange(9))),
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def resident(process: int) -> int:
    """The memory of a process, in bytes; 0 where the system does not tell."""
    status = Path(f"/proc/{process}/status")
    if not status.is_file():
        return 0
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


def fuzz(seconds: float, seed: int, alive: Callable[[], bool], port: int, size: Callable[[], int]) -> dict[str, object]:
    """Throw bytes at a service; what was sent and what came of it.

    Raises:
        AssertionError: something broke.
    """
    rng, everything, told = random.Random(seed), corpus(), Counter[str]()
    start, before, good, sent = time.monotonic(), 0, b"", 0
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:

        def check() -> bytes:
            assert alive(), "the service died"
            answer = http.post("/v1/answer", content=pack(ROWS), headers={"content-type": NPY, "accept": NPY})
            assert answer.status_code == 200, answer.text
            return answer.content

        good = check()
        while time.monotonic() - start < seconds:
            kind, body = rng.choice(everything)
            kind = kind if rng.random() < 0.9 else rng.choice(everything)[0]
            body = harmed(body, rng, everything)
            sent += 1
            if rng.random() < 0.25:
                request = request_of(kind, body, rng)
                status = raw(port, request if rng.random() < 0.5 else harmed(request, rng, everything))
                told[f"raw {status or 'no answer'}"] += 1
            else:
                headers = {"content-type": kind, "accept": rng.choice((NPY, "application/json"))}
                if rng.random() < 0.2:
                    headers["idempotency-key"] = f"k{rng.randrange(9)}"
                answer = http.post("/v1/answer", content=body, headers=headers)
                status = answer.status_code
                told[str(status)] += 1
                if status >= 400:
                    assert set(answer.json()["error"]) == {"code", "message"}, answer.text
            assert status < 500, f"status {status} for {kind}: {body[:200]!r}"
            if sent % 500 == 0:
                assert check() == good, "a good request is answered otherwise than at the start"
                before = before or size()
        assert check() == good, "a good request is answered otherwise than at the start"
    grown = size() - before
    assert not before or grown < GROWTH, f"the service grew by {grown / 2**20:.0f} MiB"
    return {
        "seconds": round(time.monotonic() - start),
        "sent": sent,
        "told": dict(sorted(told.items())),
        "grown_mib": round(grown / 2**20),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (600)")
    parser.add_argument("--seed", type=int, default=0, help="what is thrown comes from it (0)")
    options = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "robustbox.serve",
        "--model",
        "digits-cnn",
        "--port",
        "0",
        "--request-megabytes",
        "0.5",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as service:
        try:
            assert service.stdout is not None
            port = int(service.stdout.readline().rpartition(":")[2])
            report = fuzz(
                options.seconds, options.seed, lambda: service.poll() is None, port, lambda: resident(service.pid)
            )
        finally:
            service.terminate()
    print(json.dumps({**report, "exit": service.returncode}, indent=1))


if __name__ == "__main__":
    main()
