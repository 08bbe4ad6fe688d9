"""Adapters: attached to a trunk (`attaching`), merged into it (`merging`), saved (`attached`)."""

from unmasked.checkpoint.adapters.attached import (
    FOLDER,
    attached_weights,
    below_adapters,
    remember,
    write_attached,
)
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
)

__all__ = [
    "CONFIG_NAME",
    "FOLDER",
    "WEIGHTS_NAME",
    "adapter_state",
    "attach",
    "attached_weights",
    "bare",
    "below_adapters",
    "check_nested",
    "has_adapters",
    "is_adapter",
    "load_adapter_state",
    "merge",
    "merge_attached",
    "quantize_4bit",
    "read_adapter_config",
    "remember",
    "save_adapter",
    "write_attached",
]
