"""A seed -> what will happen: waves of drivers, each with what befalls it, and how the store behaves."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tests.harness.chaos.bed import MODELS, SHARDS
from tests.harness.chaos.drivers import Blow
from tests.support.s3_proxy import Fault

STEPS = {
    "disk": ("asked", "opened", "written", "synced", "named", "cleared", "done"),
    "s3": ("asked", "answered", "done"),
}
PART = r"model=\w+/part-"
OBJECTS = ("_probe-", "_plan", "_run", "_meter-", "_rejects", "_manifest", "_SUCCESS")
CAREFUL_SHARE = 0.03  # of the plans, drivers resume as in production: with processes apart, which cost seconds
Wave = tuple[Blow | None, ...]  # drivers that are started together


@dataclass(frozen=True)
class Plan:
    """`kind` names the sort of trouble; what is left when all waves are over is done by one more driver, in peace."""

    seed: int
    kind: str
    store: str  # disk | s3
    waves: tuple[Wave, ...]
    faults: tuple[Fault, ...] = ()
    careful: bool = False

    def __str__(self) -> str:
        waves = "; then ".join(" with ".join(str(blow or "a quiet driver") for blow in wave) for wave in self.waves)
        faults = ", ".join(f"{fault.kind} {fault.method} {fault.prob:g}" for fault in self.faults)
        return f"{self.kind} on {self.store}: {waves}{f'; the store: {faults}' if faults else ''}"


def plan_of(seed: int, seconds: float) -> Plan:
    """`seconds`: what an undisturbed run takes here, for blows that come at a time and not at a step."""
    rng = random.Random(seed)
    kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    store = "s3" if kind == "store" else "disk" if kind == "full" else rng.choices(("disk", "s3"), (4, 1))[0]
    plan = Plan(seed, kind, store, KINDS[kind][1](rng, store, seconds), careful=rng.random() < CAREFUL_SHARE)
    return replace(plan, faults=_faults(rng)) if kind == "store" else plan


def _killed(rng: random.Random, store: str, seconds: float) -> tuple[Wave, ...]:
    return tuple((_kill(rng, store, seconds),) for _ in range(rng.randint(1, 4)))


def _terminated(rng: random.Random, store: str, seconds: float) -> tuple[Wave, ...]:
    return tuple((replace(_kill(rng, store, seconds), what="term"),) for _ in range(rng.randint(1, 3)))


def _together(rng: random.Random, store: str, seconds: float) -> tuple[Wave, ...]:
    """Two or three at once; some are killed while the others go on."""
    return tuple(
        tuple(_kill(rng, store, seconds) if rng.random() < 0.4 else None for _ in range(rng.choice((2, 2, 3))))
        for _ in range(rng.randint(1, 2))
    )


def _paused(rng: random.Random, store: str, seconds: float) -> tuple[Wave, ...]:
    """One stops somewhere, another does what is left, then the first goes on."""
    other = _kill(rng, store, seconds) if rng.random() < 0.25 else None
    return ((replace(_at_step(rng, store), what="stop"), other),)


def _full(rng: random.Random, store: str, seconds: float) -> tuple[Wave, ...]:
    blow = Blow("full", rng.choice(("opened", "written")), *_object(rng))
    return ((blow,), *(_killed(rng, store, seconds)[:1] if rng.random() < 0.3 else ()))


def _clock(rng: random.Random, store: str, seconds: float) -> tuple[Wave, ...]:
    """A clock that jumps by years at every step from some point on, beside a driver whose clock is right, or alone."""
    blow = replace(_at_step(rng, store), what="clock", seed=rng.randrange(1 << 30))
    company = [(), (None,), (_kill(rng, store, seconds),)]
    return ((blow, *rng.choice(company)),)


KINDS = {
    "kill": (45, _killed),
    "together": (15, _together),
    "pause": (15, _paused),
    "full": (5, _full),
    "clock": (8, _clock),
    "store": (12, _killed),
    "term": (10, _terminated),
}


def _kill(rng: random.Random, store: str, seconds: float) -> Blow:
    return Blow("kill", after_s=rng.uniform(0.0, 1.1 * seconds)) if rng.random() < 0.3 else _at_step(rng, store)


def _at_step(rng: random.Random, store: str) -> Blow:
    return Blow("kill", rng.choice(STEPS[store]), *_object(rng))


def _object(rng: random.Random) -> tuple[str, int]:
    """A name, and how many of them reach a step before it counts: mostly parts, as most objects are."""
    return (PART, rng.randint(1, SHARDS * len(MODELS))) if rng.random() < 0.6 else (rng.choice(OBJECTS), 1)


def _faults(rng: random.Random) -> tuple[Fault, ...]:
    """One to three kinds at once."""
    return tuple(rng.choice(FAULTS) for _ in range(rng.randint(1, 3)))


FAULTS = (
    *(Fault("slowdown", prob=share) for share in (0.05, 0.2, 0.5)),
    Fault("internal", prob=0.1),
    Fault("reset", prob=0.1),
    Fault("reset_body", method="GET", prob=0.2),
    Fault("truncate", method="GET", prob=0.2),
    Fault("short", method="GET", prob=0.2),
    Fault("stall", prob=0.02, arg=0.5),
    Fault("stall_body", method="GET", prob=0.05, arg=60.0),
    Fault("lost_reply", method="PUT", prob=0.3),
    Fault("lost_reply", method="PUT", path="part-", prob=1.0),
    Fault("conflict", method="PUT", prob=0.2),
    Fault("ok_error", prob=0.1),
    Fault("denied", skip=40, times=1),
    Fault("denied", method="PUT", path="part-", prob=0.05, times=2),
    Fault("expired", prob=0.02),
)
