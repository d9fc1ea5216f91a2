"""Changes under load: adapters loaded, unloaded, replaced in place and pinned while they are in use."""

from __future__ import annotations

import asyncio
import random
import time

from loraplex import LoraplexError
from loraplex.errors import NotFoundError, PermissionDeniedError
from loraplex_bench.demo.tasks import MAX_ANSWER_TOKENS, expected, prompt, sure_lines
from loraplex_bench.load.answers import Verdict
from loraplex_bench.scenarios.soak.state import CHANGING, LINES_PER_ADAPTER, Soak, Version, possible_tasks


async def adapter_keeper(soak: Soak) -> None:
    """Loads an adapter, uses it, unloads it while it is in use; asks for impossible things too."""
    rng = random.Random(f"keeper {soak.config.seed}")
    for round_number in range(1 << 30):
        if not soak.running():
            return
        source = rng.choice(soak.spare)
        task = source.name
        name = f"{task}.{round_number}"
        try:
            await soak.client.adapters.load(name, source)
            soak.events["adapters loaded"] += 1
            requests = [
                asyncio.create_task(use_loaded(soak, name, task, line))
                for line in rng.sample(soak.lines[task], min(4, len(soak.lines[task])))
            ]
            await asyncio.sleep(rng.uniform(0, 0.2))
            remaining = await soak.client.adapters.unload(name)
            soak.events["adapters unloaded"] += 1
            await asyncio.gather(*requests)
            if name in {adapter.name for adapter in remaining}:
                soak.fault(f"{name} was unloaded and is listed still", "errors: unload")
        except LoraplexError as error:
            soak.fault(f"loading and unloading {name}: {error.code}: {error}", f"errors: {error.code}")
        await soak.must_fail(
            soak.client.generate("x\n", adapter=name, max_tokens=1), NotFoundError, "unloaded name"
        )
        await soak.must_fail(
            soak.client.adapters.load("missing", source / "nothing"), NotFoundError, "no folder"
        )
        outside = source.parent.parent
        await soak.must_fail(
            soak.client.adapters.load("outside", outside), PermissionDeniedError, "outside the roots"
        )
        await soak.pause(rng.uniform(0.2, 1.5))


async def use_loaded(soak: Soak, name: str, task: str, line: str) -> None:
    """Asks an adapter that may be unloaded meanwhile: a whole right answer, or NOT_FOUND."""
    try:
        answer = await soak.client.generate(
            prompt(line), adapter=name, max_tokens=MAX_ANSWER_TOKENS, timeout=120.0
        )
    except NotFoundError:
        soak.events["requests: refused after unload"] += 1
        return
    except LoraplexError as error:
        soak.fault(f"request to {name}: {error.code}: {error}", f"errors: {error.code}")
        return
    soak.judged(task, line, answer.text, soak.book.judge(task, line, answer.text))
    soak.events["requests: to adapters loaded at run time"] += 1


async def publish_first(soak: Soak) -> None:
    """Registers the adapter that changes, and finds lines that all its versions answer rightly."""
    lines = random.Random(f"changing {soak.config.seed}").sample(sure_lines(), LINES_PER_ADAPTER)
    await soak.client.adapters.load(CHANGING, soak.spare[0])
    for source in soak.spare[:2]:
        await soak.client.adapters.load(CHANGING, source, load_inplace=True)
        soak.versions = [Version(source.name, time.monotonic())]
        answers = await asyncio.gather(
            *(
                soak.client.generate(prompt(line), adapter=CHANGING, max_tokens=MAX_ANSWER_TOKENS)
                for line in lines
            )
        )
        lines = [
            line
            for line, answer in zip(lines, answers, strict=True)
            if answer.text == expected(source.name, line)
        ]
    soak.lines[CHANGING] = lines
    if not lines:
        raise LookupError(f"no line is answered rightly by {soak.spare[0].name} and {soak.spare[1].name}")


async def replacer(soak: Soak) -> None:
    """Replaces an adapter in place, again and again, while it is in use."""
    rng = random.Random(f"replacer {soak.config.seed}")
    while soak.running():
        await soak.pause(rng.uniform(0.2, 1.5))
        source = next(path for path in soak.spare[:2] if path.name != soak.versions[-1].task)
        old, new = soak.versions[-1], Version(source.name, time.monotonic())
        soak.versions.append(new)
        try:
            await soak.client.adapters.load(CHANGING, source, load_inplace=True)
        except LoraplexError as error:
            soak.fault(f"replacing {CHANGING}: {error.code}: {error}", f"errors: {error.code}")
            new.until_s = time.monotonic()
            continue
        old.until_s = time.monotonic()
        soak.events["adapters replaced in place"] += 1


async def ask_changing(soak: Soak, line: str) -> None:
    """A request that begins after a replacement was acknowledged must be answered by the new version."""
    begin_s = time.monotonic()
    try:
        answer = await soak.client.generate(
            prompt(line), adapter=CHANGING, max_tokens=MAX_ANSWER_TOKENS, timeout=120.0
        )
    except LoraplexError as error:
        soak.fault(f"request to {CHANGING}: {error.code}: {error}", f"errors: {error.code}")
        return
    end_s = time.monotonic()
    judgements = [
        soak.book.judge(task, line, answer.text) for task in possible_tasks(soak.versions, begin_s, end_s)
    ]
    best = next((one for one in judgements if one.verdict is Verdict.RIGHT), judgements[-1])
    soak.judged(CHANGING, line, answer.text, best)
    soak.events["requests: to the adapter that changes"] += 1
    # Only what a request may still be answered by is kept.
    soak.versions = [one for one in soak.versions if one.until_s > end_s - 150.0]


async def pinner(soak: Soak) -> None:
    """Pins one adapter for a while, then takes the pin away."""
    rng = random.Random(f"pinner {soak.config.seed}")
    while soak.running():
        name = rng.choice(soak.served)
        try:
            await soak.client.adapters.pin(name)
            soak.events["adapters pinned"] += 1
            await soak.pause(rng.uniform(0.5, 3.0))
            await soak.client.adapters.pin(name, False)
        except LoraplexError as error:
            soak.fault(f"pinning {name}: {error.code}: {error}", f"errors: {error.code}")
        await soak.pause(rng.uniform(0.2, 1.0))
