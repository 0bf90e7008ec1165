"""What the model is asked to predict: packed text, completions, the assistant's turns."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from loretta.cli.encode import IGNORED, encode, label_names, make_collator
from loretta.cli.report import UserError
from loretta.cli.rows import Row, Rows

PAD = 0
GENERATION_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


def rows(kind: str, *fields: dict) -> Rows:
    return Rows("f.jsonl", kind, [Row(f"f.jsonl:{number}", one) for number, one in enumerate(fields, 1)])


def learned(tokenizer, item: dict) -> str:
    """The part of an example that has a loss, as text."""
    assert len(item["labels"]) == len(item["input_ids"])
    assert all(label in (IGNORED, token) for label, token in zip(item["labels"], item["input_ids"], strict=True))
    return tokenizer.decode([label for label in item["labels"] if label != IGNORED])


def test_text_is_one_stream_in_blocks_with_the_end_token_between_documents(tokenizer) -> None:
    items = encode(rows("text", {"text": "abcde"}, {"text": "fgh"}), tokenizer, 4).items
    assert [tokenizer.decode(item["input_ids"]) for item in items] == ["abcd", "e</s>fg"]  # "h" alone predicts nothing
    assert all(item["labels"] == item["input_ids"] for item in items)


def test_only_the_completion_is_learned_with_its_end(tokenizer) -> None:
    (item,) = encode(rows("completion", {"prompt": "ask ", "completion": "answer"}), tokenizer, 64).items
    assert tokenizer.decode(item["input_ids"]) == "ask answer</s>"
    assert learned(tokenizer, item) == "answer</s>"


@pytest.fixture(scope="module")
def llama_2_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: a text begins with a blank that it does not have, and blanks belong to the word that follows."""
    letters = ["\u2581", *"abcdehlnoprstx:=45"]
    merges = [("c", "h"), ("a", "t"), ("ch", "at"), ("c", "at"), ("\u2581", "cat"), ("\u2581", "x"), ("e", "r")]
    words = ["<unk>", "<s>", "</s>", *letters, *dict.fromkeys("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SEAMS = {
    "no-blank": ("x=", "4", ["<s>", "\u2581x", "="], ["4", "</s>"]),
    "blank-before-the-completion": ("chat:", " cat", ["<s>", "\u2581", "chat", ":"], ["\u2581cat", "</s>"]),
    "blank-after-the-prompt": ("chat: ", "cat", ["<s>", "\u2581", "chat", ":"], ["\u2581cat", "</s>"]),
    "blanks-on-both-sides": ("x: ", " cat", ["<s>", "\u2581x", ":", "\u2581"], ["\u2581cat", "</s>"]),
    "within-a-word": ("the", "rest", ["<s>", "\u2581", "t", "h"], ["er", "e", "s", "t", "</s>"]),
}


@pytest.mark.parametrize("is_fast", [True, False], ids=["offsets", "no-offsets"])
@pytest.mark.parametrize(("prompt", "completion", "given", "learned"), SEAMS.values(), ids=SEAMS)
def test_prompt_and_completion_are_encoded_as_one_text(
    llama_2_tokenizer, monkeypatch, prompt, completion, given, learned, is_fast
) -> None:
    if not is_fast:
        monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    tokens = llama_2_tokenizer.convert_ids_to_tokens
    (item,) = encode(rows("completion", {"prompt": prompt, "completion": completion}), llama_2_tokenizer, 64).items
    assert item["input_ids"][:-1] == llama_2_tokenizer(prompt + completion)["input_ids"]
    assert tokens(item["input_ids"]) == given + learned
    assert tokens([label for label in item["labels"] if label != IGNORED]) == learned


def test_rows_that_are_cut_or_dropped_are_counted_and_said(tokenizer, capsys) -> None:
    fields = [{"prompt": "p" * 20, "completion": "c"}, {"prompt": "p", "completion": "c" * 20}]
    fields += [{"prompt": "p", "completion": "c"}]
    examples = encode(rows("completion", *fields), tokenizer, 8)
    assert examples.counts() == {"examples": 2, "cut": 1, "dropped": 1}
    examples.log_omissions("training", 8)
    assert capsys.readouterr().err.splitlines() == [
        "training: 1 rows are longer than 8 tokens and end there",
        "training: 1 rows have nothing to learn within 8 tokens and are left out",
    ]
    labelled = rows("label", {"text": "a" * 20, "label": "x"}, {"text": "a", "label": "y"})
    assert encode(labelled, tokenizer, 8, ["x", "y"]).counts() == {"examples": 2, "cut": 1, "dropped": 0}


def test_blanks_that_the_assistant_says_are_learned(tokenizer, monkeypatch) -> None:
    """Offsets of tokens that are blanks alone can be empty, as where ByteLevel trims them."""
    trimming = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trimming.chat_template = tokenizer.chat_template
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c  d"}]
    (item,) = encode(rows("chat", {"messages": turns}), trimming, 64).items
    assert learned(trimming, item) == "c  d</s>"


def test_long_examples_are_cut_and_those_without_an_answer_left_are_dropped(tokenizer) -> None:
    fields = [{"prompt": "p" * 20, "completion": "c"}, {"prompt": "p", "completion": "c" * 20}]
    (item,) = encode(rows("completion", *fields), tokenizer, 8).items
    assert tokenizer.decode(item["input_ids"]) == "p" + "c" * 7
    with pytest.raises(UserError, match=r"f\.jsonl: no row has anything to learn within 8 tokens; raise --seq-len"):
        encode(rows("completion", fields[0]), tokenizer, 8)


@pytest.mark.parametrize("marked", [False, True], ids=["prefixes-of-a-plain-template", "generation-marks"])
def test_only_the_assistants_turns_are_learned(tokenizer, marked, monkeypatch) -> None:
    if marked:
        monkeypatch.setattr(tokenizer, "chat_template", GENERATION_TEMPLATE)
    (item,) = encode(rows("chat", {"messages": CHAT}), tokenizer, 64).items
    assert tokenizer.decode(item["input_ids"]) == "<user>Hi</s><assistant>Hello</s><user>Bye</s><assistant>So long</s>"
    assert learned(tokenizer, item) == "Hello</s>So long</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "f.jsonl:1: .* need a chat template"),
        ("{{ raise_exception('no system role') }}", "f.jsonl:1: the chat template refuses it: no system role"),
        ("{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}", "f.jsonl:1: .* differently"),
    ],
    ids=["no-template", "template-raises", "earlier-turns-change"],
)
def test_a_chat_that_cannot_be_rendered_is_named(tokenizer, template, message, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=message):
        encode(rows("chat", {"messages": CHAT}), tokenizer, 64)


def test_classes_are_ordered_and_an_unknown_one_is_named(tokenizer) -> None:
    numbers = rows("label", *({"text": "a", "label": label} for label in ("10", "9", "-1")))
    assert label_names(numbers) == ["-1", "9", "10"]
    assert [item["labels"] for item in encode(numbers, tokenizer, 8, ["-1", "9", "10"]).items] == [2, 1, 0]
    with pytest.raises(UserError, match=r"f\.jsonl:1: the label '10' is none of the model's: a, b"):
        encode(numbers, tokenizer, 8, ["a", "b"])
    with pytest.raises(UserError, match="every row has the label 'x'"):
        label_names(rows("label", {"text": "a", "label": "x"}, {"text": "b", "label": "x"}))


def test_two_texts_and_a_value(tokenizer) -> None:
    pairs = [{"text": "ab", "text_pair": "cd", "label": "0.5"}, {"text": "a", "text_pair": "b", "label": "-2"}]
    assert label_names(rows("pair", *pairs)) == []
    one, other = encode(rows("pair", *pairs), tokenizer, 64, []).items
    assert one["input_ids"] == tokenizer("ab", "cd")["input_ids"]
    assert (one["labels"], other["labels"]) == (0.5, -2.0)
    with pytest.raises(UserError, match=r"f\.jsonl:1: the label 'x' is no number, and the model's are"):
        encode(rows("label", {"text": "a", "label": "x"}), tokenizer, 64, [])


def test_names_beside_numbers_are_classes() -> None:
    named = rows("label", *({"text": "a", "label": label} for label in ("0.5", "1", "nan")))
    assert label_names(named) == ["0.5", "1", "nan"]


def test_padding_has_no_loss_and_no_attention(tokenizer) -> None:
    items = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = make_collator(tokenizer, None)(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert torch.equal(make_collator(tokenizer, ["a"])([{"input_ids": [1], "labels": 2}])["labels"], torch.tensor([2]))
