"""Exported pairs: the options of servers, and custom_generate repositories that work from disk.

Tests have no real servers: their programs are replaced by one that writes its arguments to a file.
"""

import copy
import dataclasses
import gc
import importlib.abc
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_prompts
from hub_server import Hub
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, GenerationConfig, WhisperConfig

import hf_specdec
from hf_specdec.pairs import DEMO_PAIR
from hf_specdec.pairs.export import Exported, export_pair, pair_to_export
from hf_specdec.pairs.pair_file import ModelReference, PairConfig

SERVERS = ("vllm", "sglang")
AWKWARD = "it's a $pair"  # as the name of a folder


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """Unknown names are not looked up on the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def saved(llama_pair, tmp_path_factory) -> Path:
    """A folder with a target and a draft."""
    folder = tmp_path_factory.mktemp("models") / AWKWARD
    for name, model in zip(("target", "draft"), llama_pair):
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def export(saved, tmp_path) -> Callable[..., Exported]:
    """Exports the saved pair, with the given content of its pair file, to tmp_path / "out"."""

    def run(to: str, **config: Any) -> Exported:
        PairConfig(ModelReference("./target"), ModelReference("./draft"), **config).save(saved)
        return export_pair(pair_to_export(str(saved), None, None), to, tmp_path / "out")

    return run


def server_arguments(folder: Path, *further: str) -> list[str]:
    """The command of serve.sh, as the server's program receives it."""
    script = folder / "serve.sh"
    subprocess.run(["bash", "-n", script], check=True)
    programs = folder / "bin"
    programs.mkdir()
    for name in ("vllm", "python3"):
        fake = programs / name
        fake.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps([{name!r}, *sys.argv[1:]]))\n")
        fake.chmod(0o755)
    path = {"PATH": f"{programs}:/usr/bin:/bin"}
    done = subprocess.run([script, *further], env=path, check=True, capture_output=True, text=True)
    arguments: list[str] = json.loads(done.stdout)
    return arguments


def readme(exported: Exported) -> str:
    (path,) = (file for file in exported.files if file.name == "README.md")
    text = path.read_text(encoding="utf-8")
    assert all(note in text for note in exported.notes) and "$" not in text.replace(AWKWARD, "")
    return text


# Servers


def test_vllm_gets_its_configuration(export, saved, tmp_path):
    export("vllm", recommended={"num_assistant_tokens": 7})
    config = json.loads((tmp_path / "out" / "speculative_config.json").read_text())
    draft = str(saved / "draft")
    assert config == {"method": "draft_model", "model": draft, "num_speculative_tokens": 7}
    *command, given, port, number = server_arguments(tmp_path / "out", "--port", "8000")
    assert command == ["vllm", "serve", str(saved / "target"), "--speculative-config"]
    assert json.loads(given) == config
    assert (port, number) == ("--port", "8000")


def test_vllm_is_told_that_a_draft_predicts_several_tokens_at_once(export, saved, tmp_path):
    path = saved / "draft" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"pard_token": 5}))
    try:
        export("vllm")
    finally:
        path.write_text(before)
    assert json.loads((tmp_path / "out" / "speculative_config.json").read_text())["parallel_drafting"] is True


def test_sglang_gets_all_three_numbers(export, saved, tmp_path):
    export("sglang", recommended={"num_assistant_tokens": 4})
    flags = json.loads((tmp_path / "out" / "flags.json").read_text())
    assert flags == {
        "model_path": str(saved / "target"),
        "speculative_algorithm": "STANDALONE",
        "speculative_draft_model_path": str(saved / "draft"),
        "speculative_num_steps": 4,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 5,
    }
    python, module, server, *rest = server_arguments(tmp_path / "out")
    assert (python, module, server) == ("python3", "-m", "sglang.launch_server")
    named = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(rest[::2], rest[1::2], strict=True)
    }
    assert named == {name: str(value) for name, value in flags.items()}


def test_models_on_the_hub_keep_their_names_and_revisions(tmp_path):
    pair = pair_to_export(None, "org/target", "org/draft", revision="v1")
    pair = dataclasses.replace(pair, draft=ModelReference("org/draft", "abc"))
    for to in SERVERS:
        exported = export_pair(pair, to, tmp_path / to)
        assert exported.notes == (
            "The models' configurations could not be read here, so their vocabularies were not compared.",
        )
    *command, config = server_arguments(tmp_path / "vllm")
    assert command == ["vllm", "serve", "org/target", "--revision", "v1", "--speculative-config"]
    assert json.loads(config) == {
        "method": "draft_model",
        "model": "org/draft",
        "num_speculative_tokens": 5,
        "revision": "abc",
    }
    flags = json.loads((tmp_path / "sglang" / "flags.json").read_text())
    assert (flags["revision"], flags["speculative_draft_model_revision"]) == ("v1", "abc")


def test_a_target_alone_gets_the_catalogues_draft():
    pair = pair_to_export(None, "Qwen/Qwen3-8B", None)
    assert (pair.target.name_or_path, pair.draft.name_or_path) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B")


def test_relative_folders_become_absolute(saved, monkeypatch):
    monkeypatch.chdir(saved)
    pair = pair_to_export(None, "target", "./draft")
    assert [pair.target.name_or_path, pair.draft.name_or_path] == [str(saved / "target"), str(saved / "draft")]


@pytest.mark.parametrize("to", SERVERS)
def test_the_readme_says_what_it_rests_on(export, to):
    exported = export(to)
    text = readme(exported)
    assert "not run against a server" in text and "2026" in text
    assert any("only on this machine" in note for note in exported.notes)  # the models are folders


@pytest.mark.parametrize("to", SERVERS)
def test_what_a_server_does_not_take_is_named(export, to):
    recommended = {
        "num_assistant_tokens": 3,
        "num_assistant_tokens_schedule": "heuristic",
        "assistant_confidence_threshold": 0.4,
    }
    text = readme(export(to, recommended=recommended))
    assert "not exported: `num_assistant_tokens_schedule='heuristic'`, `assistant_confidence_threshold=0.4`" in text


def test_what_is_the_servers_default_is_not_left_behind(export):
    recommended = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
    assert not any("not exported" in note for note in export("vllm", recommended=recommended).notes)


@pytest.mark.parametrize("to", [*SERVERS, "custom-generate"])
def test_a_pair_that_does_not_pay_says_so_first(export, to):
    exported = export(to, speculate=False)
    assert "does not pay" in exported.notes[0]
    readme(exported)


@pytest.mark.parametrize("to", SERVERS)
def test_embeddings_of_different_sizes_are_told(saved, tmp_path, llama_pair, to):
    wide = copy.deepcopy(llama_pair[1])
    wide.resize_token_embeddings(128, mean_resizing=False)
    wide.save_pretrained(tmp_path / "wide")
    pair = pair_to_export(None, str(saved / "target"), str(tmp_path / "wide"))
    exported = export_pair(pair, to, tmp_path / "out")
    assert any("(96 and 128)" in note for note in exported.notes)
    if to == "vllm":
        config = json.loads((tmp_path / "out" / "speculative_config.json").read_text())
        assert config["use_heterogeneous_vocab"] is True


def test_the_embedded_pair_can_be_exported(tmp_path):
    pair = pair_to_export(str(DEMO_PAIR), None, None)
    assert pair.target.name_or_path == str(DEMO_PAIR / "target")
    for to in (*SERVERS, "custom-generate"):
        export_pair(pair, to, tmp_path / to)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None, None), "Expected a pair or a target, got neither"),
        ((None, None, "org/draft"), "Expected a pair or a target, got neither"),
        ((None, "org/target", None), "No draft is known for 'org/target'"),
        (("pair", "org/target", "org/draft"), "got both"),
        (("{saved}/target", None, None), r"Expected specdec_pair.json in .*/target, found none"),
        ((None, "{saved}", "{saved}/draft"), r"Expected a model in .*, found no config.json"),
        ((None, "./missing", "org/draft"), "Expected a local folder or Hub id, got './missing'"),
        ((None, "org/target", "a/b/c"), "Expected a local folder or Hub id, got 'a/b/c'"),
    ],
)
def test_names_that_lead_nowhere(saved, arguments, message):
    names = [None if name is None else name.format(saved=saved) for name in arguments]
    with pytest.raises(ValueError, match=message):
        pair_to_export(*names)


def test_a_folder_has_no_revision(saved):
    with pytest.raises(ValueError, match=r"local folder, which has no revision 'v1'"):
        pair_to_export(None, str(saved / "target"), str(saved / "draft"), revision="v1")


def test_unknown_exports_are_refused(export):
    with pytest.raises(ValueError, match="Unknown export 'ollama'; known: vllm, sglang, custom-generate"):
        export("ollama")


@pytest.mark.parametrize("gamma", [0, "5", None, True])
def test_draft_lengths_are_checked(export, gamma):
    with pytest.raises(ValueError, match=r"`num_assistant_tokens` of at least 1, got"):
        export("vllm", recommended={"num_assistant_tokens": gamma})


@pytest.mark.parametrize("to", [*SERVERS, "custom-generate"])
def test_encoder_decoders_are_refused(saved, tmp_path, to):
    WhisperConfig().save_pretrained(tmp_path / "whisper")
    pair = pair_to_export(None, str(tmp_path / "whisper"), str(saved / "draft"))
    with pytest.raises(ValueError, match="decoder-only models, got the encoder-decoder model type 'whisper'"):
        export_pair(pair, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_but_by_the_same(export, tmp_path):
    assert export("vllm") == export("vllm")
    mine = tmp_path / "out" / "README.md"
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match=r"README.md would be overwritten: choose another folder"):
        export("sglang")
    assert mine.read_text() == "mine" and not (tmp_path / "out" / "flags.json").exists()


# custom_generate repositories


@pytest.fixture
def repository(export, tmp_path, monkeypatch) -> str:
    """An exported repository that recommends γ = 3; its modules go to a temporary folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds that folder
    export("custom-generate", recommended={"num_assistant_tokens": 3})
    return str(tmp_path / "out")


def speculate(repository: str, pair: tuple[Any, Any], **kwargs: Any) -> Any:
    """With the repository, which must have speculated."""
    stats = hf_specdec.SpeculationStats()
    given = {"custom_generate": repository, "trust_remote_code": True, "assistant_model": pair[1], **kwargs}
    out = pair[0].generate(**given, speculation_stats=stats)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    return out


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}


@pytest.mark.parametrize("batch", [1, 3])
def test_the_repository_gives_vanillas_tokens(repository, llama_pair, batch):
    inputs = make_prompts(batch)
    assert batch == 1 or (inputs["attention_mask"] == 0).any()
    expected = llama_pair[0].generate(**inputs, **GREEDY)
    assert speculate(repository, llama_pair, **inputs, **GREEDY).equal(expected)


def test_the_repository_samples_as_the_strategy_does(repository, llama_pair):
    inputs = make_prompts(2)
    sampled = {"do_sample": True, "temperature": 0.8, "num_return_sequences": 3, "max_new_tokens": 12}
    torch.manual_seed(5)
    out = speculate(repository, llama_pair, **inputs, **sampled)
    torch.manual_seed(5)
    strategy = {"strategy": "spec", "assistant_model": llama_pair[1], "num_assistant_tokens": 3}
    assert out.equal(llama_pair[0].generate(**inputs, **strategy, **sampled))
    assert out.shape[0] == 6 and len({tuple(row) for row in out.tolist()}) > 2


def test_the_repository_ends_at_stop_strings(repository, llama_pair, tokenizer):
    inputs = make_prompts(1)
    expected = llama_pair[0].generate(**inputs, **GREEDY)
    text = tokenizer.decode(expected[0, inputs["input_ids"].shape[1] + 8 :])
    stops = {"stop_strings": text[:2], "tokenizer": tokenizer}
    stopped = llama_pair[0].generate(**inputs, **GREEDY, **stops)
    assert stopped.shape[1] < expected.shape[1]
    assert speculate(repository, llama_pair, **inputs, **GREEDY, **stops).equal(stopped)


def test_the_repository_streams(repository, llama_pair):
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    out = speculate(repository, llama_pair, **make_prompts(1), **GREEDY, streamer=streamer)
    assert streamer.ended and streamer.tokens == out[0].tolist()


def test_the_repository_returns_dictionaries(repository, llama_pair):
    options = {"return_dict_in_generate": True, "output_scores": True, **GREEDY}
    out = speculate(repository, llama_pair, **make_prompts(1), **options)
    expected = llama_pair[0].generate(**make_prompts(1), **options)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)
    assert out.speculation.committed_tokens == 20


@pytest.mark.parametrize(("given", "expected"), [({}, 3), ({"num_assistant_tokens": 2}, 2)])
def test_what_the_pair_recommends_holds_unless_the_call_says_otherwise(repository, llama_pair, given, expected):
    stats = hf_specdec.SpeculationStats()
    arguments: dict[str, Any] = {"custom_generate": repository, "trust_remote_code": True, **given}
    target, draft = llama_pair
    target.generate(**make_prompts(1), **GREEDY, **arguments, assistant_model=draft, speculation_stats=stats)
    assert len(stats.drafted_by_position) == expected


def test_all_that_the_pair_recommends_is_in_the_code(export, tmp_path):
    recommended = {"assistant_confidence_threshold": 0.4, "num_assistant_tokens_schedule": "heuristic"}
    export("custom-generate", recommended=recommended)
    code = runpy.run_path(str(tmp_path / "out" / "custom_generate" / "generate.py"))
    assert code["RECOMMENDED"] == recommended


@pytest.fixture
def loaded(saved) -> Any:
    """The saved target, loaded by name."""
    return AutoModelForCausalLM.from_pretrained(saved / "target")


def by_itself(target: Any, *args: Any, **kwargs: Any) -> hf_specdec.SpeculationStats:
    """Statistics of a call that names no draft; it must give vanilla's tokens."""
    stats = hf_specdec.SpeculationStats()
    options = {name: kwargs.pop(name) for name in ("custom_generate", "trust_remote_code") if name in kwargs}
    out = target.generate(*args, **kwargs, **options, speculation_stats=stats)
    assert out.equal(type(target).generate(target, *args, **{k: v for k, v in kwargs.items() if k in PLAIN}))
    return stats


PLAIN = {*GREEDY, "input_ids", "attention_mask", "generation_config"}


def test_the_repository_loads_the_pairs_draft_once_and_says_so(repository, loaded, saved, caplog):
    arguments: dict[str, Any] = {"custom_generate": repository, "trust_remote_code": True, **GREEDY}
    for _ in range(2):
        stats = by_itself(loaded, **make_prompts(2), **arguments)
        assert 0 < stats.accepted_tokens < stats.drafted_tokens and stats.draft_forwards
        assert len(stats.drafted_by_position) == 3  # as the pair recommends
    said = [record.message for record in caplog.records if "hf_specdec: " in record.message]
    assert said == [f"hf_specdec: {saved / 'target'} decodes with strategy='spec' and the draft ../draft"]


def test_the_draft_gets_the_targets_dtype(repository, saved):
    target = AutoModelForCausalLM.from_pretrained(saved / "target", dtype=torch.bfloat16)
    target.generate(**make_prompts(1), **GREEDY, custom_generate=repository, trust_remote_code=True)
    codes = (module for name, module in sys.modules.items() if name.endswith("custom_generate.generate"))
    (code,) = (code for code in codes if target in code.drafts)  # other tests may have loaded such code too
    assert code.drafts[target].dtype == torch.bfloat16
    del target
    gc.collect()
    assert not code.drafts  # which keep no target alive


@pytest.mark.parametrize("by", ["the call", "its config", "a drafter"])
def test_a_call_may_choose_how_to_draft(repository, loaded, by):
    lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    options: dict[str, Any] = {
        "the call": {**GREEDY, **lookup},
        "its config": {"generation_config": GenerationConfig(**GREEDY, **lookup)},
        "a drafter": {**GREEDY, "assistant_model": hf_specdec.PromptLookupDrafter(1)},
    }[by]
    inputs = {"input_ids": make_prompts(1)["input_ids"].repeat(1, 2)}
    stats = hf_specdec.SpeculationStats()
    out = loaded.generate(
        **inputs, **options, custom_generate=repository, trust_remote_code=True, speculation_stats=stats
    )
    assert out.equal(loaded.generate(**inputs, **GREEDY))
    assert stats.drafted_tokens and not stats.draft_forwards


def test_a_config_comes_before_what_the_pair_recommends(repository, loaded):
    config = GenerationConfig(num_assistant_tokens=2, **GREEDY)
    stats = hf_specdec.SpeculationStats()
    arguments: dict[str, Any] = {"custom_generate": repository, "trust_remote_code": True}
    loaded.generate(**make_prompts(1), generation_config=config, **arguments, speculation_stats=stats)
    assert len(stats.drafted_by_position) == 2


def test_a_draft_that_is_not_there_is_named(repository, llama_pair, saved, tmp_path):
    arguments: dict[str, Any] = {"custom_generate": repository, "trust_remote_code": True}
    with pytest.raises(ValueError, match=r"draft \.\./draft of the target in memory could not be .* `assistant_model`"):
        llama_pair[0].generate(**make_prompts(1), **GREEDY, **arguments)
    shutil.copytree(saved / "target", tmp_path / "moved" / "target")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "target")
    with pytest.raises(ValueError, match=r"draft \.\./draft of the target .*/moved/target could not be loaded"):
        moved.generate(**make_prompts(1), **GREEDY, **arguments)


def test_the_code_names_a_draft_on_the_hub_with_its_revision(tmp_path):
    pair = pair_to_export(None, "org/target", "org/draft")
    pair = dataclasses.replace(pair, draft=ModelReference("org/draft", "abc"))
    export_pair(pair, "custom-generate", tmp_path)
    code = runpy.run_path(str(tmp_path / "custom_generate" / "generate.py"))
    assert (code["DRAFT"], code["REVISION"]) == ("org/draft", "abc")


def test_a_local_draft_needs_a_local_target(saved, tmp_path):
    pair = pair_to_export(None, "org/target", str(saved / "draft"))
    with pytest.raises(ValueError, match=r"/draft is a local folder, .* but the target org/target is on the Hub: name"):
        export_pair(pair, "custom-generate", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_repository_works_after_unregister(repository, llama_pair):
    hf_specdec.unregister()
    try:
        expected = llama_pair[0].generate(**make_prompts(1), **GREEDY)
        assert speculate(repository, llama_pair, **make_prompts(1), **GREEDY).equal(expected)
    finally:
        hf_specdec.register()


# Beside a target's weights


@pytest.fixture
def beside(llama_pair, tmp_path, monkeypatch) -> Path:
    """A target's folder with the exported code, whose draft is in ../draft; the pair recommends γ = 3."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    pair = tmp_path / "pair"
    for name, model in zip(("target", "draft"), llama_pair):
        model.save_pretrained(pair / name)
    (pair / "target" / "README.md").write_text("The target's own.")
    config = {"recommended": {"num_assistant_tokens": 3}}
    PairConfig(ModelReference("./target"), ModelReference("./draft"), **config).save(pair)
    exported = export_pair(pair_to_export(str(pair), None, None), "custom-generate", pair / "target")
    assert pair / "target" / "custom_generate" / "README.md" in exported.files
    assert (pair / "target" / "README.md").read_text() == "The target's own."
    return pair / "target"


@pytest.mark.parametrize("batch", [1, 3])
def test_beside_weights_every_call_speculates(beside, batch):
    target = AutoModelForCausalLM.from_pretrained(beside, trust_remote_code=True)
    assert target.generate.func.__name__ == "generate" and "hf_specdec" in target.generate.func.__globals__
    stats = by_itself(target, **make_prompts(batch), **GREEDY)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens and len(stats.drafted_by_position) == 3


def test_arguments_may_be_positional(beside):
    target = AutoModelForCausalLM.from_pretrained(beside, trust_remote_code=True)
    ids = make_prompts(1)["input_ids"]
    assert by_itself(target, ids, **GREEDY).accepted_tokens
    config = GenerationConfig(num_assistant_tokens=2, **GREEDY)
    assert len(by_itself(target, ids, config).drafted_by_position) == 2  # the config, not the recommendation


def test_a_call_may_name_the_strategy(beside):
    target = AutoModelForCausalLM.from_pretrained(beside, trust_remote_code=True)
    stats = hf_specdec.SpeculationStats()
    target.generate(**make_prompts(1), **GREEDY, strategy="spec", speculation_stats=stats)
    assert stats.accepted_tokens and stats.draft_forwards


def test_without_trust_the_folder_is_an_ordinary_model(beside, llama_pair):
    target = AutoModelForCausalLM.from_pretrained(beside)
    assert "generate" not in vars(target)


def test_targets_with_the_same_code_have_their_own_drafts(beside, tmp_path):
    """Same names, same code: transformers imports it once."""
    shutil.copytree(beside.parent, tmp_path / "other")
    AutoModelForCausalLM.from_pretrained(beside).save_pretrained(tmp_path / "other" / "draft")
    rates = []
    for folder in (beside, tmp_path / "other" / "target"):
        target = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        rates.append(by_itself(target, **make_prompts(1), **GREEDY).acceptance_rate)
    assert rates[0] < 1 == rates[1]  # the other's draft is its target


ON_THE_HUB = """
import sys, torch
from transformers import AutoModelForCausalLM

target = AutoModelForCausalLM.from_pretrained("org/both", trust_remote_code=True)
plain = AutoModelForCausalLM.from_pretrained("org/both")
inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 16, "do_sample": False}
out = target.generate(**inputs, return_dict_in_generate=True)
assert out.sequences.tolist() == plain.generate(**inputs).tolist()
assert out.speculation.draft_forwards and out.speculation.accepted_tokens
"""


def test_a_hub_repository_may_hold_target_and_draft(beside, tmp_path):
    """A real client, in a process of its own, against the server of hub_server.py."""
    shutil.copytree(beside.parent / "draft", beside / "draft")
    code = beside / "custom_generate" / "generate.py"
    code.write_text(code.read_text().replace("'../draft'", "'./draft'"))
    with Hub() as hub:
        hub.add("org/both", beside)
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(Path(hf_specdec.__file__).parents[1]),
        }
        done = subprocess.run([sys.executable, "-c", ON_THE_HUB], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hf_specdec: org/both decodes with strategy='spec' and the draft ./draft" in done.stderr


def test_the_place_of_a_draft_inside_the_target_begins_with_a_dot(beside):
    shutil.copytree(beside.parent / "draft", beside / "draft")
    pair = pair_to_export(None, str(beside), str(beside / "draft"))
    export_pair(pair, "custom-generate", beside.parent / "out")
    assert "DRAFT, REVISION = './draft', None" in (beside.parent / "out/custom_generate/generate.py").read_text()


# Trust, requirements, card


def test_the_code_needs_to_be_trusted(repository, llama_pair):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        llama_pair[0].generate(**make_prompts(1), custom_generate=repository, trust_remote_code=False)


class _NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> None:
        if name == "hf_specdec":
            raise ModuleNotFoundError("No module named 'hf_specdec'", name=name)


@pytest.fixture
def no_hf_specdec(monkeypatch) -> Iterator[None]:
    hf_specdec.unregister()
    monkeypatch.setattr(sys, "meta_path", [_NotInstalled(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "hf_specdec")
    yield
    hf_specdec.register()


def test_a_missing_hf_specdec_is_named(repository, llama_pair, no_hf_specdec):
    arguments = {"custom_generate": repository, "trust_remote_code": True, "assistant_model": llama_pair[1]}
    with pytest.raises(ImportError, match=r"not found in your environment: hf_specdec\. Run `pip install hf_specdec`"):
        llama_pair[0].generate(**make_prompts(1), **arguments)


def test_requirements_are_those_of_the_package(repository):
    lines = (Path(repository) / "custom_generate" / "requirements.txt").read_text().splitlines()
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    required = [line for line in lines if not line.startswith("#")]
    assert required and all(f'"{line}"' in pyproject for line in required)


def test_the_card_is_ready_for_the_hub(export, saved, tmp_path):
    exported = export("custom-generate")
    card = ModelCard(readme(exported))
    assert card.data.library_name == "transformers" and "custom_generate" in card.data.tags
    assert card.data.base_model is None
    assert not [file for file in exported.files if str(saved.parent) in file.read_text()]  # nobody's paths are shared
    pair = pair_to_export(None, "org/target", "org/draft", revision="v1")
    card = ModelCard(readme(export_pair(pair, "custom-generate", tmp_path / "hub")))
    assert card.data.base_model == ["org/target", "org/draft"]
    assert 'from_pretrained("org/target", revision="v1")' in card.text


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM

target, draft = (AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}") for name in ("target", "draft"))
inputs = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
options = {"max_new_tokens": 16, "do_sample": False}
expected = target.generate(**inputs, **options)
assert "hf_specdec" not in sys.modules
out = target.generate(**inputs, **options, custom_generate=sys.argv[2], trust_remote_code=True, assistant_model=draft)
assert out.tolist() == expected.tolist() and "hf_specdec" in sys.modules
"""


def test_the_repository_works_in_a_process_that_does_not_know_us(repository, saved, tmp_path):
    environment = {
        "PYTHONPATH": str(Path(hf_specdec.__file__).parents[1]),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(saved), repository]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
