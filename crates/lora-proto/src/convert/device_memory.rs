//! The memory of a worker.

use lora_spec::{DeviceKind, DeviceMemory};

use crate::v1;

impl v1::Hello {
    /// Returns the memory that a job may use on the worker.
    pub fn device_memory(&self) -> DeviceMemory {
        device_memory(self.memory, self.gpu)
    }

    /// Sets the memory that a job may use on the worker.
    pub fn with_device_memory(self, memory: DeviceMemory) -> Self {
        let gpu = memory.kind == DeviceKind::Gpu;
        Self { memory: memory.known_bytes().unwrap_or(0), gpu, ..self }
    }
}

impl v1::Worker {
    /// Returns the memory that a job may use on the worker.
    pub fn device_memory(&self) -> DeviceMemory {
        device_memory(self.memory, self.gpu)
    }
}

/// Converts the fields of a message, in which 0 bytes are an unknown amount.
fn device_memory(bytes: u64, gpu: bool) -> DeviceMemory {
    let kind = if gpu { DeviceKind::Gpu } else { DeviceKind::Cpu };
    DeviceMemory::new(kind, Some(bytes).filter(|bytes| *bytes > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_round_trips_through_a_hello() {
        for kind in [DeviceKind::Cpu, DeviceKind::Gpu] {
            for bytes in [Some(5), None] {
                let memory = DeviceMemory::new(kind, bytes);
                let hello = v1::Hello::default().with_device_memory(memory);
                assert_eq!(hello.memory, bytes.unwrap_or(0));
                assert_eq!(hello.device_memory(), memory);
            }
        }
    }
}
