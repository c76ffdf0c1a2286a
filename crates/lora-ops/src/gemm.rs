//! The one matrix product of the workspace.

use candle_core::{Result, Tensor};
use gemm::Parallelism;

use crate::backend::Backend;
use crate::cpu::{read_f32, update_f32};

/// A matrix as a factor of a product: a contiguous two-dimensional tensor, or its transpose.
#[derive(Clone, Copy)]
pub struct MatrixOperand<'a> {
    tensor: &'a Tensor,
    transposed: bool,
}

/// The matrix itself.
pub fn no_trans(tensor: &Tensor) -> MatrixOperand<'_> {
    MatrixOperand { tensor, transposed: false }
}

/// The transpose of a matrix, without a copy.
pub fn trans(tensor: &Tensor) -> MatrixOperand<'_> {
    MatrixOperand { tensor, transposed: true }
}

impl MatrixOperand<'_> {
    fn dims(&self) -> Result<(usize, usize)> {
        let (rows, cols) = self.tensor.dims2()?;
        Ok(if self.transposed { (cols, rows) } else { (rows, cols) })
    }
}

/// Computes `C = alpha A B + beta C` in place, on the device of the tensors. On the CPU all are
/// f32. On a GPU the factors are both f32 or both bf16, `c` is either, and sums are f32. If `beta`
/// is 0, `c` may be uninitialized.
///
/// The bits do not depend on the number of threads or on timing.
pub fn product(alpha: f32, a: MatrixOperand, b: MatrixOperand, beta: f32, c: &Tensor) -> Result<()> {
    let ((m, k), (b_rows, n)) = (a.dims()?, b.dims()?);
    if b_rows != k || c.dims2()? != (m, n) {
        candle_core::bail!(
            "invalid product of [{m}, {k}] and [{b_rows}, {n}] into {:?}: the shapes do not fit",
            c.shape()
        );
    }
    match Backend::of_tensors(&[a.tensor, b.tensor, c])? {
        Backend::Cpu => {
            let c = &mut *update_f32(c, &[a.tensor, b.tensor])?;
            let (a_data, b_data) = (&*read_f32(a.tensor)?, &*read_f32(b.tensor)?);
            let mat = |data, factor: MatrixOperand, rows, cols| match factor.transposed {
                true => Mat::new(data, cols, rows).t(),
                false => Mat::new(data, rows, cols),
            };
            gemm(alpha, mat(a_data, a, m, k), mat(b_data, b, k, n), beta, c, n);
            Ok(())
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(gpu) => {
            let (operands, output) = (a.tensor.dtype(), c.dtype());
            gpu.product(&crate::cuda::Product {
                mnk: (m, n, k),
                alpha,
                beta,
                a: (gpu.address(a.tensor, operands)?, a.transposed),
                a_stride: if a.transposed { m } else { k },
                b: (gpu.address(b.tensor, operands)?, b.transposed),
                c: gpu.address(c, output)?,
                c_stride: n,
                operands,
                output,
            })
        }
    }
}

/// A matrix in a slice: element (i, j) is at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A `rows` x `cols` matrix whose rows are contiguous.
    ///
    /// # Panics
    /// If `data` has fewer than `rows * cols` elements.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "{} elements for a {rows} x {cols} matrix", data.len());
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Columns `first..first + count`, without a copy.
    ///
    /// # Panics
    /// If the matrix has fewer columns.
    pub fn columns(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.cols, "{count} columns from {first} on, of {}", self.cols);
        let skip = (first * self.col_stride).min(self.data.len());
        Self { data: &self.data[skip..], cols: count, ..self }
    }

    /// The transpose, without a copy.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// Computes `C = alpha A B + beta C` in f32. `c` has A's rows and B's columns, with rows `c_stride`
/// elements apart.
///
/// The bits do not depend on the number of threads.
///
/// # Panics
/// If the shapes do not fit.
pub fn gemm(alpha: f32, a: Mat, b: Mat, beta: f32, c: &mut [f32], c_stride: usize) {
    assert_eq!(a.cols, b.rows, "inner dimensions differ");
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    assert!(c_stride >= b.cols && c.len() >= (a.rows - 1) * c_stride + b.cols, "output too small");
    let lhs = RawMat { ptr: a.data.as_ptr(), row_stride: a.row_stride, col_stride: a.col_stride };
    let rhs = RawMat { ptr: b.data.as_ptr(), row_stride: b.row_stride, col_stride: b.col_stride };
    let parallelism = Parallelism::Rayon(rayon::current_num_threads());
    // SAFETY: `Mat` was checked against its slice, `c` above, and `c` is borrowed mutably.
    unsafe { raw((a.rows, b.cols, a.cols), alpha, lhs, rhs, beta, c.as_mut_ptr(), c_stride, parallelism) }
}

/// A matrix at a pointer.
#[derive(Clone, Copy)]
pub(crate) struct RawMat {
    pub(crate) ptr: *const f32,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl RawMat {
    pub(crate) fn rows(ptr: *const f32, row_stride: usize) -> Self {
        Self { ptr, row_stride, col_stride: 1 }
    }

    pub(crate) fn t(self) -> Self {
        Self { ptr: self.ptr, row_stride: self.col_stride, col_stride: self.row_stride }
    }
}

/// Computes `C = alpha A B + beta C` on the calling thread, for small products inside a parallel
/// loop. `mnk` has the rows and columns of `C`, then the inner dimension.
///
/// # Safety
/// The matrices must be inside live buffers, and no other thread may access `c`.
pub(crate) unsafe fn gemm_serial(
    mnk: (usize, usize, usize),
    alpha: f32,
    a: RawMat,
    b: RawMat,
    beta: f32,
    c: *mut f32,
    c_stride: usize,
) {
    // SAFETY: guaranteed by the caller.
    unsafe { raw(mnk, alpha, a, b, beta, c, c_stride, Parallelism::None) }
}

#[expect(clippy::too_many_arguments, reason = "the BLAS signature")]
unsafe fn raw(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: RawMat,
    b: RawMat,
    beta: f32,
    c: *mut f32,
    c_stride: usize,
    parallelism: Parallelism,
) {
    // SAFETY: guaranteed by the caller. In the gemm crate our alpha is called `beta` and our beta
    // `alpha`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            c_stride as isize,
            beta != 0.0,
            a.ptr,
            a.col_stride as isize,
            a.row_stride as isize,
            b.ptr,
            b.col_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let philox = lora_spec::Philox::new(u64::from(seed), "gemm");
        (0..n as u32).map(|i| lora_spec::Philox::unit(philox.words([i, 0, 0, 0])[0]) - 0.5).collect()
    }

    #[test]
    fn matches_the_definition_with_transposes_and_accumulation() {
        let (m, n, k) = (7, 5, 11);
        let (a, b, c0) = (values(m * k, 1), values(k * n, 2), values(m * n, 3));
        let transposed = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
            (0..cols * rows).map(|i| x[(i % rows) * cols + i / rows]).collect()
        };
        let (at, bt) = (transposed(&a, m, k), transposed(&b, k, n));
        for (lhs, rhs) in [
            (Mat::new(&a, m, k), Mat::new(&b, k, n)),
            (Mat::new(&at, k, m).t(), Mat::new(&b, k, n)),
            (Mat::new(&a, m, k), Mat::new(&bt, n, k).t()),
        ] {
            let mut c = c0.clone();
            gemm(2.0, lhs, rhs, 0.5, &mut c, n);
            for i in 0..m {
                for j in 0..n {
                    let sum: f32 = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
                    assert!((c[i * n + j] - (2.0 * sum + 0.5 * c0[i * n + j])).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn same_bits_with_any_number_of_threads() {
        for (m, n, k) in [(64, 300, 257), (200, 16, 576), (16, 576, 200), (33, 1000, 48)] {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let product = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut c = vec![0.0; m * n];
                pool.install(|| gemm(1.0, Mat::new(&a, m, k), Mat::new(&b, k, n), 0.0, &mut c, n));
                c.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let one = product(1);
            assert!((2..5).all(|threads| product(threads) == one));
        }
    }

    /// The gemm crate does not report its choice of kernels. Small products with contiguous rows
    /// reveal it: their kernels sum in as many lanes as a vector has, so elements at that distance
    /// are added first.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn instruction_set_is_the_one_the_gemm_crate_uses() {
        // 2^24 + 1 is not an f32: 1 is lost if it is added to 2^24 before -2^24 is.
        let keeps_one = |one: usize, minus: usize| {
            let mut row = [0.0; 17];
            (row[0], row[one], row[minus]) = (16_777_216.0, 1.0, -16_777_216.0);
            let (a, b) = ([row, row].concat(), [1.0; 34]);
            let mut c = [0.0; 4];
            gemm(1.0, Mat::new(&a, 2, 17), Mat::new(&b, 2, 17).t(), 0.0, &mut c, 2);
            assert!(c == [0.0; 4] || c == [1.0; 4], "{c:?}");
            c[0] == 1.0
        };
        let found = match (keeps_one(8, 16), keeps_one(1, 8)) {
            (true, _) => "x86_64 avx512f",
            (false, true) => "x86_64 avx2+fma",
            (false, false) => "x86_64",
        };
        assert_eq!(crate::instruction_set(), found);
    }
}
