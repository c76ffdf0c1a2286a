//! The user's directory of tokenized datasets, and the progress of tokenizing one.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lora_data::TokenCache;

/// The largest size of all files together.
const MAX_BYTES: u64 = 10 << 30;

/// Returns the directory `loractl/tokens` below `XDG_CACHE_HOME`, or below `.cache` in the home
/// directory. `None` without both.
pub(crate) fn of_user() -> Option<TokenCache> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache_home = set("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    let cache_home = cache_home.or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(TokenCache::new(cache_home.join("loractl/tokens"), MAX_BYTES))
}

/// A bar on stderr with the share of a dataset that is tokenized. It is hidden if stderr is not a
/// terminal.
#[derive(Default)]
pub(crate) struct TokenizingBar(OnceLock<ProgressBar>);

impl TokenizingBar {
    /// The steps of the bar.
    const STEPS: u64 = 1000;

    /// Shows that this share of the dataset is tokenized.
    pub(crate) fn show(&self, name: &Path, done: f64) {
        let bar = self.0.get_or_init(|| {
            let bar = ProgressBar::with_draw_target(Some(Self::STEPS), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:30} {percent} %  {eta} left  {wide_msg}");
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        bar.set_message(format!("tokenizing {}", name.display()));
        bar.set_position((done * Self::STEPS as f64) as u64);
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        if let Some(bar) = self.0.get() {
            bar.finish_and_clear();
        }
    }
}
