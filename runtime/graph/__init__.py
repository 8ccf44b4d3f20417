"""Hooks into llama.cpp's graph: what nodes read is set, and some nodes are computed here."""
