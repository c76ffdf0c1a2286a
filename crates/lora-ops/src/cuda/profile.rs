//! Timing events around launches and products; see [`crate::profile`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, sys};
use candle_core::{DType, Result};

use super::error::cuda_error;
use super::gpu::Gpu;
use crate::timing::Timing;

/// Whether launches are timed.
static ACTIVE: AtomicBool = AtomicBool::new(false);

static RECORDING: Mutex<Option<ProfileRecording>> = Mutex::new(None);

/// The launches of a profile.
#[derive(Default)]
struct ProfileRecording {
    /// The number of each operation, in the order of first launches.
    numbers: HashMap<LaunchKind, usize>,
    launches: Vec<Launch>,
}

struct Launch {
    operation: usize,
    bytes: u64,
    flops: u64,
    before: CudaEvent,
    after: CudaEvent,
}

/// An operation that is timed.
#[derive(Clone, PartialEq, Eq, Hash)]
enum LaunchKind {
    Kernel(String),
    Product(ProductKind),
}

/// The properties by which products count as one operation.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct ProductKind {
    pub(super) mnk: (usize, usize, usize),
    pub(super) a_transposed: bool,
    pub(super) b_transposed: bool,
    pub(super) adds: bool,
    pub(super) operands: DType,
    pub(super) output: DType,
}

/// The event before a launch.
pub(super) struct LaunchStart(CudaEvent);

pub(crate) fn start() {
    *recording() = Some(ProfileRecording::default());
    ACTIVE.store(true, Ordering::Relaxed);
}

/// Stops timing.
pub(crate) fn stop() {
    ACTIVE.store(false, Ordering::Relaxed);
}

/// Returns the timings of the launches from [`start`] to [`stop`]. Their events must have
/// completed.
pub(crate) fn finish() -> Result<Vec<Timing>> {
    let Some(ProfileRecording { numbers, launches }) = recording().take() else { return Ok(Vec::new()) };
    let mut operations: Vec<(LaunchKind, usize)> = numbers.into_iter().collect();
    operations.sort_by_key(|(_, number)| *number);
    let mut timings: Vec<Timing> = operations.into_iter().map(|(operation, _)| operation.untimed()).collect();
    for Launch { operation, bytes, flops, before, after } in launches {
        let timing = &mut timings[operation];
        timing.count += 1;
        timing.milliseconds +=
            f64::from(before.elapsed_ms(&after).map_err(cuda_error("the time of a kernel"))?);
        timing.bytes += bytes;
        timing.flops += flops;
    }
    Ok(timings)
}

fn recording() -> MutexGuard<'static, Option<ProfileRecording>> {
    RECORDING.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// Records an event with a time stamp after all work that was submitted so far.
    pub(crate) fn timed_event(&self) -> Result<CudaEvent> {
        self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(cuda_error("an event"))
    }

    /// Must be called before a launch. Returns `None` if no profile is being taken.
    pub(super) fn profile_start(&self) -> Result<Option<LaunchStart>> {
        match ACTIVE.load(Ordering::Relaxed) {
            true => Ok(Some(LaunchStart(self.timed_event()?))),
            false => Ok(None),
        }
    }

    /// Must be called after the launch of a kernel whose operands have `bytes` bytes.
    pub(super) fn profile_kernel(&self, started: LaunchStart, kernel: &str, bytes: u64) -> Result<()> {
        self.profile_end(started, LaunchKind::Kernel(kernel.to_owned()), bytes, 0)
    }

    /// Must be called after a product.
    pub(super) fn profile_product(&self, started: LaunchStart, product: ProductKind) -> Result<()> {
        let (m, n, k) = product.mnk;
        let (operands, output) = (product.operands.size_in_bytes(), product.output.size_in_bytes());
        let times = if product.adds { 2 } else { 1 };
        let bytes = operands * (m * k + k * n) + times * output * m * n;
        self.profile_end(started, LaunchKind::Product(product), bytes as u64, 2 * (m * n * k) as u64)
    }

    fn profile_end(&self, started: LaunchStart, operation: LaunchKind, bytes: u64, flops: u64) -> Result<()> {
        let after = self.timed_event()?;
        if let Some(ProfileRecording { numbers, launches }) = &mut *recording() {
            let next = numbers.len();
            let operation = *numbers.entry(operation).or_insert(next);
            launches.push(Launch { operation, bytes, flops, before: started.0, after });
        }
        Ok(())
    }
}

impl LaunchKind {
    fn untimed(&self) -> Timing {
        let (name, product) = match self {
            Self::Kernel(name) => (name.clone(), None),
            Self::Product(product) => {
                let (m, n, k) = product.mnk;
                (product.name(), Some([m, n, k]))
            }
        };
        Timing { name, product, count: 0, milliseconds: 0.0, bytes: 0, flops: 0 }
    }
}

impl ProductKind {
    fn name(&self) -> String {
        let (m, n, k) = self.mnk;
        let letter = |transposed| if transposed { 't' } else { 'n' };
        let (a, b) = (letter(self.a_transposed), letter(self.b_transposed));
        let mut name = format!("product {m}x{n}x{k} {a}{b} {}", self.operands.as_str());
        if self.output != self.operands {
            name += &format!(">{}", self.output.as_str());
        }
        if self.adds {
            name += " +=";
        }
        name
    }
}
