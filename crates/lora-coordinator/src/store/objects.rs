//! Files, stored once by the SHA-256 of their content.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use lora_proto::{DigestBuilder, v1};
use sqlx::SqliteConnection;
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt;
use tokio::task::spawn_blocking;

use super::connections::Writer;
use super::job_row::nanos;
use super::{Store, StoreError, int, io_error, owner};

impl Store {
    /// Which of these files are not in the store. The others are kept as if they had been uploaded now.
    pub(crate) async fn find_missing(
        &self,
        digests: Vec<v1::FileDigest>,
    ) -> Result<Vec<v1::FileDigest>, StoreError> {
        let digests = self.look_up(digests).await?;
        let mut writers = self.writers().await;
        refresh_or_missing(&mut writers.relaxed, digests).await.map_err(|error| self.database_error(error))
    }

    /// Looks in `objects/` for the files of these digests. A file is removed only after its row: if
    /// the row is there at a later time, so is the file that was found.
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

    /// A new file on its way in.
    pub(crate) async fn stage(&self) -> Result<Staged, StoreError> {
        let number = self.0.staged.fetch_add(1, Ordering::Relaxed);
        let path = self.0.staging.join(format!("upload-{number}"));
        let file = File::create_new(&path).await.map_err(io_error(&path))?;
        Ok(Staged { file, path, digest: DigestBuilder::default() })
    }

    /// Takes the staged file in as an input, to be named by a submit.
    pub(crate) async fn commit_input(
        &self,
        digest: &v1::FileDigest,
        staged: Staged,
    ) -> Result<(), StoreError> {
        let (store, digest) = (self.clone(), digest.clone());
        run_to_completion(async move {
            let staged = staged.checked(&digest).await?;
            let mut writers = store.writers().await;
            let failed = |error| store.database_error(error);
            let mut db = writers.lifecycle.begin().await.map_err(failed)?;
            store.move_into_place(&mut db, staged, &digest).await?;
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

    /// Where the file with this SHA-256 lies if it is in the store. `None`: it is none.
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

    /// Removes the files that no job names, those that a client has uploaded or asked for only after `unreferenced`.
    /// Gives their number.
    pub(crate) async fn collect_garbage(&self, unreferenced: Duration) -> Result<usize, StoreError> {
        let store = self.clone();
        let horizon = SystemTime::now().checked_sub(unreferenced).unwrap_or(SystemTime::UNIX_EPOCH);
        run_to_completion(async move {
            let mut writers = store.writers().await;
            let unnamed = forget(&mut writers.lifecycle, nanos(horizon), &store.0.objects).await;
            // Under the same lock: no upload can bring one of these files back before it is
            // removed.
            Ok(store.remove(unnamed.map_err(|error| store.database_error(error))?).await)
        })
        .await
    }

    /// Moves a staged file to its place, durably, and adds its row where it has none.
    pub(super) async fn move_into_place(
        &self,
        db: &mut SqliteConnection,
        staged: Staged,
        digest: &v1::FileDigest,
    ) -> Result<(), StoreError> {
        let path =
            self.object_path(&digest.sha256).ok_or_else(|| StoreError::Damaged("no SHA-256".into()))?;
        // Where the file is there already, it is replaced by its equal.
        fs::rename(&staged.path, &path).await.map_err(io_error(&path))?;
        sync_dir(&self.0.objects).await.map_err(io_error(&self.0.objects))?;
        sqlx::query("INSERT INTO objects (sha256, size) VALUES (?, ?) ON CONFLICT DO NOTHING")
            .bind(&digest.sha256)
            .bind(int(digest.size))
            .execute(db)
            .await
            .map_err(|error| self.database_error(error))?;
        Ok(())
    }

    /// Removes files that have no row, and gives their number. One that cannot be removed is found
    /// again by `remove_unknown_objects`.
    pub(super) async fn remove(&self, objects: Vec<Vec<u8>>) -> usize {
        let mut removed = 0;
        for path in objects.iter().filter_map(|sha256| self.object_path(sha256)) {
            match fs::remove_file(&path).await {
                Ok(()) => removed += 1,
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "could not remove a file that nothing names");
                }
            }
        }
        removed
    }
}

/// A digest, and whether there is a file with its name and size in `objects/`.
#[derive(Debug)]
pub(super) struct LookedUp {
    pub(super) digest: v1::FileDigest,
    pub(super) has_file: bool,
}

/// A file on its way in: removed when this is dropped, unless it has been committed.
#[derive(Debug)]
pub(crate) struct Staged {
    file: File,
    path: PathBuf,
    digest: DigestBuilder,
}

impl Staged {
    /// Appends `bytes`.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.digest.update(bytes);
        self.file.write_all(bytes).await.map_err(io_error(&self.path))
    }

    /// Brings what was written to the disk, and tells what it is.
    pub(crate) async fn finish(&mut self) -> Result<v1::FileDigest, StoreError> {
        // A file of tokio's tells of a failed write only with the next call.
        self.file.flush().await.map_err(io_error(&self.path))?;
        self.file.sync_all().await.map_err(io_error(&self.path))?;
        Ok(self.digest.clone().finish())
    }

    /// The file, if it is on the disk and what it was announced to be.
    pub(super) async fn checked(mut self, digest: &v1::FileDigest) -> Result<Self, StoreError> {
        let found = self.finish().await?;
        match found == *digest {
            true => Ok(self),
            false => Err(StoreError::Damaged(format!(
                "the file has {} bytes and SHA-256 {}, not the announced {} and {}",
                found.size,
                found.hex(),
                digest.size,
                digest.hex()
            ))),
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // It is not there if it was committed; what cannot be removed goes at the next start.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes the rows of objects that no job names and that no client wanted since `horizon`, and gives their SHA-256s.
pub(super) async fn delete_unreferenced(
    db: &mut SqliteConnection,
    horizon: i64,
) -> sqlx::Result<Vec<Vec<u8>>> {
    sqlx::query_scalar(
        "DELETE FROM objects WHERE (wanted IS NULL OR wanted < ?) \
         AND NOT EXISTS (SELECT 1 FROM inputs WHERE inputs.sha256 = objects.sha256) \
         AND NOT EXISTS (SELECT 1 FROM checkpoints WHERE checkpoints.sha256 = objects.sha256) \
         AND NOT EXISTS (SELECT 1 FROM results WHERE results.sha256 = objects.sha256) RETURNING sha256",
    )
    .bind(horizon)
    .fetch_all(db)
    .await
}

/// As `delete_unreferenced`, in a transaction of its own.
async fn forget(writer: &mut Writer, horizon: i64, objects: &Path) -> sqlx::Result<Vec<Vec<u8>>> {
    let mut db = writer.begin().await?;
    let unnamed = delete_unreferenced(&mut db, horizon).await?;
    // A copy from before has rows of files that are about to be removed.
    match unnamed.is_empty() {
        true => db.commit().await?,
        false => owner::commit(db, objects).await?,
    }
    Ok(unnamed)
}

/// Does `work` to its end even if the caller is gone before: a call that is dropped must not leave its file operation to
/// happen after it has let go of the writer, nor a commit that nobody is told of. The task ends by itself; if the process
/// ends first, it leaves what a crash would.
pub(super) async fn run_to_completion<T: Send + 'static>(
    work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::spawn(work).await?
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
