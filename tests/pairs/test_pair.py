"""Pairs loaded, run and saved; drafts by name; one tokenizer over embeddings of different sizes."""

import copy
import functools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, Fragment, make_pair, make_prompts, perturbed
from conftest import generate_with as generate
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from hf_specdec import SpeculationStats, Trace
from hf_specdec.pairs import DEMO_PAIR, SpecPair, choice
from hf_specdec.pairs import pair as pairs
from hf_specdec.pairs.pair_file import ModelReference, PairConfig

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}


@functools.cache
def pair() -> tuple[Any, Any]:
    return make_pair("llama", 0.04)


def prompts(batch: int) -> dict[str, torch.Tensor]:
    return make_prompts(batch, seed=3)


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    choice.load_draft.cache_clear()
    yield
    choice.load_draft.cache_clear()


# Drafts by name


@pytest.fixture
def saved_draft(tmp_path: Path) -> str:
    pair()[1].save_pretrained(tmp_path / "draft")
    return str(tmp_path / "draft")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_draft_may_be_a_path_and_is_loaded_once(saved_draft, kind, monkeypatch):
    target, _ = pair()
    loads = []
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        pairs.AutoModelForCausalLM, "from_pretrained", lambda *args, **kw: loads.append(args) or original(*args, **kw)
    )
    expected = target.generate(**prompts(2), **GREEDY)
    for _ in range(3):
        assert generate(target, kind(saved_draft), **prompts(2)).equal(expected)
    assert loads == [(saved_draft,)]


def test_a_draft_by_path_takes_the_targets_dtype(saved_draft):
    target = copy.deepcopy(pair()[0]).to(torch.bfloat16)
    out = target.generate(**prompts(2), **GREEDY, assistant_model=saved_draft, strategy="spec")
    assert out.shape == (2, 28)
    assert choice.load_draft(saved_draft, torch.bfloat16, target.device).dtype == torch.bfloat16
    assert choice.load_draft.cache_info().misses == 1


def test_a_draft_by_path_is_as_good_as_the_model_itself(saved_draft):
    target, draft = pair()
    counts = []
    for assistant in (draft, saved_draft):
        stats = SpeculationStats()
        target.generate(**prompts(2), **GREEDY, assistant_model=assistant, strategy="spec", speculation_stats=stats)
        counts.append(stats.iterations)
    assert counts[0] == counts[1]


# Vocabularies


def make_tokenizer(words: int, swapped: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, words)}}
    if swapped:
        vocabulary["w5"], vocabulary["w6"] = 6, 5
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), pad_token="<pad>")


def padded(target: Any, size: int) -> Any:
    """A draft with `size` embeddings; it prefers tokens that the target does not have."""
    draft = perturbed(target, 0.02)
    draft.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        extra = draft.lm_head.weight[VOCAB:]
        extra.copy_(3 * draft.lm_head.weight[: len(extra)])
    return draft


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [90, 104], ids=["draft smaller", "draft larger"])
def test_one_tokenizer_over_embeddings_of_different_sizes(size, batch):
    target = pair()[0]
    draft = padded(target, size)
    inputs = prompts(batch)
    tokenizers = {"tokenizer": make_tokenizer(88), "assistant_tokenizer": make_tokenizer(88)}
    expected = target.generate(**inputs, **GREEDY)
    assert (expected >= 90).any()  # the target may generate tokens that the smaller draft does not know
    assert generate(target, draft, **inputs, **tokenizers).equal(expected)
    assert generate(target, draft, **inputs, **tokenizers, do_sample=True, top_k=1).equal(expected)


def test_tokens_that_only_the_draft_has_are_never_proposed():
    target = pair()[0]
    stats, trace = SpeculationStats(), Trace()
    speculation = {"assistant_model": padded(target, 104), "speculation_stats": stats, "speculation_trace": trace}
    tokenizers = {"tokenizer": make_tokenizer(88), "assistant_tokenizer": make_tokenizer(88)}
    target.generate(**prompts(2), **GREEDY, **tokenizers, strategy="spec", **speculation)
    drafted = [token for iteration in trace.iterations for row in iteration.rows for token in row.drafted]
    assert len(drafted) == stats.drafted_tokens > 0
    assert max(drafted) < VOCAB


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., tuple[Any, Any, Path]]:
    """Saves and loads a target and a draft of another size, each with its tokenizer."""

    def make(**of_the_draft: Any) -> tuple[Any, Any, Path]:
        target = pair()[0]
        for name, model in {"target": target, "draft": padded(target, 104)}.items():
            model.save_pretrained(tmp_path / name)
            make_tokenizer(88, **of_the_draft if name == "draft" else {}).save_pretrained(tmp_path / name)
        target, draft = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("target", "draft"))
        return target, draft, tmp_path

    return make


def test_tokenizers_are_found_where_the_models_came_from(folders):
    target, draft, path = folders()
    expected = target.generate(**prompts(2), **GREEDY)
    assert generate(target, draft, **prompts(2)).equal(expected)
    assert generate(target, str(path / "draft"), **prompts(2)).equal(expected)


def test_different_tokenizers_where_the_models_came_from_are_translated(folders, monkeypatch):
    target, draft, path = folders(swapped=True)
    made = []
    original = choice.OtherTokenizerDrafter
    monkeypatch.setattr(choice, "OtherTokenizerDrafter", lambda *args: made.append(args) or original(*args))
    expected = target.generate(**prompts(2), **GREEDY)
    for assistant in (draft, str(path / "draft")):
        assert target.generate(**prompts(2), **GREEDY, assistant_model=assistant, strategy="spec").equal(expected)
    assert len(made) == 2


def test_tokenizers_that_are_given_beat_those_that_are_found(folders):
    target, draft, _ = folders(swapped=True)
    tokenizers = {"tokenizer": make_tokenizer(88), "assistant_tokenizer": make_tokenizer(88)}
    assert generate(target, draft, **prompts(2), **tokenizers).equal(target.generate(**prompts(2), **GREEDY))


# Pairs by name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair built in memory, saved."""
    folder = tmp_path_factory.mktemp("saved")
    SpecPair(*pair(), make_tokenizer(VOCAB), PairConfig(recommended={"num_assistant_tokens": 3})).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def loaded(saved: Path) -> SpecPair:
    return SpecPair.from_pretrained(saved)


def write_pair_file(folder: Path, target: str, draft: str, **entries: Any) -> Path:
    PairConfig(ModelReference(target), ModelReference(draft), **entries).save(folder)
    return folder


def same_weights(one: Any, other: Any) -> bool:
    weights = other.state_dict()
    return all(weight.equal(weights[name]) for name, weight in one.state_dict().items())


def drafted(trace: Trace) -> int:
    """The longest draft."""
    return max(len(row.drafted) for iteration in trace.iterations for row in iteration.rows)


def test_a_pair_generates_what_its_target_says(loaded):
    stats = SpeculationStats()
    out = loaded.generate(**prompts(2), **GREEDY, speculation_stats=stats)
    assert out.equal(loaded.target.generate(**prompts(2), **GREEDY))
    assert stats.accepted_tokens > 0


def test_a_saved_pair_loads_again(loaded):
    assert same_weights(loaded.target, pair()[0])
    assert same_weights(loaded.draft, pair()[1])
    assert not loaded.target.training and not loaded.draft.training
    assert loaded.tokenizer.get_vocab() == make_tokenizer(VOCAB).get_vocab()
    assert loaded.config.recommended == {"num_assistant_tokens": 3}


def test_a_pair_can_be_saved_where_it_came_from(saved, tmp_path):
    for _ in range(2):
        SpecPair.from_pretrained(saved).save_pretrained(tmp_path)
        saved = tmp_path
    assert same_weights(SpecPair.from_pretrained(tmp_path).target, pair()[0])


def test_the_pair_file_may_be_beside_the_targets_weights_or_elsewhere(saved, tmp_path):
    pair()[0].save_pretrained(tmp_path / "root")
    make_tokenizer(VOCAB).save_pretrained(tmp_path / "root")
    layouts = [
        write_pair_file(tmp_path / "root", ".", str(saved / "draft")),
        write_pair_file(tmp_path / "elsewhere", "../root", str(saved / "draft")),
        write_pair_file(tmp_path, "root", str(saved / "draft")),
    ]
    for folder in layouts:
        loaded = SpecPair.from_pretrained(str(folder))
        assert loaded.target.name_or_path == str(tmp_path / "root")
        assert loaded.draft.name_or_path == str(saved / "draft")


@pytest.mark.parametrize("name", ["target", "pair"])
def test_a_draft_that_is_named_is_used(saved, tmp_path, name):
    other = perturbed(pair()[0], 0.01, seed=9)
    SpecPair(pair()[0], other, make_tokenizer(VOCAB)).save_pretrained(tmp_path)
    loaded = SpecPair.from_pretrained(saved, tmp_path / "draft" if name == "target" else tmp_path)
    assert same_weights(loaded.draft, other)
    assert loaded.config.recommended == {}  # that was for the other draft


@pytest.mark.parametrize("draft", [None, "auto"])
def test_without_a_draft_the_pair_file_decides_else_the_catalogue(saved, draft):
    assert SpecPair.from_pretrained(saved, draft).draft.name_or_path == str(saved / "draft")
    with pytest.raises(ValueError, match="catalogue"):
        SpecPair.from_pretrained(saved / "draft", draft)


def test_arguments_of_from_pretrained_reach_both_models(saved):
    options = {
        "dtype": torch.bfloat16,
        "attn_implementation": "eager",
        "device_map": "meta",
        "trust_remote_code": False,
    }
    loaded = SpecPair.from_pretrained(saved, **options, token="unused", local_files_only=True)
    for model in (loaded.target, loaded.draft):
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"
        assert model.device.type == "meta"
    # A tokenizer would keep, and save, arguments that it does not understand.
    assert not loaded.tokenizer.init_kwargs.keys() & options.keys()


@pytest.mark.parametrize("name", ["revision", "draft_revision"])
def test_a_folder_has_no_revision(saved, name):
    with pytest.raises(ValueError, match="a local folder, which has no revision 'v1': drop the revision"):
        SpecPair.from_pretrained(saved / "target", saved / "draft", **{name: "v1"})


def test_a_draft_that_is_not_named_has_no_revision_to_name(saved):
    with pytest.raises(ValueError, match="`draft_revision` is the revision of `draft`, which was not given"):
        SpecPair.from_pretrained(saved, draft_revision="v1")


@pytest.mark.parametrize("arguments", [("./no/folder", "./no/folder"), ("{saved}", "./no/folder")])
def test_what_is_not_there_is_named(saved, arguments):
    with pytest.raises(OSError, match=r"\./no/folder is neither a local folder nor a Hub id"):
        SpecPair.from_pretrained(*(name.format(saved=saved) for name in arguments))


def test_only_the_target_needs_a_tokenizer(saved, tmp_path):
    pair()[1].save_pretrained(tmp_path)
    loaded = SpecPair.from_pretrained(saved / "target", tmp_path)
    assert loaded.draft_tokenizer is None
    assert "tokens" in [note.property for note in loaded.compatibility.notes]
    with pytest.raises(OSError, match=f"No tokenizer could be loaded from {tmp_path}"):
        SpecPair.from_pretrained(tmp_path, saved / "draft")


# Descriptions of pairs


def test_a_pair_is_told_in_a_few_lines(loaded, saved):
    size = f"{loaded.target.num_parameters() / 1e3:.3g} k parameters"
    facts = f"LlamaForCausalLM, {size}, float32, cpu"
    assert repr(loaded).splitlines() == [
        "SpecPair",
        f"  target: {saved}/target, {facts}",
        f"  draft: {saved}/draft, {facts}",
        "  recommended: num_assistant_tokens=3",
    ]
    sources = (ModelReference("org/target", "abc123"), ModelReference("org/draft", gguf_file="small.gguf"))
    unpaying = PairConfig(speculate=False, recommended={"num_assistant_tokens": 3})
    lines = repr(SpecPair(*pair(), make_tokenizer(VOCAB), unpaying, sources=sources)).splitlines()
    assert lines[1].startswith("  target: org/target@abc123, Llama")
    assert lines[2].startswith("  draft: org/draft small.gguf, Llama")
    assert lines[3] == "  recommended: not to speculate"


def test_a_pair_from_memory_is_told_as_such():
    lines = repr(SpecPair(*pair(), make_tokenizer(VOCAB))).splitlines()
    assert [line.split(",")[0] for line in lines[1:3]] == ["  target: made in memory", "  draft: made in memory"]
    assert lines[3] == "  recommended: the default options"


def test_a_notebook_shows_target_and_draft_side_by_side(loaded):
    named = copy.copy(loaded)
    named.sources = (ModelReference("<b>one</b>"), ModelReference("other"))
    named.draft = copy.deepcopy(loaded.draft).to(torch.bfloat16)
    shown = Fragment(named)
    size = f"{loaded.target.num_parameters() / 1e3:.3g} k parameters"
    assert shown.tables == [
        [
            ["", "target", "draft"],
            ["from", "<b>one</b>", "other"],
            ["class", "LlamaForCausalLM", "LlamaForCausalLM"],
            ["size", size, size],
            ["dtype", "float32", "bfloat16"],
            ["device", "cpu", "cpu"],
        ]
    ]
    assert shown.text == "SpecPairrecommended: num_assistant_tokens=3"


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs cells in a Jupyter kernel, in the root of the checkout, and returns each cell's outputs."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def run(*cells: str) -> list[Any]:
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        here = {"metadata": {"path": str(Path(pairs.__file__).parents[1])}}
        nbclient.NotebookClient(made, timeout=300, kernel_name="python3", resources=here).execute()
        return [cell.outputs for cell in made.cells]

    return run


def test_in_jupyter_a_pair_its_report_and_its_records_show_as_tables(notebook, saved):
    outputs = notebook(
        f"import hf_specdec, torch; pair = hf_specdec.SpecPair.from_pretrained({str(saved)!r})\n"
        "trace, stats = hf_specdec.Trace(), hf_specdec.SpeculationStats()\n"
        "pair.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=6, do_sample=False, speculation_trace=trace,"
        " speculation_stats=stats)",
        "print(pair.compatibility, end='')",
        *("pair", "pair.compatibility", "stats", "trace"),
        "trace.print(limit=1)",
    )
    printed, *shown, coloured = outputs[1:]
    assert [(out.output_type, out.text) for out in printed] == [
        ("stream", str(SpecPair.from_pretrained(saved).check()))
    ]
    titles = ("SpecPair", "Target and draft", "6 tokens in", "iterations: 6 tokens in")
    for outs, title in zip(shown, titles, strict=True):
        assert len(outs) == 1 and outs[0].output_type == "execute_result"
        assert "<table" in outs[0].data["text/html"] and title in outs[0].data["text/html"]
    assert "Iteration 1" in coloured[0].data["text/html"]
    assert re.search(r">w\d+</span>", shown[-1][0].data["text/html"])  # text, decoded by the pair's tokenizer


# Pairs generate


def test_a_trace_keeps_the_tokenizer_of_its_call_unless_it_has_one(loaded):
    mine, own, none = Trace(), Trace(), Trace()
    own.tokenizer = make_tokenizer(VOCAB)
    given = own.tokenizer
    for trace in (mine, own):
        loaded.generate(**prompts(1), **GREEDY, speculation_trace=trace)
    generate(*pair(), **prompts(1), speculation_trace=none)
    assert mine.tokenizer is loaded.tokenizer and own.tokenizer is given and none.tokenizer is None


def test_recommendations_give_way_to_the_call(loaded):
    for given, longest in (
        ({}, 3),
        ({"num_assistant_tokens": 2}, 2),
        ({"generation_config": GenerationConfig(num_assistant_tokens=4)}, 4),
    ):
        trace = Trace()
        loaded.generate(**prompts(1), **GREEDY, **given, speculation_trace=trace)
        assert drafted(trace) == longest


def test_another_draft_may_be_given_to_a_call(loaded):
    trace = Trace()
    loaded.generate(**prompts(1), **GREEDY, assistant_model=pair()[0], speculation_trace=trace)
    assert drafted(trace) == 5  # the recommendation applies to the pair's own draft


def test_a_pair_that_does_not_pay_decodes_without_and_says_so_once(loaded, caplog, monkeypatch):
    unpaying = copy.copy(loaded)
    unpaying.config = PairConfig(speculate=False)
    monkeypatch.setattr(pairs.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_specdec"), "propagate", True)
    expected = loaded.target.generate(**prompts(2), **GREEDY)
    stats = SpeculationStats()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = unpaying.generate(**prompts(2), **GREEDY, num_assistant_tokens=3, speculation_stats=stats)
            assert out.equal(expected)
    assert stats.target_forwards == 0
    assert sum("does not pay" in record.message for record in caplog.records) == 1
    assert unpaying.generate(**prompts(2), **GREEDY, strategy="spec", speculation_stats=stats).equal(expected)
    assert stats.target_forwards > 0


@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize("in_config", [True, False])
def test_a_pair_decodes_as_the_strategy_of_the_call_says(in_config, speculate, loaded):
    chosen = copy.copy(loaded)
    chosen.config = PairConfig(speculate=speculate)
    expected = loaded.target.generate(**prompts(1), **GREEDY)
    for strategy, speculates in (("vanilla", False), ("spec", True)):
        way = {"generation_config": GenerationConfig(strategy=strategy)} if in_config else {"strategy": strategy}
        seen: list[int] = []
        hook = loaded.draft.register_forward_pre_hook(lambda *args, seen=seen: seen.append(1))
        assert chosen.generate(**prompts(1), **GREEDY, **way).equal(expected)
        hook.remove()
        assert bool(seen) is speculates


def test_a_pair_uses_the_draft_in_the_config_of_a_call(loaded):
    trace, other = Trace(), copy.deepcopy(loaded.draft)
    seen: list[int] = []
    other.register_forward_pre_hook(lambda *args: seen.append(1))
    config = GenerationConfig()
    config.assistant_model = other
    loaded.generate(**prompts(1), **GREEDY, generation_config=config, speculation_trace=trace)
    assert seen
    assert drafted(trace) == 5  # the recommendation applies to the pair's own draft


@pytest.mark.parametrize("speculate", [True, False])
def test_the_pairs_tokenizer_serves_stop_strings(tokenizer, speculate):
    chosen = SpecPair(*pair(), tokenizer, PairConfig(speculate=speculate))
    free = chosen.target.generate(**prompts(1), **GREEDY)[0]
    stop = tokenizer.decode(free[16:18])
    out = chosen.generate(**prompts(1), **GREEDY, stop_strings=[stop])[0]
    assert out.tolist() == free[: len(out)].tolist()
    assert len(out) < len(free)


# A pair's draft for targets loaded by name


def test_auto_is_the_draft_of_the_targets_pair_file(saved, tmp_path):
    pair()[0].save_pretrained(tmp_path)
    write_pair_file(tmp_path, ".", str(saved / "draft"))
    expected = pair()[0].generate(**prompts(2), **GREEDY)
    for folder in (tmp_path, saved / "target"):  # the file next to the weights, and in the folder above
        target = AutoModelForCausalLM.from_pretrained(folder)
        for _ in range(2):
            assert generate(target, "auto", **prompts(2)).equal(expected)
    assert choice.load_draft.cache_info().misses == 2


def test_auto_asks_the_catalogue_where_there_is_no_pair_file(saved, tmp_path):
    for folder in (tmp_path, saved / "draft"):  # the pair file above this one is about another target
        if folder == tmp_path:
            pair()[0].save_pretrained(folder)
        target = AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"'auto' could not be loaded: .*catalogue"):
            generate(target, "auto", **prompts(1))


def test_auto_needs_a_target_with_a_name():
    with pytest.raises(ValueError, match="this target was not loaded by name"):
        generate(copy.deepcopy(pair()[0]), "auto", **prompts(1))


def test_a_draft_by_name_may_be_a_pair(saved):
    expected = pair()[0].generate(**prompts(2), **GREEDY)
    assert generate(pair()[0], str(saved), **prompts(2)).equal(expected)


# Errors


def test_a_draft_with_another_models_tokenizer_is_refused_with_the_table(saved, tmp_path):
    pair()[1].save_pretrained(tmp_path)
    make_tokenizer(VOCAB + 1, swapped=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        SpecPair.from_pretrained(saved / "target", tmp_path)
    assert re.search(r"does not fit.*tokens.*96.*97.*error.*different tokenizers", str(error.value), re.DOTALL)
    assert "dtype" not in str(error.value)  # which is fine


def test_a_pair_with_two_tokenizers_passes_both(saved, tmp_path):
    pair()[1].save_pretrained(tmp_path)
    make_tokenizer(VOCAB, swapped=True).save_pretrained(tmp_path)
    loaded = SpecPair.from_pretrained(saved / "target", tmp_path)
    assert "drafts are translated by token" in loaded.compatibility.to_text(200)
    assert loaded.has_two_tokenizers
    assert loaded.tokenizers == {"tokenizer": loaded.tokenizer, "assistant_tokenizer": loaded.draft_tokenizer}
    expected = pair()[0].generate(**prompts(2), **GREEDY)
    assert loaded.generate(**prompts(2), **GREEDY).equal(expected)


def test_a_tokenizer_that_changed_since_the_pair_was_saved_is_named(tmp_path):
    SpecPair(*pair(), make_tokenizer(VOCAB)).save_pretrained(tmp_path)
    for part in ("target", "draft"):
        make_tokenizer(VOCAB, swapped=True).save_pretrained(tmp_path / part)
    expected = f"The tokenizer files in {tmp_path / 'target'} have changed since specdec_pair.json was written.*sha256"
    with pytest.raises(ValueError, match=expected):
        SpecPair.from_pretrained(tmp_path)


def test_notes_are_kept(saved):
    loaded = SpecPair.from_pretrained(saved / "target", saved / "draft")
    assert [note.property for note in loaded.compatibility.notes] == ["parameters", "cost ratio"]  # equal in size
    loaded.draft.to(torch.bfloat16)
    assert "dtype" not in [note.property for note in loaded.compatibility.notes]
    assert "dtype" in [note.property for note in loaded.check().notes]


# Saving


def test_weights_that_are_only_here_must_be_saved(loaded, tmp_path):
    with pytest.raises(ValueError, match="The target is not on the Hub"):
        loaded.save_pretrained(tmp_path, weights=False)


def test_the_example_on_the_card_runs(saved, monkeypatch):
    """Next to the folder, which it names by a relative path."""
    monkeypatch.chdir(saved.parent)
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert f'SpecPair.from_pretrained("{saved.name}")' in card
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(example.replace("Once upon a time", "w5").replace("max_new_tokens=64", "max_new_tokens=4"), names)
    assert names["ids"].shape == (1, 5)


def test_the_card_tells_what_was_measured(loaded, tmp_path):
    measured = [
        {
            "date": "2026-11-24",
            "command": "scripts/tune --pair x",
            "speed-up": 1.8371,
            "by category": {"a": 2, "b": 1.5},
        },
        {"date": "2026-11-25", "command": "scripts/tune --pair x", "device": "one | two"},
    ]
    measuring = copy.copy(loaded)
    measuring.config = PairConfig(recommended={"num_assistant_tokens": 7}, measured=measured)
    measuring.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for line in (
        "| date | speed-up | by category | device |",
        "| 2026-11-24 | 1.837 | a: 2, b: 1.5 |  |",
        "| 2026-11-25 |  |  | one \\| two |",
        "`num_assistant_tokens=7`",
    ):
        assert line in card
    assert card.count("scripts/tune --pair x") == 1
    assert SpecPair.from_pretrained(tmp_path).config.measured == measured


def test_a_card_of_your_own_is_kept(loaded, tmp_path):
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


def test_the_embedded_pair_is_one():
    embedded = SpecPair.from_pretrained(DEMO_PAIR)
    assert embedded.compatibility.findings and not embedded.compatibility.errors + embedded.compatibility.notes
    assert embedded.config.tokenizer["vocab_size"] == 4096
