//! Eviction from the cache: the least recently used entries that are not in use.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tracing::{info, warn};

use super::dir_lock::lock_dir;

/// The age after which an interrupted fetch is abandoned.
const STALE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// A set, or a file that is being fetched.
struct CacheEntry {
    dir: PathBuf,
    used: SystemTime,
    files: Vec<u64>,
}

/// A file on disk, which may have several hard links.
#[derive(Default)]
struct CachedContent {
    bytes: u64,
    /// The number of entries that contain it.
    entries: usize,
    object: Option<PathBuf>,
}

/// Removes entries of the cache in `root` that are not in use, the least recently used first, until
/// `incoming` more bytes fit in `max_bytes`. Entries that cannot be removed are logged and stay.
pub(super) fn make_room(root: &Path, max_bytes: u64, incoming: u64) {
    let mut contents: HashMap<u64, CachedContent> = HashMap::new();
    for path in entries(&root.join("objects")) {
        if let Ok(meta) = fs::metadata(&path) {
            contents.insert(meta.ino(), CachedContent { bytes: meta.len(), entries: 0, object: Some(path) });
        }
    }
    let mut found = Vec::new();
    for dir in entries(&root.join("sets")).into_iter().chain(entries(&root.join("partial"))) {
        let mut entry = CacheEntry { used: modified(&dir), dir, files: Vec::new() };
        let mut files = Vec::new();
        collect(&entry.dir, &mut files);
        for meta in files {
            let content = contents.entry(meta.ino()).or_default();
            content.bytes = meta.len();
            content.entries += 1;
            entry.used = entry.used.max(meta.modified().unwrap_or(SystemTime::UNIX_EPOCH));
            entry.files.push(meta.ino());
        }
        found.push(entry);
    }
    found.sort_by_key(|entry| entry.used);

    // `lora_data::TokenCache` removes its files itself.
    let tokens: u64 =
        entries(&root.join("tokens")).iter().filter_map(|path| Some(path.metadata().ok()?.len())).sum();
    let mut bytes: u64 = tokens + contents.values().map(|content| content.bytes).sum::<u64>();
    let fits = |bytes: u64| bytes.saturating_add(incoming) <= max_bytes;
    let orphans = contents.values().filter(|content| content.entries == 0);
    for orphan in orphans {
        if fits(bytes) {
            return;
        }
        bytes -= orphan.bytes;
        orphan.object.as_deref().map(remove);
    }
    for entry in found {
        if fits(bytes) {
            return;
        }
        if entry.files.is_empty() || !remove_unused(&entry.dir) {
            continue;
        }
        for file in &entry.files {
            let Some(content) = contents.get_mut(file) else { continue };
            content.entries -= 1;
            if content.entries == 0 {
                bytes -= content.bytes;
                content.object.as_deref().map(remove);
            }
        }
        info!(dir = %entry.dir.display(), bytes, "removed files from the cache");
    }
    if !fits(bytes) {
        warn!(bytes, incoming, max_bytes, "cache exceeds its limit, all entries are in use");
    }
}

/// Removes fetches that were abandoned long ago, and the empty sets that they left.
pub(super) fn remove_stale(root: &Path) {
    let empty = entries(&root.join("sets")).into_iter().filter(|set| entries(set).is_empty());
    for dir in entries(&root.join("partial")).into_iter().chain(empty) {
        if is_stale(&dir) && entries(&dir).iter().all(|file| is_stale(file)) {
            remove_unused(&dir);
        }
    }
}

/// Whether a file or directory was last modified longer ago than [`STALE_AFTER`].
pub(super) fn is_stale(path: &Path) -> bool {
    modified(path).elapsed().is_ok_and(|age| age > STALE_AFTER)
}

/// The entries of a directory. Empty if it cannot be read.
pub(super) fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
        .unwrap_or_default()
}

/// Removes a file.
pub(super) fn remove(path: &Path) {
    log_removal(path, fs::remove_file(path));
}

/// Removes a directory unless another process has a lock on it. Returns whether it is gone.
fn remove_unused(dir: &Path) -> bool {
    match lock_dir(dir, File::try_lock) {
        Ok(Some(_lock)) => log_removal(dir, fs::remove_dir_all(dir)),
        Ok(None) => false,
        Err(error) => log_removal(dir, Err(error)),
    }
}

/// Logs a failed removal. Returns whether the file is gone.
fn log_removal(path: &Path, removal: io::Result<()>) -> bool {
    match removal {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => {
            warn!(path = %path.display(), %error, "cannot remove it from the cache");
            false
        }
    }
}

fn collect(dir: &Path, files: &mut Vec<fs::Metadata>) {
    for path in entries(dir) {
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => collect(&path, files),
            Ok(meta) => files.push(meta),
            // It has just been removed.
            Err(_) => {}
        }
    }
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}
