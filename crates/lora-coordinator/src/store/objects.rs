//! The stored files. Each content is stored once, under its SHA-256.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use lora_proto::{DigestBuilder, v1};
use sqlx::SqliteConnection;
use tokio::fs::{self, File};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_blocking;

use super::connections::Writer;
use super::job_row::nanos;
use super::unreferenced::delete_unreferenced;
use super::{Store, StoreError, int, io_error, owner};

/// How many bytes of a file are copied at a time.
const COPIED_BYTES: usize = 1 << 18;

impl Store {
    /// Returns the files that are not in the store. The others are kept as if they had been
    /// uploaded now.
    pub(crate) async fn find_missing(
        &self,
        digests: Vec<v1::FileDigest>,
    ) -> Result<Vec<v1::FileDigest>, StoreError> {
        let digests = self.look_up(digests).await?;
        let mut writers = self.writers().await;
        refresh_or_missing(&mut writers.relaxed, digests).await.map_err(|error| self.database_error(error))
    }

    /// Looks for the files of these digests in `objects/`. A file is removed only after its row. So
    /// if the row still exists at a later time, the file that was found exists too.
    pub(super) async fn look_up(&self, digests: Vec<v1::FileDigest>) -> Result<Vec<LookedUp>, StoreError> {
        let store = self.clone();
        let look_up = move |digest: v1::FileDigest| {
            let Some(path) = store.object_path(&digest.sha256) else {
                return Ok(LookedUp { digest, has_file: false });
            };
            let has_file = match std::fs::metadata(&path) {
                Ok(file) => file.len() == digest.size,
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                Err(source) => return Err(StoreError::Io { path, source }),
            };
            Ok(LookedUp { digest, has_file })
        };
        spawn_blocking(move || digests.into_iter().map(look_up).collect()).await?
    }

    /// Creates a staged file. If the caller is cancelled meanwhile, the file is removed.
    pub(crate) async fn stage(&self) -> Result<Staged, StoreError> {
        let number = self.0.staged.fetch_add(1, Ordering::Relaxed);
        let path = self.0.staging.join(format!("upload-{number}"));
        // The owner of the path is made where the file is: a cancelled caller cannot interrupt it.
        let create = move || match std::fs::File::create_new(&path) {
            Ok(file) => Ok((file, StagedPath(path))),
            Err(source) => Err(StoreError::Io { path, source }),
        };
        let (file, path) = spawn_blocking(create).await??;
        Ok(Staged { file: File::from_std(file), path, digest: DigestBuilder::default() })
    }

    /// Commits the staged file as an input, which a submit may name.
    pub(crate) async fn commit_input(&self, staged: StagedFile) -> Result<(), StoreError> {
        let store = self.clone();
        self.run_to_completion(async move {
            let mut writers = store.writers().await;
            let failed = |error| store.database_error(error);
            let mut db = writers.lifecycle.begin().await.map_err(failed)?;
            let digest = store.move_into_place(&mut db, staged).await?;
            sqlx::query("UPDATE objects SET wanted = ? WHERE sha256 = ?")
                .bind(nanos(SystemTime::now()))
                .bind(&digest.sha256)
                .execute(&mut *db)
                .await
                .map_err(failed)?;
            owner::commit(db, &store.0.objects).await.map_err(failed)
        })
        .await
    }

    /// Stores a copy of the file at `path` as an input.
    pub(crate) async fn add_file(&self, path: &Path) -> Result<v1::FileDigest, StoreError> {
        let mut file = File::open(path).await.map_err(io_error(path))?;
        let mut staged = self.stage().await?;
        let mut block = vec![0; COPIED_BYTES];
        loop {
            match file.read(&mut block).await.map_err(io_error(path))? {
                0 => break,
                read => staged.write(&block[..read]).await?,
            }
        }
        let staged = staged.finish().await?;
        let digest = staged.digest.clone();
        self.commit_input(staged).await?;
        Ok(digest)
    }

    /// The path of the stored file with this SHA-256, whether it exists or not. `None` if `sha256`
    /// does not have 32 bytes.
    pub(crate) fn object_path(&self, sha256: &[u8]) -> Option<PathBuf> {
        (sha256.len() == 32).then(|| self.0.objects.join(hex::encode(sha256)))
    }

    /// The digest of the stored file with this SHA-256.
    pub(crate) async fn object_digest(&self, sha256: &[u8]) -> Result<Option<v1::FileDigest>, StoreError> {
        let size = sqlx::query_scalar("SELECT size FROM objects WHERE sha256 = ?")
            .bind(sha256)
            .fetch_optional(self.readers())
            .await
            .map_err(|error| self.database_error(error))?;
        Ok(size.map(|size| v1::FileDigest { size, sha256: sha256.to_vec() }))
    }

    /// Removes files that no job names. Files that a client uploaded or asked for are kept until
    /// `unreferenced` has passed since then. Returns the number of removed files.
    pub(crate) async fn collect_garbage(&self, unreferenced: Duration) -> Result<usize, StoreError> {
        let store = self.clone();
        let horizon = SystemTime::now().checked_sub(unreferenced).unwrap_or(SystemTime::UNIX_EPOCH);
        self.run_to_completion(async move {
            let mut writers = store.writers().await;
            let unreferenced_objects =
                collect_unreferenced(&mut writers.lifecycle, nanos(horizon), &store.0.objects).await;
            // Under the same lock: no upload can bring one of these files back before it is
            // removed.
            Ok(store.remove(unreferenced_objects.map_err(|error| store.database_error(error))?).await)
        })
        .await
    }

    /// Runs `work` to completion, even if the caller is dropped: a dropped call must not leave a
    /// file operation that happens after the writer's lock is released, nor a commit that wakes no
    /// watcher. [`Store::end_work`] waits for it. If the process ends first, the result is the same
    /// as after a crash.
    pub(super) async fn run_to_completion<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.0.work.spawn(work).await?
    }

    /// Moves a staged file to `objects/`, durably, and adds its row if the row does not exist.
    /// Returns the digest of the file.
    pub(super) async fn move_into_place(
        &self,
        db: &mut SqliteConnection,
        staged: StagedFile,
    ) -> Result<v1::FileDigest, StoreError> {
        let StagedFile { path: from, digest } = staged;
        let path =
            self.object_path(&digest.sha256).ok_or_else(|| StoreError::Invalid("not a SHA-256".into()))?;
        // A file that exists already is replaced by an equal one.
        fs::rename(&from.0, &path).await.map_err(io_error(&path))?;
        sync_dir(&self.0.objects).await.map_err(io_error(&self.0.objects))?;
        sqlx::query("INSERT INTO objects (sha256, size) VALUES (?, ?) ON CONFLICT DO NOTHING")
            .bind(&digest.sha256)
            .bind(int(digest.size))
            .execute(db)
            .await
            .map_err(|error| self.database_error(error))?;
        Ok(digest)
    }

    /// Removes files that have no row, and returns the number of removed files. A file that cannot
    /// be removed is found again by `remove_unknown_objects`.
    pub(super) async fn remove(&self, objects: Vec<Vec<u8>>) -> usize {
        let mut removed = 0;
        for path in objects.iter().filter_map(|sha256| self.object_path(sha256)) {
            match fs::remove_file(&path).await {
                Ok(()) => removed += 1,
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot remove an unreferenced file");
                }
            }
        }
        removed
    }
}

/// A digest, and whether `objects/` has a file with its name and size.
#[derive(Debug)]
pub(super) struct LookedUp {
    pub(super) digest: v1::FileDigest,
    pub(super) has_file: bool,
}

/// A file in `staging/` that is being written.
#[derive(Debug)]
pub(crate) struct Staged {
    file: File,
    path: StagedPath,
    digest: DigestBuilder,
}

/// A file in `staging/` that is complete and on disk.
#[derive(Debug)]
pub(crate) struct StagedFile {
    path: StagedPath,
    pub(crate) digest: v1::FileDigest,
}

/// The path of a file in `staging/`. The file is removed on drop, unless it was moved away.
#[derive(Debug)]
struct StagedPath(PathBuf);

impl Staged {
    /// Appends `bytes`.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.digest.update(bytes);
        self.file.write_all(bytes).await.map_err(io_error(&self.path.0))
    }

    /// Flushes the file to disk.
    pub(crate) async fn finish(mut self) -> Result<StagedFile, StoreError> {
        // A tokio file reports a failed write only at the next call.
        self.file.flush().await.map_err(io_error(&self.path.0))?;
        self.file.sync_all().await.map_err(io_error(&self.path.0))?;
        Ok(StagedFile { path: self.path, digest: self.digest.finish() })
    }
}

impl Drop for StagedPath {
    fn drop(&mut self) {
        // A committed file is no longer here. A file that cannot be removed is removed at the next
        // start.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Runs [`delete_unreferenced`] in its own transaction.
async fn collect_unreferenced(
    writer: &mut Writer,
    horizon: i64,
    objects: &Path,
) -> sqlx::Result<Vec<Vec<u8>>> {
    let mut db = writer.begin().await?;
    let unreferenced_objects = delete_unreferenced(&mut db, horizon).await?;
    // An older copy of the database has rows of files that are about to be removed, so the revision
    // is raised.
    match unreferenced_objects.is_empty() {
        true => db.commit().await?,
        false => owner::commit(db, objects).await?,
    }
    Ok(unreferenced_objects)
}

async fn refresh_or_missing(
    writer: &mut Writer,
    digests: Vec<LookedUp>,
) -> sqlx::Result<Vec<v1::FileDigest>> {
    let now = nanos(SystemTime::now());
    let mut db = writer.begin().await?;
    let mut missing = Vec::new();
    for LookedUp { digest, has_file } in digests {
        if !has_file {
            missing.push(digest);
            continue;
        }
        let found = sqlx::query("UPDATE objects SET wanted = ? WHERE sha256 = ? AND size = ?")
            .bind(now)
            .bind(&digest.sha256)
            .bind(int(digest.size))
            .execute(&mut *db)
            .await?;
        if found.rows_affected() == 0 {
            missing.push(digest);
        }
    }
    db.commit().await?;
    Ok(missing)
}

async fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir).await?.sync_all().await
}
