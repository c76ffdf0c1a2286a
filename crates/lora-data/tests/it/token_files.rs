//! Files of tokens: each dataset is tokenized once, and again when its tokens would be others.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use lora_data::{Dataset, TokenCache, TokenFiles, TokenRows, Tokenizer};
use lora_spec::{DataSpec, LongRows, SourceDir};
use serde_json::json;

use crate::base_dir::{BaseDir, CHATML, LLAMA3};

const ROWS: &str = concat!(
    r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]}"#,
    "\n\n",
    r#"{"text": "a b", "id": 7}"#,
    "\n",
    r#"{"prompt": "p", "completion": " c", "id": 8}"#,
    "\n"
);

struct Fixture {
    base: BaseDir,
    data: PathBuf,
    dir: tempfile::TempDir,
    /// How often rows were tokenized.
    tokenized: AtomicUsize,
}

impl Fixture {
    fn new() -> Self {
        let base = BaseDir::with_template("</s>", CHATML);
        let data = base.write("data.jsonl", ROWS);
        Self { base, data, dir: tempfile::tempdir().unwrap(), tokenized: AtomicUsize::new(0) }
    }

    fn cache(&self) -> TokenCache {
        TokenCache::new(self.dir.path().join("tokens"), 1 << 20)
    }

    fn read_with(&self, tokenizer: &Tokenizer, data: &DataSpec, cache: &TokenCache) -> Dataset {
        let progress = |name: &Path, done: f64| {
            assert!(name == self.data && (0.0..=1.0).contains(&done));
            // 0 is shown while another process may tokenize the rows.
            self.tokenized.fetch_add(usize::from(done > 0.0), Ordering::Relaxed);
        };
        let files = TokenFiles { cache: Some(cache), progress: Some(&progress), ..TokenFiles::default() };
        Dataset::read_with(&self.data.as_path().into(), tokenizer, data, files).unwrap()
    }

    fn read(&self, data: &DataSpec) -> Dataset {
        self.read_with(&self.base.tokenizer(), data, &self.cache())
    }

    /// Whether reading with these settings tokenizes the rows.
    fn tokenizes(&self, data: &DataSpec) -> bool {
        let before = self.tokenized.load(Ordering::Relaxed);
        self.read(data);
        self.tokenized.load(Ordering::Relaxed) > before
    }

    fn token_files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.path().join("tokens")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

/// What the rows are without a cache.
fn direct(fixture: &Fixture, data: &DataSpec) -> Dataset {
    Dataset::read(&fixture.data.as_path().into(), &fixture.base.tokenizer(), data).unwrap()
}

fn assert_same(read: &Dataset, expected: &Dataset) {
    assert_eq!((&read.rows, &read.sha256), (&expected.rows, &expected.sha256));
    assert_eq!(read.report, expected.report);
}

#[test]
fn a_dataset_is_tokenized_once() {
    let fixture = Fixture::new();
    let data = DataSpec::default();
    let first = fixture.read(&data);
    assert_same(&first, &direct(&fixture, &data));
    assert_eq!((first.report.rows_read, first.report.ignored_keys["id"]), (3, 2));
    assert!(!fixture.tokenizes(&data));
    let second = fixture.read(&data);
    assert_same(&second, &first);
    assert_eq!(second.token_files, first.token_files);
    assert_eq!(
        fixture.token_files(),
        [first.token_files[0].clone().path()],
        "no lock or temporary file is left"
    );
}

#[test]
fn lengths_and_order_need_no_new_tokens() {
    let fixture = Fixture::new();
    fixture.read(&DataSpec::default());
    let base = DataSpec { max_length: 70, ..DataSpec::default() };
    for data in [
        DataSpec { long_rows: LongRows::Drop, ..base.clone() },
        DataSpec { long_rows: LongRows::Truncate, packing: true, ..base.clone() },
        DataSpec { max_length: 1000, shuffle: false, train: "other".into(), ..base },
    ] {
        assert!(!fixture.tokenizes(&data), "{data:?}");
        assert_same(&fixture.read(&data), &direct(&fixture, &data));
    }
}

#[test]
fn what_changes_the_tokens_tokenizes_again() {
    let fixture = Fixture::new();
    let data = DataSpec::default();
    fixture.read(&data);
    let settings = [
        DataSpec { completion_only_loss: false, ..data.clone() },
        DataSpec { system_prompt: Some("s".into()), ..data.clone() },
        DataSpec { chat_template: Some(LLAMA3.into()), ..data.clone() },
        DataSpec { split_turns: true, ..data.clone() },
        DataSpec { columns: [("text".to_owned(), "id".to_owned())].into(), ..data.clone() },
        DataSpec {
            chat_template_kwargs: json!({"enable_thinking": true}).as_object().unwrap().clone(),
            ..data.clone()
        },
    ];
    for changed in settings {
        // Not every setting suits the rows.
        let read = |cache: &TokenCache| {
            let tokenizer = Tokenizer::for_job(&fixture.base.dir.path().into(), &changed).unwrap();
            let files = TokenFiles { cache: Some(cache), ..TokenFiles::default() };
            Dataset::read_with(&fixture.data.as_path().into(), &tokenizer, &changed, files)
        };
        let (before, read) = (fixture.token_files().len(), read(&fixture.cache()));
        assert!(read.is_err() || fixture.token_files().len() == before + 1, "{changed:?}");
    }
    fixture.base.write("data.jsonl", &format!("{ROWS}\n"));
    assert!(fixture.tokenizes(&data), "the dataset has other bytes");
    assert!(!fixture.tokenizes(&data));
    fixture.base.config(json!({"eos_token": "</s>", "chat_template": LLAMA3}));
    assert!(fixture.tokenizes(&data), "the base has another template");
    assert!(!fixture.tokenizes(&data));
}

#[test]
fn a_damaged_file_is_made_again() {
    let fixture = Fixture::new();
    let data = DataSpec::default();
    let expected = direct(&fixture, &data);
    let path = fixture.read(&data).token_files[0].clone().path().to_owned();
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert_same(&fixture.read(&data), &expected);
        assert_eq!(fs::read(&path).unwrap(), whole, "of {length} bytes");
    }
    // Headers that ask for other memory than the file has.
    for length in [u64::MAX, 1 << 40, 1 << 24, 0] {
        let mut damaged = whole.clone();
        damaged[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(&path, damaged).unwrap();
        assert_same(&fixture.read(&data), &expected);
    }
    for at in 8..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(&path, damaged).unwrap();
        assert_same(&fixture.read(&data), &expected);
    }
    OpenOptions::new().append(true).open(&path).unwrap().set_len(whole.len() as u64 + 1).unwrap();
    assert_same(&fixture.read(&data), &expected);
}

#[test]
fn the_least_recently_used_files_are_removed() {
    let fixture = Fixture::new();
    let tokenizer = fixture.base.tokenizer();
    let of = |prompt: &str| DataSpec { system_prompt: Some(prompt.into()), ..DataSpec::default() };
    let first = fixture.read(&of("a")).token_files[0].clone();
    let bytes = first.path().metadata().unwrap().len();
    let second = fixture.read(&of("b")).token_files[0].clone();
    // The first one is used again.
    assert!(!fixture.tokenizes(&of("a")));
    let small = TokenCache::new(fixture.dir.path().join("tokens"), 2 * bytes + bytes / 2);
    fixture.read_with(&tokenizer, &of("c"), &small);
    assert!(first.path().exists() && !second.path().exists());
    // The newest file stays, even if it is too large by itself.
    let none = TokenCache::new(fixture.dir.path().join("tokens"), 0);
    let newest = fixture.read_with(&tokenizer, &of("d"), &none).token_files[0].clone();
    assert_eq!(fixture.token_files(), [newest.path()]);
}

#[test]
fn what_killed_processes_left_is_removed_after_a_day() {
    let fixture = Fixture::new();
    let dir = fixture.dir.path().join("tokens");
    fs::create_dir(&dir).unwrap();
    let left = ["old", "new"].map(|name| dir.join(name));
    for (path, hours) in left.iter().zip([25, 1]) {
        let file = fs::File::create(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
    }
    fixture.read(&DataSpec::default());
    assert_eq!(left.map(|path| path.exists()), [false, true]);
}

#[test]
fn rows_are_read_without_a_directory_for_tokens() {
    let fixture = Fixture::new();
    let data = DataSpec::default();
    let cache = TokenCache::new(fixture.data.join("not-a-directory"), 1 << 20);
    let read = fixture.read_with(&fixture.base.tokenizer(), &data, &cache);
    assert_same(&read, &direct(&fixture, &data));
    assert!(read.token_files.is_empty());
    let problem = &read.cache_problems[0];
    assert!(problem.starts_with("the tokens of ") && problem.contains("are not kept in "), "{problem}");
}

#[test]
fn given_files_come_first() {
    let fixture = Fixture::new();
    let (data, tokenizer) = (DataSpec::default(), fixture.base.tokenizer());
    let made = fixture.read(&data).token_files[0].clone();
    let given = SourceDir::new("given", made.path().parent().unwrap());
    let progress = |_: &Path, _: f64| panic!("the rows are tokenized");
    let files = TokenFiles { given: Some(&given), progress: Some(&progress), ..TokenFiles::default() };
    let read = Dataset::read_with(&fixture.data.as_path().into(), &tokenizer, &data, files).unwrap();
    assert_same(&read, &direct(&fixture, &data));
    let name = made.path().file_name().unwrap();
    assert_eq!(read.token_files[0].clone().name(), Path::new("given").join(name));
    // A file under the name of another key does not count.
    let other = DataSpec { system_prompt: Some("s".into()), ..data };
    let wanted = fixture.read(&other).token_files[0].clone();
    fs::copy(made.path(), wanted.path()).unwrap();
    let files = TokenFiles { given: Some(&given), ..TokenFiles::default() };
    let read = Dataset::read_with(&fixture.data.as_path().into(), &tokenizer, &other, files).unwrap();
    assert_same(&read, &direct(&fixture, &other));
    assert!(read.token_files.is_empty());
}

#[test]
fn several_readers_tokenize_once() {
    let fixture = Fixture::new();
    let data = DataSpec::default();
    let rows: Vec<TokenRows> = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4).map(|_| scope.spawn(|| fixture.read(&data).rows)).collect();
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    });
    assert!(rows.iter().all(|read| *read == rows[0]));
    assert_eq!(fixture.tokenized.load(Ordering::Relaxed), 1, "of four readers at the same time");
}
