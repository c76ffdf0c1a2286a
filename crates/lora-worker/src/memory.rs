//! How much memory of a worker a job may use.

use lora_spec::{DeviceKind, DeviceMemory};
use lora_train::{ComputeDevice, TrainError, memory_usage};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// The memory that a job may use on `device`: `setting` bytes or, if `setting` is 0, the detected
/// memory. That is the memory that was free on the GPU when it was opened, or all of the machine's
/// memory.
pub(crate) fn job_memory(device: &ComputeDevice, setting: u64) -> Result<DeviceMemory, TrainError> {
    let found = match memory_usage(device)? {
        Some(usage) => DeviceMemory::new(DeviceKind::Gpu, Some(usage.free_bytes)),
        None => DeviceMemory::new(DeviceKind::Cpu, machine_memory()),
    };
    Ok(if setting > 0 { DeviceMemory { bytes: setting, ..found } } else { found })
}

/// Bytes of memory available to this process: the machine's memory, or the limit of its control
/// groups if that is lower. `None` if the system does not report them.
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
        let found = job_memory(&ComputeDevice::Cpu, 0)?;
        assert_eq!((found.known_bytes(), found.kind), (machine_memory(), DeviceKind::Cpu));
        assert!(found.bytes > 64 << 20, "{found:?}");
        assert_eq!(job_memory(&ComputeDevice::Cpu, 5)?.bytes, 5);
        Ok(())
    }
}
