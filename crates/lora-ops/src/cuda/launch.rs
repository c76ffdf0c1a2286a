//! Kernel launches.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::driver::{CudaStream, result};
use candle_core::{DType, Result};

use super::gpu::{Gpu, cuda_error};

/// Threads of a block of the kernels with `flat` (flat.cuh), a thread for each four elements.
const FLAT_THREADS: u32 = 256;

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arg {
    /// In the order of memory.
    value: [u8; 8],
    /// Bytes that the kernel reads or writes through it, for a profile.
    operand_bytes: u64,
}

macro_rules! arguments {
    ($($kind:ty),*) => {
        $(impl From<$kind> for Arg {
            fn from(value: $kind) -> Self {
                let mut bytes = [0; 8];
                let value = value.to_le_bytes();
                bytes[..value.len()].copy_from_slice(&value);
                Self { value: bytes, operand_bytes: 0 }
            }
        })*
    };
}
arguments!(u32, i32, u64, f32, f64);

impl Arg {
    /// A number of elements as the kernels take it.
    ///
    /// # Errors
    /// It is not below 2^32.
    pub(crate) fn size(n: usize) -> Result<Self> {
        match u32::try_from(n) {
            Ok(n) => Ok(n.into()),
            Err(_) => candle_core::bail!("{n} elements in one dimension are too many for a kernel"),
        }
    }

    /// The same argument, through which the kernel reads or writes so many bytes.
    pub(crate) fn with_bytes(self, operand_bytes: usize) -> Self {
        Self { operand_bytes: operand_bytes as u64, ..self }
    }

    /// The same argument, which the kernel both reads and writes.
    pub(crate) fn updated(self) -> Self {
        Self { operand_bytes: 2 * self.operand_bytes, ..self }
    }
}

/// The end of the names of a type's kernels.
pub(crate) fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        other => candle_core::bail!("no operation on {other:?}"),
    }
}

impl Gpu {
    /// Starts `grid` blocks of `threads` threads with `shared` bytes of dynamic shared memory. Nothing for an empty grid.
    ///
    /// The arguments must be those of the kernel, in number, order and type.
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

    /// Starts a thread for each four of `n` elements.
    pub(crate) fn launch_flat(&self, kernel: &str, n: usize, args: &[Arg]) -> Result<()> {
        let (grid, threads) = flat_grid(n);
        self.launch(kernel, grid, threads, 0, args)
    }

    /// [`Self::launch`] on another stream of this GPU, with pointers to the arguments.
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
        // SAFETY: the callers beside the kernels' sources give what those take.
        let launched = unsafe {
            result::launch_kernel(function, (x, y, z), (threads, 1, 1), shared, stream.cu_stream(), args)
        };
        launched.map_err(cuda_error(kernel))
    }
}

/// Grid and block of a kernel with `flat` over `n` elements.
pub(crate) fn flat_grid(n: usize) -> ((usize, usize, usize), u32) {
    ((n.div_ceil(4 * FLAT_THREADS as usize), 1, 1), FLAT_THREADS)
}
