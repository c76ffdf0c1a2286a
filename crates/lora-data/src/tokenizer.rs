//! The tokenizer and chat template of a base.

use std::borrow::Cow;
use std::collections::BTreeMap;

use lora_spec::{DataSpec, FieldError, SourceDir, SourceFile, file_names};
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use crate::added_tokens;
use crate::chat_template::ChatTemplate;
use crate::content_form::with_printed_contents;
use crate::conversation::{Conversation, WholeConversation, render_conversation, render_whole_conversation};
use crate::tokenizer_files::TokenizerFiles;
use crate::{DataError, Message, TokenRow};

/// The tokenizer and chat template of a base directory.
///
/// As in Transformers, `tokenizer.json` and the added tokens of other files determine the tokens of
/// a text, and truncation and padding settings are turned off.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The chat template, or the reason why the base has none that can be used.
    chat_template: Result<ChatTemplate, String>,
    eos: Option<(String, u32)>,
    stop_tokens: Vec<u32>,
    stop_texts: Vec<String>,
    files: Vec<(String, SourceFile)>,
    /// SHA-256 of the files' contents and the stop tokens, in hex.
    sha256: String,
    bos: Option<u32>,
    special_tokens: BTreeMap<String, String>,
    /// Where the chat template is from.
    template_source: Option<String>,
    /// The job's chat template, which replaces the base's.
    template_of_job: Option<String>,
    /// Number of rows of the base's embedding, if the tokens are checked against it.
    embedding_rows: Option<usize>,
}

/// A conversation, and what its template gets besides.
#[derive(Clone, Copy)]
pub(crate) struct Chat<'a> {
    pub(crate) messages: &'a [Message],
    pub(crate) tools: Option<&'a Json>,
    /// Variables of the template, which precede those of the job.
    pub(crate) variables: &'a Map<String, Json>,
}

/// A token and its byte range in the text.
pub(crate) struct Span {
    pub(crate) token: u32,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` (of Transformers 4 or 5),
    /// `special_tokens_map.json`, `chat_template.jinja`, and the end-of-sequence ids of
    /// `generation_config.json`, otherwise of `config.json`. All files except the first may be
    /// missing.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, or an `eos_token` that is not in the vocabulary. An
    /// invalid chat template is an error only when it is used.
    pub fn load(dir: &SourceDir) -> Result<Self, DataError> {
        let file = dir.file(file_names::TOKENIZER);
        let bytes = file.read().map_err(|source| DataError::read(&file, source))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|err| DataError::file(file.name(), format!("is not a tokenizer: {err}")))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|err| DataError::Tokenize(err.to_string()))?;

        let files = TokenizerFiles::read(dir)?;
        let vocab_size = inner.get_vocab_size(true) as u32;
        added_tokens::add(&mut inner, dir, &files.config, &files.special_tokens_map)?;
        let is_listed = |token: &String| {
            let listed = files.config.get("added_tokens_decoder").and_then(Json::as_object);
            let mut listed = listed.into_iter().flat_map(Map::values);
            listed.any(|listed| listed.get("content").and_then(Json::as_str) == Some(token))
        };
        let eos = match files.special_tokens.get("eos_token") {
            Some(token) => {
                // A name alone would add a token that no text of the base's training has.
                let id = inner.token_to_id(token).filter(|id| *id < vocab_size || is_listed(token));
                let id = id.ok_or_else(|| {
                    DataError::file(
                        file.name(),
                        format!("its vocabulary does not have the eos_token {token:?}"),
                    )
                })?;
                Some((token.clone(), id))
            }
            None => files.eos_token_ids.first().and_then(|&id| Some((inner.id_to_token(id)?, id))),
        };
        let mut stop_tokens: Vec<u32> = Vec::new();
        for id in eos.iter().map(|(_, id)| *id).chain(files.eos_token_ids) {
            if !stop_tokens.contains(&id) {
                stop_tokens.push(id);
            }
        }
        let bos = files.special_tokens.get("bos_token").and_then(|token| inner.token_to_id(token));
        let template_source = files.chat_template.as_ref().map(|(file, _)| file.to_string());
        let chat_template = match files.chat_template {
            Some((file, source)) => ChatTemplate::new(&source, &files.special_tokens)
                .map_err(|err| format!("the chat template in {file} cannot be used: {err}")),
            None => Err(format!(
                "the base in {dir} has no chat template (chat_template.jinja, or chat_template in \
                 tokenizer_config.json)"
            )),
        };
        let sha256 = sha256(&files.present, &stop_tokens)?;
        Ok(Self {
            sha256,
            stop_texts: stop_tokens.iter().filter_map(|&id| inner.id_to_token(id)).collect(),
            inner,
            chat_template,
            eos,
            stop_tokens,
            files: files.present,
            bos,
            special_tokens: files.special_tokens,
            template_source,
            template_of_job: None,
            embedding_rows: None,
        })
    }

    /// Reads the tokenizer of a base, with the chat template of the job and its variables, if it
    /// has some.
    ///
    /// # Errors
    /// Those of [`Self::load`], and an invalid chat template of the job.
    pub fn for_job(dir: &SourceDir, data: &DataSpec) -> Result<Self, DataError> {
        let mut tokenizer = Self::load(dir)?;
        if let Some(template) = &data.chat_template {
            let compiled = ChatTemplate::new(template, &tokenizer.special_tokens);
            let compiled = compiled.map_err(|error| FieldError::new("data.chat_template", error))?;
            tokenizer.chat_template = Ok(compiled);
            tokenizer.template_source = Some("data.chat_template".to_owned());
            tokenizer.template_of_job = Some(template.clone());
        }
        if let Ok(template) = &mut tokenizer.chat_template {
            template.set_variables(&data.chat_template_kwargs);
        }
        Ok(tokenizer)
    }

    /// Returns the names of variables that the chat template does not read. None if there is no
    /// template.
    pub fn unread_variables<'a>(&'a self, variables: &'a Map<String, Json>) -> impl Iterator<Item = &'a str> {
        let template = self.chat_template.iter();
        template
            .flat_map(|template| variables.keys().map(String::as_str).filter(|name| !template.mentions(name)))
    }

    /// Returns where the chat template is from: a file of the base, or `data.chat_template`.
    pub fn template_source(&self) -> Option<&str> {
        self.template_source.as_deref()
    }

    /// Returns the chat template of the job, which replaces the base's file `chat_template.jinja`.
    pub fn template_of_job(&self) -> Option<&str> {
        self.template_of_job.as_deref()
    }

    /// Returns the hash of all that the tokens of a text depend on, in hex.
    pub(crate) fn sha256(&self) -> &str {
        &self.sha256
    }

    pub(crate) fn bos_token(&self) -> Option<u32> {
        self.bos
    }

    /// Returns the tokenizer for a base with `vocab_size` rows in its embedding. A dataset with a
    /// token without such a row is then an error that names the row.
    pub fn with_vocab_size(self, vocab_size: usize) -> Self {
        Self { embedding_rows: Some(vocab_size), ..self }
    }

    /// Checks that the embedding has a row for each token.
    pub(crate) fn check_embedded(&self, row: TokenRow) -> Result<(), String> {
        let Some(rows) = self.embedding_rows else { return Ok(()) };
        match row.tokens().find(|token| *token as usize >= rows) {
            None => Ok(()),
            Some(token) => Err(format!(
                "has token {token} ({:?}), but the base's vocab_size is {rows}; use the tokenizer of this \
                 base, or a base whose embedding has rows for all tokens",
                self.inner.id_to_token(token).unwrap_or_default()
            )),
        }
    }

    /// Returns the token ids of a text. Rendered chats are encoded without `add_special_tokens`,
    /// because the template has written the special tokens.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, DataError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(tokenize_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns the text of token ids.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, DataError> {
        self.inner.decode(ids, skip_special_tokens).map_err(tokenize_error)
    }

    /// Renders a conversation with the base's chat template, like Transformers'
    /// `apply_chat_template(tokenize=False)`. A template that only prints contents that are lists
    /// of parts gets such lists.
    ///
    /// # Errors
    /// [`DataError::ChatTemplate`] if the base has no valid chat template, or if the template
    /// fails.
    pub fn render_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, DataError> {
        let template = self.chat_template()?;
        let messages = with_printed_contents(template, messages, None, add_generation_prompt);
        let rendered = template.render(&messages, None, add_generation_prompt);
        rendered.map(|rendered| rendered.text).map_err(DataError::ChatTemplate)
    }

    /// Returns the tokens that end a generation: `eos_token`, and `eos_token_id` of
    /// `generation_config.json`, otherwise of `config.json`.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Returns the number of tokens in the vocabulary, including added tokens.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Returns the id of a token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns the text and id of the end-of-sequence token.
    pub fn eos_token(&self) -> Option<(&str, u32)> {
        self.eos.as_ref().map(|(token, id)| (token.as_str(), *id))
    }

    /// Returns the tokenizer files that exist, with the names that their copies get beside an
    /// adapter or a merged model. The default template of `additional_chat_templates` gets the name
    /// `chat_template.jinja`, which Transformers takes for the same; the other templates there are
    /// not used in training and have no copies.
    pub fn files(&self) -> &[(String, SourceFile)] {
        &self.files
    }

    /// Decodes a row including special tokens, with each run of trained tokens between ⟦ and ⟧.
    pub fn marked_text(&self, row: TokenRow) -> Result<String, DataError> {
        let tokens: Vec<u32> = row.tokens().collect();
        let trained: Vec<bool> = row.trained().collect();
        let mut marked = String::new();
        let mut before = String::new();
        let mut start = 0;
        for run in trained.chunk_by(|a, b| a == b) {
            let end = start + run.len();
            // The text of a token depends on its neighbours (a leading space, a character in
            // several tokens), so prefixes are decoded and compared.
            let up_to_here = self.decode(&tokens[..end], false)?;
            let text = match up_to_here.strip_prefix(before.as_str()) {
                Some(text) => text.to_owned(),
                None => self.decode(&tokens[start..end], false)?,
            };
            match run[0] {
                true => marked.extend(["⟦", &text, "⟧"]),
                false => marked.push_str(&text),
            }
            before = up_to_here;
            start = end;
        }
        Ok(marked)
    }

    pub(crate) fn encode_spans(&self, text: &str, add_special_tokens: bool) -> Result<Vec<Span>, DataError> {
        let encoding = self.inner.encode(text, add_special_tokens).map_err(tokenize_error)?;
        let spans = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(spans.map(|(&token, &(start, end))| Span { token, start, end }).collect())
    }

    pub(crate) fn conversation(&self, chat: Chat, from: usize) -> Result<Conversation, DataError> {
        let template = self.template_with(chat.variables)?;
        render_conversation(&template, chat.messages, chat.tools, from, &self.stop_texts)
            .map_err(DataError::ChatTemplate)
    }

    pub(crate) fn whole_conversation(&self, chat: Chat, from: usize) -> Result<WholeConversation, DataError> {
        let template = self.template_with(chat.variables)?;
        render_whole_conversation(&template, chat.messages, chat.tools, from).map_err(DataError::ChatTemplate)
    }

    /// The chat template with variables of a row.
    fn template_with(&self, variables: &Map<String, Json>) -> Result<Cow<'_, ChatTemplate>, DataError> {
        let mut template = Cow::Borrowed(self.chat_template()?);
        if !variables.is_empty() {
            template.to_mut().set_variables(variables);
        }
        Ok(template)
    }

    fn chat_template(&self) -> Result<&ChatTemplate, DataError> {
        self.chat_template.as_ref().map_err(|reason| DataError::ChatTemplate(reason.clone()))
    }
}

fn sha256(files: &[(String, SourceFile)], stop_tokens: &[u32]) -> Result<String, DataError> {
    let mut hash = Sha256::new();
    for (name, file) in files {
        let bytes = file.read().map_err(|source| DataError::read(file, source))?;
        hash.update(Sha256::digest(name));
        hash.update(Sha256::digest(bytes));
    }
    stop_tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
    Ok(hex::encode(hash.finalize()))
}

fn tokenize_error(err: tokenizers::Error) -> DataError {
    DataError::Tokenize(err.to_string())
}
