"""llama-cpp-python made long: rope callback, band switching, KV cache, memory, evaluation."""
