"""Models that several processes compute together: two ranks (gloo) get one process's tokens, or one clear error.

Run as a script, this file is one of the ranks: it runs the checks in order, and writes their results.
"""

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, make_model, make_pair, make_prompts, perturbed
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.integrations import deepspeed

import hf_specdec
from hf_specdec import SpeculationStats, options
from hf_specdec.kernels import packing
from hf_specdec.loop.optimal import Optimal
from hf_specdec.models import sharding

# A hang ends after this many seconds: for two ranks, and for one collective.
_SECONDS, _COLLECTIVE_SECONDS = 400, 120
SPEC = {"strategy": "spec"}


# The checks on both ranks. `models` loads "target" and "draft": as they are, or sharded.


class Models:
    def __init__(self, folder: Path):
        self._folder = folder
        self._loaded: dict[Any, PreTrainedModel] = {}

    def __call__(self, name: str, **sharded: int) -> PreTrainedModel:
        key = (name, *sharded.items())
        if key not in self._loaded:
            self._loaded[key] = self.new(name, **sharded)
        return self._loaded[key]

    def new(self, name: str, **sharded: int) -> PreTrainedModel:
        from transformers.distributed import DistributedConfig

        config = {"distributed_config": DistributedConfig(**sharded)} if sharded else {}
        return AutoModelForCausalLM.from_pretrained(self._folder / name, **config).eval()


def _generate(model: PreTrainedModel, rows: int, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    prompts = {} if "input_ids" in kwargs else make_prompts(rows, seed=seed)
    return model.generate(**{"max_new_tokens": 16, "do_sample": False, **prompts, **kwargs})


def _same(target: PreTrainedModel, plain: PreTrainedModel, rows: int, seed: int = 0, **kwargs: Any) -> None:
    """Speculation with sharded models gives one process's vanilla tokens, with drafts accepted and rejected."""
    stats = SpeculationStats()
    ours = _generate(target, rows, seed, speculation_stats=stats, **SPEC, **kwargs)
    assert torch.equal(ours, _generate(plain, rows, seed)), "other tokens than one process"
    assert 0 < stats.acceptance_rate < 1, stats


def _several_calls(models: Models, draft: PreTrainedModel, target: PreTrainedModel) -> None:
    for seed, rows in enumerate((1, 3)):
        _same(target, models("target"), rows, seed, assistant_model=draft)


def _other_drafts(models: Models, target: PreTrainedModel) -> None:
    plain, lookup = models("target"), {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    _same(target, plain, 3, **lookup)
    _same(target, plain, 3, assistant_model=models("draft"), assistant_confidence_threshold=0.4)
    _same(target, plain, 3, assistant_model=models("draft"), num_assistant_tokens_schedule="heuristic")
    _same(target, plain, 3, assistant_model=models("draft"), cache_implementation="static")


def _sampled(models: Models, draft: PreTrainedModel, target: PreTrainedModel) -> None:
    kwargs = {"do_sample": True, "num_assistant_tokens": 3, **SPEC}
    ours = _generate(target, 3, assistant_model=draft, **kwargs)
    assert torch.equal(ours, _generate(models("target"), 3, assistant_model=models("draft"), **kwargs))


def tensor_parallel_target(models: Models) -> None:
    _several_calls(models, models("draft"), models("target", tp_size=2))


def tensor_parallel_target_and_draft(models: Models) -> None:
    _several_calls(models, models("draft", tp_size=2), models("target", tp_size=2))


def tensor_parallel_draft_alone(models: Models) -> None:
    _several_calls(models, models("draft", tp_size=2), models("target"))


def tensor_parallel_with_other_drafts(models: Models) -> None:
    _other_drafts(models, models("target", tp_size=2))


def tensor_parallel_sampled(models: Models) -> None:
    _sampled(models, models("draft"), models("target", tp_size=2))


def tensor_parallel_by_torch(models: Models) -> None:
    """transformers does not know about it: only the parameters show it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    target, mesh = models.new("target"), init_device_mesh("cpu", (2,))
    for layer in target.model.layers:
        styles = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        parallelize_module(layer.mlp, mesh, styles)
    assert getattr(target, "_tp_size", None) is None
    assert "sharded over processes" in str(sharding.sharded(target, None))
    _several_calls(models, models("draft"), target)


def nothing_is_packed_by_the_clock(models: Models) -> None:
    draft, target = models.new("draft"), models("target", tp_size=2)
    with pytest.MonkeyPatch.context() as patch:  # whole models may measure in later checks
        patch.setattr(packing, "MIN_NEW_TOKENS", 0)
        patch.setattr(packing, "_measure_gain", _no_clock)
        patch.setattr(packing, "_gains", {})
        _same(target, models("target"), 1, assistant_model=draft)
        assert not packing._kept
        _same(target, models("target"), 1, assistant_model=draft, speculation_pack_weights=True)
    packable = [module for module in draft.modules() if packing._can_be_packed(module)]
    assert all(layer in packing._kept for layer in packable)
    packing._kept.clear()


def pipeline_stages(models: Models) -> None:
    _several_calls(models, models("draft"), models("target", pp_size=2))


def pipeline_stages_of_target_and_draft(models: Models) -> None:
    _several_calls(models, models("draft", pp_size=2), models("target", pp_size=2))


def pipeline_stages_with_other_drafts(models: Models) -> None:
    _other_drafts(models, models("target", pp_size=2))


def pipeline_stages_sampled(models: Models) -> None:
    _sampled(models, models("draft"), models("target", pp_size=2))


def pipeline_stages_with_windows(models: Models) -> None:
    target = models("sliding", pp_size=2)
    for rows in (1, 3):
        _same(target, models("sliding"), rows, assistant_model=models("sliding_draft"))


def pipeline_stages_decode_rows_of_different_lengths(models: Models) -> None:
    from hf_specdec.models.abilities import Abilities

    assert Abilities.of(models("target", pp_size=2)).ragged


def pipeline_stages_hand_their_layers_back(models: Models) -> None:
    plain, target, draft = models("target"), models("target", pp_size=2), models("draft")
    expected = _generate(plain, 3, return_dict_in_generate=True)
    for given in ({}, {"past_key_values": DynamicCache()}):
        out = _generate(target, 3, assistant_model=draft, return_dict_in_generate=True, **given, **SPEC)
        layers = [(index, layer) for index, layer in enumerate(out.past_key_values.layers) if layer.is_initialized]
        assert [index for index, _ in layers] == ([0], [1, 2])[distributed.get_rank()]
        for index, layer in layers:
            for name in ("keys", "values"):
                got, wanted = (getattr(each, name) for each in (layer, expected.past_key_values.layers[index]))
                torch.testing.assert_close(got[0], wanted[0], atol=1e-4, rtol=1e-4)  # the row without padding


def pipeline_stages_go_on_from_caches(models: Models) -> None:
    plain, target, draft = models("target"), models("target", pp_size=2), models("draft")
    more = make_prompts(1, width=3, seed=9)["input_ids"]

    def twice(model: PreTrainedModel, cache: Any, **kwargs: Any) -> Tensor:
        first = _generate(model, 1, past_key_values=cache, **kwargs)
        return _generate(model, 1, input_ids=torch.cat([first, more], dim=1), past_key_values=cache, **kwargs)

    expected = twice(plain, DynamicCache())
    for cache in (DynamicCache(), StaticCache(config=target.config, max_cache_len=80)):
        assert torch.equal(twice(target, cache, assistant_model=draft, **SPEC), expected)


def optimal_is_refused_where_it_is_asked_for(models: Models) -> None:
    whole, sharded = models("target"), [models("target", tp_size=2), models("target", pp_size=2)]
    for target, draft in [(s, models("draft")) for s in sharded] + [(whole, models("draft", tp_size=2))]:
        error = _error(target, assistant_model=draft, num_assistant_tokens_schedule="optimal", **SPEC)
        assert "`num_assistant_tokens_schedule='optimal'`" in error and "set it to 'constant'" in error


def _count(forwards: list[object], *_: object) -> None:
    forwards.append(1)


def fsdp_is_refused(models: Models) -> None:
    from torch.distributed.fsdp import fully_shard

    def managed(name: str) -> PreTrainedModel:
        model = models.new(name)
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    target, draft, plain, plain_draft = managed("target"), managed("draft"), models("target"), models("draft")
    only_layers = models.new("draft")
    for layer in only_layers.model.layers:
        fully_shard(layer)
    by_transformers = models("target", fsdp_size=2)
    for model, assistant, named in (
        (target, plain_draft, "the target"),
        (plain, draft, "`assistant_model`"),
        (target, draft, "the target"),
        (plain, only_layers, "`assistant_model`"),
        (by_transformers, plain_draft, "the target"),
        (target, None, "the target"),  # prompt look-up
        (plain, hf_specdec.drafters.ModelDrafter(draft), "`assistant_model`"),
    ):
        forwards: list[object] = []
        hooks = [m.register_forward_pre_hook(partial(_count, forwards)) for m in (model, plain, plain_draft)]
        for door in ({"assistant_model": assistant, **SPEC}, {"custom_generate": hf_specdec.speculative(assistant)}):
            error = _error(model, seed=distributed.get_rank(), **door)
            assert f"cannot be used with {named} (" in error and "FSDP manages it" in error
            assert "pass a copy that FSDP does not manage, or drop strategy='spec'" in error
        assert not forwards
        for hook in hooks:
            hook.remove()
    # The ways out named in the message.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    copy = models.new("target")
    copy.load_state_dict(get_model_state_dict(target, options=StateDictOptions(full_state_dict=True)))
    rank = distributed.get_rank()
    _same(copy, plain, 1 + 2 * rank, seed=rank, assistant_model=plain_draft, num_assistant_tokens=3)
    assert torch.equal(_generate(target, 1), _generate(plain, 1))


def whole_models_are_nobodys_business(models: Models) -> None:
    """Each rank has its own models and prompts; measured times may matter here, though the script forbids it."""
    assert sharding.sharded(models("target"), models("draft")) is None
    rank = distributed.get_rank()
    for seed in range(1 + rank):
        _same(
            models("target"), models("target"), 1 + rank, seed, assistant_model=models("draft"), num_assistant_tokens=3
        )


def _error(target: PreTrainedModel, seed: int = 0, **kwargs: Any) -> str:
    """The message of the ValueError that a call raises; it is the same on both ranks, and no rank is left waiting."""
    with pytest.raises(ValueError) as raised:
        _generate(target, 1, seed, **kwargs)
    messages: list[Any] = [None, None]
    distributed.all_gather_object(messages, str(raised.value))
    assert messages[0] == messages[1], messages
    return str(messages[0])


_CHECKS: list[Callable[[Models], None]] = [
    whole_models_are_nobodys_business,
    tensor_parallel_target,
    tensor_parallel_target_and_draft,
    tensor_parallel_draft_alone,
    tensor_parallel_with_other_drafts,
    tensor_parallel_sampled,
    tensor_parallel_by_torch,
    nothing_is_packed_by_the_clock,
    pipeline_stages,
    pipeline_stages_of_target_and_draft,
    pipeline_stages_with_other_drafts,
    pipeline_stages_sampled,
    pipeline_stages_with_windows,
    pipeline_stages_decode_rows_of_different_lengths,
    pipeline_stages_hand_their_layers_back,
    pipeline_stages_go_on_from_caches,
    optimal_is_refused_where_it_is_asked_for,
    fsdp_is_refused,
]


def _no_clock(*_: object) -> Any:
    raise AssertionError("something goes by the clock of one rank")


def _be_a_rank(folder: Path, names: list[str]) -> None:
    """Run these checks. A rank that fails one continues; the process group's time limit ends what waits for it."""
    from datetime import timedelta

    Optimal.__init__ = _no_clock
    distributed.init_process_group("gloo", timeout=timedelta(seconds=_COLLECTIVE_SECONDS))
    models = Models(folder)
    for check in (check for check in _CHECKS if check.__name__ in names):
        began, came = time.perf_counter(), ""
        try:
            check(models)
        except BaseException:
            came = traceback.format_exc()
        line = {"check": check.__name__, "came": came, "seconds": round(time.perf_counter() - began, 2)}
        with (folder / f"rank{distributed.get_rank()}").open("a") as file:
            file.write(json.dumps(line) + "\n")
    os._exit(0)  # without waiting for anybody


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """The traceback by check and rank, empty if there is none. Missing entries were not reached."""
    selected = {item.callspec.params.get("check") for item in request.session.items if hasattr(item, "callspec")}
    folder = tmp_path_factory.mktemp("sharded")
    for name, prefix in (("llama", ""), ("mistral-sliding", "sliding_")):
        config = ARCHITECTURES[name]()
        config.num_hidden_layers = 3  # so that stages own one and two
        target = make_model(config)
        target.save_pretrained(folder / (prefix or "target").rstrip("_"))
        perturbed(target, 0.12).save_pretrained(folder / f"{prefix}draft")
    shared = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    shared |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (Path(hf_specdec.__file__).parents[1], Path(__file__).parents[1]))),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *[c.__name__ for c in _CHECKS if c.__name__ in selected]],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"stderr{rank}").open("w"),
        )
        for rank in range(2)
    ]
    end = time.monotonic() + _SECONDS
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):  # one has died, and the other may wait for it
                end = min(end, time.monotonic() + 20)
            time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = {}
    for rank in range(2):
        print((folder / f"stderr{rank}").read_text()[-2000:])
        file = folder / f"rank{rank}"
        for line in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
            found[line["check"], rank] = line["came"]
            print(rank, line["check"], line["seconds"])
    return found


@pytest.mark.parametrize("check", [check.__name__ for check in _CHECKS])
def test_two_ranks(check: str, outcome: dict[tuple[str, int], str]) -> None:
    for rank in range(2):
        came = outcome.get((check, rank), "not reached: a rank died or waited for the other until its time was over")
        assert not came, f"rank {rank}: {came}"


# Probes of a model, without processes.


@pytest.fixture
def as_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "_world_size", lambda: 2)


def test_one_process_has_whole_models() -> None:
    target, draft = make_pair("llama")
    target._tp_size, draft._is_fsdp_managed_module = 2, True  # left over, say; there is nobody to wait for
    assert sharding.sharded(target, draft) is None


@pytest.mark.parametrize(
    ("attribute", "value", "how"),
    [
        ("_tp_size", 2, "is tensor parallel over 2 processes"),
        ("_tp_size", 1, None),
        ("_pp_stage", SimpleNamespace(pp_size=4), "is one of 4 pipeline stages"),
    ],
)
def test_sharded_target_or_draft_is_named(as_one_of_two: None, attribute: str, value: object, how: str | None) -> None:
    target, draft = make_pair("llama")
    assert sharding.sharded(target, draft) is None
    setattr(draft, attribute, value)
    expected = how and f"`assistant_model` (LlamaForCausalLM) {how}"
    assert sharding.sharded(target, draft) == expected
    assert sharding.sharded(target, hf_specdec.drafters.ModelDrafter(draft)) == expected
    assert sharding.sharded(draft, "some/draft") == (how and f"the target (LlamaForCausalLM) {how}")


@pytest.mark.parametrize("whose", ["target", "assistant_model"])
def test_fsdp_is_found_in_any_part(as_one_of_two: None, whose: str) -> None:
    target, draft = make_pair("llama")
    {"target": target, "assistant_model": draft}[whose].model.layers[1]._is_fsdp_managed_module = True
    with pytest.raises(ValueError, match=rf"cannot be used with .*{whose}.*FSDP manages it.*drop strategy='spec'"):
        target.generate(**make_prompts(1), assistant_model=draft, max_new_tokens=4, **SPEC)


def test_zero3_is_refused(as_one_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = make_pair("llama")
    enabled = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: enabled)
    for door in ({"assistant_model": draft, **SPEC}, {"custom_generate": hf_specdec.speculative(draft)}):
        with pytest.raises(
            ValueError, match=r"the target .*DeepSpeed ZeRO-3 is enabled.*generate in a process without"
        ):
            target.generate(**make_prompts(1), max_new_tokens=4, **door)


def test_synced_gpus_is_refused_in_both_doors() -> None:
    target, draft = make_pair("llama")
    for door in ({"assistant_model": draft, **SPEC}, {"custom_generate": hf_specdec.speculative(draft)}):
        with pytest.raises(ValueError, match=r"`synced_gpus` is not supported.*equally many forwards"):
            target.generate(**make_prompts(1), max_new_tokens=4, synced_gpus=True, **door)
        target.generate(**make_prompts(1), max_new_tokens=4, synced_gpus=False, **door)


@pytest.fixture
def own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(options.DEFAULTS, "num_assistant_tokens_schedule", None)
    monkeypatch.setitem(options.DEFAULTS, "speculation_pack_weights", None)


def test_default_schedule_is_constant_where_a_model_is_sharded(own_defaults: None) -> None:
    target, draft = make_pair("llama")
    for together, schedule, packs in ((None, "optimal", None), ("the target is sharded", "constant", False)):
        resolved = options.resolve_options({}, target.generation_config, target, draft, together)
        assert resolved.num_assistant_tokens_schedule == schedule
        assert resolved.speculation_pack_weights is packs


def test_what_was_asked_for_stays_where_a_model_is_sharded(own_defaults: None) -> None:
    target, draft = make_pair("llama")
    given = {"num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 3, "speculation_pack_weights": True}
    resolved = options.resolve_options(given, target.generation_config, target, draft, "the target is sharded")
    assert {name: getattr(resolved, name) for name in given} == given


@pytest.mark.parametrize("where", ["call", "target", "draft"])
def test_optimal_is_an_error_wherever_it_was_asked_for(own_defaults: None, where: str) -> None:
    target, draft = make_pair("llama")
    given = {"num_assistant_tokens_schedule": "optimal"} if where == "call" else {}
    for name, model in (("target", target), ("draft", draft)):
        model.generation_config.num_assistant_tokens_schedule = "optimal" if where == name else None
    with pytest.raises(ValueError, match=r"`num_assistant_tokens_schedule='optimal'` relies on the clock"):
        options.resolve_options(given, target.generation_config, target, draft, "the target is sharded")


def test_stage_tells_the_length_of_layers_that_it_owns() -> None:
    model = make_model(ARCHITECTURES["mistral-sliding"]())
    cache = sharding.OwnLayersCache(config=model.config)
    whole = DynamicCache(config=model.config)
    entries = torch.zeros(1, 2, 5, 8)
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(3, 0) == whole.get_mask_sizes(3, 0)
    cache.update(entries, entries, 1)
    for index in range(2):
        whole.update(entries, entries, index)
    assert cache.get_seq_length() == cache.get_query_offset() == 5
    assert cache.get_mask_sizes(3, 0) == whole.get_mask_sizes(3, 0)


if __name__ == "__main__":
    _be_a_rank(Path(sys.argv[1]), sys.argv[2:])
