"""Ray Data: what an actor does, without Ray; and with it, two actors on this machine (`./scripts/test -m clients`)."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZES, make_model, perturbed
from transformers import LlamaConfig

import hf_specdec
from hf_specdec.integrations.ray import SpecGenerator

PROMPTS = ["abc", "x", "hello world and more", "ab ab ab", "", "q z", "de\nf", "a b c d e f", "xyz"]
ENDS = [3, 17, 40]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ray")
    target = make_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "initializer_range": 0.3}), seed=12)
    for name, model in (("target", target), ("draft", perturbed(target, 0.1, seed=13))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("target", "draft")}


@pytest.fixture(scope="module")
def options(models: dict[str, str]) -> dict[str, Any]:
    own = {"max_new_tokens": 12, "eos_token_id": ENDS, "num_assistant_tokens": 3, "load_options": {"device_map": "cpu"}}
    return models | own


@pytest.fixture(scope="module")
def generator(options: dict[str, Any]) -> SpecGenerator:
    return SpecGenerator(**options, together=3)


def batch() -> dict[str, Any]:
    return {"id": np.arange(len(PROMPTS)), "prompt": np.array(PROMPTS, object)}


def vanilla(generator: SpecGenerator, prompt: str) -> list[int]:
    ids = torch.tensor([generator.pair.tokenizer(prompt)["input_ids"]])
    out = generator.pair.target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=ENDS)
    new: list[int] = out[0, ids.shape[1] :].tolist()
    return new


def test_a_batch_gets_columns(generator: SpecGenerator) -> None:
    given = batch()
    made = generator(given)
    assert list(given) == ["id", "prompt"] and made["id"].tolist() == list(range(len(PROMPTS)))
    assert {len(column) for column in made.values()} == {len(PROMPTS)}
    for index, prompt in enumerate(PROMPTS):
        if not prompt:
            assert "empty" in made["error"][index] and made["generated_text"][index] is None
            continue
        tokens = made["generated_tokens"][index].tolist()
        assert tokens == vanilla(generator, prompt) and made["error"][index] is None
        assert made["generated_text"][index] == generator.pair.tokenizer.decode(tokens, skip_special_tokens=True)
        assert made["committed_tokens"][index] == len(tokens)
    assert 0 < made["accepted_tokens"].sum() < made["drafted_tokens"].sum()


def test_a_bad_prompt_may_stop_it(generator: SpecGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "on_error", "raise")
    with pytest.raises(ValueError, match="row 4 of a batch cannot be decoded: the prompt is empty"):
        generator(batch())


def test_batches_that_do_not_fit(generator: SpecGenerator) -> None:
    with pytest.raises(ValueError, match="`column` 'prompt' is not in the batch, which has text"):
        generator({"text": np.array(["a"], object)})
    with pytest.raises(ValueError, match="a column 'error' already"):
        generator({"prompt": np.array(["a"], object), "error": np.array([0])})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"speculation_seed": 3}, "takes no `speculation_seed`"),
        ({"num_return_sequences": 2}, "gives each row one text"),
        ({"on_error": "ignore"}, "`on_error` must be"),
    ],
)
def test_options_that_cannot_work(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpecGenerator("nowhere/target", **more)


@pytest.fixture
def time_limit() -> Iterator[None]:
    """A test that waits for other processes ends after five minutes."""

    def end(*_: Any) -> None:
        raise TimeoutError("other processes did not come to an end")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.clients
def test_two_actors(
    options: dict[str, Any], generator: SpecGenerator, monkeypatch: pytest.MonkeyPatch, time_limit: None
) -> None:
    ray = pytest.importorskip("ray", reason="needs ray: ./scripts/test -m clients installs it")
    from ray import data

    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they starve where others compute too
    path = os.pathsep.join(map(str, (Path(hf_specdec.__file__).parents[1], Path(__file__).parents[1])))
    environment = {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    try:
        rows = data.from_items([{"id": index, "prompt": prompt} for index, prompt in enumerate(PROMPTS * 4)])
        made = rows.repartition(6).map_batches(
            SpecGenerator, fn_constructor_kwargs=options, batch_size=6, concurrency=2, num_cpus=1
        )
        found = {row["id"]: row for row in made.take_all()}
    finally:
        ray.shutdown()
    assert sorted(found) == list(range(len(PROMPTS) * 4))
    expected = [vanilla(generator, prompt) if prompt else [] for prompt in PROMPTS]
    for index, row in found.items():
        assert list(row["generated_tokens"]) == expected[index % len(PROMPTS)]
        assert (row["error"] is None) == bool(PROMPTS[index % len(PROMPTS)])
