"""Band changes with keys that llama.cpp's K-shift would crash on: `make layouts` tries all there are."""

from runtime.key_layouts import Layout, try_layouts

SOME = [
    *(Layout(head, head, kv) for head in (32, 80, 96, 128, 160, 256) for kv in ("f16", "q8_0")),
    *(Layout(head, head // 2, kv) for head in (64, 96, 256) for kv in ("f16", "q8_0", "q4_0")),
    *(Layout(head, n_rot, "bf16") for head, n_rot in ((64, 64), (80, 40))),
    *(Layout(64, 64, kv) for kv in ("q5_1", "q5_0", "q4_1", "q4_0", "f32")),
    *(Layout(head, head, kv, hadamard=False) for head in (64, 128) for kv in ("q8_0", "q4_0", "f16")),
]


def test_keys_that_cannot_be_shifted_are_read_again(tmp_path):
    assert try_layouts(SOME, tmp_path) == {}
