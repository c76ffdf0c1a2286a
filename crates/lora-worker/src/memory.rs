//! How much memory a worker has for a job.

use lora_train::{ComputeDevice, TrainError, device_memory};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// Memory that a job may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryLimit {
    /// None: nobody knows.
    pub(crate) bytes: Option<u64>,
    /// It is a GPU's.
    pub(crate) gpu: bool,
}

impl MemoryLimit {
    /// What there is of `device`'s, where `setting` is 0: of a GPU what was free when it was opened, else what the machine has.
    pub(crate) fn for_device(device: &ComputeDevice, setting: u64) -> Result<Self, TrainError> {
        let on_gpu = device_memory(device)?;
        let found = match &on_gpu {
            Some(memory) => Some(memory.free_bytes),
            None => machine_memory(),
        };
        let bytes = if setting > 0 { Some(setting) } else { found };
        Ok(Self { bytes, gpu: on_gpu.is_some() })
    }
}

/// Bytes of memory that this machine has for this process: all that is built in, or what its control groups allow. None: the
/// system does not say.
pub fn machine_memory() -> Option<u64> {
    let mut system = System::new().ok()?;
    system.refresh_memory();
    let this = Pid::from_u32(std::process::id());
    system.refresh_processes_specifics(
        ProcessesToUpdate::Some(&[this]),
        false,
        ProcessRefreshKind::nothing().without_tasks(),
    );
    let of_process = system.process(this).and_then(|process| process.cgroup_limits());
    let limits = [of_process, system.cgroup_limits()].into_iter().flatten().map(|limits| limits.total_memory);
    limits.chain([system.total_memory()]).filter(|bytes| *bytes > 0).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_overrides_the_detected_memory() -> Result<(), TrainError> {
        let found = MemoryLimit::for_device(&ComputeDevice::Cpu, 0)?;
        assert_eq!(found, MemoryLimit { bytes: machine_memory(), gpu: false });
        assert!(found.bytes.is_none_or(|bytes| bytes > 64 << 20), "{found:?}");
        assert_eq!(MemoryLimit::for_device(&ComputeDevice::Cpu, 5)?.bytes, Some(5));
        Ok(())
    }
}
