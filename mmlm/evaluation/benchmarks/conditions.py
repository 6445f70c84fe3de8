"""The same question in several conditions, to see whether the picture carries the answer.

    image     the question as it stands
    blind     without the picture
    shuffled  with the picture of another item, which never shows the same thing
    permuted  with the choices in another order

Which picture an item gets depends on the seed and the whole benchmark alone, so that a
subset, a later run and another model see the same pairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from mmlm.errors import EvaluationError
from mmlm.evaluation.benchmarks.benchmark import Benchmark
from mmlm.evaluation.benchmarks.items import Item

Condition = Literal["image", "blind", "shuffled", "permuted"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)

_REPAIRS = 50


class Case(NamedTuple):
    """One item in one condition: what the model is shown, and in which order the choices stand."""

    benchmark: str
    condition: Condition
    item: Item
    prompt: str
    images: tuple[Any, ...]
    image_keys: tuple[str, ...]
    choices: tuple[str, ...]
    shown_from: str = ""
    """The item whose pictures are shown, where it is another one."""


def cases(
    benchmark: Benchmark, condition: Condition, items: Sequence[Item], *, seed: int
) -> list[Case]:
    """Put items into a condition.

    Items without pictures have no blind or shuffled case, items without choices no permuted one.

    Raises:
        EvaluationError: if no two items show different things, so that nothing can be shuffled.
    """
    if condition == "image":
        return [_case(benchmark, "image", item) for item in items]
    if condition == "blind":
        return [
            _case(benchmark, "blind", item)._replace(images=(), image_keys=())
            for item in items
            if item.images
        ]
    if condition == "shuffled":
        partner = derange(benchmark, seed=seed)
        return [
            _case(benchmark, "shuffled", item)._replace(
                images=partner[item.id].images,
                image_keys=partner[item.id].image_keys,
                shown_from=partner[item.id].id,
            )
            for item in items
            if item.images
        ]
    return [
        _case(benchmark, "permuted", item, _rotated(item, seed=seed))
        for item in items
        if item.target.choices
    ]


def subset(items: Sequence[Item], limit: int | None, *, seed: int) -> list[Item]:
    """Draw items, in their order; a larger limit holds every item of a smaller one."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise EvaluationError(f"limit must be at least 1 (got {limit}).")
    rank = {item.id: random.Random(f"{seed} {item.id}").random() for item in items}
    drawn = set(sorted(rank, key=lambda identity: (rank[identity], identity))[:limit])
    return [item for item in items if item.id in drawn]


def derange(benchmark: Benchmark, *, seed: int) -> dict[str, Item]:
    """Give every item the pictures of another: never the same ones, never the same thing.

    Every item's pictures are used once, as long as no thing is in more than half of the
    items; beyond that, pictures of other things are drawn with replacement.
    """
    partners: dict[str, Item] = {}
    items = [item for item in benchmark.items if item.images]
    # A prompt about two pictures needs two pictures.
    for number in sorted({len(item.images) for item in items}):
        group = [item for item in items if len(item.images) == number]
        partners.update(_derange(benchmark.name, group, random.Random(f"{seed} {number}")))
    return partners


def _derange(name: str, items: list[Item], dice: random.Random) -> dict[str, Item]:
    order = list(items)
    dice.shuffle(order)
    for _ in range(_REPAIRS):
        clashes = [index for index, item in enumerate(items) if _same(item, order[index])]
        if not clashes:
            return {item.id: other for item, other in zip(items, order, strict=True)}
        for index in clashes:
            other = dice.randrange(len(items))
            if not _same(items[index], order[other]) and not _same(items[other], order[index]):
                order[index], order[other] = order[other], order[index]
    return {
        item.id: order[index]
        if not _same(item, order[index])
        else _any_other(name, item, items, dice)
        for index, item in enumerate(items)
    }


def _any_other(name: str, item: Item, items: list[Item], dice: random.Random) -> Item:
    others = [other for other in items if not _same(item, other)]
    if not others:
        raise EvaluationError(
            f"{name}: item {item.id} cannot get another picture, because every picture of the "
            f"benchmark shows the same ({item.thing or 'picture'}). Leave the condition "
            f"'shuffled' out, or mend the column `thing`."
        )
    return dice.choice(others)


def _same(item: Item, other: Item) -> bool:
    """Whether two items show the same picture, or the same thing."""
    if set(item.image_keys) & set(other.image_keys):
        return True
    return bool(item.thing) and item.thing == other.thing


def _rotated(item: Item, *, seed: int) -> tuple[str, ...]:
    """Return the choices in another order; with two or more, it always differs."""
    choices = item.target.choices
    by = 1 + random.Random(f"{seed} {item.id}").randrange(max(1, len(choices) - 1))
    return choices[by:] + choices[:by]


def _case(
    benchmark: Benchmark, condition: Condition, item: Item, choices: tuple[str, ...] | None = None
) -> Case:
    shown = item.target.choices if choices is None else choices
    return Case(
        benchmark=benchmark.name,
        condition=condition,
        item=item,
        prompt=benchmark.prompt(item, shown),
        images=item.images,
        image_keys=item.image_keys,
        choices=shown,
    )
