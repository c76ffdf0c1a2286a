//! The memory of a worker.

/// Kind of a worker's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceKind {
    /// The CPU, with the memory of the machine.
    Cpu,
    /// A GPU, with its own memory.
    Gpu,
}

/// Memory of a worker that a job may use. A memory of more bytes is greater, on any kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceMemory {
    /// Bytes; `u64::MAX` if the amount is unknown.
    pub bytes: u64,
    /// Kind of the device that the memory belongs to.
    pub kind: DeviceKind,
}

impl DeviceMemory {
    /// Creates a memory of `bytes`; `None`: the amount is unknown, and no job is too large.
    pub fn new(kind: DeviceKind, bytes: Option<u64>) -> Self {
        Self { bytes: bytes.unwrap_or(u64::MAX), kind }
    }

    /// Returns the bytes if the amount is known.
    pub fn known_bytes(self) -> Option<u64> {
        Some(self.bytes).filter(|bytes| *bytes < u64::MAX)
    }
}
