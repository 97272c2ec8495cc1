"""The workers of a batch on Ray: who draws what, who has died, and whom to blame.

Ray Core, not Ray Data. An actor pool of Ray Data repeats a block that killed its worker for ever, or, with a limit,
drops the block with every innocent prompt in it and does not say which it was. Here the driver knows what each worker
had in hand, so exactly the prompt that kills is left out, and named.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import BackendError, Sjd2Error
from . import folder
from .folder import Record
from .plan import Plan
from .prompts import Item
from .worker import Drawn, Worker

WAVES = 4  # a chunk fills a worker's slots at most so many times: what a lost host takes with it, and the last wait
STRIKES = 3  # workers that a prompt may take down before it is given up
DEATHS_IN_A_ROW = 10  # of one worker without a picture: the host is broken, not the prompts
FAILED_STARTS = 3  # of one worker in a row
PATIENCE_S = 30.0  # until it is said that no worker has started yet
logger = logging.getLogger(__name__)


@dataclass
class Member:
    """A place for a worker, and what was done there by all who held it. seconds: spent drawing."""

    number: int
    actor: Any = None
    name: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    hired: int = 0
    deaths: int = 0
    deaths_in_a_row: int = 0
    failed_starts: int = 0
    pictures: int = 0
    seconds: float = 0.0
    sent_at: float = 0.0

    @property
    def hopeless(self) -> bool:
        return self.deaths_in_a_row >= DEATHS_IN_A_ROW or self.failed_starts >= FAILED_STARTS


class Queue:
    """Prompts that nobody has in hand; those that may have killed a worker wait until the end and go out alone."""

    def __init__(self, items: Sequence[Item], workers: int, batch: int) -> None:
        self.fresh, self.suspects = deque(items), deque[Item]()
        self.workers, self.batch = workers, batch
        self.least = min(batch, -(-len(items) // workers))

    def __bool__(self) -> bool:
        return bool(self.fresh or self.suspects)

    def take(self) -> list[Item]:
        """The next chunk: prompts with one negative prompt, fewer towards the end so that all finish together."""
        if not self.fresh:
            return [self.suspects.popleft()]
        size = min(WAVES * self.batch, max(self.least, -(-len(self.fresh) // (2 * self.workers))))
        chunk = [self.fresh.popleft()]
        while self.fresh and len(chunk) < size and self.fresh[0].negative_prompt == chunk[0].negative_prompt:
            chunk.append(self.fresh.popleft())
        return chunk

    def put_back(self, items: Sequence[Item]) -> None:
        self.fresh.extendleft(reversed(items))


class Crew:
    """Draws `items` with `count` workers; `progress` is told of every picture that is there or has failed.

    records, errors: by index of the item. members: the workers and their figures. seconds: from the first worker
    that was ready to the last picture.
    """

    def __init__(
        self,
        plan: Plan,
        items: Sequence[Item],
        count: int,
        resources: dict[str, float],
        progress: Callable[[int], Any],
        worker_class: type[Worker] = Worker,
    ) -> None:
        self.plan, self.resources, self.progress, self.worker_class = plan, resources, progress, worker_class
        self.batch = plan.config().max_batch
        self.queue = Queue(items, count, self.batch)
        self.members = [Member(number) for number in range(count)]
        self.running: dict[Any, tuple[Member, list[Item]]] = {}  # an empty chunk: the worker is starting
        self.idle: deque[Member] = deque()
        self.strikes: Counter[int] = Counter()
        self.records: dict[int, Record] = {}
        self.errors: dict[int, str] = {}
        self.ready_at: float | None = None
        self.seconds = 0.0
        self._last_death = ""

    def work(self) -> None:
        """Until every prompt has a picture or an error. Raises BackendError when no worker is left, and what
        `Worker.start` raises when none has started yet."""
        import ray

        for member in self.members:
            self._hire(member)
        begun, told = time.monotonic(), False
        while self.queue or any(chunk for _, chunk in self.running.values()):
            if not self.running:
                raise BackendError(f"no worker is left, each died again and again; the last by {self._last_death}")
            ready, _ = ray.wait(list(self.running), timeout=1.0)
            for ref in ready:
                self._settle(ref)
            while self.queue and self.idle:
                self._send(self.idle.popleft())
            if not told and self.ready_at is None and time.monotonic() - begun > PATIENCE_S:
                told = True
                logger.warning("no worker yet; each needs %s, free are %s", self.resources, ray.available_resources())
        if self.ready_at is not None:
            self.seconds = time.monotonic() - self.ready_at

    def dismiss(self) -> None:
        """End every worker that is left."""
        for member in self.members:
            self._end(member)

    def _hire(self, member: Member) -> None:
        import ray

        member.hired += 1
        member.name = f"{member.number}-{member.hired}"
        options = {**self.resources, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        member.actor = ray.remote(self.worker_class).options(**options).remote()
        self.running[member.actor.start.remote(self.plan, member.name)] = (member, [])

    def _send(self, member: Member) -> None:
        chunk = self.queue.take()
        member.sent_at = time.monotonic()
        self.running[member.actor.draw.remote(chunk)] = (member, chunk)

    def _settle(self, ref: Any) -> None:
        """A worker has answered, or never will."""
        import ray

        member, chunk = self.running.pop(ref)
        try:
            answer: Any = ray.get(ref)
        except Exception as error:  # Ray's errors of dead workers, and whatever went wrong inside one
            cause = getattr(error, "cause", None)
            if self.ready_at is None and isinstance(cause, Sjd2Error):
                raise cause from None  # of the model, the options or the set-up: no other worker would do better
            self._died(member, chunk, cause or error)
            return
        if chunk:
            drawn: Drawn = answer
            self._count(member, drawn.records, drawn.fresh, drawn.seconds)
            self.errors |= drawn.errors
            self.progress(len(drawn.errors))
        else:
            member.about = answer
            self.ready_at = self.ready_at or time.monotonic()
        self.idle.append(member)

    def _count(self, member: Member, records: dict[int, Record], fresh: int, seconds: float) -> None:
        self.records |= records
        self.progress(len(records))
        member.pictures += fresh
        member.seconds += seconds
        if fresh:
            member.deaths_in_a_row = 0

    def _died(self, member: Member, chunk: list[Item], error: BaseException) -> None:
        """Count what the worker had finished, put back what it had not begun, and suspect the rest."""
        self._end(member)
        # Ray's messages begin with tracebacks and end with what happened.
        reason = f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"[:300]
        self._last_death = reason
        logger.warning("worker %s died%s: %s", member.name, "" if chunk else " while it started", reason)
        member.deaths += 1
        member.deaths_in_a_row += 1
        member.failed_starts = 0 if chunk else member.failed_starts + 1
        logged = {r.get("picture"): r for r in folder.read_records(folder.log_path(self.plan, member.name))}
        named = {item.index: logged.get(self.plan.picture(item)) for item in chunk}
        finished = {index: record for index, record in named.items() if record is not None}
        self._count(member, finished, len(finished), time.monotonic() - member.sent_at if chunk else 0.0)
        left = [item for item in chunk if item.index not in finished]
        for item in left[: self.batch]:
            self.strikes[item.index] += 1
            if self.strikes[item.index] < STRIKES:
                self.queue.suspects.append(item)
            else:
                self.errors[item.index] = f"{STRIKES} workers died while they drew it, the last by {reason}"
                self.progress(1)
        self.queue.put_back(left[self.batch :])
        if self.queue and not member.hopeless:
            self._hire(member)

    @staticmethod
    def _end(member: Member) -> None:
        import ray

        if member.actor is not None:
            ray.kill(member.actor)
            member.actor = None
