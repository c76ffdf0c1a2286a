//! Checks of the daemons' settings and of job-file keys in all documents.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use lora_daemon::config::{known_keys, load_from};
use lora_spec::JobSpec;
use serde_json::{Value, json};

use crate::markdown::{CodeBlock, Document};
use crate::shell;

/// A placeholder for any variable.
const EXAMPLE: &str = "LORA__SECTION__KEY";
/// Keys of loractl's configuration file.
const USER_KEYS: [&str; 1] = ["coordinator"];
/// Suffixes by which names of settings are recognized.
const ENDINGS: [&str; 4] = ["_dir", "_hours", "_roots", "_seconds"];
/// Extensions of files, whose names look like a section with a key.
const FILES: [&str; 6] = ["json", "jsonl", "proto", "py", "rs", "safetensors"];

fn problems(document: &Document) -> Vec<String> {
    let mut problems = Vec::new();
    let prose = document.prose.iter().map(|prose| (prose.line, prose.text.as_str()));
    let blocks = document.blocks.iter().map(|block| (block.line, block.text.as_str()));
    for (line, text) in prose.chain(blocks) {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for variable in words.filter(|word| word.starts_with("LORA__") && *word != EXAMPLE) {
            let key = variable["LORA__".len()..].to_lowercase().replace("__", ".");
            if !daemon_keys().contains(&key) {
                problems.push(document.problem(line, &format!("{variable}: setting {key} does not exist")));
            }
        }
    }
    for code in &document.code {
        let found = check_code(&code.text);
        problems.extend(found.map(|what| document.problem(code.line, &format!("{}: {what}", code.text))));
    }
    for block in &document.blocks {
        problems.extend(check_block(block).into_iter().map(|what| document.problem(block.line, &what)));
    }
    problems
}

/// The problem of a key, of a setting with its value, or of a `--set`.
fn check_code(code: &str) -> Option<String> {
    if let Some(set) = code.strip_prefix("--set ") {
        return check_set(set);
    }
    let (name, value) = match code.find([':', '=']) {
        Some(at) => (code[..at].trim_end(), Some((&code[at..=at], code[at + 1..].trim()))),
        None => (code, None),
    };
    if !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '.') {
        return None;
    }
    match name.split_once('.') {
        Some((section, key)) => {
            let is_other = FILES.contains(&key) || key.contains('.') || !sections().contains(section);
            if is_other {
                return None;
            }
            match value {
                Some((":", value)) if job_keys().contains(name) => check_job_value(name, value),
                Some(("=", value)) if daemon_keys().contains(name) => {
                    check_set(&format!("{name}={}", value.trim_matches('"')))
                }
                _ if daemon_keys().contains(name) || job_keys().contains(name) => None,
                _ => Some(format!("key {name} does not exist")),
            }
        }
        None => {
            let has_ending = ENDINGS.iter().any(|ending| name.ends_with(ending));
            // TOML has spaces around `=`; keyword arguments in Python have none.
            let is_assigned = code.contains(" = \"");
            let is_known = daemon_keys().iter().any(|key| key.rsplit('.').next() == Some(name))
                || USER_KEYS.contains(&name);
            ((has_ending || is_assigned) && !is_known).then(|| format!("setting {name} does not exist"))
        }
    }
}

/// The problems of the settings in a block.
fn check_block(block: &CodeBlock) -> Vec<String> {
    match block.language.as_str() {
        "sh" => {
            let commands = shell::commands(&block.text);
            let sets = commands.iter().flat_map(|words| words.windows(2)).filter(|pair| pair[0] == "--set");
            sets.filter_map(|pair| check_set(&pair[1]).map(|what| format!("--set {}: {what}", pair[1])))
                .collect()
        }
        "toml" => match toml::from_str::<toml::Table>(&block.text) {
            Ok(table) => {
                let mut keys = Vec::new();
                leaves("", &table, &mut keys);
                keys.retain(|key| !daemon_keys().contains(key) && !USER_KEYS.contains(&key.as_str()));
                keys.iter().map(|key| format!("setting {key} does not exist")).collect()
            }
            Err(error) => vec![error.to_string()],
        },
        _ => Vec::new(),
    }
}

/// The errors of both daemons for `key=value`, or `None` if one of them accepts it.
fn check_set(set: &str) -> Option<String> {
    let sets = [set.to_owned()];
    let coordinator = load_from(None, std::iter::empty(), &sets, lora_coordinator::Config::check);
    let worker = load_from(None, std::iter::empty(), &sets, lora_worker::Config::check);
    match (coordinator, worker) {
        (Ok(_), _) | (_, Ok(_)) => None,
        (Err(coordinator), Err(worker)) => Some(format!("{coordinator}; {worker}")),
    }
}

/// The error for a value of a job-file key.
fn check_job_value(key: &str, value: &str) -> Option<String> {
    if value == "…" {
        return None;
    }
    let value: Value = serde_saphyr::from_str(value).unwrap();
    let (section, name) = key.split_once('.').unwrap();
    serde_json::from_value::<JobSpec>(json!({section: {name: value}})).err().map(|error| error.to_string())
}

fn leaves(prefix: &str, table: &toml::Table, keys: &mut Vec<String>) {
    for (name, value) in table {
        match value {
            toml::Value::Table(section) => leaves(&format!("{prefix}{name}."), section, keys),
            _ => keys.push(format!("{prefix}{name}")),
        }
    }
}

fn daemon_keys() -> &'static BTreeSet<String> {
    static KEYS: OnceLock<BTreeSet<String>> = OnceLock::new();
    KEYS.get_or_init(|| {
        let worker = known_keys::<lora_worker::Config>();
        known_keys::<lora_coordinator::Config>().into_iter().chain(worker).collect()
    })
}

fn job_keys() -> &'static BTreeSet<String> {
    static KEYS: OnceLock<BTreeSet<String>> = OnceLock::new();
    KEYS.get_or_init(|| {
        let keys = lora_spec::known_keys().into_iter();
        keys.filter(|(_, is_section)| !is_section).map(|(key, _)| key).collect()
    })
}

fn sections() -> BTreeSet<&'static str> {
    daemon_keys().iter().chain(job_keys()).filter_map(|key| Some(key.split_once('.')?.0)).collect()
}

#[test]
fn every_setting_and_key_exists() {
    crate::expect_none(Document::all().iter().flat_map(problems));
}

#[test]
fn settings_that_do_not_exist_are_found() {
    for (text, expected) in [
        ("Set LORA__GRPC__LISTNE.", "setting grpc.listne does not exist"),
        ("```sh\nexport LORA__WORKERS__LEASE=1\n```", "setting workers.lease does not exist"),
        ("```sh\nlora-worker --set cache.max_byte=1\n```", "cache.max_byte"),
        ("```sh\nlora-worker --set threads=many\n```", "threads"),
        ("`--set adopt_object=true`", "adopt_object"),
        ("`limits.upload_byte`", "key limits.upload_byte does not exist"),
        ("`training.learning_rat`", "key training.learning_rat does not exist"),
        ("`model.quantization: nf5`", "unknown variant `nf5`"),
        ("`log.format = \"xml\"`", "log.format"),
        ("`collectiv = \"tcp\"`", "setting collectiv does not exist"),
        ("`drain_seconds`", "setting drain_seconds does not exist"),
        ("```toml\n[peer]\nlisten = \"\"\nport = 1\n```", "setting peer.port does not exist"),
    ] {
        crate::expect_problem(problems, text, expected);
    }
    let sound = "`model.safetensors` `data.train` `model.quantization: nf4` `collective = \"tcp\"` \
                 `cache_dir` LORA__PEER__LISTEN";
    crate::expect_sound(problems, sound);
}
