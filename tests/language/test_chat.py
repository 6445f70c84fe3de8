"""Every family's mask against one written by hand, and every token against the stock path."""

from __future__ import annotations

import pytest

from mmlm.errors import AlignmentError, ConfigError, TemplateError
from mmlm.language import ChatFormat, wrap_template
from mmlm.language.template import Renderer
from mmlm.messages import ImagePart, Message, Text, assistant, system, to_openai, user
from tests.language.families import FAMILIES, Family

BY_NAME = {family.name: family for family in FAMILIES}
IMAGE = ImagePart()
ASKED = [
    user("What is it?", [None]),
    assistant("A cat."),
    user("Which colour?"),
    assistant("Black."),
]
TOLD = [system("Be short."), *ASKED[:2]]
REFUSES_SEVERAL = {"qwen3"}


def chat(name: str, **settings) -> ChatFormat:
    return ChatFormat(BY_NAME[name].tokenizer(), **settings)


def stock_ids(tokenizer, text: str, counts: list[int]) -> list[int]:
    """What a stock processor does: repeat the placeholders, tokenise the whole."""
    pieces = text.split("<image>")
    repeated = [pieces[0]]
    for count, piece in zip(counts, pieces[1:], strict=True):
        repeated += ["<image>" * count, piece]
    starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer("".join(repeated), add_special_tokens=not starts)["input_ids"]


def by_hand(tokenizer, marked: str, count: int) -> tuple[str, list[int]]:
    """Turn marked text into the text and, for each token of the stock path, its label."""
    text, mask = "", []
    learnt = False
    for character in marked:
        if character in "⟦⟧":
            learnt = character == "⟦"
        else:
            text += character
            mask.append(learnt)
    place = text.index("<image>")
    text = text.replace("<image>", "<image>" * count)
    mask[place:place] = [False] * (count - 1) * len("<image>")
    starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoding = tokenizer(text, add_special_tokens=not starts, return_offsets_mapping=True)
    prefix = not starts and encoding["offset_mapping"][0] == (0, 0) and encoding["input_ids"][:1]
    labels = []
    for number, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        inside = mask[start:end] if end > start else mask[start : start + 1]
        is_prefix = prefix and number == tokenizer.bos_token_id and not labels
        labels.append(number if inside and all(inside) and not is_prefix else -100)
    return text, labels


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
class TestEveryFamily:
    """What holds for the published template of each family."""

    def check(self, family: Family, messages, marked: str):
        form = ChatFormat(family.tokenizer())
        encode = lambda: form.encode(messages, image_tokens=[3], with_labels=True)  # noqa: E731
        if "⟦" not in marked:
            with pytest.raises(TemplateError, match=marked):
                encode()
            return
        text, labels = by_hand(form.tokenizer, marked, 3)
        encoded = encode()
        assert encoded.text == text.replace("<image>" * 3, "<image>")
        assert encoded.ids == stock_ids(form.tokenizer, encoded.text, [3])
        assert encoded.labels == labels
        ((start, end),) = encoded.image_spans
        assert set(encoded.ids[start:end]) == {form.image_token_id}
        assert end - start == 3

    def test_two_turns_about_an_image_have_the_mask_written_by_hand(self, family):
        self.check(family, ASKED, family.asked)

    def test_a_system_turn_has_the_mask_written_by_hand(self, family):
        self.check(family, TOLD, family.told)

    @pytest.mark.parametrize(
        ("content", "counts"),
        [
            ((Text("What is it?"),), []),
            ((IMAGE, Text("What is it?")), [2]),
            ((Text("What is it?"), IMAGE), [2]),
            ((Text("Which "), IMAGE, Text("is black?")), [2]),
            ((IMAGE, IMAGE, Text("Which is black?")), [2, 5]),
            ((IMAGE,), [1]),
            ((Text("  What\n\n is it?  "), IMAGE), [3]),
        ],
        ids=["text", "first", "last", "between", "two", "alone", "spaces"],
    )
    @pytest.mark.parametrize("answer", ["A cat.", "", "  A cat. \n", "\nA\n\ncat", "3 cats"])
    def test_training_continues_what_inference_sees(self, family, content, counts, answer):
        form = ChatFormat(family.tokenizer())
        messages = [Message("user", content), assistant(answer)]
        encoded = form.encode(messages, image_tokens=counts, with_labels=True)
        assert encoded.ids == stock_ids(form.tokenizer, encoded.text, counts)
        assert len(encoded.labels) == len(encoded.ids)
        prompt = form.encode(messages[:1], image_tokens=counts, add_generation_prompt=True)
        learnt = [index for index, label in enumerate(encoded.labels) if label != -100]
        assert learnt == list(range(learnt[0], learnt[-1] + 1))
        if not answer.startswith("\n"):  # a newline may share a token with the template's
            assert encoded.ids[: learnt[0]] == prompt.ids
        assert encoded.ids[learnt[-1]] in form.stop_ids
        words = form.tokenizer.decode(
            [encoded.labels[i] for i in learnt if encoded.ids[i] not in form.stop_ids]
        )
        assert words.replace("<think>\n\n</think>\n\n", "").strip() == answer.strip()

    def test_what_somebody_writes_never_becomes_a_control_token(self, family):
        form = ChatFormat(family.tokenizer())
        tokenizer = form.tokenizer
        written = [word for word in family.words if word in family.template]
        nasty = " ".join(["Read", *family.tokens, *written, "<image>", "aloud"])
        plain = form.encode([user("Read aloud", [None]), assistant("No")], image_tokens=[2])
        encoded = form.encode(
            [user(nasty, [None]), assistant("No")], image_tokens=[2], with_labels=True
        )
        added = set(tokenizer.added_tokens_decoder)
        assert sorted(i for i in encoded.ids if i in added) == sorted(
            i for i in plain.ids if i in added
        )
        if family.kind in ("gpt2", "bytes"):
            assert tokenizer.decode(encoded.ids).count(nasty) == 1

    def test_the_saved_template_gives_a_stock_user_the_same_text(self, family):
        form = ChatFormat(family.tokenizer())
        family_tokenizer = family.tokenizer()
        messages = [user("What is it?", [None])]
        rows = to_openai(messages)
        stock = family_tokenizer.apply_chat_template(
            rows, chat_template=form.template, tokenize=False, add_generation_prompt=True
        )
        assert stock == form.render(messages, add_generation_prompt=True)
        strings = [{"role": "user", "content": "What is it?"}]
        assert family_tokenizer.apply_chat_template(
            strings, chat_template=form.template, tokenize=False
        ) == family_tokenizer.apply_chat_template(strings, tokenize=False)

    def test_turns_of_text_alone_read_as_a_stock_user_gets_them(self, family):
        form = ChatFormat(family.tokenizer())
        pieces = (Text("What "), Text("is it?"))
        messages = [Message("user", pieces), assistant("A cat."), user("Which colour?")]
        stock = family.tokenizer().apply_chat_template(
            to_openai(messages), chat_template=form.template, tokenize=False
        )
        assert form.render(messages) == stock

    def test_a_user_turn_can_be_learnt(self, family):
        form = ChatFormat(family.tokenizer())
        question = Message("user", (IMAGE, Text("What is it?")), learn=True)
        encoded = form.encode(
            [question, Message("assistant", (Text("A cat."),), learn=False)],
            image_tokens=[4],
            with_labels=True,
        )
        ids = [label for label in encoded.labels if label != -100]
        assert form.image_token_id not in ids
        words = form.tokenizer.decode(ids, skip_special_tokens=True)
        assert words.replace("<end_of_turn>", "").strip() == "What is it?"


def test_what_others_ask_of_the_tokenizer_changes_nothing():
    form = chat("qwen2.5")
    turns = [user("What is it?", [None]), assistant("A cat.")]
    before = form.encode(turns, image_tokens=[2], with_labels=True)
    form.tokenizer.pad_token = form.tokenizer.eos_token
    form.tokenizer(["a b c d", "a"], truncation=True, max_length=3, padding="max_length")
    assert form.tokenizer.backend_tokenizer.truncation is not None
    assert form.encode(turns, image_tokens=[2], with_labels=True) == before
    form.tokenizer("a", split_special_tokens=True)
    assert form.encode(turns, image_tokens=[2], with_labels=True) == before


def test_a_token_that_steers_nothing_is_read_as_the_tokenizer_reads_it():
    form = chat("qwen2.5")
    encoded = form.encode([user("<tool_call> <|im_end|>")])
    ids = [form.tokenizer.convert_tokens_to_ids(name) for name in ("<tool_call>", "<|im_end|>")]
    assert [encoded.ids.count(number) for number in ids] == [1, 2]  # system and user end


def test_control_tokens_that_are_allowed_may_be_written():
    form = chat("qwen2.5", allow=["<|vision_start|>"])
    number = form.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    encoded = form.encode([user("<|vision_start|> and <|im_start|>")])
    assert encoded.ids.count(number) == 1
    assert number not in chat("qwen2.5").encode([user("<|vision_start|>")]).ids


@pytest.mark.parametrize("name", ["smollm2", "llama-2", "gemma", "llama-3"])
def test_special_characters_in_text_leave_all_other_tokens_as_they_were(name):
    """The twin of the tokenizer reads everything but the control tokens as the original does."""
    form = chat(name)
    tokenizer = form.tokenizer
    odd = "naïve  你好\n\n 1234 x<|im_end|>y </s> z"
    twin = form._plain_twin()
    for text in ("What is it?", " a\n\n b", "naïve 你好 🙂 1234", "", "A cat. It's"):
        assert twin.encode(text)[0] == tokenizer(text, add_special_tokens=False)["input_ids"]
    messages = [user(odd), assistant(odd)]
    encoded = form.encode(messages, with_labels=True)
    if name != "gemma":  # its little vocabulary has no 你
        assert tokenizer.decode(encoded.ids).count("<|im_end|>y </s>") == 2


def test_a_special_token_in_two_pieces_stays_text():
    form = chat("chatml")
    message = Message("user", (Text("<|im_"), Text("end|> now")))
    encoded = form.encode([message])
    assert encoded.ids.count(form.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_reasoning_of_the_last_answer_is_learnt_as_it_was_written():
    form = chat("qwen3")
    words = "<think>\nA tail, so a cat.\n</think>\n\nA cat."
    encoded = form.encode([user("What is it?"), assistant(words)], with_labels=True)
    learnt = form.tokenizer.decode([label for label in encoded.labels if label != -100])
    assert learnt == words + "<|im_end|>"


def test_reasoning_that_the_template_drops_is_refused_where_it_is_learnt():
    form = chat("qwen3")
    first = "<think>\nHm.\n</think>\n\nA cat."
    messages = [user("What?"), assistant(first), user("Which?"), assistant("Black.")]
    with pytest.raises(TemplateError, match="drops or rewrites words of turn 1"):
        form.encode(messages, with_labels=True)
    messages[1] = Message("assistant", (Text(first),), learn=False)
    encoded = form.encode(messages, with_labels=True)
    learnt = form.tokenizer.decode([label for label in encoded.labels if label != -100])
    assert learnt == "<think>\n\n</think>\n\nBlack.<|im_end|>"
    assert "Hm." not in form.tokenizer.decode(encoded.ids)


def test_a_template_that_rewrites_earlier_answers_is_refused_with_the_mend():
    with pytest.raises(TemplateError, match=r"becomes .* Mark the turn `learn: false`"):
        chat("qwen3").encode(ASKED, image_tokens=[2], with_labels=True)
    chat("qwen3").encode(ASKED, image_tokens=[2])  # to answer, no mask is needed


def test_variables_of_a_template_can_be_fixed():
    tokenizer = BY_NAME["qwen3"].tokenizer()
    template = wrap_template(tokenizer.chat_template, variables={"enable_thinking": False})
    form = ChatFormat(tokenizer, template)
    messages = [user("What is it?"), assistant("A cat.")]
    assert form.render(messages[:1], add_generation_prompt=True).endswith("</think>\n\n")
    encoded = form.encode(messages, with_labels=True)
    learnt = form.tokenizer.decode([label for label in encoded.labels if label != -100])
    assert learnt == "A cat.<|im_end|>"


@pytest.mark.parametrize("words", ["", "Answer in one word."])
def test_what_a_template_says_of_itself_can_be_replaced(words):
    tokenizer = BY_NAME["qwen2.5"].tokenizer()
    usual = ChatFormat(tokenizer, wrap_template(tokenizer.chat_template))
    form = ChatFormat(tokenizer, wrap_template(tokenizer.chat_template, system=words))
    messages = [user("What is it?"), assistant("A cat.")]
    assert "created by" in usual.render(messages)
    assert form.render(messages) == usual.render([system(words), *messages])
    assert form.render([system("s"), *messages]) == usual.render([system("s"), *messages])
    encoded = form.encode(messages, with_labels=True)
    learnt = form.tokenizer.decode([label for label in encoded.labels if label != -100])
    assert learnt == "A cat.<|im_end|>"


def test_a_system_turn_that_moves_is_refused_only_where_it_changes_an_earlier_prompt():
    form = chat("mistral-v0.3")
    with pytest.raises(TemplateError, match="turn 0"):
        form.encode([*TOLD, *ASKED[2:]], image_tokens=[1], with_labels=True)


@pytest.mark.parametrize(
    ("messages", "mend"),
    [
        ([user("a"), user("b")], "Join neighbouring turns"),
        ([system("s"), user("a")], "Put the words of the system turn"),
        ([assistant("a")], "Begin the conversation with a user turn"),
    ],
    ids=["twice", "system", "answer first"],
)
def test_a_refusing_template_is_quoted_with_a_mend(messages, mend):
    with pytest.raises(TemplateError, match=mend):
        chat("gemma").encode(messages)


BROKEN = {
    "never ends a turn": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        "never learn to stop",
    ),
    "no generation prompt": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] +"
        " '<|im_end|>\n' }}{% endfor %}",
        "would have to write it itself",
    ),
    "space before the answer": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "reads differently once an answer follows",
    ),
    "upper case": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | upper +"
        " '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "leaves out the text of turn 0",
    ),
    "twice": (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + m['content'] +"
        " '<|im_end|>\n' }}{% endfor %}",
        "writes 2 times the text of turn 0",
    ),
    "counts turns": (
        "{% for m in messages %}{{ messages | length ~ '<|im_start|>' + m['role'] + '\n' +"
        " m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "differently once it has been answered",
    ),
    "shortens": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] if"
        " m['content'] | length < 400 else m['content'][:300]) + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "drops or rewrites words of turn 1",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_without_a_provable_mask_is_refused_with_the_reason(name):
    template, reason = BROKEN[name]
    tokenizer = BY_NAME["chatml"].tokenizer()
    messages = [user("What is it?"), assistant("A cat. " * 80)]
    with pytest.raises(TemplateError, match=reason):
        ChatFormat(tokenizer, template).encode(messages, with_labels=True)


def test_generation_markers_say_what_is_learnt():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] =="
        " 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = BY_NAME["chatml"].tokenizer()
    encoded = ChatFormat(tokenizer, template).encode(ASKED, image_tokens=[2], with_labels=True)
    plain = chat("chatml").encode(ASKED, image_tokens=[2], with_labels=True)
    assert encoded.labels == plain.labels


def test_a_template_that_knows_images_itself_is_used_as_it_stands():
    template = (  # the published form of llava-hf's templates: images first, in capitals
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ message['role'].upper() + ': '}}{% endif %}{% for content in message['content'] |"
        " selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% if message['role'] != 'assistant' %}{% for content in message['content'] |"
        " selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + '</s>'}}{% endgeneration %}{% endfor %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    tokenizer = BY_NAME["vicuna"].tokenizer()
    form = ChatFormat(tokenizer, template)
    assert form.template == template
    encoded = form.encode(ASKED, image_tokens=[2], with_labels=True)
    assert encoded.text.startswith("USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: ")
    words = tokenizer.decode([label for label in encoded.labels if label != -100])
    assert words == "A cat.</s> Black.</s>"


def test_a_model_without_a_template_gets_a_plain_one():
    tokenizer = BY_NAME["olmo-2"].tokenizer()
    tokenizer.chat_template = None
    form = ChatFormat(tokenizer)
    encoded = form.encode(TOLD, image_tokens=[2], with_labels=True)
    assert encoded.text == (
        "Be short.\nUSER: <image>\nWhat is it?\nASSISTANT: A cat.<|endoftext|>\n"
    )
    learnt = tokenizer.decode([label for label in encoded.labels if label != -100])
    assert learnt == " A cat.<|endoftext|>"


def test_wrapping_twice_is_wrapping_once():
    once = wrap_template("{{ messages[0]['content'] }}")
    assert wrap_template(once) == once


@pytest.mark.parametrize("system_words", [None, "Be kind."])
def test_a_wrapped_template_is_rendered_as_stock_tools_render_it(system_words):
    tokenizer = BY_NAME["chatml"].tokenizer()
    place = '<pic "1">'
    template = wrap_template(
        " {{ mood }}" + tokenizer.chat_template, image_token=place, variables={"mood": "é"},
        system=system_words,
    )  # fmt: skip
    renderer = Renderer(tokenizer, template)
    word = Text("What?")
    for content in (
        (), (word,), (ImagePart(),), (ImagePart(), word), (word, ImagePart()),
        (ImagePart(), ImagePart()), (word, ImagePart(), ImagePart(), word, word),
    ):  # fmt: skip
        for messages in ([Message("user", content)], [*TOLD, Message("user", content)]):
            stock = tokenizer.apply_chat_template(
                to_openai(messages), chat_template=template, tokenize=False,
                add_generation_prompt=True,
            )  # fmt: skip
            assert renderer(messages, add_generation_prompt=True) == stock
            assert stock.count(place) == sum(len(message.images) for message in messages)


def test_white_space_at_the_head_of_a_template_is_kept():
    tokenizer = BY_NAME["chatml"].tokenizer()
    rows = [{"role": "user", "content": "a"}]
    for head in ("", " ", "\n", "  {% set x = 1 %}\n", "\n\n  "):
        template = head + "{{ messages[0]['content'] }}"
        texts = [
            tokenizer.apply_chat_template(rows, chat_template=one, tokenize=False)
            for one in (template, wrap_template(template))
        ]
        assert texts[0] == texts[1]


def test_counts_that_do_not_fit_the_images_are_refused():
    with pytest.raises(AlignmentError, match="holds 1 images, and token counts for 2"):
        chat("chatml").encode(ASKED, image_tokens=[2, 2])
    with pytest.raises(AlignmentError, match="at least one"):
        chat("chatml").encode(ASKED, image_tokens=[0])


def test_a_tokenizer_without_the_image_token_is_refused_when_an_image_comes():
    from transformers import PreTrainedTokenizerFast

    from tests.language.families import CHATML, _trained

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(_trained("gpt2")), eos_token="<|e|>"
    )
    tokenizer.chat_template = CHATML
    form = ChatFormat(tokenizer)
    form.encode([user("no image, and <image> is text")])
    with pytest.raises(ConfigError, match="add_image_token"):
        form.encode(ASKED, image_tokens=[2])


def _backend(source: str):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(source)


def test_the_skeleton_is_made_once_for_each_shape():
    form = chat("chatml")
    for words in ("a", "b", "c"):
        form.encode([user(words), assistant(words)], with_labels=True)
    assert len(form._skeletons) == 1
    form.encode([user("a", [None]), assistant("b")], image_tokens=[1], with_labels=True)
    assert len(form._skeletons) == 2


def test_a_template_with_a_clock_is_read_again_when_the_clock_moves(monkeypatch):
    from datetime import datetime

    from transformers.utils import chat_template_utils

    now = [datetime(2026, 5, 1)]

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return now[0]

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    template = "{{ strftime_now('%d %b') + '\n' }}" + BY_NAME["chatml"].template
    form = ChatFormat(BY_NAME["chatml"].tokenizer(), template)
    messages = [user("a"), assistant("b")]
    assert form.encode(messages, with_labels=True).text.startswith("01 May")
    now[0] = datetime(2026, 5, 2)
    assert form.encode(messages, with_labels=True).text.startswith("02 May")


def test_formats_survive_pickling_for_data_workers():
    import pickle

    form = chat("llama-2")
    nasty = [user("a </s> b"), assistant("c")]
    before = form.encode(nasty, with_labels=True)
    assert pickle.loads(pickle.dumps(form)).encode(nasty, with_labels=True) == before
