"""While a draft is attached to a model, every call of its `generate()` speculates; before and after, none does."""

import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread
from time import sleep
from typing import Any

import pytest
import torch
from conftest import SIZES, make_model, make_pair, make_prompts, perturbed
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

import hf_specdec
from hf_specdec import PromptLookupDrafter, SpeculationStats
from hf_specdec.generate import defaults
from hf_specdec.kernels import packing
from hf_specdec.pairs.choice import load_draft

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}


@functools.cache
def pair() -> tuple[Any, Any]:
    return make_pair("llama", 0.04)


def prompts(batch: int = 1, seed: int = 3) -> dict[str, torch.Tensor]:
    return make_prompts(batch, seed=seed)


def plain(model: Any, batch: int = 1, **options: Any) -> Any:
    """A call as somebody else's code makes it."""
    return model.generate(**prompts(batch), **GREEDY | options)


@pytest.fixture(autouse=True)
def nothing_stays_attached() -> Iterator[None]:
    yield
    gc.collect()
    left = dict(defaults._by_model)
    defaults._by_model.clear()  # a test that fails must not make others fail
    assert not left


# Inside and outside


@pytest.mark.core
@pytest.mark.parametrize("batch", [1, 3])
def test_calls_speculate_inside_and_only_there(batch):
    target, draft = pair()
    expected = plain(target, batch)
    with hf_specdec.attached(target, draft, num_assistant_tokens=4) as attachment:
        for number in (1, 2):
            assert plain(target, batch).equal(expected)
            assert attachment.calls == number
            assert attachment.stats.committed_tokens == number * batch * 14
        assert 0 < attachment.stats.accepted_tokens < attachment.stats.drafted_tokens
        assert len(attachment.stats.drafted_by_position) == 4
    assert plain(target, batch).equal(expected)
    assert attachment.calls == 2


def test_attach_and_detach_do_the_same_and_may_be_repeated():
    target, draft = pair()
    attachment = hf_specdec.attach(target, draft)
    plain(target)
    assert attachment.attach() is attachment  # does nothing
    attachment.detach()
    attachment.detach()
    plain(target)
    assert attachment.calls == 1
    attachment.attach()
    plain(target)
    attachment.detach()
    with attachment:
        plain(target)
    plain(target)
    assert attachment.calls == 3
    unused = hf_specdec.attached(target, draft)
    plain(target)
    assert unused.calls == 0


@pytest.mark.parametrize("way", ["path", "drafter", "None"])
def test_a_draft_may_be_a_path_or_a_drafter_or_none(way, tmp_path):
    target, draft = pair()
    draft.save_pretrained(tmp_path)
    given = {"path": str(tmp_path), "drafter": hf_specdec.ModelDrafter(draft), "None": None}[way]
    expected = plain(target, 2)
    with hf_specdec.attached(target, given) as attachment:
        assert plain(target, 2).equal(expected)
    assert attachment.stats.target_forwards > 0
    assert bool(attachment.stats.draft_forwards) is (way != "None")


def test_an_error_in_the_block_or_in_a_call_detaches():
    target, draft = pair()
    expected = plain(target)
    with pytest.raises(ZeroDivisionError), hf_specdec.attached(target, draft) as attachment:
        plain(target, stopping_criteria=[lambda ids, scores, **_: 1 / 0])
    assert plain(target).equal(expected)
    assert attachment.calls == 1  # it had begun
    assert attachment.stats.target_forwards == 0
    with hf_specdec.attached(target, draft) as attachment:
        with pytest.raises(ValueError, match="`num_beams` is 2"):
            plain(target, num_beams=2)
        calls = attachment.calls
        with pytest.raises(ValueError, match="`max_new_tokens` must be greater than 0"):
            plain(target, max_new_tokens=0)
        assert attachment.calls == calls  # nothing was decoded
        assert plain(target).equal(expected)
    assert attachment.stats.committed_tokens == 14


def test_the_newest_attachment_counts_and_each_removes_itself():
    target, draft = pair()
    expected = plain(target)
    first, second, third = (hf_specdec.attached(target, draft, num_assistant_tokens=n) for n in (2, 3, 4))

    def who_speculates() -> list[int]:
        before = [a.calls for a in (first, second, third)]
        assert plain(target).equal(expected)
        return [a.calls - n for a, n in zip((first, second, third), before)]

    with first:
        with second:
            third.attach()
            assert who_speculates() == [0, 0, 1]
            third.detach()
            assert who_speculates() == [0, 1, 0]
            third.attach()
            first.attach()  # attached already: it stays where it is
        assert who_speculates() == [0, 0, 1]
    assert who_speculates() == [0, 0, 1]
    third.detach()
    assert who_speculates() == [0, 0, 0]


def test_other_models_do_not_speculate():
    target, draft = pair()
    twin = copy.deepcopy(target)
    with hf_specdec.attached(target, draft) as attachment:
        plain(draft)
        plain(twin)
        plain(copy.deepcopy(target))
    assert attachment.calls == 0


# What a call says for itself


@pytest.mark.core
def test_arguments_of_a_call_beat_those_of_the_attachment():
    target, draft = copy.deepcopy(pair())
    target.generation_config.num_assistant_tokens = 6
    other = copy.deepcopy(draft)
    with hf_specdec.attached(target, draft, num_assistant_tokens=4):
        assert longest_draft(target) == 4
        assert longest_draft(target, strategy="spec") == 4
        assert longest_draft(target, num_assistant_tokens=2) == 2
        assert longest_draft(target, generation_config=GenerationConfig(num_assistant_tokens=3)) == 3
        forwards = count_forwards(other, lambda: longest_draft(target, assistant_model=other))
        assert forwards > 0
        assert count_forwards(draft, lambda: longest_draft(target, assistant_model=other)) == 0
        assert count_forwards(draft, lambda: longest_draft(target, prompt_lookup_num_tokens=3)) == 0
    with hf_specdec.attached(target, prompt_lookup_num_tokens=3):
        assert count_forwards(draft, lambda: longest_draft(target, assistant_model=draft)) > 0


def longest_draft(target: Any, **options: Any) -> int:
    stats = SpeculationStats()
    plain(target, speculation_stats=stats, **options)
    return len(stats.drafted_by_position)


def count_forwards(model: Any, call: Callable[[], Any]) -> int:
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda *args: seen.append(1))
    call()
    hook.remove()
    return len(seen)


@pytest.mark.parametrize("place", ["argument", "config of the call", "decoding method"])
def test_a_call_may_switch_it_off(place):
    target, draft = pair()
    expected = plain(target)
    way = {
        "argument": {"strategy": "vanilla"},
        "config of the call": {"generation_config": GenerationConfig(strategy="vanilla", pad_token_id=0)},
        "decoding method": {"custom_generate": lambda model, ids, *_, **__: model.generate(ids, **GREEDY)},
    }[place]
    with hf_specdec.attached(target, draft) as attachment:
        assert plain(target, **way).equal(expected)
        assert attachment.calls == 0
        plain(target)
        assert attachment.calls == 1


def test_it_beats_the_strategy_and_the_draft_of_the_models_own_config():
    target, draft = copy.deepcopy(pair())
    target.generation_config.strategy = "vanilla"
    target.generation_config.assistant_model = "org/missing"
    for given in (draft, None):
        with hf_specdec.attached(target, given) as attachment:
            plain(target)
        assert attachment.stats.committed_tokens == 14
        assert bool(attachment.stats.draft_forwards) is (given is draft)


def test_a_call_in_the_midst_of_a_call_speculates_too():
    """A criterion may ask a model, for instance."""
    target, draft = pair()
    expected, inner = plain(target), []

    def ask(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not inner:
            inner.append(0)
            inner[0] = plain(target)
        return torch.zeros(len(ids), dtype=torch.bool)

    for given in (draft, hf_specdec.ModelDrafter(draft)):
        inner.clear()
        with hf_specdec.attached(target, given) as attachment:
            assert plain(target, stopping_criteria=[ask]).equal(expected)
        assert inner[0].equal(expected)
        assert attachment.calls == 2


# What it tells


def test_statistics_are_the_sum_of_all_calls_and_a_call_gets_its_own_too():
    target, draft = pair()
    together = SpeculationStats()
    for batch in (2, 1):
        plain(target, batch, strategy="spec", assistant_model=draft, speculation_stats=together)
    with hf_specdec.attached(target, draft) as attachment:
        own = SpeculationStats()
        out = plain(target, 2, speculation_stats=own, return_dict_in_generate=True)
        assert out.speculation is own
        assert counters(own) == counters(attachment.stats)
        assert len(own.iterations) == own.target_forwards
        out = plain(target, return_dict_in_generate=True)
        assert counters(out.speculation) != counters(attachment.stats) == counters(together)
        assert attachment.stats.seconds > 0
        assert not attachment.stats.iterations  # a server would fill it for ever
        plain(target, speculation_stats=own)
        assert len(own.iterations) == own.target_forwards
        assert own.committed_tokens == (2 + 1) * 14


def counters(stats: SpeculationStats) -> dict[str, Any]:
    return {
        name: value for name, value in stats.to_dict().items() if "seconds" not in name and name != "iterations"
    } | {"per_row": [row.to_dict() for row in stats.per_row]}


def test_records_may_be_attached():
    target, draft = pair()
    stats, trace = SpeculationStats(), hf_specdec.Trace()
    with hf_specdec.attached(target, draft, speculation_stats=stats, speculation_trace=trace) as attachment:
        plain(target)
        plain(target)
    assert counters(stats) == counters(attachment.stats)
    assert stats.committed_tokens == 2 * 14
    assert len(trace.iterations) == stats.target_forwards


def test_its_repr_says_what_it_did():
    target, draft = pair()
    attachment = hf_specdec.attached(target, draft)
    assert repr(attachment) == (
        "Attachment(target=LlamaForCausalLM, draft=LlamaForCausalLM, detached: 0 calls, 0 committed tokens, "
        "0 target forwards, acceptance rate α = 0%)"
    )
    with attachment:
        plain(target)
        stats = attachment.stats
        assert f"attached: 1 calls, 14 committed tokens, {stats.target_forwards} target forwards" in repr(attachment)
        assert f"α = {stats.acceptance_rate:.0%}" in repr(attachment)
    assert "detached: 1 calls" in repr(attachment)
    assert "draft=prompt look-up" in repr(hf_specdec.attached(target))
    assert "draft='org/draft'" in repr(hf_specdec.attached(target, "org/draft"))
    assert "draft=PromptLookupDrafter" in repr(hf_specdec.attached(target, PromptLookupDrafter()))


# Threads


def test_calls_of_all_threads_speculate_and_do_not_disturb_each_other():
    target, draft = pair()
    calls = [{**prompts(1 + seed % 2, seed), **GREEDY, "max_new_tokens": 20 + seed} for seed in range(4)]
    expected = [target.generate(**call).tolist() for call in calls]
    tokens = sum(len(rows) * call["max_new_tokens"] for rows, call in zip(expected, calls))
    with hf_specdec.attached(target, draft, num_assistant_tokens=3) as attachment:
        start = Barrier(len(calls))

        def work(call: dict[str, Any]) -> list[Any]:
            start.wait()
            return [target.generate(**call).tolist() for _ in range(3)]

        with ThreadPoolExecutor(len(calls)) as pool:
            assert list(pool.map(work, calls)) == [[rows] * 3 for rows in expected]
    assert attachment.calls == 3 * len(calls)
    assert attachment.stats.committed_tokens == 3 * tokens


def test_calls_that_begin_together_load_a_draft_once(tmp_path):
    target, draft = pair()
    draft.save_pretrained(tmp_path)
    load_draft.cache_clear()
    start = Barrier(3)

    def work(_: int) -> Any:
        start.wait()
        return plain(target)

    with hf_specdec.attached(target, str(tmp_path)), ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert load_draft.cache_info().misses == 1


def test_statistics_of_calls_at_once_are_added_one_after_another(monkeypatch):
    target, draft = pair()
    merge, inside, start = SpeculationStats.merge, list[int](), Barrier(3)

    def watched(self: SpeculationStats, other: SpeculationStats) -> None:
        assert not inside
        inside.append(1)
        sleep(0.05)  # long enough for the others to arrive
        merge(self, other)
        inside.clear()

    def work(_: int) -> Any:
        start.wait()
        return plain(target)

    monkeypatch.setattr(SpeculationStats, "merge", watched)
    with hf_specdec.attached(target, draft) as attachment, ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert attachment.stats.committed_tokens == 3 * 14


def test_a_drafter_serves_one_call_at_a_time():
    target, draft = pair()
    drafter = hf_specdec.ModelDrafter(draft)
    expected, drafting, other = plain(target), Event(), Event()

    def wait(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        drafting.set()
        assert other.wait(60)
        return torch.zeros(len(ids), dtype=torch.bool)

    with hf_specdec.attached(target, drafter) as attachment, ThreadPoolExecutor(1) as pool:
        first = pool.submit(plain, target, stopping_criteria=[wait])
        assert drafting.wait(60)
        try:
            assert count_forwards(draft, lambda: expected.equal(plain(target))) == 0
        finally:
            other.set()
        assert first.result().equal(expected)
        assert attachment.stats.draft_forwards > 0
        assert count_forwards(draft, lambda: plain(target)) > 0  # it is free again


def test_detaching_does_not_disturb_a_call_in_progress():
    target, draft = pair()
    expected = plain(target)
    attachment = hf_specdec.attach(target, draft)

    def detach(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        attachment.detach()
        return torch.zeros(len(ids), dtype=torch.bool)

    assert plain(target, stopping_criteria=[detach]).equal(expected)
    assert attachment.calls == 1
    assert attachment.stats.committed_tokens == 14
    assert attachment.stats.accepted_tokens > 0
    plain(target)
    assert attachment.calls == 1


def test_attaching_in_one_thread_while_others_generate():
    target, draft = pair()
    expected, done, wrong = plain(target), Event(), []

    def work() -> None:
        while not done.is_set():
            if not plain(target).equal(expected):
                wrong.append(1)

    threads = [Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    calls = 0
    for _ in range(20):
        with hf_specdec.attached(target, draft) as attachment:
            plain(target)
        calls += attachment.calls
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert calls >= 20


# Models, wrappers and classes


class Shouting(LlamaForCausalLM):
    def generate(self, *args: Any, volume: int = 0, **kwargs: Any) -> Any:
        self.heard = volume
        return super().generate(*args, **kwargs)


class Passing(nn.Module):
    """A wrapper that passes `generate()` on, as value heads for reinforcement learning do."""

    def __init__(self, inside: Any):
        super().__init__()
        self.inside = inside

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside.generate(*args, **kwargs)


def test_classes_that_override_generate():
    target, draft = pair()
    loud = Shouting(target.config).eval()
    loud.load_state_dict(target.state_dict())
    loud.generation_config = target.generation_config
    with hf_specdec.attached(loud, draft) as attachment:
        assert plain(loud, volume=11).equal(plain(target))
        assert plain(loud, volume=12, strategy="vanilla").equal(plain(target))
    assert loud.heard == 12
    assert attachment.calls == 1
    assert attachment.stats.committed_tokens == 14


@pytest.mark.parametrize("wrap", [Passing, torch.compile, nn.DataParallel], ids=["passing", "compiled", "parallel"])
def test_a_wrapper_is_attached_to_inside(wrap):
    target, draft = pair()
    wrapper = wrap(target)
    with hf_specdec.attached(wrapper, draft) as attachment:
        plain(wrapper if hasattr(wrapper, "generate") else wrapper.module)
        plain(target)
    assert attachment.calls == 2


def test_wrappers_of_other_kinds():
    target, draft = pair()

    class Adapted:
        def get_base_model(self) -> Any:
            return target

    for wrapper in (Adapted(), Passing(nn.Sequential(nn.Identity(), Passing(target)))):
        with hf_specdec.attached(wrapper, draft) as attachment:
            plain(target)
        assert attachment.calls == 1


def test_an_adapter_is_attached_to_inside():
    peft = pytest.importorskip("peft")
    target, draft = copy.deepcopy(pair())
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(target, config).eval()
    expected = plain(adapted)
    with hf_specdec.attached(adapted, draft) as attachment:
        assert plain(adapted).equal(expected)
        assert attachment.calls == 1
        plain(adapted.get_base_model())
        assert attachment.calls == 2
    assert plain(adapted).equal(expected)
    assert attachment.calls == 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Linear(2, 2), "got Linear"),
        ("org/model", "got str"),
        (None, "got NoneType"),
        (LlamaForCausalLM, "got type"),
        (lambda: pair()[0].model, "got LlamaModel"),
        (
            lambda: nn.ModuleList(pair()),
            r"\(ModuleList\) holds several models .* \(LlamaForCausalLM, LlamaForCausalLM\)",
        ),
    ],
)
def test_what_does_not_generate_is_an_error(target, message):
    with pytest.raises(TypeError, match=f"`target`.*{message}"):
        hf_specdec.attached(target() if callable(target) and not isinstance(target, (type, nn.Module)) else target)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": 3}, TypeError, r"attached\(\) got unknown options \['gamma'\]; it knows num_assistant_tokens, "),
        ({"max_new_tokens": 3}, TypeError, r"attached\(\) got unknown options \['max_new_tokens'\]"),
        ({"num_assistant_tokens": 0}, ValueError, "`num_assistant_tokens` must be at least 1, got 0"),
        ({"speculation_stats": {}}, TypeError, "`speculation_stats` must be a SpeculationStats, got dict"),
        ({"draft": nn.Linear(2, 2)}, TypeError, "`assistant_model` must be a transformers model, .* got Linear"),
        ({"draft": 3}, TypeError, "`assistant_model` must be a transformers model, .* got int"),
    ],
)
def test_options_are_checked_before_the_first_call(options, error, message):
    with pytest.raises(error, match=message):
        hf_specdec.attached(pair()[0], **options)


def test_without_registration_attaching_is_an_error_that_says_what_to_call(request):
    request.addfinalizer(hf_specdec.register)
    target, draft = pair()
    attachment = hf_specdec.attached(target, draft)
    before = hf_specdec.attach(target, draft)
    hf_specdec.unregister()
    for attach in (attachment.attach, attachment.__enter__, lambda: hf_specdec.attach(target, draft)):
        with pytest.raises(RuntimeError, match=r"hf_specdec is not registered, .* call hf_specdec.register\(\)"):
            attach()
    plain(target)
    assert before.calls == 0
    hf_specdec.register()
    plain(target)
    assert before.calls == 1
    before.detach()


def test_nothing_is_left_on_the_model_or_its_class():
    target, draft = copy.deepcopy(pair())
    plain(target)
    before = set(vars(target)), target.generation_config.to_dict(), target.config.to_dict(), GenerationMixin.generate
    with hf_specdec.attached(target, draft):
        plain(target)
        assert set(vars(target)) == before[0]
    after = set(vars(target)), target.generation_config.to_dict(), target.config.to_dict(), GenerationMixin.generate
    assert after == before


@pytest.mark.parametrize("state", ["never attached", "detached", "attached"])
def test_an_attachment_does_not_keep_its_target_alive(state):
    target, draft = make_pair("llama", 0.04)
    attachment = hf_specdec.attached(target, draft)
    if state != "never attached":
        attachment.attach()
        plain(target)
    if state == "detached":
        attachment.detach()
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None
    assert "target=LlamaForCausalLM" in repr(attachment) and "detached" in repr(attachment)
    attachment.detach()
    with pytest.raises(RuntimeError, match=r"The target \(LlamaForCausalLM\) is gone"):
        attachment.attach()


def test_pipelines_speculate(tokenizer):
    target, draft = copy.deepcopy(pair())
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer)
    expected = pipe(["abc", "the"], **GREEDY)
    with hf_specdec.attached(target, draft) as attachment:
        assert pipe(["abc", "the"], **GREEDY) == expected
    assert attachment.calls == 2


# Weights that change between calls, as in reinforcement learning


def _weight(model: PreTrainedModel) -> nn.Parameter:
    weight: nn.Parameter = model.get_submodule("model.layers.1.mlp.up_proj").weight
    return weight


def _in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        _weight(model).mul_(-0.5)


def _data_in_place(model: PreTrainedModel) -> None:
    version = _weight(model)._version
    _weight(model).data.copy_(_weight(model).data.flip(0))
    assert _weight(model)._version == version  # autograd's counter does not see it


def _columns_in_place(model: PreTrainedModel) -> None:
    _weight(model).data.copy_(_weight(model).data.roll(2, dims=1))


def _load_state_dict(model: PreTrainedModel) -> None:
    model.load_state_dict(make_model(LlamaConfig(**SIZES), seed=9).state_dict())


def _assign_state_dict(model: PreTrainedModel) -> None:
    model.load_state_dict(make_model(LlamaConfig(**SIZES), seed=9).state_dict(), assign=True)


def _replace_data(model: PreTrainedModel) -> None:
    _weight(model).data = _weight(model).data.flip(1)


def _optimizer_step(model: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    ids = prompts(2)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def _swap_parameter(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.1.mlp").up_proj.weight = nn.Parameter(_weight(model).detach() * -1)


CHANGES = [
    _in_place,
    _data_in_place,
    _columns_in_place,
    _load_state_dict,
    _assign_state_dict,
    _replace_data,
    _optimizer_step,
    _swap_parameter,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("path", ["packed", "packed by itself", "static"])
def test_changed_weights_are_noticed(path, change, request):
    if path == "static":
        way: dict[str, Any] = {"cache_implementation": "static"}
    elif not packing._packs(torch.float32):
        pytest.skip("this machine's PyTorch packs no weights")
    else:
        request.getfixturevalue("weights_packed_from_the_first_token_on")
        way = {}
    target = make_model(LlamaConfig(**SIZES), seed=3)
    draft = perturbed(target, 0.04, seed=4)
    packs = True if path == "packed" else None
    before = plain(target, 2, max_new_tokens=30)
    with hf_specdec.attached(target, draft, num_assistant_tokens=3, speculation_pack_weights=packs) as attachment:
        assert plain(target, 2, max_new_tokens=30, **way).equal(before)
        assert path == "static" or any(module in packing._kept for module in target.modules())
        for _ in range(2):  # the second time, from what the first one has left
            change(target)
            change(draft)
            expected = plain(target, 2, max_new_tokens=30, strategy="vanilla")
            assert not expected.equal(before)
            accepted = attachment.stats.accepted_tokens
            assert plain(target, 2, max_new_tokens=30, **way).equal(expected)
            assert attachment.stats.accepted_tokens > accepted
            before = expected
            change = functools.partial(_noise, 0.05)
    assert attachment.calls == 3


def _noise(strength: float, model: PreTrainedModel) -> None:
    """The same for target and draft."""
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator) * weight.data.std(), alpha=strength)
