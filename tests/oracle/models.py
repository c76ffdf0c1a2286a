"""Tiny random bases in Hugging Face layout, one per feature of the model families.

The weights are larger than those of a usual initialization: activations and logits are of order 1
to 10 and attention is far from uniform, so that every mistake changes the logits.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM, BitsAndBytesConfig, Cohere2Config, Gemma2Config, Gemma3Config, Gemma3TextConfig,
    Gemma4Config, Gemma4TextConfig, GraniteConfig, GraniteMoeHybridConfig, LlamaConfig, Ministral3Config,
    MistralConfig, Olmo2Config, Olmo3Config, Phi3Config, Qwen2Config, Qwen3Config, SmolLM3Config,
    Starcoder2Config,
)  # fmt: skip

LLAMA_GQA = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip

# head_dim is not hidden_size / heads. With 32 original positions all three branches of the scaling
# are used.
LLAMA3_ROPE = LlamaConfig(
    vocab_size=101, hidden_size=36, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5,
    tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
)  # fmt: skip

LLAMA_LINEAR_ROPE = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False,
    rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
)  # fmt: skip

QWEN2 = Qwen2Config(
    vocab_size=103, hidden_size=30, intermediate_size=52, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

LLAMA_BF16 = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=1, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip

# The window is shorter than the rows of its case. The first block has no window.
QWEN2_WINDOW = Qwen2Config(
    vocab_size=89, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=1, eos_token_id=2,
    use_sliding_window=True, sliding_window=6, max_window_layers=1,
)  # fmt: skip

LLAMA_GEGLU = LlamaConfig(
    vocab_size=83, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
    hidden_act="gelu_pytorch_tanh", rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip

# head_dim is not hidden_size / heads.
QWEN3 = Qwen3Config(
    vocab_size=107, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-6,
    tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip

# With 24 original positions the ramp covers some of the frequencies.
LLAMA_YARN = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=96, rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_parameters={
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 3.0, "beta_slow": 0.5,
        "original_max_position_embeddings": 24,
    },
)  # fmt: skip

# Five of six blocks have a window, and another base of rotary embeddings.
GEMMA3 = Gemma3TextConfig(
    vocab_size=101, hidden_size=36, intermediate_size=44, num_hidden_layers=6, num_attention_heads=3,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-6, sliding_window=6,
    query_pre_attn_scalar=20, bos_token_id=1, eos_token_id=2,
    rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
)  # fmt: skip

# Many scores of attention and logits are near their bounds. The second block has no window. With a
# shorter window some positions of padding would see no key, and eager attention gives NaN for them.
GEMMA2 = Gemma2Config(
    vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-6, sliding_window=18,
    query_pre_attn_scalar=6, attn_logit_softcapping=3.0, final_logit_softcapping=8.0, bos_token_id=1,
    eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip

# The text tower of a model with a vision tower. Its tensors have other names.
GEMMA3_VISION = Gemma3Config(
    text_config=Gemma3TextConfig(
        vocab_size=89, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-6, sliding_window=6,
        query_pre_attn_scalar=8, bos_token_id=1, eos_token_id=2, sliding_window_pattern=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ).to_dict(),
    vision_config={
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
    },
    mm_tokens_per_image=4, image_token_index=88, boi_token_index=87, eoi_token_index=86,
)  # fmt: skip

# The last of three blocks has no window. Its heads are larger, its values are its keys, and a
# quarter of its pairs of features is rotated.
GEMMA4 = Gemma4TextConfig(
    vocab_size=101, hidden_size=36, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, global_head_dim=24, num_global_key_value_heads=1,
    attention_k_eq_v=True, hidden_size_per_layer_input=0, sliding_window=6, final_logit_softcapping=8.0,
    max_position_embeddings=128, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    rope_parameters={
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
)  # fmt: skip

# The last two of five blocks share the keys and values of the second and the third one, and have
# MLPs of twice the width. Each block has an embedding of its own.
GEMMA4_SHARED = Gemma4TextConfig(
    vocab_size=89, hidden_size=28, intermediate_size=20, num_hidden_layers=5, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, global_head_dim=16, num_kv_shared_layers=2, use_double_wide_mlp=True,
    vocab_size_per_layer_input=89, hidden_size_per_layer_input=6, sliding_window=6,
    final_logit_softcapping=8.0, max_position_embeddings=128, rms_norm_eps=1e-2, bos_token_id=1,
    eos_token_id=2,
    layer_types=["sliding_attention", *["sliding_attention", "full_attention"] * 2],
)  # fmt: skip

# The text tower of a model with a vision tower. Its values have projections of their own. The
# tokens of images are outside the vocabulary, because Transformers replaces their embeddings.
GEMMA4_VISION = Gemma4Config(
    text_config=Gemma4TextConfig(
        vocab_size=89, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=16, hidden_size_per_layer_input=0,
        sliding_window=6, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        layer_types=["sliding_attention", "full_attention"],
    ).to_dict(),
    vision_config={
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16,
    },
    boi_token_id=95, image_token_id=96, video_token_id=97, eoi_token_id=98, audio_token_id=94,
)  # fmt: skip

# The window is shorter than the rows of its case.
MISTRAL = MistralConfig(
    vocab_size=97, hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-5, sliding_window=7,
    tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip

# The second block has no rotary embedding.
SMOLLM3 = SmolLM3Config(
    vocab_size=101, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6, no_rope_layer_interval=2,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, pad_token_id=None, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip

OLMO2 = Olmo2Config(
    vocab_size=89, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6, pad_token_id=None,
    eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip

# The last of four blocks has no window, and the other base of rotary embeddings.
OLMO3 = Olmo3Config(
    vocab_size=89, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128, rms_norm_eps=1e-6, pad_token_id=None,
    eos_token_id=2, sliding_window=6,
    rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
)  # fmt: skip

GRANITE = GraniteConfig(
    vocab_size=103, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
    embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.5,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

# Granite 4 without Mamba layers and experts. `intermediate_size` would be the width of the experts.
GRANITE4 = GraniteMoeHybridConfig(
    vocab_size=97, hidden_size=36, intermediate_size=13, shared_intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=128, rms_norm_eps=1e-5,
    tie_word_embeddings=True, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.3,
    logits_scaling=2.5, num_local_experts=0, num_experts_per_tok=0, layer_types=["full_attention"] * 2,
    position_embedding_type="rope", rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    mamba_n_heads=4, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

# The same without positions, and with biases and a head of its own.
GRANITE4_NOPE = GraniteMoeHybridConfig(
    vocab_size=97, hidden_size=32, intermediate_size=13, shared_intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5,
    tie_word_embeddings=False, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.3,
    logits_scaling=2.5, num_local_experts=0, num_experts_per_tok=0, layer_types=["full_attention"] * 2,
    position_embedding_type="nope", attention_bias=True, mamba_n_heads=4, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

# The window is shorter than the rows of its case.
STARCODER2 = Starcoder2Config(
    vocab_size=97, hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, max_position_embeddings=128, norm_epsilon=1e-5, sliding_window=7,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

# The second block has neither a window nor positions.
COHERE2 = Cohere2Config(
    vocab_size=89, hidden_size=36, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
    num_key_value_heads=1, max_position_embeddings=128, layer_norm_eps=1e-5, sliding_window=6,
    logit_scale=0.4, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip

# Rows of more than 24 tokens change the base of the rotary embeddings.
LLAMA_DYNAMIC = LlamaConfig(
    vocab_size=83, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=24, rms_norm_eps=1e-5, tie_word_embeddings=True,
    rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0},
)  # fmt: skip

# The window is shorter than the rows of its case.
PHI3 = Phi3Config(
    vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, max_position_embeddings=128, rms_norm_eps=1e-5, sliding_window=7,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, pad_token_id=0, eos_token_id=2,
)  # fmt: skip

# 12 of 16 features of a head are rotated. Rows of more than 24 tokens take the long divisors.
PHI3_LONGROPE = Phi3Config(
    vocab_size=89, hidden_size=64, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=96, original_max_position_embeddings=24,
    rms_norm_eps=1e-5, tie_word_embeddings=True, pad_token_id=0, eos_token_id=2,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
    },
)  # fmt: skip

# Queries at positions from 16 on are scaled.
MINISTRAL3 = Ministral3Config(
    vocab_size=97, hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-5, pad_token_id=0,
    rope_parameters={
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 4.0, "beta_slow": 0.5,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.3,
    },
)  # fmt: skip

# The sizes of rows are multiples of 64, or not multiples of 16: bitsandbytes 0.50.2 dequantizes
# other rows wrongly on CPUs with AVX-512.
LLAMA_NF4 = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=1, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip

PHI3_NF4 = Phi3Config(
    vocab_size=97, hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=1, max_position_embeddings=128, rms_norm_eps=1e-5, pad_token_id=0, eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip


def make_all(root: Path) -> None:
    """Writes `root/<name>/` for every base. A base must load to the logits of the saved model."""
    save(root / "llama-gqa", LLAMA_GQA, seed=1, version4={"rope_theta": 10000.0, "rope_scaling": None})
    save(
        root / "llama3-rope",
        LLAMA3_ROPE,
        seed=2,
        version4={
            "head_dim": 16,
            "mlp_bias": True,
            "rope_theta": 500.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 32,
                "rope_type": "llama3",
            },
        },
    )
    save(root / "llama-linear-rope", LLAMA_LINEAR_ROPE, seed=3, shards=3)
    save(root / "qwen2", QWEN2, seed=4)
    save(
        root / "qwen2-v4",
        QWEN2,
        seed=4,
        version4={
            "max_window_layers": 1,
            "rope_theta": 1000000.0,
            "sliding_window": 16,
            "use_sliding_window": False,
        },
    )
    save(root / "llama-bf16", LLAMA_BF16, seed=5, dtype=torch.bfloat16)
    save(root / "qwen2-window", QWEN2_WINDOW, seed=6)
    save(root / "llama-geglu", LLAMA_GEGLU, seed=7)
    save(root / "qwen3", QWEN3, seed=11)
    save(root / "mistral", MISTRAL, seed=12)
    save(root / "smollm3", SMOLLM3, seed=13)
    save(root / "olmo2", OLMO2, seed=14)
    save(root / "olmo3", OLMO3, seed=15)
    save(root / "granite", GRANITE, seed=16)
    save(root / "llama-yarn", LLAMA_YARN, seed=17)
    save(root / "gemma3", GEMMA3, seed=18)
    save(root / "llama-dynamic", LLAMA_DYNAMIC, seed=19)
    save(root / "phi3", PHI3, seed=20)
    save(root / "phi3-longrope", PHI3_LONGROPE, seed=21)
    save(root / "ministral3", MINISTRAL3, seed=22)
    save(root / "gemma2", GEMMA2, seed=24)
    save(root / "gemma3-vision", GEMMA3_VISION, seed=23)
    save(root / "granite4", GRANITE4, seed=27)
    save(root / "granite4-nope", GRANITE4_NOPE, seed=28)
    save(root / "gemma4", GEMMA4, seed=29)
    save(root / "gemma4-vision", GEMMA4_VISION, seed=30)
    save(root / "gemma4-shared", GEMMA4_SHARED, seed=35)
    save(root / "starcoder2", STARCODER2, seed=36)
    save(root / "cohere2", COHERE2, seed=37)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    save_quantized(root / "llama-nf4", LLAMA_NF4, 8, torch.bfloat16, **nf4, bnb_4bit_use_double_quant=True)
    save_quantized(root / "qwen2-nf4", QWEN2, 9, torch.float32, **nf4)
    save_quantized(root / "llama-int8", LLAMA_GQA, 10, torch.float32, load_in_8bit=True)
    save_quantized(root / "phi3-nf4", PHI3_NF4, 25, torch.bfloat16, **nf4, bnb_4bit_use_double_quant=True)
    save_quantized(root / "qwen3-int8", QWEN3, 26, torch.float32, load_in_8bit=True)


def save(
    directory: Path,
    config,
    seed: int,
    version4: dict | None = None,
    shards: int = 1,
    dtype=torch.float32,
) -> None:
    """Saves one base. `version4` has the keys to add to a `config.json` of Transformers 4."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomize(model, seed)
    model.config.dtype = dtype

    shutil.rmtree(directory, ignore_errors=True)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=int(size / shards * 1.15) if shards > 1 else "1GB")
    (directory / "generation_config.json").unlink(missing_ok=True)
    assert len(list(directory.glob("*.safetensors"))) == shards, list(directory.iterdir())
    if version4 is not None:
        write_version4_config(directory, model.config, version4)

    tokens = torch.arange(60).reshape(2, 30) % config.get_text_config().vocab_size
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert loaded.dtype == dtype
    with torch.no_grad():
        logits = loaded(tokens).logits
        assert torch.equal(logits, model(tokens).logits), f"{directory.name}: other logits after loading"
    assert 1.0 < logits.float().std() < 10.0, f"{directory.name}: logits of order {logits.float().std()}"


def save_quantized(directory: Path, config, seed: int, dtype: torch.dtype, **quantization) -> None:
    """Saves one base as Transformers does after quantizing the base with bitsandbytes."""
    with tempfile.TemporaryDirectory() as dense:
        save(Path(dense), config, seed, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(
            dense, dtype=dtype, quantization_config=BitsAndBytesConfig(**quantization), device_map="cpu"
        )
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)


def randomize(model, seed: int) -> None:
    """Fills all parameters: linear gains and norms near 1, biases and embeddings far from 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, std):
        return torch.randn(shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            if "vision" in name or "projector" in name:
                parameter.copy_(normal(shape, 0.1))
            elif "norm" in name and name.endswith(".weight"):
                parameter.copy_(0.5 + torch.rand(shape, generator=generator))
            elif name.endswith(".bias"):
                parameter.copy_(normal(shape, 0.4))
            elif "embed_tokens" in name:
                parameter.copy_(normal(shape, 0.5))
            else:
                gain = {"q_proj": 1.25, "k_proj": 1.25, "lm_head": 2.5}.get(name.split(".")[-2], 1.0)
                parameter.copy_(normal(shape, gain / shape[1] ** 0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.5 + torch.rand(1, generator=generator))


def write_version4_config(directory: Path, config, extra: dict) -> None:
    common = [
        "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size",
        "initializer_range", "intermediate_size", "max_position_embeddings", "model_type",
        "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
        "tie_word_embeddings", "use_cache", "vocab_size",
    ]  # fmt: skip
    fields = {key: getattr(config, key) for key in common} | extra
    if config.model_type == "llama":
        fields |= {"attention_bias": config.attention_bias, "pretraining_tp": 1}
    fields |= {"torch_dtype": str(config.dtype).removeprefix("torch."), "transformers_version": "4.46.3"}
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
