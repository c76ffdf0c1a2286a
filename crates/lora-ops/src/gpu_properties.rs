//! The properties of a GPU.

/// Properties of a GPU, as the driver reports them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuProperties {
    /// The number `N` in `cuda:N`.
    pub ordinal: usize,
    /// The unique identifier, in hex.
    pub uuid: String,
    /// The name of the model.
    pub name: String,
    /// Major and minor number.
    pub compute_capability: (i32, i32),
    /// Memory that no process uses, in bytes.
    pub free_bytes: u64,
    /// All of its memory, in bytes.
    pub total_bytes: u64,
}
