"""Pairs on the Hub: a real client, in separate processes, against the server of hub_server.py. Nothing is patched.

The clients run once, in `online` and `offline`; each test then looks at one property.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pair, make_prompts
from eagle3_reference import make_parts, random_head
from hub_server import TOKEN, USER, Hub
from huggingface_hub import ModelCard
from test_pair import make_tokenizer

import hf_specdec
from hf_specdec.drafters.heads.saving import save_folder
from hf_specdec.pairs import SpecPair
from hf_specdec.pairs.pair_file import ModelReference, PairConfig

PROMPT = make_prompts(1, width=6, seed=3)["input_ids"].tolist()

PRELUDE = f"""
import json, os, time, torch
from pathlib import Path
torch.set_num_threads(1)
import hf_specdec
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
from hf_specdec.pairs import SpecPair
results = {{}}
GREEDY = dict(inputs=torch.tensor({PROMPT}), do_sample=False, max_new_tokens=12)

def speculate(name, *args, **kwargs):
    pair = SpecPair.from_pretrained(name, *args, **kwargs)
    fixed = dict(num_assistant_tokens=4, num_assistant_tokens_schedule="constant")  # the default depends on the clock
    out = pair.generate(**GREEDY, **fixed, return_dict_in_generate=True)
    sources = [source.name_or_path + "@" + str(source.revision) for source in pair.sources]
    return {{"tokens": out.sequences.tolist(), "forwards": out.speculation.target_forwards, "sources": sources}}

def record(name, action, *args, **kwargs):
    try:
        results[name] = action(*args, **kwargs)
    except Exception as error:
        kind = {{"error": type(error).__name__, "is_os_error": isinstance(error, OSError)}}
        results[name] = {{**kind, "message": str(error)}}
"""

ONLINE = f"""
for name in ("one", "again"):
    record(name, speculate, "org/pair")
for name in ("org/ids", "org/root", "org/private", "org/escaping"):
    record(name, speculate, name)
record("private, token", speculate, "org/private", token={TOKEN!r})
record("bad token", speculate, "org/public", "org/draft", token="hf_bad")
record("missing", speculate, "org/missing", "org/draft")
record("missing draft", speculate, "org/public", "org/missing")
record("no revision", speculate, "org/public", "org/draft", revision="v9")
record("old draft", speculate, "org/public", "org/draft", draft_revision=os.environ["OLD_DRAFT"])
record("old pair", speculate, "org/moved", revision=os.environ["OLD_PAIR"])
record("unknown to the catalogue", speculate, "org/public")
record("cut", speculate, "org/cut", "org/draft")
record("dropped", speculate, "org/dropped", "org/draft")
record("dropped, next try", speculate, "org/dropped", "org/draft")

pair = SpecPair.from_pretrained("org/public", "org/draft")
target = pair.target
for name in ("org/draft", "org/whole", "org/missing", "org/head"):
    record("by name: " + name, lambda: target.generate(**GREEDY, assistant_model=name, strategy="spec").tolist())
stats = hf_specdec.SpeculationStats()
record("head", lambda: target.generate(**GREEDY, assistant_model="org/head", strategy="spec",
    num_assistant_tokens=3, speculation_stats=stats).tolist())
results["head drafted"] = [stats.drafted_tokens, stats.draft_forwards]
record("pair with a head", speculate, "org/public", "org/head")
record("head at a revision", speculate, "org/public", "org/head", draft_revision="v9")
root = SpecPair.from_pretrained("org/root").target
record("auto", lambda: root.generate(**GREEDY, assistant_model="auto", strategy="spec").tolist())

record("push", pair.push_to_hub, "pushed", private=True, token={TOKEN!r}, weights=True, commit_message="All of it")
record("pushed", speculate, "{USER}/pushed", token={TOKEN!r})
record("push references", pair.push_to_hub, "{USER}/references", token={TOKEN!r})
record("push again", pair.push_to_hub, "{USER}/references", token={TOKEN!r})
record("references", speculate, "{USER}/references")
record("push, no token", pair.push_to_hub, "{USER}/nothing")
"""

OFFLINE = """
record("cached", speculate, "org/pair")
record("cached by id", speculate, "org/public", "org/draft")
record("cached head", speculate, "org/public", "org/head")
record("never seen", speculate, "org/unseen", "org/draft")
record("pair never seen", speculate, "org/unseen")
record("draft never seen", speculate, "org/public", "org/unseen")
"""


def run(hub: Hub, home: Path, code: str, **environment: str) -> dict[str, Any]:
    """The values that `record` noted while a new process ran `code`, with `hub` as its Hub and its cache in `home`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    package = str(Path(hf_specdec.__file__).parent.parent)
    hub_settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": package}
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + code + "\nprint(json.dumps(results))"],
        env=clean | hub_settings | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> SpecPair:
    """The pair in all repositories, saved and loaded once."""
    folder = tmp_path_factory.mktemp("local")
    target, draft = make_pair("llama", 0.04)
    SpecPair(target, draft, make_tokenizer(96)).save_pretrained(folder)
    return SpecPair.from_pretrained(folder)


@pytest.fixture(scope="module")
def hub(local: SpecPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    saved = Path(local.target.name_or_path).parent

    def pair_file(target: str, draft: str, revision: str | None = None) -> Path:
        folder = tmp_path_factory.mktemp("pair")
        PairConfig(ModelReference(target), ModelReference(draft, revision)).save(folder)
        return folder

    unlike = tmp_path_factory.mktemp("unlike")
    make_pair("llama", seed=5)[1].save_pretrained(unlike)
    licensed = tmp_path_factory.mktemp("licensed")
    (licensed / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    with Hub() as hub:
        hub.add("org/pair", saved)
        hub.add("org/whole", saved)
        hub.add("org/public", saved / "target")
        hub.add("org/public", licensed)
        hub.old_draft = hub.add("org/draft", saved / "draft")  # type: ignore[attr-defined]
        hub.add("org/draft", unlike)
        hub.add("org/draft", licensed)
        headed = tmp_path_factory.mktemp("head")
        save_folder(random_head(make_parts()), headed, local.target)
        (headed / "training.txt").write_text("not needed")
        hub.head = hub.add("org/head", headed)  # type: ignore[attr-defined]
        hub.add("org/ids", pair_file("org/public", "org/draft", hub.old_draft))  # type: ignore[attr-defined]
        hub.add("org/private", saved, private=True)
        hub.add("org/root", saved / "target")
        hub.add("org/root", pair_file(".", "org/draft", hub.old_draft))  # type: ignore[attr-defined]
        hub.add("org/moved", saved / "target")
        hub.old_pair = hub.add("org/moved", pair_file(".", "org/draft"))  # type: ignore[attr-defined]
        hub.add("org/moved", unlike)
        hub.add("org/escaping", pair_file("../../target", "org/draft"))
        hub.add("org/cut", saved / "target", faults=["cut"])
        hub.add("org/dropped", saved / "target", faults=["cut"] + ["drop"] * 6)  # the client tries 6 times
        hub.add("org/unseen", saved / "draft")
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path) -> dict[str, Any]:
    return run(hub, home, ONLINE, OLD_DRAFT=hub.old_draft, OLD_PAIR=hub.old_pair)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def offline(hub: Hub, home: Path, online: dict[str, Any]) -> dict[str, Any]:
    requests = len(hub.log)
    results = run(hub, home, OFFLINE, HF_HUB_OFFLINE="1")
    return results | {"requests": len(hub.log) - requests}


@pytest.fixture(scope="module")
def tokens(local: SpecPair) -> list[list[int]]:
    """The target's output without speculation and without a Hub."""
    return local.target.generate(torch.tensor(PROMPT), do_sample=False, max_new_tokens=12).tolist()


WEIGHTS = "model.safetensors"


def test_a_repository_can_be_a_pair(online, tokens):
    assert online["one"]["tokens"] == tokens
    assert online["one"]["forwards"] < 12


def test_the_second_load_downloads_nothing(hub, online, tokens):
    assert online["again"]["tokens"] == tokens
    assert set(hub.downloads("org/pair").values()) == {1}


def test_only_what_a_pair_needs_is_downloaded(hub, online):
    assert hub.downloads("org/pair").keys() == {
        "specdec_pair.json",
        *(f"target/{name}" for name in ("config.json", "generation_config.json", WEIGHTS)),
        *(f"target/{name}" for name in ("tokenizer.json", "tokenizer_config.json")),
        f"draft/{WEIGHTS}",  # its other files have the same content as the target's
    }


def test_a_pair_file_may_name_other_repositories_at_a_commit(hub, online, tokens):
    assert online["org/ids"]["tokens"] == tokens
    assert online["org/ids"]["sources"][1] == f"org/draft@{hub.old_draft}"
    assert online["org/ids"]["forwards"] == online["one"]["forwards"]  # the newest commit's draft is worse


def test_the_targets_weights_may_be_beside_the_pair_file(hub, online, tokens):
    assert online["org/root"]["tokens"] == tokens
    assert online["org/root"]["sources"] == [
        f"org/root@{hub.repos['org/root'].resolve('main')}",
        f"org/draft@{hub.old_draft}",
    ]


def test_a_pair_file_from_the_hub_names_no_folders_outside_its_repository(online):
    assert online["org/escaping"]["error"] == "ValueError"
    assert "expected a Hub id or a folder inside the repository" in online["org/escaping"]["message"]


def test_the_revision_of_a_pair_is_that_of_the_weights_beside_it(hub, online, tokens):
    assert online["old pair"]["tokens"] == tokens
    assert online["old pair"]["sources"][0] == f"org/moved@{hub.old_pair}"


def test_the_revision_of_the_draft_is_its_own(hub, online, tokens):
    assert online["old draft"]["tokens"] == tokens
    assert online["old draft"]["sources"][1] == f"org/draft@{hub.old_draft}"
    assert online["old draft"]["forwards"] < online["cut"]["forwards"]  # that one uses the newest commit's draft


@pytest.mark.parametrize(
    "name, message",
    {
        "missing": "org/missing is neither a local folder nor a readable repository on the Hub: check the name",
        "missing draft": "org/missing is neither a local folder nor a readable repository on the Hub",
        "org/private": "org/private is neither .* if it is private, pass `token` or run `hf auth login`",
        "bad token": "The Hub rejected the token for org/public: pass a valid `token`",
        "no revision": "org/public has no revision 'v9' on the Hub: name a branch, tag or commit that it has",
        "push, no token": "401 Unauthorized",
    }.items(),
)
def test_what_the_hub_refuses_is_said_by_name(online, name, message):
    assert online[name]["is_os_error"]
    assert re.search(message, online[name]["message"])


def test_a_token_opens_a_private_pair(online, tokens):
    assert online["private, token"]["tokens"] == tokens


def test_without_a_pair_file_the_catalogue_is_asked(online):
    assert online["unknown to the catalogue"]["error"] == "ValueError"
    assert "catalogue" in online["unknown to the catalogue"]["message"]


def test_a_download_that_is_cut_off_is_taken_up_again(hub, online, tokens):
    assert online["cut"]["tokens"] == tokens
    assert hub.downloads("org/cut")[WEIGHTS] == 2


def test_a_download_that_fails_says_so_and_the_next_try_is_right(online, tokens):
    failed = online["dropped"]
    assert failed["is_os_error"]
    assert re.search("org/dropped could not be loaded: .*peer closed connection", failed["message"])
    assert online["dropped, next try"]["tokens"] == tokens


@pytest.mark.parametrize("name", ["by name: org/draft", "by name: org/whole", "auto"])
def test_assistant_models_are_found_on_the_hub(online, tokens, name):
    assert online[name] == tokens


def test_of_a_pair_whose_draft_is_wanted_only_that_is_downloaded(hub, online):
    assert hub.downloads("org/whole")[f"draft/{WEIGHTS}"] == 1
    assert not any(name.startswith("target/") for name in hub.downloads("org/whole"))


def test_an_assistant_model_that_is_not_there_is_a_value_error(online):
    assert online["by name: org/missing"]["error"] == "ValueError"
    assert "`assistant_model` 'org/missing' could not be loaded" in online["by name: org/missing"]["message"]


def test_what_was_pushed_generates_the_same(hub, online, tokens):
    assert online["pushed"]["tokens"] == tokens
    pushed = hub.repos[f"{USER}/pushed"]
    assert pushed.private
    assert online["push"].endswith(f"/{USER}/pushed/commit/{pushed.resolve('main')}")
    files = pushed.commits[pushed.resolve("main")]
    assert {"README.md", "specdec_pair.json", f"target/{WEIGHTS}", f"draft/{WEIGHTS}"} <= files.keys()
    assert f'SpecPair.from_pretrained("{USER}/pushed")' in files["README.md"].decode()


def test_models_from_the_hub_are_pushed_as_references(hub, online, tokens):
    assert online["references"]["tokens"] == tokens
    repo = hub.repos[f"{USER}/references"]
    assert not repo.private
    files = repo.commits[repo.resolve("main")]
    assert files.keys() == {".gitattributes", "README.md", "specdec_pair.json"}
    config = PairConfig.from_json(files["specdec_pair.json"].decode())
    assert config.target == ModelReference("org/public", hub.repos["org/public"].resolve("main"))
    assert config.draft == ModelReference("org/draft", hub.repos["org/draft"].resolve("main"))
    card = ModelCard(files["README.md"].decode()).data
    assert card.base_model == ["org/public", "org/draft"]
    assert (card.library_name, card.tags, card.license) == ("hf_specdec", ["speculative-decoding"], "mit")


def test_a_pair_can_be_pushed_again(online):
    assert "/commit/" in online["push again"]


@pytest.mark.parametrize("name", ["cached", "cached by id"])
def test_without_a_network_the_cache_is_enough(offline, tokens, name):
    assert offline[name]["tokens"] == tokens
    assert offline["requests"] == 0


@pytest.mark.parametrize("name", ["never seen", "pair never seen", "draft never seen"])
def test_without_a_network_what_is_missing_is_named(offline, name):
    assert offline[name]["is_os_error"]
    assert re.search("org/unseen is not in the local cache, .* run `hf download org/unseen`", offline[name]["message"])


def test_a_head_by_its_id_drafts(hub, online, tokens):
    """Only its own files are downloaded, once, at the commit of its config."""
    assert online["by name: org/head"] == online["head"] == online["pair with a head"]["tokens"] == tokens
    drafted, forwards = online["head drafted"]
    assert drafted > 0 and forwards > 0
    assert online["pair with a head"]["sources"][1] == f"org/head@{hub.head}"
    downloads = hub.downloads("org/head")
    assert downloads.keys() == {"config.json", WEIGHTS} and set(downloads.values()) == {1}
    assert "org/head has no revision 'v9'" in online["head at a revision"]["message"]


def test_a_head_in_the_cache_needs_no_network(offline, tokens):
    assert offline["cached head"]["tokens"] == tokens and offline["requests"] == 0
