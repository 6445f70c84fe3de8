"""Counters of the API in the text form that Prometheus reads."""

from __future__ import annotations

import threading
from bisect import bisect_left

from mmlm.generation.session import Usage

_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """What happened since the server began."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._requests: dict[int, int] = {}
        self._tokens = {"prompt": 0, "image": 0, "cached": 0, "answer": 0}
        self._firsts = [0] * (len(_BOUNDS) + 1)
        self._first_seconds = 0.0

    def request(self, status: int) -> None:
        """Count a request by the status of its answer; 499 is a client that left."""
        with self._guard:
            self._requests[status] = self._requests.get(status, 0) + 1

    def answer(self, usage: Usage) -> None:
        """Count an answer."""
        with self._guard:
            self._tokens["prompt"] += usage.num_prompt_tokens
            self._tokens["image"] += usage.num_image_tokens
            self._tokens["cached"] += usage.num_cached_tokens
            self._tokens["answer"] += usage.num_tokens
            self._firsts[bisect_left(_BOUNDS, usage.first_token_seconds)] += 1
            self._first_seconds += usage.first_token_seconds

    def text(self, gauges: dict[str, float]) -> str:
        """Return all counters, and the gauges that the server reads off now."""
        with self._guard:
            lines = ["# TYPE mmlm_requests_total counter"]
            for status, number in sorted(self._requests.items()):
                lines.append(f'mmlm_requests_total{{status="{status}"}} {number}')
            lines.append("# TYPE mmlm_tokens_total counter")
            for kind, number in self._tokens.items():
                lines.append(f'mmlm_tokens_total{{kind="{kind}"}} {number}')
            lines.append("# TYPE mmlm_first_token_seconds histogram")
            total = 0
            for bound, number in zip((*_BOUNDS, "+Inf"), self._firsts, strict=True):
                total += number
                lines.append(f'mmlm_first_token_seconds_bucket{{le="{bound}"}} {total}')
            lines.append(f"mmlm_first_token_seconds_sum {self._first_seconds:.6f}")
            lines.append(f"mmlm_first_token_seconds_count {total}")
        for name, value in gauges.items():
            lines += [f"# TYPE mmlm_{name} gauge", f"mmlm_{name} {value:g}"]
        return "\n".join(lines) + "\n"
