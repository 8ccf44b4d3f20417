"""Checkpoints that llama.cpp would not load, or run differently: refused or noted before anything is written."""

import json

import llama_cpp
import numpy as np
import pytest
import tiny_checkpoints as tc
import torch
from gguf import GGMLQuantizationType
from ropewalk.container import read_header
from ropewalk.container.values import F32, STRING, U32, Value
from ropewalk.convert import convert_checkpoint
from ropewalk.convert.checkpoint import Config, architecture_of, open_checkpoint, read_config
from ropewalk.convert.checkpoint.scaled import with_scales
from ropewalk.convert.embed import encoded
from ropewalk.convert.from_checkpoint import read_source
from ropewalk.convert.load_trial import check_loads
from ropewalk.errors import UserError
from safetensors.torch import load_file, save_file

MISTRAL = tc.without(tc.MISTRAL, "vocab_size") | {"vocab_size": 512}


@pytest.fixture
def make(tmp_path):
    """``make(config, tensors=change, **case)``: a checkpoint whose tensors `change` has changed in place."""

    def write(config, tensors=None, **more):
        case = tc.Case(f"case{len(list(tmp_path.iterdir()))}", config, **more)
        if not case.can_be_made():
            pytest.skip(f"{case.needs}, which the tokeniser comes from, is not installed")
        folder = tc.write_checkpoint(case, tmp_path)
        if tensors is not None:
            held = load_file(folder / "model.safetensors")
            tensors(held)
            save_file(held, folder / "model.safetensors")
        return folder

    return write


def refused(folder, message):
    with pytest.raises(UserError, match=message) as error:
        read_source(folder)
    assert "\n" not in str(error.value)


def logits(path):
    llm = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    llm.eval(list(range(3, 11)))
    found = np.array(llm.scores[:8])
    llm.close()
    return found


# --- names and shapes that llama.cpp's loader does not take

AT = "model.layers.0."


@pytest.mark.parametrize(
    ("config", "name", "shape", "expected"),
    [
        (tc.LLAMA, "mlp.up_proj.weight", (100, 64), r"\[96, 64\]"),
        (tc.LLAMA, "mlp.gate_proj.weight", (64, 96), r"\[96, 64\]"),
        (tc.LLAMA, "post_attention_layernorm.weight", (63,), r"\[64\]"),
        ({**tc.LLAMA, "attention_bias": True}, "self_attn.v_proj.bias", (8,), r"\[32\]"),
        ({**tc.LLAMA, "attention_bias": True}, "self_attn.o_proj.bias", (32,), r"\[64\]"),
        ({**tc.LLAMA, "mlp_bias": True}, "mlp.down_proj.bias", (96,), r"\[64\]"),
        (tc.QWEN2, "self_attn.q_proj.bias", (32,), r"\[64\]"),
        (tc.QWEN3, "self_attn.q_norm.weight", (64,), r"\[32\]"),
        (tc.QWEN3, "self_attn.k_norm.weight", (16,), r"\[32\]"),
        (tc.PHI3, "self_attn.qkv_proj.weight", (128, 64), r"\[192, 64\]"),
        (tc.PHI3, "mlp.gate_up_proj.weight", (96, 64), r"\[192, 64\]"),
        (tc.GEMMA2, "post_feedforward_layernorm.weight", (32,), r"\[64\]"),
        (tc.GEMMA3, "pre_feedforward_layernorm.weight", (32,), r"\[64\]"),
        (tc.MIXTRAL, "block_sparse_moe.gate.weight", (5, 64), r"\[4, 64\]"),
        (tc.MIXTRAL, "block_sparse_moe.experts.0.w1.weight", (64, 96), r"\[96, 64\]|as for the first"),
    ],
)
def test_a_wrong_shape(make, config, name, shape, expected):
    more = {"added": tc.PHI3_TOKENS} if config is tc.PHI3 else {}
    folder = make(config, lambda held: held.update({AT + name: torch.zeros(shape, dtype=torch.bfloat16)}), **more)
    refused(folder, rf"{AT}.*{name.split('.')[-2]}.*: shape \[{shape[0]}.*\], expected {expected}")


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (tc.LLAMA, "self_attn.v_proj.weight"),
        (tc.LLAMA, "mlp.gate_proj.weight"),
        (tc.LLAMA, "input_layernorm.weight"),
        ({**tc.LLAMA, "attention_bias": True}, "self_attn.k_proj.bias"),
        ({**tc.LLAMA, "mlp_bias": True}, "mlp.up_proj.bias"),
        (tc.QWEN2, "self_attn.q_proj.bias"),
        (tc.QWEN3, "self_attn.q_norm.weight"),
        (tc.GEMMA2, "pre_feedforward_layernorm.weight"),
        (tc.GEMMA3, "post_attention_layernorm.weight"),
        (tc.PHI3, "self_attn.qkv_proj.weight"),
        (tc.MIXTRAL, "block_sparse_moe.gate.weight"),
        (tc.MINICPM, "mlp.down_proj.weight"),
    ],
)
def test_a_kind_of_tensor_that_every_layer_lacks(make, config, part):
    def remove(held):
        for name in [name for name in held if part in name]:
            del held[name]

    more = {"added": tc.PHI3_TOKENS} if config is tc.PHI3 else {}
    refused(make(config, remove, **more), rf"layer 0 has no tensor for .*, which every layer needs: {AT}{part}")


def test_all_experts_of_one_kind_are_missing(make):
    def remove(held):
        for name in [name for name in held if ".w3." in name]:
            del held[name]

    refused(make(tc.MIXTRAL, remove), "layer 0 has no tensor for ffn_up_exps.weight, which every layer needs")


def test_the_output_is_missing_where_it_is_not_tied(make):
    config = tc.without(tc.LLAMA, "tie_word_embeddings")  # as transformers 5 saves it
    refused(make(config), r"no tensor for output.weight, expected one \(config.json\): lm_head.weight")


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        (tc.QWEN3, "self_attn.o_proj.bias", (64,)),
        (tc.GEMMA2, "self_attn.o_proj.bias", (64,)),
        (tc.QWEN2, "mlp.up_proj.bias", (96,)),
        (tc.QWEN2, "self_attn.o_proj.bias", (64,)),
    ],
)
def test_a_bias_that_the_loader_does_not_take(make, config, name, shape):
    def add(held):
        for i in range(2):
            held[f"model.layers.{i}.{name}"] = torch.zeros(shape, dtype=torch.bfloat16)

    refused(make(config, add), rf"{AT}{name}: llama.cpp takes no blk.0.\w+.bias in a {config['architectures'][0]}")


@pytest.mark.parametrize("vocab_size", [510, 514])
def test_rows_that_are_not_the_tokens(make, vocab_size):
    folder = make(tc.LLAMA)
    config = {**tc.LLAMA, "vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, rf"shape \[512, 64\], expected \[{vocab_size}, 64\] from config.json and one row for each token")


def test_a_head_size_that_qwen2_and_phi3_do_not_take(make):
    refused(make({**tc.QWEN2, "head_dim": 32}), r"o_proj.weight: shape \[64, 128\], expected \[64, 64\]")


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("base_model.model.", "begins with 'base_model.model.', which is of a PEFT wrapper, expected the merged model"),
        ("_orig_mod.", "begins with '_orig_mod.', which is of a compiled model"),
        ("module.", "begins with 'module.', which is of a DataParallel, DDP or FSDP wrapper"),
    ],
)
def test_names_with_a_wrapper_in_front(make, prefix, message):
    refused(make(tc.LLAMA, prefix=prefix), message)


def test_an_adapter_s_weights(make):
    name = f"{AT}self_attn.q_proj.lora_A.weight"
    refused(make(tc.LLAMA, lambda held: held.update({name: torch.zeros(4, 64)})), rf"{name}: a LoRA adapter's weight")


def test_whole_numbers_for_weights(make):
    name = f"{AT}mlp.up_proj.weight"
    folder = make(tc.LLAMA, lambda held: held.update({name: torch.ones(96, 64, dtype=torch.int64)}))
    refused(folder, f"{name}: int64 numbers, expected floats")


def test_more_experts_per_token_than_there_are(make):
    refused(make({**tc.MIXTRAL, "num_experts_per_tok": 5}), "num_experts_per_tok: 5, expected at most .*, 4")


def test_the_number_of_experts_under_its_other_name(make):
    config = tc.without(tc.QWEN3_MOE, "num_experts")
    folder = make(tc.QWEN3_MOE, tokeniser=tc.NEW_BPE)
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 8}))
    assert [value.value for value in read_source(folder).values if value.key == "qwen3moe.expert_count"] == [8]


def test_llama_cpp_tries_the_result_before_it_gets_its_name(make, tmp_path, monkeypatch):
    """What the checks miss: here, all of them are left out."""
    folder = make({**tc.QWEN3, "attention_bias": True})
    monkeypatch.setattr("ropewalk.convert.checkpoint.tensors._check_slots", lambda *arguments: None)
    for kind in (None, "q4_0"):
        with pytest.raises(UserError, match=r"would not load the converted model: .*wrong number of tensors") as error:
            convert_checkpoint(folder, tmp_path / "out.gguf", weight_type=kind)
        assert str(error.value).startswith(f"{folder}: ") and "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]


def test_an_abort_of_llama_cpp_is_a_message(tiny_llama, tmp_path):
    path = tiny_llama(tmp_path / "in.gguf", extend=lambda writer: writer.add_expert_used_count(3))
    with pytest.raises(UserError, match=r"^it: llama.cpp would not load .*GGML_ASSERT\(n_expert_used") as error:
        check_loads(path, "it")
    assert str(tmp_path) not in str(error.value)


# --- numbers that a type cannot hold


def test_a_number_too_large_for_float16(make, tmp_path):
    name = f"{AT}mlp.up_proj.weight"

    def change(held):
        held[name][3, 5] = 1e5

    folder = make({**tc.LLAMA, "torch_dtype": "float32"}, change, dtype="F32")
    with pytest.raises(UserError, match=rf"{name}: 1e\+05 is too large for f16, expected --type bf16 or f32"):
        convert_checkpoint(folder, tmp_path / "out.gguf", weight_type="f16")
    for kind in (None, "q5_1"):
        notes = convert_checkpoint(folder, tmp_path / "out.gguf", weight_type=kind, force=True)
        assert [note for note in notes if "bfloat16" in note] == [
            f"written in bfloat16: {folder / 'model.safetensors'}: {name}: 1e+05 is too large for f16"
        ]
        assert np.isfinite(logits(tmp_path / "out.gguf")).all()


@pytest.mark.parametrize(("kind", "value"), [("q8_0", 1e9), ("bf16", 3.4e38), ("f32", 1e300)])
def test_numbers_too_large_for_other_types(make, tmp_path, kind, value):
    name = f"{AT}mlp.up_proj.weight"

    def change(held):
        held[name] = held[name].to(torch.float64)
        held[name][3, 5] = -value

    folder = make({**tc.LLAMA, "torch_dtype": "float32"}, change, dtype="F32")
    with pytest.raises(UserError, match=rf"{name}: .* is too large for {kind}"):
        convert_checkpoint(folder, tmp_path / "out.gguf", weight_type=kind)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_infinities_are_reported(make, tmp_path, kind):
    def change(held):
        held[f"{AT}mlp.up_proj.weight"][3, 5] = -float("inf")
        held[f"{AT}mlp.up_proj.weight"][4, 5] = float("nan")

    notes = convert_checkpoint(make(tc.LLAMA, change), tmp_path / "out.gguf", weight_type=kind)
    assert [note for note in notes if "contains" in note] == [
        f"{AT}mlp.up_proj.weight: contains NaNs; the model will generate noise",
        f"{AT}mlp.up_proj.weight: contains infinities; the model will generate noise",
    ]


# --- quantised checkpoints


def test_a_quantization_config_left_beside_floats(make, tmp_path):
    folder = make({**tc.LLAMA, "quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}})
    assert read_source(folder).notes == (
        "quantization_config (bitsandbytes): ignored, as the weights are not quantised",
    )


def test_weights_that_another_program_has_packed(make):
    def pack(held):
        held[f"{AT}mlp.up_proj.qweight"] = torch.zeros(8, 96, dtype=torch.int32)

    refused(
        make({**tc.LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, pack),
        "quantization_config: .*gptq.*, expected none, or 8-bit weights with scales",
    )


FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [32, 48]}
CHANNEL = {
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel", "type": "float"}}},
    "format": "float-quantized",
    "quant_method": "compressed-tensors",
}


def eight_bits(ending, shape_of, dtype=torch.float8_e4m3fn):
    """Store layer 0's matrices in 8 bits, with scales of a shape that depends on theirs."""

    def change(held):
        for name in [name for name in held if name.startswith(AT) and held[name].dim() == 2]:
            rows, columns = held[name].shape
            held[name] = (100 * held[name].to(torch.float32)).to(dtype)
            scale = torch.arange(1, 1 + int(np.prod(shape_of(rows, columns))), dtype=torch.float32) / 128
            held[name + ending] = scale.reshape(shape_of(rows, columns))
            held[name.replace("weight", "input_scale")] = torch.ones(1)

    return change


@pytest.mark.parametrize(
    ("given", "ending", "shape_of", "dtype"),
    [
        (FP8, "_scale_inv", lambda rows, columns: (-(-rows // 32), -(-columns // 48)), torch.float8_e4m3fn),
        (CHANNEL, "_scale", lambda rows, columns: (rows, 1), torch.float8_e4m3fn),
        (CHANNEL, "_scale", lambda rows, columns: (rows, 1), torch.int8),
        ({"quant_method": "modelopt"}, "_scale", lambda rows, columns: (), torch.float8_e5m2),
    ],
)
def test_8_bit_weights_are_dequantised(make, tmp_path, given, ending, shape_of, dtype):
    folder = make({**tc.LLAMA, "quantization_config": given}, eight_bits(ending, shape_of, dtype))
    convert_checkpoint(folder, tmp_path / "out.gguf", weight_type="f32")
    held = load_file(folder / "model.safetensors")
    name = f"{AT}mlp.down_proj.weight"  # 64 × 96, whose rows are not permuted
    scale = held[name + ending]
    if len(scale.shape) == 2 and scale.shape[1] > 1:
        scale = scale.repeat_interleave(32, 0).repeat_interleave(48, 1)[:64, :96]
    header = read_header(tmp_path / "out.gguf")
    found = np.frombuffer(header.tensor_data(header.tensor("blk.0.ffn_down.weight")), "<f4").reshape(64, 96)
    assert np.array_equal(found, (held[name].float() * scale).numpy())
    assert np.isfinite(logits(tmp_path / "out.gguf")).all()


def test_a_scale_that_is_missing_or_of_the_wrong_shape(make):
    config = {**tc.LLAMA, "quantization_config": FP8}
    refused(make(config, eight_bits("_other", lambda *_: (1,))), "weight: torch.float8_e4m3fn, expected a scale beside")
    refused(
        make(config, eight_bits("_scale_inv", lambda *_: (5, 1))), r"_scale_inv: shape \[5, 1\], expected scales of"
    )
    bad = {**config, "quantization_config": {**FP8, "weight_block_size": [0, 128]}}
    refused(make(bad, eight_bits("_scale_inv", lambda *_: (1, 1))), "weight_block_size: .*, expected two positive")


def test_the_default_type_does_not_depend_on_scales(make):
    folder = make(
        {**tc.LLAMA, "quantization_config": FP8},
        eight_bits("_scale_inv", lambda rows, columns: (-(-rows // 32), -(-columns // 48))),
    )
    checkpoint = with_scales(open_checkpoint(folder), read_config(folder))
    assert not [name for name in checkpoint.tensors if "scale" in name]
    kinds = {tensor.type for tensor in read_source(folder).planned if len(tensor.shape) > 1}
    assert kinds == {GGMLQuantizationType.BF16}


# --- settings that llama.cpp does not read

WINDOW = {"sliding_window": 8, "use_sliding_window": True}
NOTE = "sliding_window 8: llama.cpp lets every token attend to all before it"


@pytest.mark.parametrize(
    ("config", "more", "notes"),
    [
        (tc.QWEN2, {**WINDOW, "max_window_layers": 0}, (NOTE,)),
        (tc.QWEN2, {**WINDOW, "max_window_layers": 2}, ()),
        (tc.QWEN3, {**WINDOW, "layer_types": ["full_attention", "sliding_attention"]}, (NOTE,)),
        (tc.QWEN3, {**WINDOW, "layer_types": ["full_attention"] * 2}, ()),
        (tc.QWEN3, {**WINDOW, "use_sliding_window": False, "max_window_layers": 0}, ()),
        (MISTRAL, {"sliding_window": 8}, (NOTE,)),
        (tc.GEMMA3, {"sliding_window_pattern": 6}, ()),
        (
            tc.GEMMA3,
            {"sliding_window_pattern": 3},
            ("sliding_window_pattern: llama.cpp gives full attention to one layer in 6",),
        ),
        (
            tc.GEMMA3,
            {"layer_types": ["full_attention"] * 6},
            ("layer_types: llama.cpp gives full attention to one layer in 6",),
        ),
        (tc.GEMMA3, {"use_bidirectional_attention": True}, ("use_bidirectional_attention: llama.cpp lets",)),
        (tc.GEMMA3, {"attn_logit_softcapping": 30.0}, ("attn_logit_softcapping: llama.cpp does not",)),
        (tc.GEMMA2, {"tie_word_embeddings": False}, ("tie_word_embeddings false: llama.cpp uses the embedding",)),
        (tc.PHI3, {"sliding_window": 8}, (NOTE,)),
    ],
)
def test_settings_that_are_not_read(make, config, more, notes):
    case = {"added": tc.PHI3_TOKENS} if config is tc.PHI3 else {}
    found = [note for note in read_source(make({**config, **more}, **case)).notes if not note.startswith("tokeniser")]
    assert len(found) == len(notes)
    assert all(note.startswith(expected) for note, expected in zip(found, notes, strict=True))


@pytest.mark.parametrize("given", [False, True, None])
def test_experts_whose_weights_are_not_normalised(tmp_path, given):
    raw = Config(tmp_path / "config.json", {**tc.QWEN3_MOE, "norm_topk_prob": given})
    note = "norm_topk_prob false: llama.cpp makes the weights of a token's experts sum to 1"
    assert architecture_of(raw).unread(raw) == (() if given else (note,))


# --- hostile text


@pytest.mark.parametrize(("kind", "value"), [(STRING, "x/\ud83d"), (F32, 1e39), (U32, 10**400), (U32, -1)])
def test_what_gguf_cannot_hold(kind, value):
    with pytest.raises(UserError, match=r"^folder: general.name: .*, which GGUF cannot hold") as error:
        encoded(Value("general.name", kind, value), "folder")
    assert "\n" not in str(error.value)


def test_a_template_with_half_a_surrogate_is_not_a_traceback(make, tmp_path):
    folder = make(tc.LLAMA)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    text = (folder / "tokenizer_config.json").read_text().replace("{", '{"chat_template": "\\ud83d",', 1)
    (folder / "tokenizer_config.json").write_text(text)
    try:
        convert_checkpoint(folder, tmp_path / "out.gguf")
    except UserError as error:
        assert "chat_template" in str(error)


def test_no_temporary_path_is_in_a_message(make, tmp_path):
    folder = make(tc.LLAMA)

    def choose(header):
        raise UserError(f"{header.path}: no")

    with pytest.raises(UserError) as error:
        convert_checkpoint(folder, tmp_path / "out.gguf", choose=choose)
    assert str(error.value) == f"{folder}: no"
