//! A base directory with a byte-level tokenizer, and dataset files.

use std::fs;
use std::path::PathBuf;

use lora_data::{DataError, Dataset, Tokenizer};
use lora_spec::DataSpec;
use serde_json::{Map, Value as Json, json};
use tempfile::TempDir;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

pub(crate) const CHATML: &str = "{% for message in messages %}\n\
    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n\
    {%- endfor %}\n\
    {% if add_generation_prompt %}\n\
    {{- '<|im_start|>assistant\\n' }}\n\
    {%- endif %}\n";

pub(crate) const LLAMA3: &str = "{{- bos_token }}\n\
    {%- for message in messages %}\n\
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' \
    + message['content'] | trim + '<|eot_id|>' }}\n\
    {%- endfor %}\n\
    {%- if add_generation_prompt %}\n\
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n\
    {%- endif %}\n";

pub(crate) const SPECIAL: [&str; 7] =
    ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"];

pub(crate) struct BaseDir {
    pub(crate) dir: TempDir,
}

impl BaseDir {
    /// Creates a base whose vocabulary has all bytes and a few merges (` w`, `he`, `hel`), without
    /// a chat template. If `bos` is true, texts start with `<s>`.
    pub(crate) fn new(eos: &str, bos: bool) -> Self {
        let base = Self { dir: tempfile::tempdir().unwrap() };
        base.write("tokenizer.json", &tokenizer_json(bos).to_string());
        base.config(json!({"bos_token": "<s>", "eos_token": eos}));
        base
    }

    pub(crate) fn with_template(eos: &str, template: &str) -> Self {
        let base = Self::new(eos, false);
        base.config(json!({"bos_token": "<s>", "eos_token": eos, "chat_template": template}));
        base
    }

    pub(crate) fn config(&self, config: Json) {
        self.write("tokenizer_config.json", &config.to_string());
    }

    pub(crate) fn write(&self, name: &str, contents: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        path
    }

    pub(crate) fn tokenizer(&self) -> Tokenizer {
        Tokenizer::load(&self.dir.path().into()).unwrap()
    }

    /// Reads a dataset with these lines.
    pub(crate) fn read(&self, lines: &[Json]) -> Result<Dataset, DataError> {
        let lines: Vec<String> = lines.iter().map(Json::to_string).collect();
        self.read_text(&lines.join("\n"))
    }

    pub(crate) fn read_text(&self, text: &str) -> Result<Dataset, DataError> {
        Dataset::read(&self.write("data.jsonl", text).into(), &self.tokenizer(), &DataSpec::default())
    }

    /// Returns the text of a dataset's only row, with its trained tokens marked.
    pub(crate) fn marked(&self, row: Json) -> String {
        let dataset = self.read(&[row]).unwrap();
        assert_eq!(dataset.rows.len(), 1);
        self.tokenizer().marked_text(dataset.rows.row(0)).unwrap()
    }

    /// Returns the error for these lines, without the directory in its paths.
    pub(crate) fn error(&self, text: &str) -> String {
        self.error_text(self.read_text(text).unwrap_err())
    }

    pub(crate) fn error_text(&self, error: DataError) -> String {
        error.to_string().replace(&format!("{}/", self.dir.path().display()), "")
    }
}

fn tokenizer_json(bos: bool) -> Json {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut pieces: Vec<String> = alphabet.iter().map(char::to_string).collect();
    pieces.extend(["Ġw".into(), "he".into(), "hel".into()]);
    let vocab: Map<String, Json> =
        pieces.iter().enumerate().map(|(id, piece)| (piece.clone(), json!(id))).collect();
    let added: Vec<Json> = SPECIAL
        .iter()
        .enumerate()
        .map(|(i, token)| {
            json!({"id": pieces.len() + i, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let template = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [pieces.len()], "tokens": ["<s>"]}},
    });
    let post_processor = if bos {
        json!({"type": "Sequence", "processors": [byte_level, template]})
    } else {
        byte_level.clone()
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<s>"},
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": post_processor,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": ["Ġ w", "h e", "he l"]},
    })
}
