"""The queue between the engine and a client: ordered, bounded, and joined only when the client is behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loraplex_server.core.errors import ResourceExhaustedError, UnavailableError
from loraplex_server.core.request import FinishReason
from loraplex_server.wire.deltas import BEHIND_S, SPACED_S, SPACING_S, DeltaQueue, Spacing
from loraplex_server.wire.frames import FrameBuffer, encode
from loraplex_server.wire.messages import Times, TokenDelta, TokenLogprobs

TIMES = Times(queue_s=0.0, adapter_wait_s=0.0, first_token_s=0.1, total_s=0.1, preemptions=0)
LAST = Times(queue_s=0.0, adapter_wait_s=0.0, first_token_s=0.1, total_s=0.9, preemptions=0)


def delta(*token_ids: int, **fields: Any) -> TokenDelta:
    return TokenDelta("r", token_ids, **fields)


def test_a_taker_who_is_up_to_date_gets_each_delta_as_it_came() -> None:
    async def main() -> None:
        queue = DeltaQueue(max_joined=256, max_unread=4096)
        for token_id in range(20):
            taking = asyncio.ensure_future(queue.take())
            await asyncio.sleep(0)
            assert not taking.done()
            sent = delta(token_id)
            assert queue.put(sent)
            assert await taking is sent

    asyncio.run(main())


def test_what_waits_is_joined_in_order_with_all_that_it_carries() -> None:
    async def main() -> None:
        queue = DeltaQueue(max_joined=256, max_unread=4096)
        entries = [TokenLogprobs(token_id, -0.5 * token_id) for token_id in range(4)]
        queue.put(delta(0, logprobs=(entries[0],), times=TIMES))
        queue.put(delta(1, 2, logprobs=(entries[1], entries[2])))
        assert await queue.take() == delta(0, 1, 2, logprobs=tuple(entries[:3]), times=TIMES)
        queue.put(delta(3, logprobs=(entries[3],)))
        queue.put(delta(1, finish=FinishReason.STOP, stop_token=True, times=LAST))
        end = await queue.take()
        assert end.token_ids == (3, 1)
        assert (end.finish, end.stop_token, end.times) == (FinishReason.STOP, True, LAST)

    asyncio.run(main())


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_more_than_so_many_tokens_are_joined(limit: int) -> None:
    async def main() -> None:
        queue = DeltaQueue(max_joined=limit, max_unread=4096)
        for token_id in range(11):
            queue.put(delta(token_id))
        # One step may give more tokens than may be joined; they stay together.
        queue.put(delta(*range(11, 21)))
        taken = []
        while sum(map(len, taken)) < 21:
            taken.append((await queue.take()).token_ids)
        assert [token_id for ids in taken for token_id in ids] == list(range(21))
        assert all(len(ids) <= limit for ids in taken[:-1])
        assert len(taken) == -(-11 // limit) + 1

    asyncio.run(main())


def test_scores_of_a_long_prompt_are_not_joined_and_not_too_many() -> None:
    async def main() -> None:
        queue = DeltaQueue(max_joined=100, max_unread=8)
        chunks = [tuple(TokenLogprobs(token_id, -1.0) for token_id in range(80)) for _ in range(3)]
        for chunk in chunks:
            assert queue.put(delta(prompt_logprobs=chunk))
        assert queue.put(delta(5))
        assert [(await queue.take()).prompt_logprobs for _ in range(2)] == chunks[:2]
        assert await queue.take() == delta(5, prompt_logprobs=chunks[2])

    asyncio.run(main())


def test_messages_of_a_stream_that_is_behind_come_apart_for_a_while() -> None:
    spacing = Spacing()
    spacing.sent(100.0)
    assert spacing.pause_s(100.001) == 0.0
    spacing.behind(100.001)
    assert spacing.pause_s(100.001) == pytest.approx(SPACING_S - 0.001)
    assert spacing.pause_s(100.0 + SPACING_S) == 0.0
    spacing.sent(100.0 + SPACED_S)
    assert spacing.pause_s(100.0 + SPACED_S) == pytest.approx(SPACING_S)
    assert spacing.pause_s(100.0 + SPACED_S + 0.002) == 0.0


@pytest.mark.parametrize("late_s", [BEHIND_S * 0.5, BEHIND_S * 2])
def test_who_comes_late_gets_the_next_tokens_together(late_s: float) -> None:
    clock = [50.0]

    async def main() -> None:
        queue = DeltaQueue(max_joined=256, max_unread=4096, clock=lambda: clock[0])
        queue.put(delta(0))
        clock[0] += late_s
        assert (await queue.take()).token_ids == (0,)
        # At once the next: by itself for who was not late, else with what comes while it waits.
        queue.put(delta(1))
        taking = asyncio.ensure_future(queue.take())
        await asyncio.sleep(0)
        behind = late_s > BEHIND_S
        assert taking.done() != behind
        queue.put(delta(2))
        clock[0] += SPACING_S
        assert (await taking).token_ids == ((1, 2) if behind else (1,))
        clock[0] += SPACED_S
        if behind:
            queue.put(delta(2))
        taking = asyncio.ensure_future(queue.take())
        await asyncio.sleep(0)
        assert taking.done()

    asyncio.run(main())


def test_the_end_and_what_cannot_be_joined_do_not_wait() -> None:
    clock = [50.0]

    async def main() -> None:
        queue = DeltaQueue(max_joined=2, max_unread=4096, clock=lambda: clock[0])
        queue.put(delta(0))
        clock[0] += 2 * BEHIND_S
        await queue.take()
        for now in ((delta(1), delta(2)), (delta(3, finish=FinishReason.STOP),)):
            for each in now:
                queue.put(each)
            taking = asyncio.ensure_future(queue.take())
            await asyncio.sleep(0)
            assert taking.done()

    asyncio.run(main())


@pytest.mark.parametrize("error", [False, True])
def test_who_waits_for_more_does_not_wait_past_the_end(monkeypatch: pytest.MonkeyPatch, error: bool) -> None:
    monkeypatch.setattr("loraplex_server.wire.deltas.SPACING_S", 3600.0)
    clock = [50.0]

    async def main() -> None:
        queue = DeltaQueue(max_joined=256, max_unread=4096, clock=lambda: clock[0])
        queue.put(delta(0))
        clock[0] += 2 * BEHIND_S
        await queue.take()
        queue.put(delta(1))
        taking = asyncio.ensure_future(queue.take())
        for token_id in range(2, 5):
            await asyncio.sleep(0)
            assert not taking.done()
            queue.put(delta(token_id))
        if error:
            queue.fail(UnavailableError("gone"))
        else:
            queue.put(delta(5, finish=FinishReason.LENGTH, times=LAST))
        assert (await taking).token_ids == ((1, 2, 3, 4) if error else (1, 2, 3, 4, 5))
        if error:
            with pytest.raises(UnavailableError):
                await queue.take()

    asyncio.run(main())


def test_an_error_comes_after_what_waited_before_it() -> None:
    async def main() -> None:
        queue = DeltaQueue(max_joined=256, max_unread=4096)
        queue.put(delta(1))
        queue.put(delta(2))
        queue.fail(UnavailableError("gone"))
        queue.fail(UnavailableError("gone again"))
        assert (await queue.take()).token_ids == (1, 2)
        for _ in range(2):
            with pytest.raises(UnavailableError, match=r"gone$"):
                await queue.take()

    asyncio.run(main())


def test_an_error_wakes_who_waits() -> None:
    async def main() -> None:
        queue = DeltaQueue(max_joined=256, max_unread=4096)
        taking = asyncio.ensure_future(queue.take())
        await asyncio.sleep(0)
        queue.fail(UnavailableError("gone"))
        with pytest.raises(UnavailableError):
            await taking

    asyncio.run(main())


def test_one_unread_token_too_many_drops_them_all_and_is_told_once() -> None:
    async def main() -> None:
        queue = DeltaQueue(max_joined=256, max_unread=8)
        for _ in range(3):
            # What has been taken does not count.
            assert all(queue.put(delta(token_id)) for token_id in range(8))
            assert len((await queue.take()).token_ids) == 8
        assert all(queue.put(delta(token_id)) for token_id in range(8))
        assert not queue.put(delta(8))
        assert queue.put(delta(9))
        with pytest.raises(ResourceExhaustedError, match="9 tokens wait to be read"):
            await queue.take()

    asyncio.run(main())


def test_the_last_token_is_never_one_too_many() -> None:
    async def main() -> None:
        queue = DeltaQueue(max_joined=256, max_unread=2)
        queue.put(delta(1, 2))
        assert queue.put(delta(3, finish=FinishReason.LENGTH, times=LAST))
        assert (await queue.take()).token_ids == (1, 2, 3)

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_frames_come_out_whole_however_the_bytes_arrive(size: int) -> None:
    bodies = [encode(delta(*range(count)))[4:] for count in (0, 1, 40, 2)]
    stream = b"".join(len(body).to_bytes(4, "big") + body for body in bodies)
    frames = FrameBuffer()
    found = [
        body for begin in range(0, len(stream), size) for body in frames.feed(stream[begin : begin + size])
    ]
    assert found == bodies
