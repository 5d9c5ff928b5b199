"""What is kept between calls: how much, how it is freed, and what is left of calls that raise errors."""

import gc
import weakref
from typing import Any

import pretend_cuda
import pytest
import torch
from conftest import make_prompts
from static_calls import Calls, make_target
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import hf_specdec
from hf_specdec.drafters.model import ModelDrafter
from hf_specdec.kernels import packing
from hf_specdec.models import kept


def small_calls(seed: int = 31, move: Any = lambda model: model, **both: Any) -> Calls:
    return Calls(make_target(seed, num_hidden_layers=1), move, **both)


def storages(model: PreTrainedModel) -> list[Any]:
    """The kept caches, the least recently used first."""
    return [entry.forwards.cache for entry in kept._kept.get(model, [])]


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    hf_specdec.release()


# ----------------------------------------------------------------------------------- release()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("of_all", [True, False])
def test_release_frees_caches_and_graphs(device, of_all, request):
    move = (lambda model: model) if device == "cpu" else pretend_cuda.move
    if device == "cuda":
        request.getfixturevalue("cuda")
    call, other = small_calls(move=move), small_calls(seed=32, move=move)
    expected, _ = call()
    other()
    forwards = kept._kept[call.target][0].forwards
    gone = [weakref.ref(forwards), weakref.ref(forwards.cache), weakref.ref(forwards.cache.layers[0].keys)]
    gone += [weakref.ref(step.graph) for step in forwards._steps.values() if step.graph is not None]
    assert len(gone) == (3 if device == "cpu" else 7)
    del forwards
    hf_specdec.release(*([] if of_all else [call.target]))
    gc.collect()
    assert not any(reference() for reference in gone)
    assert not storages(call.target)
    assert bool(storages(call.draft)) is bool(storages(other.target)) is (not of_all)
    assert call()[0] == expected and storages(call.target)


def test_release_finds_the_model_inside_a_wrapper():
    call = small_calls()
    call()
    hf_specdec.release(torch.nn.Sequential(torch.nn.Identity(), call.target))
    assert not storages(call.target) and storages(call.draft)


def test_release_frees_packed_weights(weights_packed_from_the_first_token_on, monkeypatch):
    monkeypatch.setattr(packing, "_can_be_packed", lambda module: type(module) is torch.nn.Linear)
    monkeypatch.setattr(packing, "_pack", lambda weight: weight.detach().clone())
    monkeypatch.setattr(packing, "_takes", lambda tokens, packed: False)
    call, other = small_calls(), small_calls(seed=32)
    for each in (call, other):
        each()
    assert call.target.lm_head in packing._kept
    hf_specdec.release(call.target)
    assert call.target.lm_head not in packing._kept and other.target.lm_head in packing._kept
    call()
    assert call.target.lm_head in packing._kept
    hf_specdec.release()
    assert not packing._kept


def test_release_says_what_it_takes():
    with pytest.raises(TypeError, match=r"release\(\) takes a model, or nothing for all models, got str"):
        hf_specdec.release("org/model")


def test_what_a_call_in_progress_uses_is_not_taken_from_it():
    call, seen = small_calls(), []

    def released(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        hf_specdec.release()
        seen.append(1)
        return torch.zeros(len(ids), dtype=torch.bool)

    call()
    call(stopping_criteria=[released])
    assert seen and len(storages(call.target)) == 1


# ------------------------------------------------------------------------------------ the bound


def test_the_least_recently_used_go_first(monkeypatch):
    calls = [small_calls(seed) for seed in (31, 32, 33)]
    models = [call.target for call in calls]
    for call in calls:
        call.draft = models[2]  # drafts are too, so there is one fewer to think about
    calls[0]()
    size = storages(models[0])[0].nbytes
    monkeypatch.setattr(kept, "MOST_BYTES", 3 * size)
    calls[1]()
    assert [len(storages(model)) for model in models] == [1, 1, 1]
    calls[0]()  # now the second target is the least recently used
    calls[2](rows=1)  # target and draft are one model, which is used twice at once
    assert [len(storages(model)) for model in models] == [1, 0, 2]
    assert sum(cache.nbytes for model in models for cache in storages(model)) <= kept.MOST_BYTES


def test_a_cache_above_the_bound_is_not_kept_and_others_stay(monkeypatch, caplog):
    kept.logger.warning_once.cache_clear()
    call, large = small_calls(), small_calls(seed=32, max_new_tokens=200)
    call()
    monkeypatch.setattr(kept, "MOST_BYTES", 2 * storages(call.target)[0].nbytes)
    large()
    assert not storages(large.target) and storages(call.target) and storages(call.draft)
    assert "The cache of LlamaForCausalLM takes 0.0 GiB and is not kept for the next call" in caplog.text


def test_on_cuda_the_bound_is_a_share_of_the_memory_of_each_device(cuda):
    cuda.total_memory = 1 << 20
    assert kept._most_bytes(torch.device("cuda", 0)) == kept.SHARE_OF_DEVICE * cuda.total_memory
    on_cpu, call = small_calls(), small_calls(move=pretend_cuda.move)
    on_cpu()
    call()
    assert storages(call.target)
    needed = kept._kept[call.target][0].forwards.nbytes
    assert needed > storages(call.target)[0].nbytes  # results of graphs count
    cuda.total_memory = int(needed / kept.SHARE_OF_DEVICE) + 8
    call()
    assert len(storages(call.target)) + len(storages(call.draft)) == 1
    assert storages(on_cpu.target)


def test_storage_that_a_longer_call_has_outgrown_is_not_kept():
    call = small_calls()
    for new_tokens in (9, 200, 9):
        call.spec(max_new_tokens=new_tokens)
        assert len(storages(call.target)) == 1
    assert storages(call.target)[0].capacity > 200


def test_storage_of_a_model_that_has_changed_is_not_kept():
    call = small_calls()
    call()
    call.target.config.rms_norm_eps = 0.01
    call()
    assert len(storages(call.target)) == 1


def test_calls_in_two_modes_keep_one_each(cuda, monkeypatch):
    call, counts = small_calls(move=pretend_cuda.move), []
    for benchmark in (False, True, False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        call()
        counts.append((len(cuda.captures), len(storages(call.target))))
    assert counts[1] == counts[2] == counts[3] and counts[1][0] == 2 * counts[0][0] and counts[1][1] == 2


def test_storage_belongs_to_the_stream_of_its_calls(cuda):
    call = small_calls(move=pretend_cuda.move)
    call()
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    assert len(storages(call.target)) == 2
    captures = len(cuda.captures)
    call()
    assert len(cuda.captures) == captures


# ----------------------------------------------------------------------------------- errors


class Failing(BaseStreamer):
    """Raises an error after some tokens."""

    def __init__(self, error: BaseException):
        self.error, self.seen = error, 0

    def put(self, value: Tensor) -> None:
        self.seen += 1
        if self.seen > 4:
            raise self.error

    def end(self) -> None:
        pass


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("error", [ArithmeticError("stop"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_call_that_raises_leaves_its_caches_for_the_next_one(device, error, request):
    captures: list[Any] = []
    if device == "cuda":
        captures = request.getfixturevalue("cuda").captures
    call = small_calls(move=(lambda model: model) if device == "cpu" else pretend_cuda.move)
    with pytest.raises(type(error)):
        call.spec(streamer=Failing(error))
    before, count = [storages(call.target), storages(call.draft)], len(captures)
    assert [len(caches) for caches in before] == [1, 1]
    assert before[0][0].lengths[0] > 20  # it is dirty
    call(seed=1)
    assert [storages(call.target), storages(call.draft)] == before and len(captures) == count


def test_a_call_that_fails_while_a_draft_is_prepared_leaves_the_targets_cache(monkeypatch):
    call = small_calls()
    call()
    before = storages(call.target), storages(call.draft)
    monkeypatch.setattr(ModelDrafter, "start", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call.spec()
    monkeypatch.undo()
    assert (storages(call.target), storages(call.draft)) == before
    call()


def test_a_drafter_whose_start_fails_does_not_give_back_twice(monkeypatch):
    """It still knows the cache of its last call, which another call may be using."""
    call = small_calls()
    drafter = ModelDrafter(call.draft)
    call.draft = drafter  # type: ignore[assignment]
    call()
    monkeypatch.setattr("hf_specdec.drafters.model.show", lambda *_: 1 / 0)
    monkeypatch.setattr("hf_specdec.drafters.model.borrow", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call.spec()
    drafter.end()
    assert len(storages(drafter.model)) == 1


def test_drafters_hear_of_the_end_of_a_call_that_raises():
    heard = []

    class Drafter(hf_specdec.PromptLookupDrafter):
        def end(self) -> None:
            heard.append("end")

    call = small_calls()
    call.draft = Drafter()  # type: ignore[assignment]
    with pytest.raises(ArithmeticError):
        call.spec(streamer=Failing(ArithmeticError("stop")))
    call()
    assert heard == ["end", "end"]


def test_a_call_that_raises_does_not_leak():
    call = small_calls()
    error = ArithmeticError("stop")
    with pytest.raises(ArithmeticError):
        call.spec(streamer=Failing(error))
    model = weakref.ref(call.target)
    del call
    error.__traceback__ = None
    gc.collect()
    assert model() is None


def test_without_memory_everything_is_released():
    call, other = small_calls(), small_calls(seed=32)
    other()
    with pytest.raises(torch.OutOfMemoryError):
        call.spec(streamer=Failing(torch.OutOfMemoryError("no memory")))
    assert not kept._kept
    call()


def test_a_dirty_cache_with_infinite_entries_does_not_spoil_the_next_call():
    call = small_calls()
    call()
    for layer in storages(call.target)[0].layers:
        layer.values.fill_(float("inf"))
    call(seed=1)
    assert make_prompts(1)
