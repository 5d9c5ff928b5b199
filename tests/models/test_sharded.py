"""Models that several processes compute together: two ranks (gloo) get one process's tokens, or one clear error.

Run as a script, this file is one of the ranks: it runs the checks in order, and writes their results.
"""

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, make_model, make_pair, make_prompts, perturbed
from torch import Tensor, distributed
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations import deepspeed

import hf_specdec
from hf_specdec import Draft, Drafter, SpeculationStats, SuffixDrafter
from hf_specdec.kernels import packing
from hf_specdec.loop.optimal import Optimal
from hf_specdec.models import sharding
from hf_specdec.sampling.context import Context

# A hang ends after this many seconds: for two ranks, and for one collective.
_SECONDS, _COLLECTIVE_SECONDS = 400, 120
SPEC: dict[str, Any] = {"strategy": "spec"}


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


def _generate(model: PreTrainedModel, rows: int, seed: int = 0, random_seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(random_seed)
    prompts = {} if "input_ids" in kwargs else make_prompts(rows, seed=seed)
    return model.generate(**{"max_new_tokens": 16, "do_sample": False, **prompts, **kwargs})


def _same(target: PreTrainedModel, plain: PreTrainedModel, rows: int, seed: int = 0, **kwargs: Any) -> None:
    """Speculation with sharded models gives one process's vanilla tokens, with drafts accepted and rejected."""
    stats = SpeculationStats()
    kwargs = {"num_assistant_tokens": 3, **kwargs}
    ours = _generate(target, rows, seed, speculation_stats=stats, **SPEC, **kwargs)
    assert torch.equal(ours, _generate(plain, rows, seed)), "other tokens than one process"
    assert 0 < stats.acceptance_rate < 1, stats


def _several_calls(models: Models, draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """With the default schedule, which on each rank would choose other draft lengths."""
    dice = random.Random(distributed.get_rank())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimal, "plan", lambda *_: dice.randint(0, 4))
        patch.setattr(Optimal, "_go_on", lambda *_: dice.random() < 0.7)
        patch.setattr(Optimal, "update", lambda *_: None)
        for seed, rows in enumerate((1, 3)):
            _same(target, models("target"), rows, seed, assistant_model=draft, num_assistant_tokens=None)


def _other_drafts(models: Models, target: PreTrainedModel) -> None:
    plain, lookup = models("target"), {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    _same(target, plain, 3, **lookup)
    _same(target, plain, 3, assistant_model=models("draft"), assistant_confidence_threshold=0.4)
    _same(target, plain, 3, assistant_model=models("draft"), num_assistant_tokens_schedule="heuristic")
    _same(target, plain, 3, assistant_model=models("draft"), cache_implementation="static")


def _sampled(models: Models, draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """The first rank's seed counts, and afterwards all ranks have the same random state."""
    kwargs: dict[str, Any] = {"do_sample": True, "num_assistant_tokens": 3, **SPEC}
    for rule in ("token", "coupled"):
        kwargs["speculation_acceptance"] = rule
        ours = _generate(target, 3, random_seed=distributed.get_rank(), assistant_model=draft, **kwargs)
        after = torch.rand(1)
        alone = _generate(models("target"), 3, assistant_model=models("draft"), **kwargs)
        expected = torch.rand(1)
        if distributed.get_rank() == 0:
            assert torch.equal(ours, alone) and torch.equal(after, expected), rule
        everyone: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, (ours.tolist(), after.item()))
        assert all(each == everyone[0] for each in everyone), rule


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


def _by_torch(models: Models, mesh: Any) -> PreTrainedModel:
    """transformers does not know about it: only the parameters show it."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    target = models.new("target")
    for layer in target.model.layers:
        styles = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        parallelize_module(layer.mlp, mesh, styles)
    assert getattr(target, "_tp_size", None) is None
    return target


def tensor_parallel_by_torch(models: Models) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    target = _by_torch(models, init_device_mesh("cpu", (2,)))
    assert sharding.sharded(target, None) == (None, False)
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


class Guesses(Drafter):
    """Random tokens, on each rank others."""

    in_vocabulary = True

    def __init__(self, fails_after: int = 1000):
        self.generator = torch.Generator().manual_seed(distributed.get_rank())
        self.left = fails_after

    def propose(self, context: Context, max_tokens: int) -> Draft:
        self.left -= 1
        if self.left < 0:
            raise ValueError("no more guesses")
        shape = len(context.rows), max_tokens
        return Draft(torch.randint(5, 60, shape, generator=self.generator))


def drafts_of_the_first_rank_count(models: Models) -> None:
    plain, rank = models("target"), distributed.get_rank()
    texts = [_generate(plain, 3, seed=4)[:, 4:].tolist(), []][rank]
    for target in (models("target", tp_size=2), models("target", pp_size=2)):
        for drafter in (Guesses(), SuffixDrafter(corpus=texts)):
            out = _generate(target, 3, seed=4, assistant_model=drafter, num_assistant_tokens=3, **SPEC)
            assert torch.equal(out, _generate(plain, 3, seed=4)), type(drafter)


def time_of_the_first_rank_counts(models: Models) -> None:
    from transformers.generation import stopping_criteria

    target, draft, began = models("target", tp_size=2), models("draft"), time.time()
    for ends in (True, False):
        is_fast = (distributed.get_rank() == 0) == ends
        with pytest.MonkeyPatch.context() as patch:
            clocks = itertools.count(began, 1000.0 if is_fast else 0.0)
            patch.setattr(stopping_criteria, "time", SimpleNamespace(time=clocks.__next__))
            out = _generate(target, 3, assistant_model=draft, max_time=500.0, **SPEC)
        expected = _generate(models("target"), 3)
        assert torch.equal(out, expected[:, : out.shape[1]]), ends
        assert (out.shape[1] == expected.shape[1] - 15) == ends


def an_error_of_the_first_rank_ends_all(models: Models) -> None:
    target, rank = models("target", tp_size=2), distributed.get_rank()
    for fails_after in (0, 3):
        with pytest.raises(ValueError if rank == 0 else RuntimeError) as raised:
            drafter = Guesses(fails_after if rank == 0 else 1000)
            _generate(target, 2, assistant_model=drafter, num_assistant_tokens=2, **SPEC)
        assert ("no more guesses" if rank == 0 else "has stopped: see its error") in str(raised.value)
    _same(target, models("target"), 2, assistant_model=models("draft"))


def many_prompts(models: Models) -> None:
    plain, draft = models("target"), models("draft")
    whole = make_prompts(1, width=49, seed=3)["input_ids"][0].tolist()
    prompts = [whole[7 * i :][: 3 + i] for i in range(7)]
    for target in (models("target", tp_size=2), models("target", pp_size=2)):
        for assistant in (draft, models("draft", tp_size=2)):
            found = hf_specdec.generate_many(
                target, prompts, assistant_model=assistant, batch_size=3, max_new_tokens=12, do_sample=False
            )
            for each in found:
                ids = torch.tensor([prompts[each.index]])
                expected = _generate(plain, 1, input_ids=ids, max_new_tokens=12)[0, ids.shape[1] :]
                assert each.new_tokens.tolist() == expected.tolist(), each.index


def one_message_per_iteration(models: Models) -> None:
    """And two more: whether the drafter has started, and what the last iteration has chosen."""
    sizes: list[int] = []
    broadcast = distributed.broadcast

    def noted(tensor: Tensor, *args: Any) -> None:
        sizes.append(tensor.numel())
        broadcast(tensor, *args)

    stats = SpeculationStats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "broadcast", noted)
        _generate(models("target", tp_size=2), 3, assistant_model=models("draft"), speculation_stats=stats, **SPEC)
    assert len(sizes) == len(stats.iterations) + 2 > 5 and max(sizes) <= 512


def tensor_parallel_sampled_in_step(models: Models) -> None:
    _sampled(models, models("draft", tp_size=2), models("target", tp_size=2))


def long_messages(models: Models) -> None:
    _same(models("target", tp_size=2), models("target"), 40, assistant_model=models("draft"), num_assistant_tokens=8)


def early_exit(models: Models) -> None:
    _same(models("target", tp_size=2), models("target"), 3, assistant_early_exit=2)


def hundred_calls(models: Models) -> None:
    target, draft, rank = models("target", tp_size=2), models("draft"), distributed.get_rank()
    for seed in range(100):
        time.sleep(0.001 * rank * (seed % 3))
        rows = 1 + seed % 4
        ours = _generate(target, rows, seed, assistant_model=draft, **SPEC)
        assert torch.equal(ours, _generate(models("target"), rows, seed)), seed


def tensor_parallel_of_four(models: Models) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    _several_calls(models, models("draft"), _by_torch(models, init_device_mesh("cpu", (4,))))


def groups_beside_each_other_of_four(models: Models) -> None:
    """Two groups of two ranks: each decodes other prompts, and another number of them."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")), distributed.get_rank() // 2
    target = _by_torch(models, mesh["tensor"])
    for seed in range(1 + 2 * group):
        _same(target, models("target"), 1 + group, seed + 5 * group, assistant_model=models("draft"))
    distributed.barrier()


def _managed(models: Models, name: str) -> PreTrainedModel:
    from torch.distributed.fsdp import fully_shard

    model = models.new(name)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp_ranks_have_prompts_of_their_own(models: Models) -> None:
    plain, plain_draft, rank = models("target"), models("draft"), distributed.get_rank()
    target, draft = _managed(models, "target"), _managed(models, "draft")
    for case, (model, assistant) in enumerate(
        [
            (target, plain_draft),
            (plain, draft),
            (target, draft),
            (models("target", fsdp_size=2), plain_draft),
            (plain, hf_specdec.drafters.ModelDrafter(draft)),
        ]
    ):
        rows = 1 + 2 * (rank != case % 2)  # a batch on one rank, one row on the other
        _same(model, plain, rows, 2 * case + rank, assistant_model=assistant)
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    _same(target, plain, 2, rank, **lookup)
    sampled: dict[str, Any] = {"do_sample": True, "speculation_acceptance": "coupled", "speculation_seed": 5 + rank}
    ours, expected = (
        _generate(model, 2, rank, assistant_model=assistant, **SPEC, **sampled)
        for model, assistant in ((target, draft), (plain, plain_draft))
    )
    assert torch.equal(ours, expected)


def fsdp_ranks_may_end_early(models: Models) -> None:
    target, draft, rank = _managed(models, "target"), _managed(models, "draft"), distributed.get_rank()
    hooks = [len(model._forward_pre_hooks) for model in (target, draft)]
    for early in range(2):
        tokens = 2 if rank == early else 20
        out = _generate(target, 1, rank, max_new_tokens=tokens, assistant_model=draft, **SPEC)
        assert torch.equal(out, _generate(models("target"), 1, rank, max_new_tokens=tokens))
        kwargs: dict[str, Any] = {"num_assistant_tokens_schedule": "nothing"} if rank == early else {}
        if kwargs:
            with pytest.raises(ValueError, match="num_assistant_tokens_schedule"):
                _generate(target, 1, rank, assistant_model=draft, **kwargs, **SPEC)
        else:
            _same(target, models("target"), 1, rank, assistant_model=draft)
    assert [len(model._forward_pre_hooks) for model in (target, draft)] == hooks


def fsdp_refuses_what_is_unlike_other_forwards(models: Models) -> None:
    target = _managed(models, "target")
    with pytest.raises(ValueError, match=r"`assistant_early_exit`.*not possible where all ranks gather weights"):
        _generate(target, 1, assistant_early_exit=1, **SPEC)
    with pytest.raises(ValueError, match=r"generate_many\(\) cannot be used where all ranks gather"):
        next(iter(hf_specdec.generate_many(target, [[5, 6]], assistant_model=models("draft"), max_new_tokens=2)))


def synced_gpus(models: Models) -> None:
    rank = distributed.get_rank()
    _same(models("target"), models("target"), 1 + rank, rank, assistant_model=models("draft"), synced_gpus=True)


def whole_models_are_nobodys_business(models: Models) -> None:
    """Each rank has its own models and prompts, and goes by its own clock."""
    assert sharding.sharded(models("target"), models("draft")) is None
    rank = distributed.get_rank()
    for seed in range(1 + rank):
        _same(
            models("target"), models("target"), 1 + rank, seed, assistant_model=models("draft"), num_assistant_tokens=3
        )


def prompts_are_split_between_processes(models: Models) -> None:
    from accelerate import PartialState

    with PartialState(cpu=True).split_between_processes(list(range(5))) as mine:
        assert len(mine) == 3 - distributed.get_rank()
        for seed in mine:
            _same(models("target"), models("target"), 1 + seed % 2, seed, assistant_model=models("draft"))


_CHECKS: list[Callable[[Models], None]] = [
    whole_models_are_nobodys_business,
    prompts_are_split_between_processes,
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
    drafts_of_the_first_rank_count,
    time_of_the_first_rank_counts,
    an_error_of_the_first_rank_ends_all,
    many_prompts,
    one_message_per_iteration,
    tensor_parallel_sampled_in_step,
    long_messages,
    early_exit,
    fsdp_ranks_have_prompts_of_their_own,
    fsdp_ranks_may_end_early,
    fsdp_refuses_what_is_unlike_other_forwards,
    synced_gpus,
    hundred_calls,
    tensor_parallel_of_four,
    groups_beside_each_other_of_four,
]


def _no_clock(*_: object) -> Any:
    raise AssertionError("something goes by the clock of one rank")


def _be_a_rank(folder: Path, names: list[str]) -> None:
    """Run these checks. A rank that fails one continues; the process group's time limit ends what waits for it."""
    from datetime import timedelta

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


_SLOW = (hundred_calls, tensor_parallel_of_four, groups_beside_each_other_of_four)


def _ranks_of(check: str) -> int:
    return 4 if check.endswith("of_four") else 2


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """The traceback by check and rank, empty if there is none. Missing entries were not reached."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = [check.__name__ for check in _CHECKS if any(p.get("check") == check.__name__ for p in params)]
    folder = tmp_path_factory.mktemp("sharded")
    for name, prefix in (("llama", ""), ("mistral-sliding", "sliding_")):
        config = ARCHITECTURES[name]()
        config.num_hidden_layers = 3  # so that stages own one and two
        target = make_model(config)
        target.save_pretrained(folder / (prefix or "target").rstrip("_"))
        perturbed(target, 0.12).save_pretrained(folder / f"{prefix}draft")
    found: dict[tuple[str, int], str] = {}
    for world in (2, 4):
        if names := [name for name in selected if _ranks_of(name) == world]:
            found |= _run(folder, world, names)
    return found


def _run(folder: Path, world: int, names: list[str]) -> dict[tuple[str, int], str]:
    shared = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
    shared |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (Path(hf_specdec.__file__).parents[1], Path(__file__).parents[1]))),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *names],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"stderr{rank}").open("w"),
        )
        for rank in range(world)
    ]
    end = time.monotonic() + _SECONDS
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):  # one has died, and others may wait for it
                end = min(end, time.monotonic() + 20)
            time.sleep(0.2)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    found = {}
    for rank in range(world):
        print((folder / f"stderr{rank}").read_text()[-2000:])
        file = folder / f"rank{rank}"
        for line in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
            found[line["check"], rank] = line["came"]
            print(rank, line["check"], line["seconds"])
    return found


@pytest.mark.parametrize(
    "check", [pytest.param(check.__name__, marks=[pytest.mark.slow] * (check in _SLOW)) for check in _CHECKS]
)
def test_several_ranks(check: str, outcome: dict[tuple[str, int], str]) -> None:
    for rank in range(_ranks_of(check)):
        came = outcome.get((check, rank), "not reached: a rank died or waited for others until its time was over")
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
    ("attribute", "value", "found"),
    [("_tp_size", 2, True), ("_tp_size", 1, False), ("_pp_stage", SimpleNamespace(pp_size=4), True)],
)
def test_sharded_target_or_draft_is_found(as_one_of_two: None, attribute: str, value: object, found: bool) -> None:
    target, draft = make_pair("llama")
    assert sharding.sharded(target, draft) is None
    setattr(draft, attribute, value)
    draft._device_mesh = SimpleNamespace(size=lambda: 2)
    expected = (None, True) if found else None
    assert sharding.sharded(target, draft) == expected
    assert sharding.sharded(target, hf_specdec.drafters.ModelDrafter(draft)) == expected
    assert sharding.sharded(draft, "some/draft") == ((None, False) if found else None)


def test_zero3_is_refused(as_one_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = make_pair("llama")
    enabled = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: enabled)
    for door in ({"assistant_model": draft, **SPEC}, {"custom_generate": hf_specdec.speculative(draft)}):
        with pytest.raises(ValueError, match=r"has not been tried with DeepSpeed ZeRO-3, which is enabled"):
            target.generate(**make_prompts(1), max_new_tokens=4, **door)


def test_fsdp_is_not_combined_with_parts_of_models(as_one_of_two: None) -> None:
    target, draft = make_pair("llama")
    target._tp_size, draft.model.layers[1]._is_fsdp_managed_module = 2, True
    with pytest.raises(ValueError, match="FSDP together with tensor parallel models or pipeline stages"):
        target.generate(**make_prompts(1), assistant_model=draft, max_new_tokens=4, **SPEC)


def test_fsdp_needs_forwards_that_are_alike(as_one_of_two: None) -> None:
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    target = draft = T5ForConditionalGeneration(config)
    target._is_fsdp_managed_module = True
    with pytest.raises(ValueError, match="with encoder-decoder models where all ranks gather weights"):
        target.generate(**make_prompts(1), assistant_model=draft, max_new_tokens=4, **SPEC)


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
