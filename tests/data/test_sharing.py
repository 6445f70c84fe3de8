"""Questions about one picture share its tokens, and learn exactly what they learn alone."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.data import Drop, Mixture, Share
from mmlm.data.collate import collate_packed, collate_padded
from mmlm.data.planning import Planned, Planner
from mmlm.data.sharing import NOT_LEARNT, Coded, join, parted_questions
from mmlm.errors import DataError
from mmlm.messages import ImagePart, Message, Text, assistant, user
from mmlm.modeling import SEGMENTS
from mmlm.training.attention import AttentionChoice
from mmlm.training.sharing import prove_sharing, with_sharing
from tests.data.made import open_source, write_lines
from tests.tiny import compose_tiny, picture

PAIRS = [("What is it?", "A cat."), ("What colour?", "Red, I think."), ("How many?", "2")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    eye = {"use": "patches", "patch_px": 8, "side_px": 16}
    made = compose_tiny(tmp_path_factory.mktemp("model"), vision="patches", eye=eye)
    made.model.model.language.set_attn_implementation(SEGMENTS)
    made.model.eval()
    return made


def turns(pairs):
    said = [({"from": "human", "value": q}, {"from": "gpt", "value": a}) for q, a in pairs]
    return [turn for pair in said for turn in pair]


def planner(folder, tiny, *, share, pairs=PAIRS, **words):
    picture(3).save(folder / "a.png")
    rows = [{"id": "row", "image": "a.png", "conversations": turns(pairs)}]
    rows += [{"id": f"{n}", "image": "a.png", "conversations": turns([p])}
             for n, p in enumerate(pairs)]  # fmt: skip
    write_lines(folder / "a.jsonl", rows)
    words = {"use": "jsonl", "path": "a.jsonl", "turns": "apart", **words}
    mixture = Mixture([(open_source(folder, **words), Share())], shuffle=False)
    return Planner(mixture, tiny.processor, max_tokens=2000, max_tiles=64, share=share)


def loss_of(tiny, samples):
    """The summed loss of one packed row."""
    inputs = collate_packed(samples)
    pixels = [tiny.processor.image_processor.pixels(i) for s in samples for i in s.images]
    count = sum(s.num_labels for s in samples)
    with torch.no_grad():
        out = tiny.model(**inputs, pixel_values=torch.cat(pixels), loss_only=True)
    return float(out.loss) * count, count


@pytest.mark.parametrize("learn", ["answers", "all"])
def test_the_loss_of_a_shared_picture_is_that_of_its_questions_alone(tmp_path, tiny, learn):
    plans = planner(tmp_path, tiny, share=True, learn=learn)
    shared, *alone = [plans.plan(n) for n in range(1 + len(PAIRS))]
    assert shared.shares
    assert len(shared.pieces) == 1 + len(PAIRS)
    assert shared.num_tokens < sum(one.num_tokens for one in alone)
    assert len(shared.images) == 1
    together, count = loss_of(tiny, [shared])
    apart = [loss_of(tiny, [one]) for one in alone]
    assert count == sum(n for _, n in apart)
    # float32, other orders of summing: the largest difference seen is 3e-6 of the loss.
    assert together == pytest.approx(sum(loss for loss, _ in apart), rel=1e-4)


def test_a_row_of_samples_of_both_kinds_has_the_loss_of_each(tmp_path, tiny):
    plans = planner(tmp_path, tiny, share=True)
    shared, plain = plans.plan(0), plans.plan(2)
    both, _ = loss_of(tiny, [plain, shared, plain])
    one, other = loss_of(tiny, [plain])[0], loss_of(tiny, [shared])[0]
    assert both == pytest.approx(2 * one + other, rel=1e-4)


def test_no_branch_sees_another(tmp_path, tiny):
    first = planner(tmp_path, tiny, share=True).plan(0)
    changed = [("What is it?", "A bat."), *PAIRS[1:]]
    second = planner(tmp_path, tiny, share=True, pairs=changed).plan(0)
    assert first.pieces == second.pieces
    logits = [logits_of(tiny, sample) for sample in (first, second)]
    begin = first.pieces[0] + first.pieces[1]
    assert not torch.equal(logits[0][:begin], logits[1][:begin])
    assert torch.equal(logits[0][begin:], logits[1][begin:])


def logits_of(tiny, sample):
    pixels = torch.cat([tiny.processor.image_processor.pixels(i) for i in sample.images])
    inputs = collate_packed([sample])
    inputs.pop("labels")
    with torch.no_grad():
        return tiny.model(**inputs, pixel_values=pixels, use_cache=False).logits[0]


def test_where_nothing_can_be_shared_every_question_has_the_picture(tmp_path, tiny):
    plans = planner(tmp_path, tiny, share=False)
    whole, *alone = [plans.plan(n) for n in range(1 + len(PAIRS))]
    assert not whole.shares
    assert len(whole.images) == len(whole.sizes) == whole.num_tiles == len(PAIRS)
    assert list(whole.pieces) == [one.num_tokens for one in alone]
    assert loss_of(tiny, [whole])[0] == pytest.approx(
        sum(loss_of(tiny, [one])[0] for one in alone), rel=1e-4
    )
    padded = collate_padded([whole], pad_id=0)
    assert padded["input_ids"].shape[0] == len(PAIRS)
    assert padded["attention_mask"].sum(1).tolist() == list(whole.pieces)
    with pytest.raises(DataError, match="share=False"):
        collate_padded([planner(tmp_path, tiny, share=True).plan(0)], pad_id=0)


def test_a_chain_stays_a_chain(tmp_path, tiny):
    chained = planner(tmp_path, tiny, share=True, turns="chain").plan(0)
    assert not chained.pieces
    assert "seen_before" not in collate_packed([chained])


def test_user_turns_are_learnt_where_the_source_says_so(tmp_path, tiny):
    for learn, expected in (("answers", "A cat."), ("all", "What is it?A cat.")):
        sample = planner(tmp_path, tiny, share=True, learn=learn).plan(1)
        kept = sample.ids[sample.labels != NOT_LEARNT].tolist()
        said = tiny.processor.tokenizer.decode(kept).replace("<|im_end|>", "")
        assert said == expected


def test_a_row_that_says_what_is_learnt_is_believed(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a", "learn": False},
                          {"role": "assistant", "content": "b"}]}]  # fmt: skip
    write_lines(tmp_path / "a.jsonl", rows)
    source = open_source(tmp_path, use="jsonl", path="a.jsonl", learn="all")
    assert [message.learns for message in source.sample(0).messages] == [False, True]


def test_a_sample_that_is_too_long_in_sum_is_dropped(tmp_path, tiny):
    plans = planner(tmp_path, tiny, share=False)
    plans.max_tiles = 2
    assert plans.plan(0).cause == "too_long"
    plans = planner(tmp_path, tiny, share=True)
    plans.max_tiles = 2
    assert not isinstance(plans.plan(0), Drop)


PICTURE = ImagePart("a.png")


@pytest.mark.parametrize(
    "messages",
    [
        [user("a"), assistant("b"), user("c"), assistant("d")],
        [Message("user", (PICTURE, Text("a"))), assistant("b")],
        [Message("user", (Text("a"), PICTURE)), assistant("b"), user("c"), assistant("d")],
        [Message("user", (PICTURE,)), assistant("b"), Message("user", (PICTURE,)), assistant("d")],
        [Message("user", (PICTURE,)), assistant("b"), user("c")],
    ],
    ids=["no picture", "one question", "picture last", "picture between", "no last answer"],
)
def test_turns_that_cannot_stand_alone_stay_together(messages):
    assert parted_questions(messages) is None


def test_every_question_gets_the_system_turn_and_the_pictures():
    messages = [Message("system", (Text("s"),)), Message("user", (PICTURE, Text("a"))),
                assistant("b"), user("c"), assistant("d")]  # fmt: skip
    found = parted_questions(messages)
    assert [[m.text for m in one] for one in found] == [["s", "a", "b"], ["s", "c", "d"]]
    assert all(one[1].content[0] is PICTURE for one in found)


CODES = st.lists(st.integers(0, 3), min_size=2, max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(CODES, st.integers(1, 11)), min_size=1, max_size=4), st.integers(0, 6))
def test_whatever_is_joined_every_branch_reads_as_it_does_alone(parts, images_end):
    coded = []
    for ids, first in parts:
        labels = [NOT_LEARNT if n < first else token for n, token in enumerate(ids)]
        coded.append(Coded(ids, labels, min(images_end, len(ids))))
    for share in (False, True):
        joined = join(coded, share=share)
        ids, labels = joined.ids.tolist(), joined.labels.tolist()
        head = joined.pieces[0] if joined.shares else 0
        start = head
        for one, length in zip(coded, joined.pieces[1 if joined.shares else 0 :], strict=True):
            assert ids[:head] + ids[start : start + length] == list(one.ids)
            assert [NOT_LEARNT] * head + labels[start : start + length] == list(one.labels)
            assert not joined.shares or head >= one.images_end
            start += length
        assert start == len(ids) == len(labels)


def test_sharing_is_proven_on_the_model_itself(tiny):
    proof = prove_sharing(tiny.model)
    assert proof.holds
    assert proof.leak == 0.0
    packed = AttentionChoice(SEGMENTS, True, "")
    assert with_sharing(tiny.model, packed).shares
    assert not with_sharing(tiny.model, packed._replace(packed=False)).shares
    assert not with_sharing(tiny.model, packed._replace(backend="sdpa")).shares


def test_an_attention_that_overlooks_what_is_shared_is_found_out(tiny):
    tiny.model.model.language.set_attn_implementation("sdpa")
    try:
        assert not prove_sharing(tiny.model).holds
    finally:
        tiny.model.model.language.set_attn_implementation(SEGMENTS)


def test_a_training_shares_pictures_and_ends(tmp_path):
    from mmlm.training import train
    from tests.training.tiny_run import tiny_recipe

    for index in range(4):
        picture(index).save(tmp_path / f"{index}.png")
    rows = [{"image": f"{n % 4}.png", "conversations": turns(PAIRS)} for n in range(8)]
    write_lines(tmp_path / "rows.jsonl", rows)
    recipe = tiny_recipe(tmp_path)
    recipe["stages"] = [dict(recipe["stages"][0], step_tokens=512)]
    recipe["stages"][0]["data"] = {"use": "jsonl", "path": str(tmp_path / "rows.jsonl"),
                                   "turns": "apart"}  # fmt: skip
    result = train(recipe, tmp_path / "run", quiet=True)
    shared = result.stages[0].tokens
    padded = {**recipe, "run": {**recipe["run"], "packing": "padded"}}
    alone = train(padded, tmp_path / "padded", quiet=True).stages[0].tokens
    assert shared < alone
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] > 0


def test_the_plan_of_a_shared_row_says_its_pieces(tmp_path, tiny):
    sample = planner(tmp_path, tiny, share=True).plan(0)
    assert isinstance(sample, Planned)
    inputs = collate_packed([sample])
    head, *branches = sample.pieces
    positions = inputs["position_ids"][0].tolist()
    expected = list(range(head)) + [n for b in branches for n in range(head, head + b)]
    assert positions == expected
    assert inputs["seen_before"].tolist() == [[0, 0]] + [[0, head]] * len(branches)
