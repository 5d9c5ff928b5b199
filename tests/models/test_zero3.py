"""DeepSpeed ZeRO-3: ranks with prompts of their own make their forwards in turns (`./scripts/test -m deepspeed`).

Run as a script, this file is one of two ranks (gloo, on the CPU).
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from several_ranks import SPEC, Check, Models, assert_reached, be_a_rank, generate, run_ranks, same, save_pair
from torch import distributed
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

import hf_specdec
from hf_specdec.loop.optimal import _believed_cost
from hf_specdec.models import sharding

pytestmark = pytest.mark.deepspeed
# Without a threshold, DeepSpeed would keep these small weights whole once they were gathered.
_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
_engines: dict[str, Any] = {}


def _zero(models: Models, name: str) -> PreTrainedModel:
    """A model whose weights all ranks hold a part of. Plain ones must be loaded before."""
    import deepspeed

    if name not in _engines:
        models("target"), models("draft")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # faster messages, but two minutes of compiling
        deepspeed.init_distributed("gloo")
        config = HfDeepSpeedConfig(_CONFIG)  # `from_pretrained` asks whether there is one
        _engines[name] = deepspeed.initialize(model=models.new(name), config=_CONFIG)[0]
        del config
    model: PreTrainedModel = _engines[name].module.eval()
    assert all(parameter.numel() == 0 < parameter.ds_numel for parameter in model.parameters())
    return model


def ranks_have_prompts_of_their_own(models: Models) -> None:
    rank = distributed.get_rank()
    target, draft = _zero(models, "target"), _zero(models, "draft")
    plain, plain_draft = models("target"), models("draft")
    for case, (model, assistant) in enumerate(
        [
            (target, plain_draft),
            (plain, draft),
            (target, draft),
            (plain, hf_specdec.drafters.ModelDrafter(draft)),
        ]
    ):
        rows = 1 + 2 * (rank != case % 2)  # a batch on one rank, one row on the other
        same(model, plain, rows, 2 * case + rank, assistant_model=assistant)
    same(target, plain, 2, rank, assistant_model=draft, num_assistant_tokens=None)
    same(target, plain, 2, rank, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    sampled: dict[str, Any] = {"do_sample": True, "speculation_acceptance": "coupled", "speculation_seed": 5 + rank}
    ours, expected = (
        generate(model, 2, rank, assistant_model=assistant, **SPEC, **sampled)
        for model, assistant in ((target, draft), (plain, plain_draft))
    )
    assert torch.equal(ours, expected)


def ranks_may_end_early(models: Models) -> None:
    target, draft, rank = _zero(models, "target"), _zero(models, "draft"), distributed.get_rank()
    hooks = [len(model._forward_pre_hooks) for model in (target, draft)]
    for early in range(2):
        tokens = 2 if rank == early else 20
        out = generate(target, 1, rank, max_new_tokens=tokens, assistant_model=draft, **SPEC)
        assert torch.equal(out, generate(models("target"), 1, rank, max_new_tokens=tokens))
        if rank == early:
            with pytest.raises(ValueError, match="num_assistant_tokens_schedule"):
                generate(target, 1, rank, assistant_model=draft, num_assistant_tokens_schedule="nothing", **SPEC)
        else:
            same(target, models("target"), 1, rank, assistant_model=draft)
    assert [len(model._forward_pre_hooks) for model in (target, draft)] == hooks


def whole_models_beside_it_are_nobodys_business(models: Models) -> None:
    """Each rank makes another number of calls while ZeRO-3 is enabled in the process."""
    _zero(models, "target")
    plain, draft, rank = models("target"), models("draft"), distributed.get_rank()
    seeds = range(1 + rank)
    expected = [generate(plain, 1 + rank, seed) for seed in seeds]
    config = HfDeepSpeedConfig(_CONFIG)  # vanilla would wait for other ranks now
    for seed in seeds:
        assert torch.equal(generate(plain, 1 + rank, seed, assistant_model=draft, **SPEC), expected[seed])
    del config
    assert sharding.gathered(plain, draft, None) is None


def weights_may_be_gathered_for_a_while(models: Models) -> None:
    """As trainers do before they generate."""
    import deepspeed

    target, draft, rank = _zero(models, "target"), _zero(models, "draft"), distributed.get_rank()
    with deepspeed.zero.GatheredParameters([*target.parameters(), *draft.parameters()]):
        for seed in range(2):
            same(target, models("target"), 1 + rank, seed + 2 * rank, assistant_model=draft)
    same(target, models("target"), 1 + rank, 5 + rank, assistant_model=draft)


def the_schedule_knows_how_large_models_are(models: Models) -> None:
    for target in (_zero(models, "target"), models("target")):
        for draft in (_zero(models, "draft"), models("draft")):
            assert _believed_cost(target, hf_specdec.drafters.ModelDrafter(draft)) == 1.0  # they have equal sizes


def what_cannot_work_is_an_error(models: Models) -> None:
    target = _zero(models, "target")
    with pytest.raises(ValueError, match=r"`assistant_early_exit`.*not possible where all ranks gather weights"):
        generate(target, 1, assistant_early_exit=1, **SPEC)
    with pytest.raises(ValueError, match=r"generate_many\(\) cannot be used where all ranks gather"):
        next(iter(hf_specdec.generate_many(target, [[5, 6]], assistant_model=models("draft"), max_new_tokens=2)))


_CHECKS: list[Check] = [
    ranks_have_prompts_of_their_own,
    ranks_may_end_early,
    whole_models_beside_it_are_nobodys_business,
    weights_may_be_gathered_for_a_while,
    the_schedule_knows_how_large_models_are,
    what_cannot_work_is_an_error,
]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    pytest.importorskip("deepspeed", reason="needs deepspeed: ./scripts/test -m deepspeed installs it")
    folder = tmp_path_factory.mktemp("zero3")
    save_pair(folder, "llama")
    return run_ranks(__file__, folder, 2, [check.__name__ for check in _CHECKS], DS_ACCELERATOR="cpu")


@pytest.mark.parametrize("check", [check.__name__ for check in _CHECKS])
def test_two_ranks(check: str, outcome: dict[tuple[str, int], str]) -> None:
    assert_reached(outcome, check, 2)


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]), sys.argv[2:], _CHECKS)
