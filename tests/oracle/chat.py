"""Renders, tokenizes and masks chat templates with Transformers' `apply_chat_template`."""

import json
import shutil
from pathlib import Path

import jinja2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEMPLATES = Path(__file__).resolve().parent / "chat_templates"

CONVERSATIONS = {
    "one-turn": [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
    ],
    "system-and-turns": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And of Germany?"},
        {"role": "assistant", "content": "Berlin."},
    ],
    "question-only": [{"role": "user", "content": "Hello there"}],
    "whitespace-and-unicode": [
        {"role": "user", "content": "  Grüße,\n\n\tmy \"friend\" <b>&amp;</b> 👋🏽  "},
        {"role": "assistant", "content": "\n<think>\nhm\n</think>\n\nÇa va? 日本語 \\n 'quoted' \n"},
    ],
    "extra-keys": [
        {"role": "user", "content": "Which city?", "name": "ann"},
        {"role": "assistant", "content": "", "tags": {"b": [1, 2.5, True, None], "a": "é<"}},
        {"role": "user", "content": "Thanks"},
    ],
    "system-last": [
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Be brief."},
    ],
    "assistant-first": [{"role": "assistant", "content": "Hi"}],
}

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip


def make_all(root: Path) -> None:
    """Writes `tokenizer/`, `tokenizer-v4/` (Transformers 4), `templates/`, `renderings.json`."""
    shutil.rmtree(root, ignore_errors=True)
    tokenizer = train_tokenizer()
    templates = {path.stem: path.read_text() for path in sorted(TEMPLATES.glob("*.jinja"))}

    tokenizer.chat_template = templates["chatml"]
    tokenizer.save_pretrained(root / "tokenizer")
    write_version4(tokenizer, root / "tokenizer-v4")
    shutil.copytree(TEMPLATES, root / "templates")

    renderings = [
        render(tokenizer, name, template, conversation, prompt)
        for name, template in templates.items()
        for conversation in CONVERSATIONS
        for prompt in [False, True]
    ]
    contents = {"conversations": CONVERSATIONS, "renderings": renderings}
    text = json.dumps(contents, indent=1, ensure_ascii=False)
    (root / "renderings.json").write_text(text + "\n", encoding="utf-8")


def render(tokenizer, name: str, template: str, conversation: str, prompt: bool) -> dict:
    """`text`, `tokens`, with generation blocks `assistant_mask`; or the template's `error`."""
    result = {"template": name, "conversation": conversation, "add_generation_prompt": prompt}
    arguments = {"chat_template": template, "add_generation_prompt": prompt}
    messages = CONVERSATIONS[conversation]
    try:
        result["text"] = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except jinja2.exceptions.TemplateError as error:
        return result | {"error": str(error)}
    masked = "{% generation %}" in template
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=masked, **arguments
    )
    result["tokens"] = encoded["input_ids"]
    if masked:
        result["assistant_mask"] = encoded["assistant_masks"]
    return result


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that adds a first token, which a template may have too, to plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [message["content"] for messages in CONVERSATIONS.values() for message in messages]
    tokenizer.train_from_iterator(corpus + ["system user assistant helpful"] * 2, trainer)
    first = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first[0]} $A", pair=f"{first[0]} $A $B", special_tokens=[first]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def write_version4(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes Transformers 4's format: template in `tokenizer_config.json`, token objects."""

    def token(content: str) -> dict:
        return {
            "content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
        }  # fmt: skip

    directory.mkdir()
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    ids = {tokenizer.convert_tokens_to_ids(content): content for content in SPECIAL}
    config = {
        "added_tokens_decoder": {
            str(i): token(content) | {"special": True} for i, content in sorted(ids.items())
        },
        "bos_token": {"__type": "AddedToken", **token("<|begin_of_text|>")},
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 128,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    names = ["bos_token", "eos_token", "pad_token"]
    special = {name: token(tokenizer.special_tokens_map[name]) for name in names}
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")

    loaded = AutoTokenizer.from_pretrained(directory)
    messages = CONVERSATIONS["whitespace-and-unicode"]
    expected = tokenizer.apply_chat_template(messages)["input_ids"]
    assert loaded.apply_chat_template(messages)["input_ids"] == expected
    assert loaded("Hello").input_ids == tokenizer("Hello").input_ids
