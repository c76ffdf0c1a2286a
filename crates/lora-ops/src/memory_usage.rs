//! The memory of a GPU that a process uses.

/// Use of a GPU's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Used by live tensors of this process.
    pub used_bytes: u64,
    /// The largest `used_bytes` since the device was opened or the peaks were reset.
    pub peak_bytes: u64,
    /// Reserved by this process's memory pool: live tensors, and memory that the pool keeps for
    /// later tensors.
    pub reserved_bytes: u64,
    /// The largest `reserved_bytes` since the device was opened or the peaks were reset.
    pub peak_reserved_bytes: u64,
    /// Free when this process had opened the device, which excludes the memory of CUDA and of the
    /// kernels.
    pub free_bytes: u64,
    /// All memory of the device.
    pub total_bytes: u64,
}
