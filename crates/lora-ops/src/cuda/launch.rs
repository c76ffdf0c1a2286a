//! Kernel launches.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::driver::{CudaStream, result};
use candle_core::{DType, Result};

use super::arg::Arg;
use super::error::cuda_error;
use super::gpu::Gpu;

/// Threads per block of the kernels that use `flat` (flat.cuh), with a thread for each four
/// elements.
const FLAT_THREADS: u32 = 256;

/// The suffix of kernel names for a type.
pub(crate) fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        other => candle_core::bail!("no operation supports {other:?}"),
    }
}

impl Gpu {
    /// Launches `grid` blocks of `threads` threads with `shared` bytes of dynamic shared memory.
    /// Does nothing for an empty grid.
    ///
    /// The arguments must match those of the kernel in number, order and type.
    pub(crate) fn launch(
        &self,
        kernel: &str,
        grid: (usize, usize, usize),
        threads: u32,
        shared: u32,
        args: &[Arg],
    ) -> Result<()> {
        let mut args = args.to_vec();
        let mut pointers: Vec<*mut c_void> = args.iter_mut().map(|arg| (&raw mut arg.value).cast()).collect();
        let started = self.profile_start()?;
        self.launch_on(&self.stream, kernel, grid, threads, shared, &mut pointers)?;
        match started {
            Some(started) => {
                self.profile_kernel(started, kernel, args.iter().map(|arg| arg.operand_bytes).sum())
            }
            None => Ok(()),
        }
    }

    /// Launches a kernel that uses `flat` (flat.cuh) over `n` elements, with a thread for each
    /// four.
    pub(crate) fn launch_flat(&self, kernel: &str, n: usize, args: &[Arg]) -> Result<()> {
        let (grid, threads) = flat_grid(n);
        self.launch(kernel, grid, threads, 0, args)
    }

    /// Does the same as [`Self::launch`] on another stream of this GPU, with pointers to the
    /// arguments, and without a profile.
    pub(crate) fn launch_on(
        &self,
        stream: &CudaStream,
        kernel: &str,
        grid: (usize, usize, usize),
        threads: u32,
        shared: u32,
        args: &mut [*mut c_void],
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        let fits = |n: usize, most: u32| u32::try_from(n).ok().filter(|n| *n <= most);
        let limits = (fits(grid.0, i32::MAX as u32), fits(grid.1, 65535), fits(grid.2, 65535));
        let (Some(x), Some(y), Some(z)) = limits else {
            candle_core::bail!("{kernel}: a grid of {grid:?} blocks is too large");
        };
        let function = self.function(kernel)?;
        stream.context().bind_to_thread().map_err(cuda_error(kernel))?;
        // SAFETY: the callers, next to the kernels' sources, pass the arguments that the kernels
        // take.
        let launched = unsafe {
            result::launch_kernel(function, (x, y, z), (threads, 1, 1), shared, stream.cu_stream(), args)
        };
        launched.map_err(cuda_error(kernel))
    }
}

/// The grid and the threads per block of a kernel that uses `flat` over `n` elements.
pub(crate) fn flat_grid(n: usize) -> ((usize, usize, usize), u32) {
    ((n.div_ceil(4 * FLAT_THREADS as usize), 1, 1), FLAT_THREADS)
}
