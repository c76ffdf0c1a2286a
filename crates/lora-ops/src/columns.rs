//! Matrices side by side: the columns of a matrix as matrices of their own, and back.

use candle_core::{DType, Result, Tensor};

use crate::backend::Backend;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// Columns that are copied from one matrix to another with as many rows.
#[derive(Clone, Copy)]
struct Columns {
    /// Number of columns.
    width: usize,
    /// The first of them in the matrix that is read.
    from: usize,
    /// The first of them in the matrix that is written.
    to: usize,
}

/// Returns the first `widths[0]` columns of `x` `[rows, columns]`, the next `widths[1]` ones, and
/// so on, each as a tensor of its own.
///
/// # Errors
/// The widths are not those of all columns, or `x` is neither f32 nor, on a GPU, bf16.
pub fn split(x: &Tensor, widths: &[usize]) -> Result<Vec<Tensor>> {
    let (rows, columns) = x.dims2()?;
    if widths.iter().sum::<usize>() != columns || widths.contains(&0) {
        candle_core::bail!("invalid columns {widths:?} of {:?}", x.shape());
    }
    let mut from = 0;
    let mut parts = Vec::with_capacity(widths.len());
    for &width in widths {
        let part = empty(rows, width, x)?;
        copy(x, &part, Columns { width, from, to: 0 })?;
        from += width;
        parts.push(part);
    }
    Ok(parts)
}

/// Returns the matrices `parts` `[rows, _]` side by side.
///
/// # Errors
/// There are no parts, or their rows or types differ.
pub fn join(parts: &[Tensor]) -> Result<Tensor> {
    let Some(first) = parts.first() else { candle_core::bail!("invalid columns: there are none") };
    let rows = first.dims2()?.0;
    let mut columns = 0;
    for part in parts {
        if part.dims2()?.0 != rows || part.dtype() != first.dtype() {
            candle_core::bail!("cannot put {:?} beside {:?}", part.shape(), first.shape());
        }
        columns += part.dims2()?.1;
    }
    let joined = empty(rows, columns, first)?;
    let mut to = 0;
    for part in parts {
        let width = part.dims2()?.1;
        copy(part, &joined, Columns { width, from: 0, to })?;
        to += width;
    }
    Ok(joined)
}

/// Returns a matrix of the type of `like`, whose elements will be written.
fn empty(rows: usize, columns: usize, like: &Tensor) -> Result<Tensor> {
    match Backend::of_tensors(&[like])? {
        Backend::Cpu => Tensor::zeros((rows, columns), DType::F32, like.device()),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => gpu.empty((rows, columns), like.dtype()),
    }
}

#[tracing::instrument(level = "trace", name = "columns", skip_all)]
fn copy(from: &Tensor, to: &Tensor, columns: Columns) -> Result<()> {
    match Backend::of_tensors(&[from, to])? {
        Backend::Cpu => cpu::copy(from, to, columns),
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => cuda::copy(&gpu, from, to, columns),
    }
}
