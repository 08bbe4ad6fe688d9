"""What is installed on this machine, which devices it has, and what each extra still needs."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from unmasked.checkpoint.card import versions
from unmasked.errors import pip_install

Facts = dict[str, Any]


def environment() -> Facts:
    """Versions, devices and extras."""
    from unmasked.forward.precision import bfloat16_instructions, int8_instructions

    found: Facts = {**versions(), "python": platform.python_version()}
    found["platform"] = platform.platform(terse=True)
    found["devices"] = _devices()
    found["cpu_bfloat16"] = bfloat16_instructions() or "no (slow: emulated; use float32)"
    found["cpu_int8"] = int8_instructions() or "no (--quantize int8 gains little)"
    for extra, packages in _extras().items():
        missing = [name for name in packages if not any(metadata.distributions(name=name))]
        install = f"{pip_install(extra)} ({', '.join(missing)} missing)"
        found[f"extra_{extra}"] = install if missing else "installed"
    return found


def _extras() -> dict[str, list[str]]:
    """The packages of each extra in the metadata of this package; empty if it is not installed."""
    from packaging.requirements import Requirement

    extras: dict[str, list[str]] = {}
    ours = next(iter(metadata.distributions(name="unmasked")), None)
    for requirement in map(Requirement, (ours.requires if ours else None) or []):
        # A marker such as: extra == "serve" or extra == "dev"
        names = str(requirement.marker or "").split("extra == ")[1:]
        for extra in (name.strip("\"'() ") for name in names):
            if extra != "dev":
                extras.setdefault(extra, []).append(requirement.name)
    return extras


def _devices() -> list[str]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        bfloat16 = "with" if torch.cuda.is_bf16_supported() else "without"
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        found.append(f"cuda:{index} {gpu.name} {memory} {bfloat16} bfloat16")
    if torch.backends.mps.is_available():
        found.append("mps")
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return [*found, f"cpu {capability}, {threads} thread{'s' * (threads != 1)}"]
