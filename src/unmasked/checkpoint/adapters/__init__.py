"""The weights that train: attached to a trunk (`attaching`), read and merged (`merging`)."""

from unmasked.checkpoint.adapters.attaching import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapter_state,
    attach,
    check_nested,
    quantize_4bit,
    save_adapter,
)
from unmasked.checkpoint.adapters.merging import (
    bare,
    has_adapters,
    is_adapter,
    load_adapter_state,
    merge,
    merge_attached,
    read_adapter_config,
    require_finite,
)

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "adapter_state",
    "attach",
    "bare",
    "check_nested",
    "has_adapters",
    "is_adapter",
    "load_adapter_state",
    "merge",
    "merge_attached",
    "quantize_4bit",
    "read_adapter_config",
    "require_finite",
    "save_adapter",
]
