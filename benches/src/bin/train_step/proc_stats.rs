//! What Linux says of this process.

use std::fs;

use anyhow::{Context, Result};

/// The most physical memory that the process ever held (`VmHWM`), in bytes.
pub(crate) fn peak_rss_bytes() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("peak memory is read from Linux's /proc")?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("/proc/self/status has no VmHWM")? * 1024)
}

/// Begins the peak of [`peak_rss_bytes`] anew, where the kernel allows that; else it stays that of the whole process.
pub(crate) fn reset_peak_rss() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Processor time of all threads so far, user and system, in seconds (clock ticks of 10 ms).
pub(crate) fn cpu_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat").context("processor time is read from Linux's /proc")?;
    // Fields are counted after the command's name, which may hold spaces: utime and stime are the 14th and 15th.
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat has no command")?;
    let ticks: Vec<u64> =
        fields.split_whitespace().skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<u64>() as f64 / 100.0)
}
