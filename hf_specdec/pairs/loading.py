"""Models and pairs by name: local folders, Hub repositories, and the pair files in them.

Resolves names and loads models; `compatibility.py` compares them.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .pair_file import FILE_NAME, ModelReference, PairConfig

# The arguments of `from_pretrained` that locate files, and those that tokenizers also understand.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
TOKENIZER_ARGUMENTS = (*HUB_ARGUMENTS, "proxies", "trust_remote_code", "code_revision")


@dataclass(frozen=True)
class FoundPair:
    """A pair file, and where to load its models from, regardless of where the file was."""

    config: PairConfig
    target: ModelReference
    draft: ModelReference


def find_pair(
    name: str, revision: str | None = None, *, roles: Iterable[str] = ("target", "draft"), **arguments: Any
) -> FoundPair | None:
    """The pair in a local folder or Hub repository; None if it has no pair file, or the Hub cannot be reached.

    Args:
        name: a local folder or Hub id.
        revision: revision of the Hub repository.
        roles: the models to resolve. Those in folders of the Hub repository are downloaded; other references stay as
            the file has them.
        arguments: arguments of `from_pretrained`; only those about the Hub are used.

    Raises:
        OSError: if the Hub repository does not exist or cannot be read, or `name` is a file.
        ValueError: if the pair file is invalid.
    """
    if Path(name).is_file():
        hint = f": pass {str(Path(name).parent)!r} with gguf_file={Path(name).name!r}" * name.endswith(".gguf")
        raise OSError(f"{name} is a file, expected a folder or Hub id{hint}")
    if Path(name).is_dir():
        if not (Path(name) / FILE_NAME).is_file():
            return None
        config = PairConfig.load(name)
        return FoundPair(config, _beside(Path(name), config.target), _beside(Path(name), config.draft))
    hub = hub_arguments(arguments)
    try:
        file = hub_file(name, FILE_NAME, revision, **hub)
    except LocalEntryNotFoundError:  # the Hub cannot be reached; loading will say so if that matters
        return None
    if file is None:
        return None
    config = PairConfig.load(file.parent)
    references = {"target": config.target, "draft": config.draft}
    return FoundPair(config, **references | {role: _inside(name, file.parent, references[role], hub) for role in roles})


def _beside(folder: Path, reference: ModelReference) -> ModelReference:
    """Resolve a reference in a local folder's pair file."""
    name = reference.name_or_path
    if name.startswith(".") or (folder / name).is_dir():
        return replace(reference, name_or_path=str((folder / name).resolve()))
    return reference


def _inside(repo: str, snapshot: Path, reference: ModelReference, hub: dict[str, Any]) -> ModelReference:
    """Resolve a reference in a Hub repository's pair file; a folder of the repository is downloaded.

    `snapshot` is the repository in the local cache, named after its commit.
    """
    commit, name = snapshot.name, PurePosixPath(reference.name_or_path)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{FILE_NAME} of {repo} names {name}, expected a Hub id or a folder inside the repository")
    if not name.parts:
        return replace(reference, name_or_path=repo, revision=commit)
    is_folder = reference.name_or_path.startswith(".")
    if not is_folder:
        try:
            is_folder = hub_file(repo, f"{name}/{reference.gguf_file or 'config.json'}", commit, **hub) is not None
        except LocalEntryNotFoundError:
            is_folder = False
    if not is_folder:
        return reference
    try:
        snapshot_download(repo, revision=commit, allow_patterns=[f"{name}/*"], **hub)
    except Exception as error:
        raise OSError(explain(error, repo, commit)) from error
    return replace(reference, name_or_path=str(snapshot / name))


def pin(reference: ModelReference, **arguments: Any) -> ModelReference:
    """Replace a reference's branch or tag by its commit, so all files come from the same state of the repo.

    Raises:
        OSError: if the model does not exist, cannot be read, or is neither reachable nor in the cache.
        ValueError: if a local folder is given a revision.
    """
    _check_gguf_file(reference)
    if Path(reference.name_or_path).is_dir():
        if reference.revision is not None:
            raise ValueError(
                f"{reference.name_or_path} is a local folder, which has no revision {reference.revision!r}: drop the "
                "revision, or name the Hub repository"
            )
        return reference
    try:
        wanted = reference.gguf_file or "config.json"
        file = hub_file(reference.name_or_path, wanted, reference.revision, **hub_arguments(arguments))
    except LocalEntryNotFoundError as error:
        raise OSError(explain(error, reference.name_or_path, reference.revision)) from error
    if file is None and reference.gguf_file is not None:
        raise OSError(f"`gguf_file`: {reference.name_or_path} has no file {reference.gguf_file} on the Hub")
    return reference if file is None else replace(reference, revision=_commit(file, wanted))


def _commit(file: Path, name: str) -> str:
    """The commit of a file in the local cache, where `name` is a path in the folder named after the commit."""
    return file.parents[len(PurePosixPath(name).parts) - 1].name


def _check_gguf_file(reference: ModelReference) -> None:
    """Raise a FileNotFoundError if a local folder lacks the file that the reference names."""
    place = Path(reference.name_or_path)
    if reference.gguf_file is None or not place.is_dir() or (place / reference.gguf_file).is_file():
        return
    others = ", ".join(sorted(path.name for path in place.glob("*.gguf"))) or "no GGUF files"
    raise FileNotFoundError(f"`gguf_file`: {place} has no file {reference.gguf_file!r}; it has {others}")


def load_model(reference: ModelReference, **arguments: Any) -> PreTrainedModel:
    """Load the language model, in evaluation mode; `arguments` are those of `from_pretrained`.

    Raises:
        OSError: if it cannot be loaded.
        ImportError: if it is in GGUF and a package that reads GGUF is missing.
    """
    name, options = reference.name_or_path, _options(reference)
    try:
        return _model_class(name, options, **arguments).from_pretrained(name, **options, **arguments).eval()
    except ImportError as error:
        raise _explained(error, reference) from error
    except OSError as error:
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        # transformers names the missing file but not the cause, which may be a broken connection.
        reason = "" if cause is error else f"; the first error was {type(cause).__name__}: {cause}"
        raise OSError(f"{name} could not be loaded: {error}{reason}") from error


def _options(reference: ModelReference) -> dict[str, Any]:
    """The arguments of `from_pretrained` that a reference adds to the name."""
    gguf = {} if reference.gguf_file is None else {"gguf_file": reference.gguf_file}
    return {"revision": reference.revision, **gguf}


def _explained(error: ImportError, reference: ModelReference) -> ImportError:
    """For a model in GGUF, an error that says what to install."""
    if reference.gguf_file is None:
        return error
    return ImportError(
        f"`gguf_file`: {reference.gguf_file} cannot be read: {error} Run `pip install gguf accelerate` (or install "
        "the extra hf_specdec[gguf])"
    )


def _model_class(name: str, options: dict[str, Any], **arguments: Any) -> Any:
    """The class to load a model with: as causal models, encoder-decoders would lose their encoder."""
    understood = {key: value for key, value in arguments.items() if key in TOKENIZER_ARGUMENTS}
    config = AutoConfig.from_pretrained(name, **options, **understood)
    if not config.is_encoder_decoder:
        return AutoModelForCausalLM
    return getattr(transformers, (config.architectures or [""])[0], AutoModelForSeq2SeqLM)


def load_tokenizer(reference: ModelReference, **arguments: Any) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; of `from_pretrained`'s `arguments`, only those that tokenizers understand are used.

    Raises:
        OSError: if there is no tokenizer, or it cannot be loaded.
        ImportError: if it is in GGUF and a package that reads GGUF is missing.
    """
    understood = {name: value for name, value in arguments.items() if name in TOKENIZER_ARGUMENTS}
    name = reference.name_or_path
    try:
        return AutoTokenizer.from_pretrained(name, **_options(reference), **understood)
    except ImportError as error:
        raise _explained(error, reference) from error
    except (OSError, ValueError) as error:
        raise OSError(f"No tokenizer could be loaded from {name}: {error}") from error


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """`model.save_pretrained`, but also for models that were quantized in the file and dequantized on loading.

    transformers refuses to save a model whose quantizer cannot write its format, even a dequantized GGUF model, which
    has nothing left of that format.

    Raises:
        ValueError: if the weights are still quantized, in a format that cannot be saved.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.is_serializable():
        model.save_pretrained(folder)
        return
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config).to(model.dtype)
    weights, expected = model.state_dict(), plain.state_dict()
    if {name: _kind(w) for name, w in weights.items()} != {name: _kind(w) for name, w in expected.items()}:
        method = getattr(quantizer.quantization_config.quant_method, "value", "quantized")
        raise ValueError(
            f"The weights of {type(model).__name__} are quantized ({method}), and transformers cannot save them: load "
            "the model dequantized (GGUF: `quantization_config=GgufConfig(dequantize=True)`)"
        )
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    plain.save_pretrained(folder)


def _kind(weight: torch.Tensor) -> tuple[torch.Size, bool]:
    """The shape, and whether the weight is plain floats: 8-bit floats are a quantized format."""
    return weight.shape, weight.is_floating_point() and weight.element_size() > 1


def hub_file(repo: str, name: str, revision: str | None = None, **hub: Any) -> Path | None:
    """One file of a Hub repository, in the local cache; None if the repository has no such file.

    Raises:
        LocalEntryNotFoundError: if the Hub cannot be reached and the file is not in the cache.
        OSError: if the repository or revision does not exist or cannot be read.
    """
    try:
        return Path(hf_hub_download(repo, name, revision=revision, **hub))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
    except Exception as error:  # errors of the HTTP client are not OSErrors
        raise OSError(explain(error, repo, revision)) from error


def explain(error: Exception, name: str, revision: str | None) -> str:
    """A sentence that says why a model could not be loaded, and what to do."""
    if isinstance(error, HFValidationError):
        return f"{name} is neither a local folder nor a Hub id (such as 'Qwen/Qwen3-0.6B')"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{name} is not in the local cache, and the Hub cannot be reached or is disabled (HF_HUB_OFFLINE, "
            f"local_files_only): go online once, or run `hf download {name}` where there is a network"
        )
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its terms on the Hub, then pass `token` or run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on the Hub: name a branch, tag or commit that it has"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name} is neither a local folder nor a readable repository on the Hub: check the name; if it is "
            "private, pass `token` or run `hf auth login`"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"The Hub rejected the token for {name}: pass a valid `token`, or run `hf auth login`"
    return f"{name} could not be downloaded: {error}"


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that are about the Hub."""
    return {name: value for name, value in arguments.items() if name in HUB_ARGUMENTS and value is not None}
