"""The arguments that scripts share: the pair, the prompts, and how prompts become a batch."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hf_specdec.pairs import SpecPair, demo_pair
from hf_specdec.tools.arguments import (
    Prompt,
    add_pair_arguments,
    add_prompt_arguments,
    encode,
    load_pair,
    load_prompts,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return demo_pair()[2]


def parse(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_pair_arguments(parser)
    add_prompt_arguments(parser, prompts=4)
    return parser.parse_args(given)


def test_without_arguments_it_is_the_embedded_pair_and_its_prompts(tokenizer):
    args = parse()
    pair = load_pair(args)
    assert isinstance(pair, SpecPair)
    assert pair.target.config.num_hidden_layers > pair.draft.config.num_hidden_layers
    prompts = load_prompts(args, tokenizer)
    assert len(prompts) == 4
    assert {prompt.category for prompt in load_prompts(parse("--prompts", "60"), tokenizer)} == {"class", "function"}


@pytest.mark.parametrize("given", [["--pair", "a", "--target", "b"], ["--draft", "a"]])
def test_arguments_that_contradict_each_other_are_refused(given):
    with pytest.raises(SystemExit, match="expected --"):
        load_pair(parse(*given))


@pytest.fixture
def spec_bench(tmp_path: Path) -> str:
    """In the form of Spec-Bench's question.jsonl."""
    rows = [
        {"question_id": i, "category": "qa" if i < 6 else "rag", "turns": [f"question {i}?", "and then?"]}
        for i in range(12)
    ]
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_of_a_file_are_spread_over_its_categories(spec_bench, tokenizer):
    prompts = load_prompts(parse("--dataset", spec_bench), tokenizer)
    assert [(p.text, p.category) for p in prompts] == [
        ("question 0?", "qa"), ("question 3?", "qa"), ("question 6?", "rag"), ("question 9?", "rag"),
    ]  # fmt: skip


def test_prompts_are_shortened_by_tokens(spec_bench, tokenizer):
    for prompt in load_prompts(parse("--dataset", spec_bench, "--prompt-tokens", "2"), tokenizer):
        assert len(tokenizer(prompt.text)["input_ids"]) == 2
        assert "question 10?".startswith(prompt.text[:4])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--column", "answer"], "expected a text column, found .*turns"),
        (["--prompts", "0"], "expected --prompts of at least 1, got 0"),
        (["--chat-template"], "--chat-template: the target's tokenizer has none"),
    ],
)
def test_what_a_dataset_cannot_give_is_an_error(given, message, spec_bench, tokenizer):
    with pytest.raises(SystemExit, match=message):
        load_prompts(parse("--dataset", spec_bench, *given), tokenizer)


@pytest.mark.parametrize("name", ["missing.jsonl", "wrong.xyz"])
def test_a_dataset_that_is_not_there_is_an_error(name, tmp_path, tokenizer):
    (tmp_path / "wrong.xyz").write_text("text")
    with pytest.raises(SystemExit, match="--dataset"):
        load_prompts(parse("--dataset", str(tmp_path / name)), tokenizer)


def test_a_batch_is_padded_on_the_left(tokenizer):
    batch = encode([Prompt("def f(x):"), Prompt("x")], tokenizer, "cpu")
    assert batch["attention_mask"][0].all()
    assert batch["attention_mask"][1].tolist() == sorted(batch["attention_mask"][1].tolist())
    assert batch["attention_mask"][1].sum() == 1


def test_a_chat_template_is_not_given_special_tokens_twice(spec_bench, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    bos = tokenizer.bos_token_id
    tokenizer.add_bos_token = True
    prompts = load_prompts(parse("--dataset", spec_bench, "--chat-template"), tokenizer)
    assert encode(prompts, tokenizer, "cpu")["input_ids"][0].tolist().count(bos) == 1
