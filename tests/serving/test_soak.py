"""Eight clients for a long time: nothing leaks, nobody is forgotten, and the p99 is said.

It takes half an hour; `MMLM_SOAK_SECONDS=60` makes it shorter. `-s` shows what was measured.
"""

from __future__ import annotations

import base64
import gc
import io
import os
import random
import statistics
import threading
import time
from pathlib import Path

import httpx
import pytest

from mmlm.generation.session import Sessions
from mmlm.serving.engine import Engine
from tests.serving.live import serving
from tests.tiny import compose_tiny, picture

pytestmark = pytest.mark.slow
CLIENTS = 8
SECONDS = float(os.environ.get("MMLM_SOAK_SECONDS", "1800"))
GROWTH_BYTES = 64 << 20
PATIENCE_SECONDS = 300
"""How long a client waits for one piece: far more than it takes, as other work may run beside."""


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def shown(number):
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


class Person:
    """A client that talks, sometimes leaves in the middle, and now and then sends nonsense."""

    def __init__(self, address, seed, until):
        self.address, self.draw, self.until = address, random.Random(seed), until
        self.firsts, self.faults, self.num_left = [], [], 0

    def run(self):
        with httpx.Client(
            base_url=self.address, timeout=PATIENCE_SECONDS, trust_env=False
        ) as client:
            talk: list = []
            while time.monotonic() < self.until:
                try:
                    talk = self.turn(client, talk)
                except Exception as fault:
                    self.faults.append(repr(fault))
                    return

    def turn(self, client, talk):
        if len(talk) > 6:
            talk = []
        parts = [{"type": "text", "text": f"{self.draw.randrange(100)}?"}]
        if self.draw.random() < 0.5:
            parts.insert(0, shown(self.draw.randrange(1000)))
        if self.draw.random() < 0.05:
            parts.append({"type": "image_url", "image_url": "data:image/png;base64,aGVsbG8="})
        talk = [*talk, {"role": "user", "content": parts}]
        body = {"model": "tiny", "messages": talk, "max_tokens": 12, "stream": True}
        began, said = time.perf_counter(), 0
        leaves = self.draw.random() < 0.1
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                assert response.status_code == 400, response.text
                return []
            for line in response.iter_lines():
                said += line.startswith("data:")
                if said == 2:
                    self.firsts.append(time.perf_counter() - began)
                    if leaves:
                        self.num_left += 1
                        return []
        assert said >= 3
        return [*talk, {"role": "assistant", "content": "Yes."}]


def test_eight_clients_are_answered_all_the_time_and_nothing_leaks(tmp_path):
    tiny = compose_tiny(tmp_path)
    engine = Engine(Sessions(tiny.model, tiny.processor, budget_bytes=4 << 20), name="tiny")
    with serving([engine]) as address:
        until = time.monotonic() + SECONDS
        people = [Person(address, seed, until) for seed in range(CLIENTS)]
        threads = [threading.Thread(target=person.run) for person in people]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 4)
        gc.collect()
        floor, num_threads = resident(), threading.active_count()
        for thread in threads:
            thread.join(SECONDS + PATIENCE_SECONDS)
        gc.collect()
        grown = resident() - floor
        deadline = time.monotonic() + 30
        while not engine.is_idle and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine.is_idle
        assert engine.sessions.num_bytes <= engine.sessions.budget_bytes
    firsts = sorted(first for person in people for first in person.firsts)
    assert [person.faults for person in people] == [[]] * CLIENTS
    p50, p99 = statistics.median(firsts), firsts[int(0.99 * (len(firsts) - 1))]
    left = sum(person.num_left for person in people)
    print(
        f"\n{SECONDS:g} s, {CLIENTS} clients: {len(firsts)} answers ({left} left by the client), "
        f"first token p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, grown by "
        f"{grown / 1e6:.1f} MB, {num_threads} threads"
    )
    assert min(len(person.firsts) for person in people) * 3 > len(firsts) / CLIENTS  # fair
    assert grown < GROWTH_BYTES
    assert threading.active_count() <= num_threads
