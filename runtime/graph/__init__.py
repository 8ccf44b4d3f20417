"""llama.cpp's graph, seen and set: what nodes read, and nodes that are computed here."""
