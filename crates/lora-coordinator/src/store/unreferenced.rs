//! Objects that no job names.

use sqlx::SqliteConnection;

/// Removes the rows of objects that no job names and that no client has uploaded or asked for since
/// `horizon`. Returns their SHA-256s.
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
