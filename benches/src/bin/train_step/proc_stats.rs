//! Statistics of this process from Linux's `/proc`.

use std::fs;

use anyhow::{Context, Result};

/// Returns the peak resident set size of the process (`VmHWM`), in bytes.
pub(crate) fn peak_rss_bytes() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("peak memory is read from Linux's /proc")?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("/proc/self/status has no VmHWM")? * 1024)
}

/// Resets the peak of [`peak_rss_bytes`]. If the kernel does not allow this, the peak stays that of
/// the whole process.
pub(crate) fn reset_peak_rss() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Returns the CPU time of all threads so far, user and system, in seconds. The resolution is a
/// clock tick of 10 ms.
pub(crate) fn cpu_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat").context("processor time is read from Linux's /proc")?;
    // The command name may contain spaces, so the fields after it are counted: utime and stime are
    // fields 14 and 15 of the line.
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat has no command")?;
    let ticks: Vec<u64> =
        fields.split_whitespace().skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<u64>() as f64 / 100.0)
}
