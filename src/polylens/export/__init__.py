"""What a run leaves, in the formats that other tools read.

`save_lora` writes an adapter for PEFT, `save_control_vector` a control vector for llama.cpp, and
`save_gguf` the merged model for llama.cpp; the merged model as safetensors is
`polylens.merging.save_model`. What a format cannot hold is reported, never dropped in silence.
"""

from polylens.export.control_vector import save_control_vector
from polylens.export.gguf import save_gguf
from polylens.export.lora import save_lora

__all__ = ["save_control_vector", "save_gguf", "save_lora"]
