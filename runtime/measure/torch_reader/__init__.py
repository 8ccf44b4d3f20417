"""A GGUF's model in torch, to read texts with and to differentiate: losses under any band, on a CPU or a GPU."""
