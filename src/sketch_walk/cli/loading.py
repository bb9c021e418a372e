"""Loading of a model under a spinner instead of progress bars of three libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sketch_walk.extras import require

if TYPE_CHECKING:
    from rich.console import Console

    from sketch_walk.integrations.models import LoadedModel


def load_quietly(
    console: Console, model: str | None, gguf_file: str | None = None, device: str | None = None
) -> LoadedModel:
    """`sketch_walk.integrations.models.load`, with transformers' own bars and advice switched off.

    Raises
    ------
    ModelLoadError, MissingExtraError
        As `load`.
    """
    logging = require("transformers", "transformers").utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    from sketch_walk.integrations.models import load

    first_time = " (the first time takes about 20 seconds more)" if model is None else ""
    with console.status(f"loading {model or 'the embedded SmolLM2'}{first_time}"):
        return load(model, gguf_file=gguf_file, device=device)
