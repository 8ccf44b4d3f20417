"""A GGUF model in torch, for differentiable losses in any band, on a CPU or a GPU."""
