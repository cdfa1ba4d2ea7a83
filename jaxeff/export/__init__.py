"""Models for other programs."""

from .safetensors import (
    load_safetensors as load_safetensors,
    save_safetensors as save_safetensors,
)
