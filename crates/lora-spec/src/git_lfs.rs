//! Pointers of Git LFS, which a clone without `git lfs` has in place of large files.

/// What to do about a pointer, for errors.
pub const GIT_LFS_POINTER: &str =
    "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`, or download it again";

/// Whether a file that begins with these bytes is a pointer of Git LFS (github.com/git-lfs/git-lfs,
/// `docs/spec.md`).
pub fn is_git_lfs_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"version https://git-lfs.github.com/spec/")
}
