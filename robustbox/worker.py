"""One black box, many requests: a single thread asks it, and fuses requests that wait into passes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbox.errors import ModelError
from robustbox.protocol import Answer, BlackBox

log = logging.getLogger("robustbox.serve")


@dataclass(slots=True)
class Job:
    """The rows [n,C,H,W] of one request, their n accounts, and the answer to come."""

    rows: Tensor
    accounts: list[int]
    answer: asyncio.Future[Answer]


class Worker:
    """Asks a black box about jobs in the order in which they came, in one thread: a black box need not be thread-safe.

    Args:
        box: the black box, defended or not.
        fuse: the most rows of several jobs that are sent in one pass; a job is never split.

    Attributes:
        waiting: rows of the jobs that have not been sent yet.
        passes, seconds: how often, and for how long in all, the black box was asked.
    """

    def __init__(self, box: BlackBox, fuse: int) -> None:
        self.box, self.fuse = box, fuse
        self.waiting, self.passes, self.seconds = 0, 0, 0.0
        self._jobs: deque[Job] = deque()
        self._some = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "black-box")

    def submit(self, rows: Tensor, accounts: list[int]) -> asyncio.Future[Answer]:
        """Put a job in line. The answer raises ModelError where the black box fails."""
        job = Job(rows, accounts, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self.waiting += len(rows)
        self._some.set()
        return job.answer

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            jobs = self._next()
            start = time.perf_counter()
            try:
                answers = await loop.run_in_executor(self._thread, self._ask, jobs)
            except Exception as error:
                log.error("the model failed: %s: %s", type(error).__name__, str(error).partition("\n")[0])
                for job in jobs:
                    job.answer.set_exception(ModelError("the model failed"))
            else:
                for job, answer in zip(jobs, answers, strict=True):
                    job.answer.set_result(answer)
            self.passes += 1
            self.seconds += time.perf_counter() - start

    def close(self) -> None:
        """End the thread, once it is idle."""
        self._thread.shutdown()

    def _next(self) -> list[Job]:
        """The jobs of the next pass: the first, and those behind it that fit."""
        jobs = [self._jobs.popleft()]
        rows = len(jobs[0].rows)
        shape = jobs[0].rows.shape[1:]
        while self._jobs and rows + len(self._jobs[0].rows) <= self.fuse and self._jobs[0].rows.shape[1:] == shape:
            jobs.append(self._jobs.popleft())
            rows += len(jobs[-1].rows)
        self.waiting -= rows
        if not self._jobs:
            self._some.clear()
        return jobs

    def _ask(self, jobs: Sequence[Job]) -> list[Answer]:
        rows = torch.cat([job.rows for job in jobs]).to(self.box.device)
        accounts = torch.tensor([account for job in jobs for account in job.accounts])
        answer = self.box.answer(rows, accounts)
        counts = {len(answer.labels), len(answer.status), len(rows if answer.scores is None else answer.scores)}
        if counts != {len(rows)}:
            raise ModelError(f"it was asked {len(rows)} rows and answered {max(counts - {len(rows)})}")
        sizes = [len(job.rows) for job in jobs]
        labels, status = answer.labels.cpu().split(sizes), answer.status.cpu().split(sizes)
        scores = [None] * len(jobs) if answer.scores is None else answer.scores.cpu().split(sizes)
        return [Answer(*part) for part in zip(labels, scores, status, strict=True)]
