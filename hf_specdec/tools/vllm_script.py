"""The script that does with vLLM's offline engine what `hf-specdec generate` does here."""

import argparse
import json
from pathlib import Path
from string import Template
from typing import Any

from transformers import GenerationConfig

from ..loop.schedule import DEFAULT_GAMMA
from ..pairs.export import EXPORTERS, GAMMA, TEMPLATES, pair_to_export
from ..pairs.pair import DEMO_PAIR
from .arguments import DATASET_FILES
from .dataset_prompts import DatasetPrompts

# Options of `generate()` by their names in vLLM's SamplingParams.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
_ALWAYS = {
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "num_return_sequences": "n",
}
_TOP_K = 50  # where transformers samples and nothing is said


def vllm_script(args: argparse.Namespace, options: dict[str, Any]) -> str:
    """A Python script with the arguments of `add_arguments`.

    Args:
        options: those of `generate()`.

    Raises:
        ValueError: for models, options and messages that vLLM does not take in this way.
    """
    for name in ("gguf_file", "draft_gguf_file"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is not translated for vLLM: name a model with plain weights")
    pair = pair_to_export(
        args.pair or (None if args.target else str(DEMO_PAIR)), args.target, args.draft, args.revision
    )
    prompts = DatasetPrompts(args)
    files, notes = EXPORTERS["vllm"](pair, args.gamma or pair.recommended.get(GAMMA, DEFAULT_GAMMA))
    engine = {"model": pair.target.name_or_path, "revision": pair.target.revision, "dtype": args.dtype}
    engine |= {"trust_remote_code": args.trust_remote_code or None}
    engine |= {"speculative_config": json.loads(files["speculative_config.json"])}
    sampling = _sampling_params(args, options, pair.target.name_or_path, pair.target.revision)
    column, path = repr(prompts.column), Path(args.dataset).resolve()
    rows, load = f"load_dataset({args.dataset!r}, {args.dataset_config!r}, split={args.split!r})", "load_dataset"
    if path.is_file():
        rows = f"load_dataset({DATASET_FILES[path.suffix]!r}, data_files={str(path)!r}, split='train')"
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        rows, load = f"load_from_disk({str(path)!r})", "load_from_disk"
        rows += f"[{args.split!r}]" if (path / "dataset_dict.json").is_file() else ""
    if args.limit is not None:
        rows += f".select(range({prompts.count}))"
    is_parquet = Path(args.output).suffix == ".parquet"
    template = Template((TEMPLATES / "vllm_offline.py.txt").read_text(encoding="utf-8"))
    script = template.substitute(
        load=load,
        rows=rows,
        prompts=f"[{_prompt(prompts)} for row in rows]",
        engine=_arguments(engine),
        sampling=_arguments(sampling),
        call=_call(prompts),
        sample='"sample": sample, ' if sampling["n"] > 1 else "",
        key=prompts.key,
        column=column,
        write=f"to_parquet({args.output!r})" if is_parquet else f"to_json({args.output!r}, force_ascii=False)",
    )
    return script + "".join(f"# Note: {note}\n" for note in notes)


def _prompt(prompts: DatasetPrompts) -> str:
    """The code for the prompt of a `row`."""
    value = f"row[{prompts.column!r}]"
    if not prompts.is_chat:
        return value
    if prompts.is_text:
        return f'[{{"role": "user", "content": {value}}}]'
    # A table has all keys in each message.
    return f"[{{name: part for name, part in message.items() if part is not None}} for message in {value}]"


def _call(prompts: DatasetPrompts) -> str:
    """The code for the call of the engine.

    Raises:
        ValueError: if the assistant's message is to be continued in some rows only.
    """
    if not prompts.is_chat:
        return "generate(prompts, sampling)"
    ends = [] if prompts.is_text else [_goes_on(prompts[index]) for index in range(prompts.count)]
    if not any(ends):
        return "chat(prompts, sampling)"
    if not all(ends):
        raise ValueError(
            f"row {ends.index(True)} of --dataset ends with a message of the assistant, row {ends.index(False)} does "
            "not, and vLLM continues the last message of all rows or of none: split the dataset"
        )
    return "chat(prompts, sampling, add_generation_prompt=False, continue_final_message=True)"


def _goes_on(messages: list[dict[str, Any]] | None) -> bool:
    """Whether the last of these messages is the assistant's."""
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant"


def _sampling_params(
    args: argparse.Namespace, options: dict[str, Any], target: str, revision: str | None
) -> dict[str, Any]:
    if unknown := sorted(options.keys() - {*_SAMPLING, *_ALWAYS, "do_sample"}):
        raise ValueError(f"--options {unknown[0]} is not translated for vLLM: leave it out, and add it to the script")
    try:
        config = GenerationConfig.from_pretrained(target, revision=revision)
    except OSError:  # it has none
        config = GenerationConfig()
    config.update(**options)
    found = {"max_tokens": args.new_tokens, "seed": args.seed, "temperature": None if config.do_sample else 0.0}
    names = _ALWAYS | _SAMPLING if config.do_sample else _ALWAYS
    found |= {theirs: getattr(config, ours, None) for ours, theirs in names.items()}
    found["n"] = found["n"] or 1
    if config.do_sample and found["top_k"] is None:
        found["top_k"] = _TOP_K
    if found["stop"]:
        found["include_stop_str_in_output"] = True  # as `generate()` does
    return found


def _arguments(given: dict[str, Any]) -> str:
    return "\n        ".join(f"{name}={value!r}," for name, value in given.items() if value is not None)
