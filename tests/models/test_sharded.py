"""Models that several processes compute together: two ranks (gloo) get one process's tokens, or one clear error.

Run as a script, this file is one of the ranks: it runs the checks in order, and writes their results.
"""

import itertools
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, make_model, make_pair, make_prompts
from several_ranks import SPEC, Check, Models, assert_reached, be_a_rank, generate, run_ranks, same, save_pair
from torch import Tensor, distributed
from transformers import (
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_specdec
from hf_specdec import Draft, Drafter, SpeculationStats, SuffixDrafter
from hf_specdec.kernels import packing
from hf_specdec.loop.optimal import Optimal
from hf_specdec.models import sharding
from hf_specdec.sampling.context import Context

# The checks on both ranks. `models` loads "target" and "draft": as they are, or sharded.


def _several_calls(models: Models, draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """With the default schedule, which on each rank would choose other draft lengths."""
    dice = random.Random(distributed.get_rank())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimal, "plan", lambda *_: dice.randint(0, 4))
        patch.setattr(Optimal, "_go_on", lambda *_: dice.random() < 0.7)
        patch.setattr(Optimal, "update", lambda *_: None)
        for seed, rows in enumerate((1, 3)):
            same(target, models("target"), rows, seed, assistant_model=draft, num_assistant_tokens=None)


def _other_drafts(models: Models, target: PreTrainedModel) -> None:
    plain, lookup = models("target"), {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    same(target, plain, 3, **lookup)
    same(target, plain, 3, assistant_model=models("draft"), assistant_confidence_threshold=0.4)
    same(target, plain, 3, assistant_model=models("draft"), num_assistant_tokens_schedule="heuristic")
    same(target, plain, 3, assistant_model=models("draft"), cache_implementation="static")


def _sampled(models: Models, draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """The first rank's seed counts, and afterwards all ranks have the same random state."""
    kwargs: dict[str, Any] = {"do_sample": True, "num_assistant_tokens": 3, **SPEC}
    for rule in ("token", "coupled"):
        kwargs["speculation_acceptance"] = rule
        ours = generate(target, 3, random_seed=distributed.get_rank(), assistant_model=draft, **kwargs)
        after = torch.rand(1)
        alone = generate(models("target"), 3, assistant_model=models("draft"), **kwargs)
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
        same(target, models("target"), 1, assistant_model=draft)
        assert not packing._kept
        same(target, models("target"), 1, assistant_model=draft, speculation_pack_weights=True)
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
        same(target, models("sliding"), rows, assistant_model=models("sliding_draft"))


def pipeline_stages_decode_rows_of_different_lengths(models: Models) -> None:
    from hf_specdec.models.abilities import Abilities

    assert Abilities.of(models("target", pp_size=2)).ragged


def pipeline_stages_hand_their_layers_back(models: Models) -> None:
    plain, target, draft = models("target"), models("target", pp_size=2), models("draft")
    expected = generate(plain, 3, return_dict_in_generate=True)
    for given in ({}, {"past_key_values": DynamicCache()}):
        out = generate(target, 3, assistant_model=draft, return_dict_in_generate=True, **given, **SPEC)
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
        first = generate(model, 1, past_key_values=cache, **kwargs)
        return generate(model, 1, input_ids=torch.cat([first, more], dim=1), past_key_values=cache, **kwargs)

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
    texts = [generate(plain, 3, seed=4)[:, 4:].tolist(), []][rank]
    for target in (models("target", tp_size=2), models("target", pp_size=2)):
        for drafter in (Guesses(), SuffixDrafter(corpus=texts)):
            out = generate(target, 3, seed=4, assistant_model=drafter, num_assistant_tokens=3, **SPEC)
            assert torch.equal(out, generate(plain, 3, seed=4)), type(drafter)


def time_of_the_first_rank_counts(models: Models) -> None:
    from transformers.generation import stopping_criteria

    target, draft, began = models("target", tp_size=2), models("draft"), time.time()
    for ends in (True, False):
        is_fast = (distributed.get_rank() == 0) == ends
        with pytest.MonkeyPatch.context() as patch:
            clocks = itertools.count(began, 1000.0 if is_fast else 0.0)
            patch.setattr(stopping_criteria, "time", SimpleNamespace(time=clocks.__next__))
            out = generate(target, 3, assistant_model=draft, max_time=500.0, **SPEC)
        expected = generate(models("target"), 3)
        assert torch.equal(out, expected[:, : out.shape[1]]), ends
        assert (out.shape[1] == expected.shape[1] - 15) == ends


def an_error_of_the_first_rank_ends_all(models: Models) -> None:
    target, rank = models("target", tp_size=2), distributed.get_rank()
    for fails_after in (0, 3):
        with pytest.raises(ValueError if rank == 0 else RuntimeError) as raised:
            drafter = Guesses(fails_after if rank == 0 else 1000)
            generate(target, 2, assistant_model=drafter, num_assistant_tokens=2, **SPEC)
        assert ("no more guesses" if rank == 0 else "has stopped: see its error") in str(raised.value)
    same(target, models("target"), 2, assistant_model=models("draft"))


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
                expected = generate(plain, 1, input_ids=ids, max_new_tokens=12)[0, ids.shape[1] :]
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
        generate(models("target", tp_size=2), 3, assistant_model=models("draft"), speculation_stats=stats, **SPEC)
    assert len(sizes) == len(stats.iterations) + 2 > 5 and max(sizes) <= 512


def tensor_parallel_sampled_in_step(models: Models) -> None:
    _sampled(models, models("draft", tp_size=2), models("target", tp_size=2))


def long_messages(models: Models) -> None:
    same(models("target", tp_size=2), models("target"), 40, assistant_model=models("draft"), num_assistant_tokens=8)


def early_exit(models: Models) -> None:
    same(models("target", tp_size=2), models("target"), 3, assistant_early_exit=2)


def hundred_calls(models: Models) -> None:
    target, draft, rank = models("target", tp_size=2), models("draft"), distributed.get_rank()
    for seed in range(100):
        time.sleep(0.001 * rank * (seed % 3))
        rows = 1 + seed % 4
        ours = generate(target, rows, seed, assistant_model=draft, **SPEC)
        assert torch.equal(ours, generate(models("target"), rows, seed)), seed


def tensor_parallel_of_four(models: Models) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    _several_calls(models, models("draft"), _by_torch(models, init_device_mesh("cpu", (4,))))


def groups_beside_each_other_of_four(models: Models) -> None:
    """Two groups of two ranks: each decodes other prompts, and another number of them."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")), distributed.get_rank() // 2
    target = _by_torch(models, mesh["tensor"])
    for seed in range(1 + 2 * group):
        same(target, models("target"), 1 + group, seed + 5 * group, assistant_model=models("draft"))
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
        same(model, plain, rows, 2 * case + rank, assistant_model=assistant)
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    same(target, plain, 2, rank, **lookup)
    sampled: dict[str, Any] = {"do_sample": True, "speculation_acceptance": "coupled", "speculation_seed": 5 + rank}
    ours, expected = (
        generate(model, 2, rank, assistant_model=assistant, **SPEC, **sampled)
        for model, assistant in ((target, draft), (plain, plain_draft))
    )
    assert torch.equal(ours, expected)


def fsdp_ranks_may_end_early(models: Models) -> None:
    target, draft, rank = _managed(models, "target"), _managed(models, "draft"), distributed.get_rank()
    hooks = [len(model._forward_pre_hooks) for model in (target, draft)]
    for early in range(2):
        tokens = 2 if rank == early else 20
        out = generate(target, 1, rank, max_new_tokens=tokens, assistant_model=draft, **SPEC)
        assert torch.equal(out, generate(models("target"), 1, rank, max_new_tokens=tokens))
        kwargs: dict[str, Any] = {"num_assistant_tokens_schedule": "nothing"} if rank == early else {}
        if kwargs:
            with pytest.raises(ValueError, match="num_assistant_tokens_schedule"):
                generate(target, 1, rank, assistant_model=draft, **kwargs, **SPEC)
        else:
            same(target, models("target"), 1, rank, assistant_model=draft)
    assert [len(model._forward_pre_hooks) for model in (target, draft)] == hooks


def fsdp_refuses_what_is_unlike_other_forwards(models: Models) -> None:
    target = _managed(models, "target")
    with pytest.raises(ValueError, match=r"`assistant_early_exit`.*not possible where all ranks gather weights"):
        generate(target, 1, assistant_early_exit=1, **SPEC)
    with pytest.raises(ValueError, match=r"generate_many\(\) cannot be used where all ranks gather"):
        next(iter(hf_specdec.generate_many(target, [[5, 6]], assistant_model=models("draft"), max_new_tokens=2)))


def synced_gpus(models: Models) -> None:
    rank = distributed.get_rank()
    same(models("target"), models("target"), 1 + rank, rank, assistant_model=models("draft"), synced_gpus=True)


def whole_models_are_nobodys_business(models: Models) -> None:
    """Each rank has its own models and prompts, and goes by its own clock."""
    assert sharding.sharded(models("target"), models("draft")) is None
    rank = distributed.get_rank()
    for seed in range(1 + rank):
        same(
            models("target"), models("target"), 1 + rank, seed, assistant_model=models("draft"), num_assistant_tokens=3
        )


def prompts_are_split_between_processes(models: Models) -> None:
    from accelerate import PartialState

    with PartialState(cpu=True).split_between_processes(list(range(5))) as mine:
        assert len(mine) == 3 - distributed.get_rank()
        for seed in mine:
            same(models("target"), models("target"), 1 + seed % 2, seed, assistant_model=models("draft"))


_CHECKS: list[Check] = [
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


_SLOW = (hundred_calls, tensor_parallel_of_four, groups_beside_each_other_of_four)


def _ranks_of(check: str) -> int:
    return 4 if check.endswith("of_four") else 2


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """The traceback by check and rank, empty if there is none. Missing entries were not reached."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = [check.__name__ for check in _CHECKS if any(p.get("check") == check.__name__ for p in params)]
    folder = tmp_path_factory.mktemp("sharded")
    save_pair(folder, "llama")
    save_pair(folder, "mistral-sliding", "sliding_")
    found: dict[tuple[str, int], str] = {}
    for world in (2, 4):
        if names := [name for name in selected if _ranks_of(name) == world]:
            found |= run_ranks(__file__, folder, world, names)
    return found


@pytest.mark.parametrize(
    "check", [pytest.param(check.__name__, marks=[pytest.mark.slow] * (check in _SLOW)) for check in _CHECKS]
)
def test_several_ranks(check: str, outcome: dict[tuple[str, int], str]) -> None:
    assert_reached(outcome, check, _ranks_of(check))


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


@pytest.mark.parametrize(("processes", "group"), [(2, None), (1, 1)])
def test_weights_that_zero3_divides_are_found(
    as_one_of_two: None, monkeypatch: pytest.MonkeyPatch, processes: int, group: int | None
) -> None:
    """Here a number stands for the group of so many processes."""
    monkeypatch.setattr(distributed, "get_world_size", lambda group: group)
    target, draft = make_pair("llama")
    assert sharding.gathered(target, draft, None) is None
    draft.model.layers[1].mlp.up_proj.weight.ds_process_group = processes
    assert sharding.gathered(target, draft, None) == ([draft], group)
    assert sharding.gathered(draft, target, None) == ([draft], group)
    assert sharding.sharded(target, draft) is None


def test_fsdp_is_not_combined_with_parts_of_models(as_one_of_two: None) -> None:
    target, draft = make_pair("llama")
    target._tp_size, draft.model.layers[1]._is_fsdp_managed_module = 2, True
    with pytest.raises(ValueError, match="FSDP or ZeRO-3 together with tensor parallel models or pipeline stages"):
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
    be_a_rank(Path(sys.argv[1]), sys.argv[2:], _CHECKS)
