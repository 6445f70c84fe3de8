"""Who is answered next: clients take turns, however many requests each of them sends."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairLine(Generic[T]):
    """A line in which every client has one place at a time.

    Requests of one client keep their order. Not safe for threads by itself.

    >>> line = FairLine()
    >>> for client, request in [("a", 1), ("a", 2), ("a", 3), ("b", 4)]:
    ...     line.put(client, request)
    >>> [line.take() for _ in range(4)]
    [1, 4, 2, 3]
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(requests) for requests in self._clients.values())

    def put(self, client: str, request: T) -> None:
        """Let a request wait."""
        self._clients.setdefault(client, deque()).append(request)

    def take(self) -> T:
        """Return the next request; its client goes to the end of the line."""
        client, requests = self._clients.popitem(last=False)
        request = requests.popleft()
        if requests:
            self._clients[client] = requests
        return request

    def drop(self, request: T) -> bool:
        """Take a request out of the line; False if it is not there."""
        for client, requests in self._clients.items():
            if request in requests:
                requests.remove(request)
                if not requests:
                    del self._clients[client]
                return True
        return False

    def waiting(self) -> list[T]:
        """Return all that wait."""
        return [request for requests in self._clients.values() for request in requests]
