//! Low-rank approximations of a matrix. faer decomposes on one thread, so that no bit depends on
//! the number of threads.

use candle_core::{DType, Device, Result, Tensor};
use faer::MatRef;
use lora_ops::gemm::{no_trans, product, trans};
use lora_ops::read_f32;
use lora_spec::Philox;

use crate::adapter::fill_uniform;

/// Additional columns of the randomized subspace iteration beyond the rank (arXiv 0909.4061,
/// section 4.3).
const OVERSAMPLING: usize = 8;

/// The factors of a low-rank matrix `B A` `[rows, cols]`, f32 on the CPU.
#[derive(Debug)]
pub(crate) struct LowRankFactors {
    /// `[r, cols]`
    pub(crate) a: Tensor,
    /// `[rows, r]`
    pub(crate) b: Tensor,
}

/// Returns the matrix of rank `r` that is nearest to `matrix`, as `scaling B A`. Each factor
/// contains the square roots of the singular values.
///
/// # Errors
/// An element is not finite.
pub(crate) fn truncated_svd(matrix: &Tensor, r: usize, scaling: f64) -> Result<LowRankFactors> {
    check_finite(matrix)?;
    let (u, s, v) = svd(matrix, r)?;
    split_evenly(&u, &s, &v, scaling)
}

/// Approximates [`truncated_svd`] with `rounds` of a subspace iteration from random numbers (like
/// torch's `svd_lowrank`).
///
/// # Errors
/// An element is not finite.
pub(crate) fn randomized_svd(
    matrix: &Tensor,
    r: usize,
    scaling: f64,
    rounds: u32,
    philox: &Philox,
) -> Result<LowRankFactors> {
    check_finite(matrix)?;
    let (rows, cols) = matrix.dims2()?;
    let width = (r + OVERSAMPLING).min(rows).min(cols);
    let mut random = vec![0.0; cols * width];
    fill_uniform(&mut random, philox, 1.0);
    let times = |right: &Tensor| {
        let out = zeros(rows, width)?;
        product(1.0, no_trans(matrix), no_trans(right), 0.0, &out)?;
        orthonormal_columns(&out)
    };
    let mut q = times(&Tensor::from_vec(random, (cols, width), &Device::Cpu)?)?;
    for _ in 0..rounds {
        let out = zeros(cols, width)?;
        product(1.0, trans(matrix), no_trans(&q), 0.0, &out)?;
        q = times(&orthonormal_columns(&out)?)?;
    }
    let small = zeros(width, cols)?;
    product(1.0, trans(&q), no_trans(matrix), 0.0, &small)?;
    let (u, s, v) = svd(&small, r)?;
    let left_vectors = zeros(rows, r)?;
    product(1.0, no_trans(&q), no_trans(&u), 0.0, &left_vectors)?;
    split_evenly(&left_vectors, &s, &v, scaling)
}

/// Returns the factors of a projection of `matrix`: `B` is an orthonormal basis of its first `r`
/// columns, from their QR decomposition, and `A = B^T matrix`.
///
/// # Errors
/// An element is not finite.
pub(crate) fn truncated_qr(matrix: &Tensor, r: usize) -> Result<LowRankFactors> {
    check_finite(matrix)?;
    let (_, cols) = matrix.dims2()?;
    let b = orthonormal_columns(&matrix.narrow(1, 0, r)?.contiguous()?)?;
    let a = zeros(r, cols)?;
    product(1.0, trans(&b), no_trans(matrix), 0.0, &a)?;
    Ok(LowRankFactors { a, b })
}

fn zeros(rows: usize, cols: usize) -> Result<Tensor> {
    Tensor::zeros((rows, cols), DType::F32, &Device::Cpu)
}

/// Returns orthonormal columns with the same span as the columns of `matrix` `[rows, cols]`, which
/// has at least as many rows as columns.
fn orthonormal_columns(matrix: &Tensor) -> Result<Tensor> {
    let (rows, cols) = matrix.dims2()?;
    let values = &*read_f32(matrix)?;
    let qr = MatRef::from_row_major_slice(values, rows, cols).qr();
    tensor(qr.compute_thin_Q().as_ref(), (rows, cols))
}

/// Returns the left singular vectors `[rows, r]`, the singular values in descending order and the
/// right singular vectors `[cols, r]` of the `r` largest singular values.
fn svd(matrix: &Tensor, r: usize) -> Result<(Tensor, Vec<f32>, Tensor)> {
    let (rows, cols) = matrix.dims2()?;
    let values = &*read_f32(matrix)?;
    let Ok(svd) = MatRef::from_row_major_slice(values, rows, cols).thin_svd() else {
        candle_core::bail!("the singular value decomposition did not converge")
    };
    let s = svd.S().column_vector().iter().take(r).copied().collect();
    Ok((tensor(svd.U(), (rows, r))?, s, tensor(svd.V(), (cols, r))?))
}

fn check_finite(matrix: &Tensor) -> Result<()> {
    let (_, cols) = matrix.dims2()?;
    let values = &*read_f32(matrix)?;
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => candle_core::bail!("element ({}, {}) is {}", i / cols, i % cols, values[i]),
        None => Ok(()),
    }
}

/// Copies the first rows and columns of `matrix` into a tensor of the given shape.
fn tensor(matrix: MatRef<f32>, shape: (usize, usize)) -> Result<Tensor> {
    let values = (0..shape.0).flat_map(|i| (0..shape.1).map(move |j| matrix[(i, j)]));
    Tensor::from_vec(values.collect(), shape, &Device::Cpu)
}

/// Returns the factors `scaling B A = u diag(s) v^T`, each with the square roots of `s / scaling`.
fn split_evenly(u: &Tensor, s: &[f32], v: &Tensor, scaling: f64) -> Result<LowRankFactors> {
    let roots: Vec<f32> = s.iter().map(|s| (f64::from(*s) / scaling).sqrt() as f32).collect();
    let roots = Tensor::from_vec(roots, (1, s.len()), &Device::Cpu)?;
    Ok(LowRankFactors { a: v.broadcast_mul(&roots)?.t()?.contiguous()?, b: u.broadcast_mul(&roots)? })
}
