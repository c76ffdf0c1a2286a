"""The families of bases, with one of the cases in `tests/golden` each. The base of a case has the
name of the case."""

FAMILIES = {
    "Llama": "llama-gqa",
    "Llama 3 (`llama3`)": "llama3-rope",
    "Mistral": "mistral",
    "Ministral 3": "ministral3",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "SmolLM3": "smollm3",
    "OLMo 2": "olmo2",
    "OLMo 3": "olmo3",
    "Granite": "granite",
    "Granite 4": "granite4",
    "Phi-3": "phi3",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3",
    "Gemma 4": "gemma4",
    "Gemma 4 with shared keys": "gemma4-shared",
    "StarCoder2": "starcoder2",
    "Cohere 2": "cohere2",
}
