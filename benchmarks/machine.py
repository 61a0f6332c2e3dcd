"""The machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers

__all__ = ["description"]


def description() -> str:
    """One line: processor, cores, memory, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family', '?')}), "
        f"{os.cpu_count()} cores, {', '.join(wide)}, {memory:.0f} GiB; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.system()}"
    )
