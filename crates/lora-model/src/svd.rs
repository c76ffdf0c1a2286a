//! Matrices of low rank that stand for another matrix. faer decomposes on one thread, so that no bit depends on their number.

use candle_core::{DType, Device, Result, Tensor};
use faer::MatRef;
use lora_ops::gemm::{no_trans, product, trans};
use lora_ops::read_f32;
use lora_spec::Philox;

use crate::adapter::fill_uniform;

/// Columns of the randomized iteration beyond those that are wanted (arXiv 0909.4061, section 4.3).
const OVERSAMPLING: usize = 8;

/// `B A` of a matrix `[rows, cols]`, f32 on the CPU.
#[derive(Debug)]
pub(crate) struct LowRankFactors {
    /// `[r, cols]`
    pub(crate) a: Tensor,
    /// `[rows, r]`
    pub(crate) b: Tensor,
}

/// The matrix of rank `r` that is nearest to `matrix`, as `scaling B A`; the singular values are shared evenly.
///
/// # Errors
/// An element that is not finite.
pub(crate) fn truncated_svd(matrix: &Tensor, r: usize, scaling: f64) -> Result<LowRankFactors> {
    check_finite(matrix)?;
    let (u, s, v) = svd(matrix, r)?;
    split_evenly(&u, &s, &v, scaling)
}

/// Nearly what [`truncated_svd`] gives, after `rounds` of a subspace iteration from random numbers (torch's `svd_lowrank`).
///
/// # Errors
/// An element that is not finite.
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
    let turned = zeros(rows, r)?;
    product(1.0, no_trans(&q), no_trans(&u), 0.0, &turned)?;
    split_evenly(&turned, &s, &v, scaling)
}

/// `B`: an orthonormal basis of the first `r` columns of `matrix` (of its QR decomposition), `A`: its rows in it.
///
/// # Errors
/// An element that is not finite.
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

/// Orthonormal columns that span those of `matrix` `[rows, cols]`, of which there are no more than rows.
fn orthonormal_columns(matrix: &Tensor) -> Result<Tensor> {
    let (rows, cols) = matrix.dims2()?;
    with_mat_ref(matrix, |matrix| tensor(matrix.qr().compute_thin_Q().as_ref(), (rows, cols)))?
}

/// Of the `r` largest singular values: left vectors `[rows, r]`, the values in descending order, right vectors `[cols, r]`.
fn svd(matrix: &Tensor, r: usize) -> Result<(Tensor, Vec<f32>, Tensor)> {
    let (rows, cols) = matrix.dims2()?;
    with_mat_ref(matrix, |matrix| {
        let Ok(svd) = matrix.thin_svd() else { candle_core::bail!("the singular values were not found") };
        let s = svd.S().column_vector().iter().take(r).copied().collect();
        Ok((tensor(svd.U(), (rows, r))?, s, tensor(svd.V(), (cols, r))?))
    })?
}

fn with_mat_ref<T>(matrix: &Tensor, f: impl FnOnce(MatRef<f32>) -> T) -> Result<T> {
    let (rows, cols) = matrix.dims2()?;
    read_f32(matrix, |values| f(MatRef::from_row_major_slice(values, rows, cols)))
}

fn check_finite(matrix: &Tensor) -> Result<()> {
    let (_, cols) = matrix.dims2()?;
    let wrong = |values: &[f32]| values.iter().position(|v| !v.is_finite()).map(|i| (i, values[i]));
    match read_f32(matrix, wrong)? {
        Some((i, value)) => candle_core::bail!("element ({}, {}) is {value}", i / cols, i % cols),
        None => Ok(()),
    }
}

/// The first rows and columns of `matrix`.
fn tensor(matrix: MatRef<f32>, shape: (usize, usize)) -> Result<Tensor> {
    let values = (0..shape.0).flat_map(|i| (0..shape.1).map(move |j| matrix[(i, j)]));
    Tensor::from_vec(values.collect(), shape, &Device::Cpu)
}

fn split_evenly(u: &Tensor, s: &[f32], v: &Tensor, scaling: f64) -> Result<LowRankFactors> {
    let roots: Vec<f32> = s.iter().map(|s| (f64::from(*s) / scaling).sqrt() as f32).collect();
    let roots = Tensor::from_vec(roots, (1, s.len()), &Device::Cpu)?;
    Ok(LowRankFactors { a: v.broadcast_mul(&roots)?.t()?.contiguous()?, b: u.broadcast_mul(&roots)? })
}
